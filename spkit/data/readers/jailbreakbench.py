"""JailbreakBench's behaviours: 100 harmful ones with openings of an answer, and 100 benign ones.

Columns `Index,Goal,Target,Behavior,Category,Source`, in JailbreakBench/JBB-Behaviors on the hub
(config behaviors, splits harmful and benign) and in its files harmful-behaviors.csv and
benign-behaviors.csv. No column says which of the two a row is, so `split` or the file's name must:
harmful or benign. Benign ones measure over-safety. A target is an *opening*, as in AdvBench.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, unique
from spkit.data.readers.source import hub_part, load_rows, part_of, remembered
from spkit.errors import SpkitError

SPLITS = ("harmful", "benign")
CATEGORIES = (
    "Harassment/Discrimination",
    "Malware/Hacking",
    "Physical harm",
    "Economic harm",
    "Fraud/Deception",
    "Disinformation",
    "Sexual/Adult content",
    "Privacy",
    "Expert advice",
    "Government decision-making",
)


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """The harmful behaviours with openings; SpkitError as for prompts, and for benign ones."""
    found = _rows(source)
    if any(record.objective != "harmful" for record in found):
        raise SpkitError(
            f"data.harmful: {source.path} holds JailbreakBench's benign behaviours, must be the "
            f"harmful ones (split: harmful)"
        )
    return found


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """All behaviours of one split, the benign ones for over-safety.

    SpkitError for a bad file, row or value, and where nothing says which split it is.
    """
    return _rows(source)


def _rows(source: SourceConfig) -> tuple[Record, ...]:
    config, _ = hub_part(source, "behaviors")
    split = _split(source)
    records = [
        Record(
            id=identifier(row, ("Index", "id"), number, where),
            prompt=text(row, "Goal", where),
            response=text(row, "Target", where) if split == "harmful" else "",
            categories=(choice(row, "Category", CATEGORIES, where),),
            objective="harmful" if split == "harmful" else "over_safety",
        )
        for where, number, row in load_rows(source, ("Goal", "Target", "Category"), (config, split))
    ]
    return unique(source.path, records)


def _split(source: SourceConfig) -> str:
    """ "harmful" or "benign", of `split` or, where that says neither, of the file's name."""
    named = {split: split for split in SPLITS}
    return part_of(source, hub_part(source)[1], named, "which of them the rows are")
