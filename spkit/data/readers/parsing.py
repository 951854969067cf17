"""Text of a CSV, JSONL, JSON or YAML file as rows, without guessing and without losing anything.

Every value of a CSV file is a text. A key that stands twice in an object is an error, because only
one of its values could be read. Every error names the file and the row. packed.py gives the bytes.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from spkit.data.readers.packed import content, decoded, format_of, not_utf8
from spkit.data.readers.rows import shown
from spkit.errors import SpkitError

SEPARATORS = (",", ";", "\t")
SEPARATOR_LINE = re.compile(r'"?sep=([,;\t])"?[,;\t]*\r?\n', re.IGNORECASE)
Row = tuple[str, int, dict[str, Any]]  # ("file, row 3", 3, {column: value})


# ---- CSV -----------------------------------------------------------------------------------------


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV or TSV file; columns without a name, as an index has none, are left out.

    The separator is the suffix's own, or another of SEPARATORS where the header has only that, or
    what a first line "sep=;" says, as spreadsheets write one. Rows without any text are left out.
    SpkitError for a column that is there twice and a row with more or fewer fields than the header.
    """
    text = decoded(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the process; 131072 before
    said = SEPARATOR_LINE.match(text)
    text = text[said.end() :] if said else text
    usual = "\t" if format_of(path)[0] == ".tsv" else ","
    usual = said[1] if said else usual
    rows: list[dict[str, str]] = []
    names: list[str] = []
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), **_dialect(text, usual)):
            if not any(fields) and (names or not fields):
                continue  # a blank line, also as spreadsheets write it: ";;"
            if not names:
                names = _names(path, fields)
            else:
                rows.append(_row(f"{path}, row {len(rows) + 1}", names, fields))
    except csv.Error as error:
        raise SpkitError(f"{path}, row {len(rows) + 1}: not CSV: {error}") from None
    return rows


