"""OR-Bench: 80,000 prompts that sound harmful and are not, the 1,000 hardest, and harmful ones.

Columns `prompt,category`, in bench-llm/or-bench on the hub (configs or-bench-80k, or-bench-hard-1k
and or-bench-toxic) and in CSV files of these names. No column says whether a prompt is harmful, so
`split` or the file's name must say which of the three it is. Those of or-bench-toxic are harmful,
the others measure over-safety. There are no responses: as D_h or-bench-toxic needs
`data.responses`.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, unique, without_responses
from spkit.data.readers.source import load_rows, part_of, remembered

TOXIC = "or-bench-toxic"
PARTS = ("or-bench-80k", "or-bench-hard-1k", TOXIC)
CATEGORIES = (
    *("deception", "harassment", "harmful", "hate", "illegal"),
    *("privacy", "self-harm", "sexual", "unethical", "violence"),
)


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """The prompts of or-bench-toxic, with empty responses. SpkitError for the other two parts."""
    if _part(source) != TOXIC:
        raise without_responses(source)
    return _rows(source)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """All prompts. SpkitError for a bad file, row or value, and where nothing says which part."""
    return _rows(source)


def _rows(source: SourceConfig) -> tuple[Record, ...]:
    part = _part(source)
    records = [
        Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "prompt", where),
            categories=(choice(row, "category", CATEGORIES, where),),
            objective="harmful" if part == TOXIC else "over_safety",
        )
        for where, number, row in load_rows(source, ("prompt", "category"), (part, "train"))
    ]
    return unique(source.path, records)


def _part(source: SourceConfig) -> str:
    """One of PARTS, of `split` (also with /train behind it) or, where it is train, of the name."""
    named = {part: part.removeprefix("or-bench-") for part in PARTS}
    said = source.split.removesuffix("/train")
    return part_of(source, said, named, "whether the prompts are harmful")
