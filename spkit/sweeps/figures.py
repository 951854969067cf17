"""Figures of a sweep's table: a line plot for each number that is varied, a map for two of them.

Same look as spkit/figures.py. They show SafePatching, in percent, with the table's intervals.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from spkit.figures import (
    ACCENT,
    HEAT,
    MARKERS,
    MIDDLE,
    _legend_below,
    _panels,
    _reach,
    save,
    styled,
)
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.running.seeds import BASE
from spkit.workflow.units import slug

WIDE = 8.6  # inches
LINES = ("-", "--", "-", ":", "--", ":")
SPREAD = 30  # a key whose largest value is so many times its smallest has a log axis


def write(folder: Path, table: pd.DataFrame, keys: Sequence[str]) -> list[Path]:
    """Every figure as PNG and SVG, without a date inside."""
    shutil.rmtree(folder, ignore_errors=True)  # of another grid
    return [path for name, figure in drawn(table, keys) for path in save(folder, name, figure)]


def drawn(table: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each part and params file."""
    groups = [name for name in ("part", "params") if name in table]
    several = len(table[groups].drop_duplicates()) > 1
    named = _names(table["params"].unique())
    for names, own in table.groupby(groups, sort=False):
        *part, params = names
        prefix = "-".join([*filter(None, part), named[params], ""]) if several else ""
        numeric: list[str] = []
        for key in keys:
            if _is_varied(own[key]) and not any(_go_together(own, key, k) for k in numeric):
                numeric.append(key)
        for key in numeric:
            rows, held = _held(own, [key], keys)
            yield f"{prefix}{key}", lines(rows, key, held)
        if len(numeric) == 2:
            rows, held = _held(own, numeric, keys)
            yield f"{prefix}{'-'.join(numeric)}", maps(rows, *numeric, held)


@styled
def lines(table: pd.DataFrame, key: str, title: str = "") -> Figure:
    """A line for each figure of the short table over the values of one key, with intervals.

    table: of one params file, with one value of every other key. At the right edge: base's.
    """
    figure, (ax,) = _panels(1, 1, width=7.5, height=4)
    own, base = (table[table["model"] == model] for model in (SAFEPATCHING, BASE))
    values = sorted(own[key].astype(float).unique())
    log = values[0] > 0 and values[-1] / values[0] >= SPREAD
    metrics = list(dict.fromkeys(own["metric"]))
    width = (values[-1] - values[0]) * 0.006
    for number, metric in enumerate(metrics):
        rates = own[own["metric"] == metric].astype({key: float}).sort_values(key)
        rates = rates.rename(columns={"mean": "rate"})
        shift = number - (len(metrics) - 1) / 2  # or the intervals would hide one another
        x = rates[key] * (1 + 0.02 * shift) if log else rates[key] + width * shift
        look = {"marker": MARKERS[number % len(MARKERS)], "color": _shade(metric)}
        ax.errorbar(
            x, rates["rate"], yerr=_reach(rates), fmt=LINES[number % len(LINES)], capsize=2,
            markeredgecolor="black", linewidth=1.3, label=metric, **look,
        )  # fmt: skip
        of_base = base[base["metric"] == metric]["mean"]
        if len(of_base):
            ax.plot(
                1.03, of_base.mean(), marker=look["marker"], color="white", markersize=5,
                markeredgecolor=look["color"], transform=ax.get_yaxis_transform(), clip_on=False,
            )  # fmt: skip
    ax.annotate("base", (1.03, 1.02), xycoords="axes fraction", ha="center", size=7)
    if log:
        ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.set(xlabel=key, ylabel="%", ylim=(-3, 103), title=title)
    _legend_below(figure, ax.get_legend_handles_labels()[0])
    return figure


@styled
def maps(table: pd.DataFrame, down: str, across: str, title: str = "") -> Figure:
    """A map for each figure of the short table over the values of two keys.

    table: of one params file, with one value of every other key. Numbers are means over seeds.
    """
    own = table[table["model"] == SAFEPATCHING].astype({down: float, across: float})
    metrics = list(dict.fromkeys(own["metric"]))
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    height = rows * (1.0 + 0.35 * own[down].nunique())
    figure, axes = _panels(rows, columns, width=WIDE, height=height)
    for ax, metric in zip(axes, metrics, strict=False):
        cells = own[own["metric"] == metric].pivot_table(index=down, columns=across, values="mean")
        sns.heatmap(
            cells, ax=ax, cmap=HEAT, vmin=0, vmax=100, linewidths=0.5, cbar=False, annot=True,
            fmt=".0f", annot_kws={"size": 7},
            xticklabels=[f"{value:g}" for value in cells.columns],
            yticklabels=[f"{value:g}" for value in cells.index],
        )  # fmt: skip
        ax.set(title=metric, xlabel=across, ylabel=down)
        ax.tick_params(axis="both", rotation=0)
        ax.invert_yaxis()
    for ax in axes[len(metrics) :]:
        ax.remove()
    if title:
        figure.suptitle(title, size=8)
    return figure


def _names(files: Sequence[str]) -> dict[str, str]:
    """A word for each params file: its name, or its whole path where two have one name."""
    stems = [Path(file).stem for file in files]
    whole = {file: slug(str(Path(file).with_suffix(""))) for file in files}
    return {f: s if stems.count(s) == 1 else whole[f] for f, s in zip(files, stems, strict=True)}


def _is_varied(values: pd.Series) -> bool:
    """Whether it is a number with several values."""
    if any(isinstance(value, bool) for value in values):
        return False
    return pd.to_numeric(values, errors="coerce").notna().all() and values.nunique() > 1


def _go_together(table: pd.DataFrame, one: str, other: str) -> bool:
    """Whether each value of one key has one of the other alone, as rank and alpha in `points`."""
    return all((table.groupby(a)[b].nunique() == 1).all() for a, b in ((one, other), (other, one)))


def _held(
    table: pd.DataFrame, shown: Sequence[str], keys: Sequence[str]
) -> tuple[pd.DataFrame, str]:
    """(the rows with the first value of every other key, these values in words).

    A key of which one value would leave a shown one with one value is not held.
    """
    held = []
    for key in keys:
        first = table[key].iloc[0]
        rows = table[table[key] == first]
        if key in shown or table[key].nunique() == 1 or any(rows[k].nunique() == 1 for k in shown):
            continue
        table = rows
        held.append(f"{key} = {first}")
    return table, ", ".join(held)


def _shade(metric: str) -> str:
    return ACCENT if metric.startswith("harmful") else MIDDLE if "broken" not in metric else "0.35"
