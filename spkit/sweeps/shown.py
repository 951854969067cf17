"""The table of a sweep as it is printed: 80 columns, a row for each params file and values."""

from collections.abc import Sequence
from textwrap import wrap

import pandas as pd

from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.running.seeds import BASE
from spkit.running.summary import _head, _lined_up

LONGEST = 26  # characters of a row's name
MOST = 40  # rows


def short(table: pd.DataFrame, keys: Sequence[str]) -> str:
    """Means of SafePatching in percent, and of base; all else is in the file."""
    titles = list(dict.fromkeys(table["metric"]))
    groups = [name for name in ("part", "params") if name in table]
    rows: list[list[str]] = []
    for names, part in table.groupby(groups, sort=False):
        rows.append([", ".join(filter(None, names))])
        for number, (values, own) in enumerate(_of_values(part, keys)):
            wide = own.pivot(index="model", columns="metric", values="mean").reindex(columns=titles)
            if number == 0 and BASE in wide.index:
                rows.append([f"  {BASE}", *_cells(wide.loc[BASE])])
            if SAFEPATCHING in wide.index:
                *before, last = wrap(values, LONGEST) or [SAFEPATCHING]
                rows += [[f"  {line}", *[""] * len(titles)] for line in before]
                rows.append([f"  {last}", *_cells(wide.loc[SAFEPATCHING])])
    more = [f"and {len(rows) - MOST} rows more, in the file"] if len(rows) > MOST else []
    seeds = table["seeds"]
    low, high = seeds.min(), seeds.max()
    over = f"mean of {low}" if low == high else f"means of {low} to {high}"
    said = f"SafePatching, percent, {over} seeds" if high > 1 else "SafePatching, percent, one seed"
    lines = _lined_up(rows[:MOST], [_head(title) for title in titles])
    return "\n".join([said, "", lines, *more])


def _of_values(part: pd.DataFrame, keys: Sequence[str]):
    """("retention_rate=0.3", its rows) of every point, seeds together."""
    varied = [key for key in keys if part[key].nunique(dropna=False) > 1]
    if not varied:
        yield "", part
        return
    last = [key.rpartition(".")[2] for key in varied]
    names = last if len({*last}) == len(last) else varied
    for values, own in part.groupby(varied, sort=False, dropna=False):
        yield ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)), own


def _cells(figures: pd.Series) -> list[str]:
    return ["" if pd.isna(value) else f"{value:.1f}" for value in figures]
