"""A file of JSON lines that grows while a long computation runs, and is read back after a cut.

The first line is a header: it names all that the rows depend on. A file with another header is
begun anew. Rows are appended a group at a time and synced, so that a killed process loses at most
the group it was working on; a line that a kill tore is dropped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spkit.system.files import atomic, write_error

Row = Mapping[str, Any]


def stored(path: str | Path, header: Row) -> list[dict[str, Any]]:
    """The whole rows under this header; none where there is no such file or it has another."""
    try:
        *lines, _ = Path(path).read_bytes().split(b"\n")  # what follows the last line end is torn
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # a power cut can leave a line of zeros
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows[1:] if rows and rows[0] == {"header": dict(header)} else []


def begin(path: str | Path, header: Row, rows: Sequence[Row]) -> None:
    """Replace the file by one that holds the header and these rows."""
    with atomic(path) as temporary:
        temporary.write_bytes(_lines([{"header": dict(header)}, *rows]))


def append(path: str | Path, rows: Sequence[Row]) -> None:
    """Add the rows at the end; they are on the disk when this returns."""
    try:
        with Path(path).open("ab") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(Path(path), error) from error


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()
