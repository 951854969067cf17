"""PyRIT's seed prompts: harmful behaviours, each with the categories of harm that it can do.

A YAML file (suffix .prompt) with `seeds: [{value, harm_categories: [...]}]`. PyRIT ships AdvBench's
520 behaviours so, with several categories each. There are no responses: as D_h they need
`data.responses`.
"""

from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import identifier, shown, text, unique
from spkit.data.readers.source import load_rows, remembered
from spkit.errors import SpkitError


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """Every seed, with an empty response. SpkitError for a bad file, row or value."""
    records = [
        Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "value", where).strip(),
            categories=_categories(row.get("harm_categories"), where),
        )
        for where, number, row in load_rows(source, ("value", "harm_categories"))
    ]
    return unique(source.path, records)


prompts = pairs


def _categories(value: Any, where: str) -> tuple[str, ...]:
    """The names in the file's order, each once."""
    names = value if isinstance(value, list) else []
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        rule = "allowed: a list of one category or more"
        raise SpkitError(f"{where}: harm_categories is {shown(value)}, {rule}")
    return tuple(dict.fromkeys(names))
