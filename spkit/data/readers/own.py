"""Files of one's own: JSONL (one object a line, UTF-8), CSV, JSON, Parquet, or a hub id.

Harmful pairs: "prompt", "response", "category" (and "id"). Evaluation prompts: "prompt",
"objective", "category" (and "id", "group", "phrasing", "reference", "forbidden", "split").
Responses: "prompt", "response". In a CSV file an empty cell of an optional column says nothing, and
"forbidden" is a JSON list. Other keys are left alone; a mistyped one of ours is an error.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.packed import format_of, no_rows
from spkit.data.readers.parsing import json_lines
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, misspelt, shown, text, unique
from spkit.data.readers.source import Row, load_rows, on_disk, remembered
from spkit.data.readers.texts import normalised
from spkit.errors import SpkitError
from spkit.examples import GROUPS


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """All pairs in the file's order; a row without an id gets its number as one.

    SpkitError names file and row of a missing key, a wrong value, a mistyped key, an id used twice.
    """
    records = [
        Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "prompt", where),
            response=text(row, "response", where),
            categories=(text(row, "category", where).strip(),),
        )
        for where, number, row in _rows(source, ("prompt", "response", "category"), ("id",))
    ]
    return unique(source.path, records)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """All evaluation prompts of every split; group and split are empty where the row has none.

    SpkitError as for pairs, for an objective, group or split that there is not, and for a prompt
    with two objectives.
    """
    records, objectives, required = [], {}, ("prompt", "objective", "category")
    optional = ("id", "group", "phrasing", "reference", "forbidden", "split")
    for where, number, row in _rows(source, required, optional):
        objective = choice(row, "objective", tuple(GROUPS), where)
        first = objectives.setdefault(normalised(text(row, "prompt", where)), objective)
        if first != objective:
            raise SpkitError(
                f"{where}: objective is {objective!r}, but an earlier row with the same prompt "
                f"says {first!r}"
            )
        record = Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "prompt", where),
            categories=(text(row, "category", where).strip(),),
            objective=objective,
            group=choice(row, "group", GROUPS[objective], where) if "group" in row else "",
            phrasing=text(row, "phrasing", where, default="plain"),
            reference=text(row, "reference", where, default="", empty=True),
            forbidden=_forbidden(row.get("forbidden", []), where),
            split=choice(row, "split", ("dev", "test"), where) if "split" in row else "",
        )
        records.append(record)
    return unique(source.path, records)


def responses(source: SourceConfig) -> dict[str, str]:
    """{normalised prompt: response}. SpkitError as for pairs, and where a prompt comes twice."""
    found: dict[str, str] = {}
    for where, _, row in _rows(source, ("prompt", "response"), ("id",)):
        key = normalised(text(row, "prompt", where))
        if key in found:
            raise SpkitError(f"{where}: its prompt has a response in an earlier row already")
        found[key] = text(row, "response", where)
    return found


def cut_responses(source: SourceConfig) -> set[str]:
    """The normalised prompts whose row says "ends": false: their response was cut."""
    rows = _rows(source, ("prompt", "response"), ("id",))
    return {normalised(row["prompt"]) for _, _, row in rows if row.get("ends", True) is False}


def _rows(source: SourceConfig, required: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """The rows with all required keys; without the optional ones that hold nothing."""
    # a JSONL file is read line by line, as it was written: the library would fill missing keys
    lines = format_of(source.path)[0] == ".jsonl" and source.revision is None
    empty = True
    for where, number, row in _lines(source) if lines else load_rows(source, required):
        if not lines:
            row = {k: v for k, v in row.items() if k not in optional or v not in (None, "")}
        missing = [key for key in required if key not in row]
        if missing:
            found = ", ".join(row) or "nothing"
            hint = misspelt(missing[:1], list(row))
            raise SpkitError(f"{where}: the key {missing[0]!r} is missing (found: {found}){hint}")
        for key in row:  # a key of one's own is welcome, a mistyped one of ours is not
            near = difflib.get_close_matches(key, optional, n=1, cutoff=0.8)
            if near and key not in (*required, *optional):
                raise SpkitError(f"{where}: unknown key {key!r}, did you mean {near[0]}?")
        empty = False
        yield where, number, row
    if empty:
        raise no_rows(source.path)


def _lines(source: SourceConfig) -> Iterator[Row]:
    with on_disk(source) as path:
        yield from json_lines(path, source.path)


def _forbidden(value: Any, where: str) -> tuple[str, ...]:
    listed = value
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV file
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise SpkitError(f"{where}: forbidden is {shown(value)}, allowed: a list of texts")
    return tuple(listed)
