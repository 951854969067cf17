"""Writing without half-written files: a temporary name in the same folder, synced, then renamed.

Whoever reads a file under its final name reads all of it, whenever the writer was killed. This file
knows nothing of stages (`runs.py`) or of what is written.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spkit.errors import SpkitError

TEMPORARY = ".tmp-"  # followed by the final name, so that the suffix still tells the format
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EEXIST: "a file stands where a folder should be",
}
ADVICE = "choose another root folder with the parameter outputs, then run again"
CACHE_ADVICE = "name another cache folder in the environment variable XDG_CACHE_HOME"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file *or* a folder to; on success it becomes `path`.

    After an error nothing is left and `path` is as before. An OSError (full disk, read-only
    folder) becomes one SpkitError sentence.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        _sync(temporary)
        if path.is_dir():  # a folder cannot replace a full one, so the old one steps aside
            aside = path.with_name(f"{TEMPORARY}old-{path.name}")
            _remove(aside)
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            os.replace(temporary, path)
        sync_folder_entry(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        if temporary.exists():
            _remove(temporary)


def cache_folder() -> Path:
    """Where files are kept that any run can use and that can be made again: the user's own cache.

    $XDG_CACHE_HOME/spkit, by default ~/.cache/spkit; a relative XDG_CACHE_HOME does not count, as
    its standard says. SpkitError for a user without a home folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "spkit"
    try:
        return Path.home() / ".cache" / "spkit"
    except RuntimeError:  # a container's user without a name
        raise SpkitError(f"this user has no home folder: {CACHE_ADVICE}") from None


@contextmanager
def once(path: str | Path) -> Iterator[Path]:
    """As `atomic`, for a file or folder of the cache that several processes may make at once.

    Each writes under a name of its own. All would write the same, so whoever is first stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    except OSError as error:
        raise write_error(path, error, CACHE_ADVICE) from error
    try:
        yield own / path.name
        _sync(own / path.name)
        try:
            (own / path.name).rename(path)
        except OSError:
            if not path.exists():  # else another process was first
                raise
        sync_folder_entry(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error, CACHE_ADVICE) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)


def save_csv(path: str | Path, frame) -> Path:
    """A pandas data frame as CSV without its index, the same bytes for the same values."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    return Path(path)


def make_folder(path: str | Path) -> Path:
    """Create the folder with its parents; clear temporary files that a killed run left in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.rglob(f"{TEMPORARY}*"):
            _remove(leftover)
        # fails here and not after an hour's work if the folder is read-only
        probe = path / f"{TEMPORARY}probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(path, error) from error
    return path


def write_error(path: Path, error: Exception, advice: str = ADVICE) -> SpkitError:
    """One sentence for a failed write, with what can be done besides making room."""
    code = getattr(error, "errno", None)
    if code is None and "os error 28" in str(error):  # safetensors speaks Rust
        code = errno.ENOSPC
    reason = REASONS.get(code) or getattr(error, "strerror", None) or str(error)
    return SpkitError(f"cannot write {path}: {reason}; make room or access, or {advice}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def sync_folder_entry(folder: Path) -> None:
    """Make a rename within the folder last through a power cut."""
    if os.name == "posix":  # Windows has no handle of a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
