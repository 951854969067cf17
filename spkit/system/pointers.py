"""Files that are not what their name says, because a download never fetched them or was cut.

A git clone without git-lfs leaves a small text in the place of a large file; a failed download can
leave a web page. Checkpoints and data files are both looked at here. This file reads the first
bytes only and knows no format.
"""

from pathlib import Path

from spkit.errors import SpkitError

POINTER = b"version https://git-lfs.github.com/spec/"  # how git-lfs begins every pointer
HEAD = 512  # bytes; a pointer has about 130 of them
PAGES = (b"<!doctype html", b"<html")


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is a git-lfs pointer; False for a folder and what cannot be read."""
    return head(path).startswith(POINTER)


def is_web_page(path: str | Path) -> bool:
    """Whether a file begins as HTML, as a server's error page does; False where none is read."""
    start = head(path).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith(PAGES)


def refuse_pointer(path: str | Path) -> None:
    """SpkitError for a git-lfs pointer and for a web page, with what to do about it."""
    path = Path(path)
    if is_lfs_pointer(path):
        raise SpkitError(
            f"{path}: a git-lfs pointer and not the file itself; run `git lfs pull` in the folder "
            f"that was cloned, or download the file again"
        )
    if is_web_page(path):
        raise SpkitError(
            f"{path}: a web page and not the file itself, as a failed download leaves it; download "
            f"it again (on the hub by the link that has /resolve/ in it and not /blob/)"
        )


def refuse_empty(path: str | Path) -> None:
    """SpkitError for a file of 0 bytes, as a download leaves it that never began."""
    path = Path(path)
    if path.is_file() and path.stat().st_size == 0:
        raise SpkitError(f"{path}: an empty file of 0 bytes; download it again")


def head(path: str | Path) -> bytes:
    """The first HEAD bytes, none for a folder and for a file that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""
