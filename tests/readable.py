"""Whether a figure can be read: what both test files of figures check."""

import inspect
from itertools import combinations

from matplotlib.figure import Figure


def texts(figure):
    """{what it says: its box in pixels} of all that is written, but for turned labels."""
    found = []
    for ax in figure.axes:
        found += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in axis.get_major_ticks():
                if min(limits) <= tick.get_loc() <= max(limits):
                    found += [tick.label1, tick.label2]
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes)]:
        found += legend.get_texts() if legend else []
    found = [text for text in found if text.get_visible() and text.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(), t.get_rotation()) for t in found]
    return [(text, box) for text, box, turn in boxes if turn in (0, 90)]


def check_readable(figure, path):
    """It can be saved; nothing written on it is cut, and nothing lies on something else."""
    figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000
    width, height = figure.bbox.size
    boxes = texts(figure)
    assert len(boxes) > 3
    for text, box in boxes:
        assert box.x0 > -1 and box.x1 < width + 1 and box.y0 > -1 and box.y1 < height + 1, text
    for (one, a), (two, b) in combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        upward = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or upward < 1, (one, two)


def public_figures(module):
    """The names of its functions that give a figure."""
    return {
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(function).return_annotation is Figure
    }
