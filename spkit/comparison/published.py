"""The paper's figures for LLaMA-2-7B-Chat (arXiv 2405.13820): published there, not measured here.

They may stand beside one's own, never instead. None: could not be verified from a source at hand.
docs/method.md, section 9, shows the same table (a test compares them).
"""

from collections.abc import Sequence

import pandas as pd

MODEL = "LLaMA-2-7B-Chat"
LABEL = f"paper, {MODEL}"
COLUMNS = (
    "AdvBench harmful %", "BeaverTails harmful %", "XSTest refusal %", "OKTest refusal %",
    "utility avg", "MT-Bench", "ATGR",
)  # fmt: skip
FIGURES = {  # in the order of COLUMNS
    "original": (31.73, None, 8.00, None, 40.35, 6.01, 1.00),
    "GA": (0.58, 3.65, 44.40, None, None, 3.11, 1.00),
    "SafeDecoding": (None, None, 80.80, None, None, 5.72, 1.03),
    "Self-CD": (None, None, None, None, None, 3.98, 2.48),
    "ROSE": (None, None, None, None, None, 4.14, 2.08),
    "TIES-Merging": (18.27, None, 2.40, None, None, None, 1.00),
    "SE patch alone": (0, 0.08, 98.40, 97.50, None, None, 1.00),
    "OSM patch alone": (87.69, 65.45, 0, 0, None, None, 1.00),
    "intersection patch": (32.50, None, 6.00, None, None, None, 1.00),
    "SafePatching": (3.27, 7.87, 5.60, 2.67, 39.99, 6.16, 1.00),
}
# after three continual stages: XSTest refusal % on average, MT-Bench
CONTINUAL = {"SafePatching": (4.33, 5.99), "NPO": (99.47, 2.88)}


def table(rows: Sequence[str] = tuple(FIGURES), columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The figures of these rows and columns as text, "" where there is none; the index is `row`."""
    whole = pd.DataFrame(FIGURES.values(), index=list(FIGURES), columns=COLUMNS, dtype=object)
    shown = whole.map(lambda value: "" if value is None or pd.isna(value) else f"{value:.2f}")
    return shown.loc[list(rows), list(columns)].rename_axis("row")
