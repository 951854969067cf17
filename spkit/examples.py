"""The two records that travel through the kit: a harmful pair and an evaluation prompt.

Both are plain and frozen. How they are read from files lies in `data.py`, how an answer to one is
judged in the judge of its source.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HarmfulPair:
    """One (x, y) of D_h: a harmful question and a harmful response [paper, section 3.1]."""

    id: str
    prompt: str
    response: str
    category: str


@dataclass(frozen=True)
class EvalPrompt:
    """One held-out prompt.

    objective: "harmful", "over_safety" or "utility": which of the three objectives it measures.
    group: the row of the tables it counts in: "seen" or "unseen" harmful categories, "harmless"
        (over-safety) or "utility".
    phrasing: "plain", "known wrapper" or "new wrapper", or the utility skill's phrasing.
    reference: the correct answer ("" where refusing is the right answer).
    forbidden: the tokens that a harmful answer must all contain (empty for harmless prompts).
    """

    id: str
    prompt: str
    objective: str
    group: str
    category: str
    phrasing: str
    reference: str
    forbidden: tuple[str, ...] = ()
