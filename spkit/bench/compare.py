"""Two bench.json files, row by row: what has become slower?

Only ratios are compared, which hold on another machine or a busy one better than seconds do. A row
is called slower where its median has grown by more than the threshold and the two spreads do not
meet; a single disturbed round is not enough.
"""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from spkit.bench.bench import GROWTH, Row, read
from spkit.bench.tables import figure

HIGHER = ("per minute",)  # of these more is better


def compare(before: Path, after: Path, threshold: float) -> tuple[str, bool]:
    """(a table, whether a row is slower). SpkitError where a file is none of ours."""
    old, new = ({_key(row): row for row in _ratios(read(file)[0])} for file in (before, after))
    cells, slower = [], False
    for key, row in new.items():
        if key not in old:
            cells.append([*key[:3], "", figure(row), "", "new"])
            continue
        change, verdict = _change(old[key], row, threshold)
        slower |= verdict == "slower"
        cells.append([*key[:3], figure(old[key]), figure(row), f"{change:.2f}", verdict])
    cells += [[*key[:3], figure(row), "", "", "gone"] for key, row in old.items() if key not in new]
    titles = ("stage", "size", "against", str(before), str(after), "times as long", "")
    return tabulate(cells, titles, "simple", disable_numparse=True), slower


def _change(old: Row, new: Row, threshold: float) -> tuple[float, str]:
    """(how many times as long, "slower", "faster" or ""), beyond the threshold and the spreads."""
    if old.what in HIGHER:
        change, worse, better = old.median / new.median, new.high < old.low, new.low > old.high
    else:
        change, worse, better = new.median / old.median, new.low > old.high, new.high < old.low
    if change > 1 + threshold and worse:
        return change, "slower"
    return change, "faster" if change < 1 / (1 + threshold) and better else ""


def _ratios(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.role != GROWTH]


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.stage, row.size, row.against, row.what
