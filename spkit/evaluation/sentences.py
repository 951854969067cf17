"""One model's rates against another's, in a sentence: what a notebook says under its tables.

A difference counts where the two intervals do not meet. Prompts are shared, so this is strict: a
pair of overlapping intervals can still hide a real difference (notebook 05 pairs them).
"""

from collections.abc import Mapping

import pandas as pd

from spkit.evaluation.rates import Cell, cell_rows, headline_cells, rate_row

HIGHER_IS_BETTER = "utility"  # the metric


def compared(
    results: pd.DataFrame, model: str, other: str, confidence: float = 0.95
) -> pd.DataFrame:
    """A row for each column of the short table: `model` against `other`.

    results: the tidy frame of rates. Columns: model, other (percent), finding: "better", "worse",
    "unclear" (the intervals meet) or "equal". A group that either of them lacks is left out.
    """
    rows = {}
    for title, cell in headline_cells(results).items():
        own, theirs = (_counts(results, name, cell) for name in (model, other))
        if own["n"] and theirs["n"]:
            finding = _finding(own, theirs, cell.metric == HIGHER_IS_BETTER, confidence)
            values = (100 * own["k"] / own["n"], 100 * theirs["k"] / theirs["n"])
            rows[title] = (*values, finding)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["model", "other", "finding"])


def sentence(results: pd.DataFrame, model: str, other: str, confidence: float = 0.95) -> str:
    """The same in Markdown: what is better, what is worse, and what the intervals leave open."""
    found = compared(results, model, other, confidence)
    said = []
    for finding, words in (
        ("better", "better in {}"),
        ("worse", "**worse** in {}"),
        ("unclear", "within the intervals in {}"),
    ):
        rows = found[found["finding"] == finding]
        if len(rows):
            said.append(words.format(", ".join(map(_change, rows.index, rows.to_dict("records")))))
    return f"*{model}* against *{other}*: {'; '.join(said) or 'the same rates in all columns'}."


def nowhere_worse(results: pd.DataFrame, model: str, other: str, confidence: float = 0.95) -> bool:
    """Whether no rate of `model` is worse than that of `other` beyond the intervals."""
    return "worse" not in set(compared(results, model, other, confidence)["finding"])


def _change(title: str, row: Mapping) -> str:
    return f"{title.removesuffix(' %')} ({row['other']:.1f} → {row['model']:.1f} %)"


def _counts(results: pd.DataFrame, model: str, cell: Cell) -> dict[str, int]:
    rows = cell_rows(results[results["model"] == model], cell)
    return {"k": int(rows["k"].sum()), "n": int(rows["n"].sum())}


def _finding(own: dict, theirs: dict, higher_is_better: bool, confidence: float) -> str:
    if own["k"] * theirs["n"] == theirs["k"] * own["n"]:
        return "equal"
    (low, high), (their_low, their_high) = (_interval(c, confidence) for c in (own, theirs))
    if low > their_high:
        return "better" if higher_is_better else "worse"
    if high < their_low:
        return "worse" if higher_is_better else "better"
    return "unclear"


def _interval(counts: dict, confidence: float) -> tuple[float, float]:
    verdicts = ["yes"] * counts["k"] + ["no"] * (counts["n"] - counts["k"])
    row = rate_row(verdicts, ("yes",), confidence)
    return row["low"], row["high"]