def _dialect(text: str, usual: str) -> dict[str, Any]:
    """How csv.reader is to read the text: the header decides."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    found = {s: next(csv.reader([header], delimiter=s), []) for s in SEPARATORS}
    separator = usual
    if len(found[usual]) < 2:  # else the usual one is right, whatever the names hold
        separator = max((usual, *SEPARATORS), key=lambda s: len(found[s]))
    # "prompt, response": the space belongs to neither the name nor the texts below it
    spaced = any(name.startswith(" ") for name in found[separator][1:])
    return {"delimiter": separator, "strict": True, "skipinitialspace": spaced}


def _names(path: Path, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise SpkitError(f"{path}: the column {twice!r} stands twice, names must differ")
    if not any(names):
        raise SpkitError(f"{path}: the first line is empty but for separators, must name columns")
    return names


def _row(where: str, names: list[str], fields: list[str]) -> dict[str, str]:
    """{name: field}. A separator at the end of the header alone is a column less in the rows."""
    named = len(names)
    while not names[named - 1]:
        named -= 1
    if not named <= len(fields) <= len(names):
        raise SpkitError(
            f"{where}: {len(fields)} fields, must be {len(names)} as in the header (a text with a "
            f"separator in it stands in double quotes)"
        )
    return {name: field for name, field in zip(names, fields, strict=False) if name}


# ---- JSON ----------------------------------------------------------------------------------------


def json_lines(path: str | Path, name: str | None = None) -> Iterator[Row]:
    """Each line of a JSONL file that is not blank; a line's number counts the blank ones too.

    name: instead of the path, for "file, row 3". SpkitError for a file that cannot be read, text
    that is not UTF-8, a line without an object, and a key that stands twice in one.
    """
    found = content(path)
    lines = found.splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{name or path}, row {number}"
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise not_utf8(name or path, found, number) from None
        if not text:
            continue
        try:
            row, twice = _loaded(text)
        except (ValueError, RecursionError) as error:
            cut = number == len(lines) > 1 and not found.endswith((b"\n", b"\r"))
            hint = "; the file ends in this row: download it again where it was cut" * cut
            if text in ("[", "{"):
                hint = "; a row must be one line (a list of objects is a .json file)"
            raise SpkitError(f"{where}: not JSON: {_why(error)}{hint}") from None
        if not isinstance(row, dict):
            hint = " (a list of objects is a .json file)" * text.startswith("[")
            raise SpkitError(f"{where}: found {shown(text)}, must be an object with keys{hint}")
        if twice:
            raise _stands_twice(where, twice[-1][1])
        yield where, number, row


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json file: a list of objects, or one object a line as in a JSONL file."""
    text = decoded(path)
    if not text.strip():
        return []
    try:
        rows, twice = _loaded(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and getattr(error, "msg", "") == "Extra data":
            return filled([row for _, _, row in json_lines(path)])
        raise SpkitError(f"{path}: cannot be read (not JSON: {_why(error)})") from None
    if not isinstance(rows, list):
        keys = f"the keys {shown(list(rows))}" if isinstance(rows, dict) else shown(rows)
        if isinstance(rows, dict) and text.strip().count("\n") == 0 and not twice:
            return [rows]  # a JSONL file of one line
        raise SpkitError(f"{path}: cannot be read (found {keys}, must be a list of objects)")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            said = f"found {shown(row)}, must be an object with keys"
            raise SpkitError(f"{path}, row {number}: {said}")
        inner = next((key for one, key in twice if _holds(row, one)), None)
        if inner is not None:
            raise _stands_twice(f"{path}, row {number}", inner)
    return filled(rows)


def filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the keys of all of them: None where a row does not have one."""
    keys = dict.fromkeys(key for row in rows for key in row)
    if all(len(row) == len(keys) for row in rows):
        return rows
    return [{key: row.get(key) for key in keys} for row in rows]


def _loaded(text: str) -> tuple[Any, list[tuple[dict, str]]]:
    """(the value, [(an object in it, a key that stands twice there)]), the outermost last."""
    twice: list[tuple[dict, str]] = []

    def from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append((found, next(key for key in keys if keys.count(key) > 1)))
        return found

    return json.loads(text, object_pairs_hook=from_pairs), twice


def _holds(value: Any, wanted: dict) -> bool:
    if value is wanted:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(one, wanted) for one in inner)


def _stands_twice(where: str, key: Any) -> SpkitError:
    return SpkitError(f"{where}: the key {shown(key)} stands twice, only one value can be read")


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


# ---- YAML ----------------------------------------------------------------------------------------


def seeds(path: Path) -> list[dict[str, Any]]:
    """The list under `seeds` of a YAML file; each is a row, whatever keys the first one has."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(decoded(path))  # C: ten times as fast
    try:
        node = loader.get_single_node()
        _refuse_twice(path, node)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SpkitError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "unreadable"
        raise SpkitError(f"{path}{where}: not YAML: {what}") from None
    finally:
        loader.dispose()
    rows = content.get("seeds") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise SpkitError(f"{path}: the key 'seeds' is missing, must hold a list of seeds")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            found = f"found {shown(row)}, must be an object with keys"
            raise SpkitError(f"{path}, row {number}: {found}")
    return rows


def _refuse_twice(path: Path, root: yaml.Node | None) -> None:
    """SpkitError for a key that stands twice in one mapping of the file, with its row or line."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "seeds" and isinstance(value, yaml.SequenceNode):
            for number, row in enumerate(value.value, start=1):
                _look_through(row, f"{path}, row {number}", set())
    _look_through(root, str(path), set())


def _look_through(node: Any, where: str, met: set[int]) -> None:
    if id(node) in met:  # an alias: one node in several places
        return
    met.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        name = next((name for name in names if names.count(name) > 1), None)
        if name is not None:
            line = f", line {node.start_mark.line + 1}" if ", row " not in where else ""
            raise _stands_twice(f"{where}{line}", name)
        for _, value in node.value:
            _look_through(value, where, met)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _look_through(value, where, met)
