"""The two records that travel through the kit: a harmful pair and an evaluation prompt.

Both are plain and frozen. How they are read from files lies in `readers` and `data.py`, how an
answer to one is judged in the judge of its source.
"""

from dataclasses import dataclass

GROUPS = {
    "harmful": ("seen", "unseen"),
    "over_safety": ("harmless",),
    "utility": ("utility",),
}  # objective -> the groups it is split into; a row without a group belongs to the first


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
    phrasing: "plain", "known wrapper" or "new wrapper", "wrapper: <name>" for one of data.wrappers,
        or the utility skill's phrasing.
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
