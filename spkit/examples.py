"""The two records that travel through the kit: a harmful pair and an evaluation prompt.

Both are plain and frozen. data/ reads them from files.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GROUPS = {
    "harmful": ("seen", "unseen"),
    "over_safety": ("harmless",),
    "utility": ("utility",),
}  # objective -> the groups of the sandbox and of files without a name; the first is the default


@dataclass(frozen=True)
class HarmfulPair:
    """One (x, y) of D_h: a harmful question and a harmful response [paper, section 3.1]."""

    id: str
    prompt: str
    response: str
    category: str
    ends: bool = True  # False: the response was cut, so that its end is not learnt


@dataclass(frozen=True)
class EvalPrompt:
    """One held-out prompt.

    objective: "harmful", "over_safety" or "utility": which of the three objectives it measures.
    group: what it counts with in every table: the name of its source in data.sources; for the
        sandbox and files without a name "seen" or "unseen" harmful categories, "harmless"
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


def in_order(groups: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each (objective, group) once, as tables show them: harmful, over-safety, utility.

    Within an objective its GROUPS come first, then names of sources as they come.
    """

    def place(pair: tuple[str, str]) -> tuple[int, int]:
        objective, group = pair
        known = GROUPS[objective]
        return list(GROUPS).index(objective), (*known, group).index(group)

    return sorted(dict.fromkeys(groups), key=place)


def digest(rows: Iterable[Sequence]) -> str:
    """SHA-256 in hex of the rows, whatever their order: names a set without showing it."""
    lines = sorted(json.dumps(list(row)) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(pairs: Sequence[HarmfulPair]) -> str:
    """SHA-256 of D_h's text in hex: names the set without showing it; order does not matter."""
    cut = {True: [], False: ["cut"]}
    return digest([p.prompt, p.response, p.category, *cut[p.ends]] for p in pairs)


def sample(examples: list, count: int | None, seed: int) -> list:
    """At most `count` examples, in their order, chosen by a hash of seed and id."""
    if count is None or count >= len(examples):
        return examples

    def rank(example) -> bytes:
        return hashlib.sha256(f"{seed}|{example.id}".encode()).digest()

    chosen = {example.id for example in sorted(examples, key=rank)[:count]}
    return [example for example in examples if example.id in chosen]
