"""StrongREJECT: 313 forbidden prompts of six categories, and a smaller set of 60.

The authors' CSV files have the columns `category,source,forbidden_prompt`; walledai/StrongREJECT on
the hub has `prompt,category,source`. There are no responses: as D_h they need `data.responses`.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, unique
from spkit.data.readers.source import load_rows, remembered

CATEGORIES = (
    "Disinformation and deception",
    "Hate, harassment and discrimination",
    "Illegal goods and services",
    "Non-violent crimes",
    "Sexual content",
    "Violence",
)


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """Every prompt, with an empty response. SpkitError for a bad file, row or value."""
    records = []
    columns = (("forbidden_prompt", "prompt"), "category")
    for where, number, row in load_rows(source, columns):
        column = "forbidden_prompt" if "forbidden_prompt" in row else "prompt"
        record = Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, column, where),
            categories=(choice(row, "category", CATEGORIES, where),),
        )
        records.append(record)
    return unique(source.path, records)


prompts = pairs
