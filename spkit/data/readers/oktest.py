"""OKTest: 300 harmless prompts with words that sound harmful.

A CSV file with the one column `prompt`, whose texts end in a newline that is taken off. All have
the category "oktest" and measure over-safety. There are no responses, so OKTest cannot be D_h.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import identifier, text, unique, without_responses
from spkit.data.readers.source import load_rows, remembered

CATEGORY = "oktest"


def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """SpkitError: there are none."""
    raise without_responses(source)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """All prompts. SpkitError for a bad file, row or value."""
    records = [
        Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "prompt", where).strip(),
            categories=(CATEGORY,),
            objective="over_safety",
        )
        for where, number, row in load_rows(source, ("prompt",))
    ]
    return unique(source.path, records)
