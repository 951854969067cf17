"""Figures of a bench: ratios against peers and limits, and seconds against the size of a model."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from spkit.bench.bench import GROWTH, LIMIT, PEER, Row
from spkit.figures import DARK, MIDDLE, _panels, styled

MARKERS = "osD^vP*X"


@styled
def ratios(rows: Sequence[Row]) -> Figure:
    """ours / other of every row, on a logarithmic axis: left of 1 is faster. Bars: all rounds."""
    shown = [row for row in rows if row.role in (PEER, LIMIT)][::-1]
    figure, (ax,) = _panels(1, 1, width=8.6, height=1 + 0.26 * len(shown))
    for y, row in enumerate(shown):
        limit = row.role == LIMIT
        reach = [[row.median - row.low], [row.high - row.median]]
        ax.errorbar(
            [row.median], [y], xerr=reach, fmt="s" if limit else "o",
            color=MIDDLE if limit else DARK, markeredgecolor="0.3", capsize=2,
        )  # fmt: skip
        if row.goal.startswith("<="):
            ax.plot([float(row.goal[3:])], [y], marker="|", markersize=12, color="black")
    ax.axvline(1, color="0.4", linewidth=1)
    names = [f"{row.stage}, {row.size}: {row.against}" for row in shown]
    ax.set_yticks(range(len(shown)), names)
    ax.set(xscale="log", ylim=(-0.6, len(shown) - 0.4), xlabel="seconds of ours / of the other")
    ax.set_title("circles: peers; squares: limits; upright marks: goals", fontsize=9)
    return figure


@styled
def growth(rows: Sequence[Row]) -> Figure:
    """Seconds of each stage against the number of weights; the dotted line grows like the size."""
    figure, (ax,) = _panels(1, 1, width=6.4, height=4.6)
    for number, (name, own) in enumerate(_by_stage(rows).items()):
        x, y = [row.weights / 1e6 for row in own], [row.median for row in own]
        shade = str(0.15 + 0.12 * number)
        ax.plot(x, y, marker=MARKERS[number % 8], color=shade, label=name)
    start = min(row.median for row in rows if row.role == GROWTH)
    ends = np.array([min(x), max(x)])
    ax.plot(ends, start * ends / ends[0], ":", color="0.4", label="in proportion")
    ax.set(xscale="log", yscale="log", xlabel="weights [millions]", ylabel="seconds")
    ax.margins(x=0.05)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def exponents(rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    """{stage: (power, smallest, largest size in millions)}: a line through the logarithms."""
    found = {}
    for name, own in _by_stage(rows).items():
        if len(own) > 1:
            sizes = np.array([row.weights for row in own]) / 1e6
            power = np.polyfit(np.log(sizes), np.log([row.median for row in own]), 1)[0]
            found[name] = (float(power), round(sizes.min()), round(sizes.max()))
    return found


def _by_stage(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == GROWTH:
            found.setdefault(row.against, []).append(row)
    return found
