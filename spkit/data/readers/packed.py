"""The bytes of one local data file: which format its name says, unpacked, and no pointer or page.

What the name says must be what the file holds. This file knows no rows and no columns.
"""

import gzip
import zlib
from pathlib import Path

from spkit.errors import SpkitError
from spkit.system.pointers import head, refuse_pointer

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUFFIXES[".prompt"] = "yaml"  # PyRIT's, with the rows under `seeds`
GZ = ".gz"
PACKABLE = (".csv", ".tsv", ".jsonl", ".json")  # each of them may end in .gz, too
UNPACK = f"unpack it, or pack it as {GZ}"
OTHERS = {  # formats that people bring, and what to do with one
    **dict.fromkeys((".zip", ".zst", ".xz", ".bz2", ".tar", ".tgz", ".7z"), UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (UTF-8)"),
    ".txt": "write a JSONL or CSV file with a key for every column",
    **dict.fromkeys((".arrow", ".feather", ".orc"), "write it as Parquet"),
    **dict.fromkeys((".pkl", ".pickle"), "write it as JSONL or Parquet"),
    **dict.fromkeys((".ndjson", ".jsonlines"), "rename it to .jsonl"),
    **dict.fromkeys((".yaml", ".yml"), "write it as JSONL; PyRIT's own files end in .prompt"),
}
BEGINNINGS = {  # how a file of another format begins, whatever its name says
    b"\x1f\x8b": "a gz file: add .gz to its name",
    b"PK\x03\x04": "a zip file or a spreadsheet: unpack it or save it as CSV",
    b"\x28\xb5\x2f\xfd": "a zst file: unpack it",
    b"PAR1": "a Parquet file: name it .parquet",
    b"\xff\xfe": "UTF-16, as some spreadsheets write it: save it as UTF-8",
    b"\xfe\xff": "UTF-16, as some spreadsheets write it: save it as UTF-8",
}


def format_of(path: str | Path) -> tuple[str, bool]:
    """(the suffix that says the format, in small letters; whether .gz stands behind it)."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == GZ:
        inner = Path(path.stem).suffix.lower()
        return inner, True
    return suffix, False


def is_data_name(path: str | Path) -> bool:
    """Whether a name is meant as a file: it ends as a data file, or as one that must be changed."""
    suffix, packed = format_of(path)
    return packed or suffix in SUFFIXES or suffix in OTHERS


def checked_format(path: Path) -> str:
    """ "csv", "json", "parquet" or "yaml"; SpkitError for another suffix, with what to do."""
    suffix, packed = format_of(path)
    if packed and suffix in PACKABLE:
        return SUFFIXES[suffix]
    if not packed and suffix in SUFFIXES:
        return SUFFIXES[suffix]
    allowed = f"allowed: {', '.join(SUFFIXES)}, and {', '.join(s + GZ for s in PACKABLE)}"
    todo = f"{suffix or 'it'} cannot be packed, unpack it" if packed else OTHERS.get(suffix)
    raise SpkitError(f"{path}: unknown suffix, {allowed}" + (f"; {todo}" if todo else ""))


def content(path: str | Path) -> bytes:
    """All bytes of a file, unpacked where its name ends in .gz.

    SpkitError for a file that cannot be read, a git-lfs pointer, a web page, a damaged gz file.
    """
    refuse_pointer(path)
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise SpkitError(f"{path}: cannot be read ({error.strerror})") from None
    if not format_of(path)[1]:
        return found
    try:
        return gzip.decompress(found)
    except (EOFError, zlib.error, OSError) as error:  # BadGzipFile is an OSError
        what = "a gz file that is cut" if isinstance(error, EOFError) else "no whole gz file"
        plain = isinstance(error, gzip.BadGzipFile) and not found.startswith(b"\x1f\x8b")
        todo = f"take {GZ} off its name, or download it again" if plain else "download it again"
        raise SpkitError(f"{path}: {what} ({str(error).rstrip('.')}); {todo}") from None


def decoded(path: str | Path) -> str:
    """The text of a file without a byte order mark; SpkitError names the line that is not UTF-8."""
    found = content(path)
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError:
        for number, line in enumerate(found.split(b"\n"), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise not_utf8(path, found, number) from None
        raise  # a file that is not UTF-8 has such a line


def no_rows(path: str | Path) -> SpkitError:
    """The error for a file without a row; it says where the file holds no byte at all."""
    empty = Path(path).is_file() and Path(path).stat().st_size == 0
    hint = " (an empty file of 0 bytes: download or write it again)" * empty
    return SpkitError(f"{path}: holds no rows, at least one is needed{hint}")


def not_utf8(path: str | Path, found: bytes, number: int) -> SpkitError:
    """The error for line `number`, which in a JSONL file is a row; it says what else it may be."""
    unit = "row" if format_of(path)[0] == ".jsonl" else "line"
    what = next((said for start, said in BEGINNINGS.items() if found.startswith(start)), "")
    return SpkitError(f"{path}, {unit} {number}: not UTF-8 text" + (f" ({what})" if what else ""))


def refuse_cut_parquet(path: Path) -> None:
    """SpkitError for a Parquet file without its beginning or its end, as a cut download has it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    if not head(path).startswith(b"PAR1") or end != b"PAR1":
        which = "its end is missing" if head(path).startswith(b"PAR1") else "no Parquet file"
        raise SpkitError(f"{path}: cannot be read ({which}); download it again")
