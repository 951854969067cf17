"""Checks on single rows: a text that is not empty, one of several words, true or false, ids.

Each names the row ("file, row 3"), the column, what was found and what is expected. A long value is
cut, so that no error shows a whole text. source.py reads the rows.
"""

from collections.abc import Sequence
from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.errors import SpkitError

SHOWN = 40  # characters of a wrong value that an error may show


def text(
    row: dict[str, Any], key: str, where: str, default: str | None = None, empty: bool = False
) -> str:
    """The text under `key`; SpkitError where it is no text or, unless `empty`, blank."""
    value = row.get(key, default)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: a text that is not empty")
    return value


def choice(
    row: dict[str, Any], key: str, allowed: Sequence[str], where: str, default: str | None = None
) -> str:
    """The value under `key`; SpkitError where it is none of `allowed`."""
    value = row.get(key, default)
    if value not in allowed:
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: {', '.join(allowed)}")
    return value


def truth(value: Any, key: str, where: str) -> bool:
    """A boolean, also as the text that a CSV file makes of it; SpkitError for anything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: true or false")
    return value


def identifier(row: dict[str, Any], keys: Sequence[str], number: int, where: str) -> str:
    """The first of the id columns that is there, as a text; else the row's number."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return str(number)
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(row, key, where)


def unique(path: Any, records: Sequence[Record]) -> tuple[Record, ...]:
    """The records; SpkitError where two have one id."""
    seen = set()
    for record in records:
        if record.id in seen:
            raise SpkitError(f"{path}: the id {record.id!r} stands twice, ids must differ")
        seen.add(record.id)
    return tuple(records)


def shown(value: Any) -> str:
    """A value as an error shows it, cut at SHOWN characters."""
    said = repr(value)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}..."


def without_responses(source: SourceConfig) -> SpkitError:
    """The error of a reader whose data set has prompts alone, where D_h is asked for."""
    return SpkitError(
        f"data.harmful: {source.path} (reader {source.reader}) has prompts without responses, so "
        f"it cannot be D_h; allowed readers: advbench, beavertails, own, and pyrit with "
        f"data.responses"
    )
