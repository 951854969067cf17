"""What notebooks show: the card of a figure, and tables that can be read."""

import io
import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from spkit.running.display import CARD, MARGIN, SHOWN, show, table
from spkit.system.files import make_folder


class Run:
    """As runs.Run saves a figure."""

    def __init__(self, folder):
        self.folder = make_folder(folder)

    def save_figure(self, name, figure):
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        return path


def drawn(width=4, height=2):
    figure = Figure(figsize=(width, height))
    figure.subplots().bar([0, 1], [1, 2], color="black")
    return figure


def test_a_figure_is_shown_as_a_round_light_card_with_its_text(tmp_path):
    shown = show(Run(tmp_path), "bars", drawn(), "Two bars, the right one twice as high.")
    data, metadata = shown._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "Two bars, the right one twice as high."
    saved = Image.open(tmp_path / "bars.png")
    assert saved.size == (600, 300)
    card = Image.open(io.BytesIO(shown.data))
    assert card.size == (600 + 2 * MARGIN, 300 + 2 * MARGIN)
    assert metadata["image/png"]["width"] == round(card.width * SHOWN)
    pixels = np.asarray(card)
    for corner in (pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]):
        assert corner[3] == 0  # the page shows through
    assert tuple(pixels[MARGIN + 2, MARGIN + 2]) == (*CARD, 255)
    inside = pixels[MARGIN:-MARGIN, MARGIN:-MARGIN, :3].astype(int)
    plain = np.asarray(saved.convert("RGB")).astype(int)
    assert np.abs(inside - plain * np.array(CARD) / 255).max() <= 1


def test_text_is_left_numbers_are_right_and_hashes_are_short():
    frame = pd.DataFrame(
        {"text": ["a", "b"], "hash": ["0123456789abcdef" * 4, None], "rate": [1.26, float("nan")]},
        index=["one", "two"],
    )
    before = frame.copy()
    html = table(frame)._repr_html_()
    assert frame.equals(before)
    assert "0123456789ab<" in html and "0123456789abc" not in html and "None" not in html
    assert ">1.3<" in html and ">–<" in html
    left = "".join(re.findall(r"([^{}]*)\{[^{}]*text-align: left", html))
    right = "".join(re.findall(r"([^{}]*)\{[^{}]*text-align: right", html))
    cells = {f"{tag}.col{column}" for tag in ("th", "td") for column in (0, 1)}
    assert cells <= set(re.findall(r"t[dh]\.col\d", left))
    assert "th.col2" in right and "td.col2" in right and "col2" not in left
    again = table(frame.copy())  # the same bytes each time, as plain text, too
    assert (again._repr_html_(), repr(again)) == (html, repr(table(frame)))
    assert "0123456789ab" in repr(again) and "1.3" in repr(again) and "0x" not in repr(again)


def test_an_interval_does_not_break():
    frame = pd.DataFrame({"rate": ["31.1 [24.1, 38.4]"], "text": ["a [b]"]})
    html = table(frame)._repr_html_()
    whole = "".join(re.findall(r"([^{}]*)\{[^{}]*white-space: nowrap", html))
    assert "td.col0" in whole and "col1" not in whole


def test_what_a_model_says_is_text_and_no_markup():
    html = table(pd.DataFrame({"<b>": ["<eos>"]}, index=["<i>"]))._repr_html_()
    assert {"&lt;eos&gt;", "&lt;b&gt;", "&lt;i&gt;"} <= set(re.findall(r"&lt;\w+&gt;", html))
    assert not {"<eos>", "<b>", "<i>"} & set(re.findall(r"<\w+>", html))


def test_row_numbers_are_left_out():
    named = pd.DataFrame({"a": [10, 20]}, index=["one", "two"])
    assert "row_heading" in table(named)._repr_html_() and "two" in repr(table(named))
    plain = table(named.reset_index(drop=True))
    assert "row_heading" not in plain._repr_html_().partition("</style>")[2]
    assert repr(plain).split() == ["a", "10", "20"]


def test_an_empty_table_is_a_sentence(capsys):
    assert table(pd.DataFrame(columns=["a"]), if_empty="One judge: nothing to compare.") is None
    assert capsys.readouterr().out == "One judge: nothing to compare.\n"
