"""One process at a time in a folder: a lock of the system that ends with the process, also by kill.

    with locked("outputs/sandbox/seed-0"):
        ...                        SpkitError at once where another process is in there

The lock is on a file beside the folder, `.seed-0.lock`, into which its holder is written. What a
killed process leaves of it is no lock. A process may take its own lock again, and what it starts is
told by a variable of the environment that the folder is its parent's.
Windows has no such locks, nor have some network drives: there nothing is refused.
"""

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spkit.errors import SpkitError
from spkit.system.files import write_error

VARIABLE = "SPKIT_LOCKED"  # the folders that a parent of this process holds
TRIES = 3
_MADE: dict[Path, list[Path]] = {}  # folders that were made for a lock: gone again if left empty
_HELD: dict[Path, int] = {}  # {folder: the open lock file} of this process


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder, which need not exist, until the end of the block.

    SpkitError names the process that holds it. Nothing happens where this process holds it already.
    What is started inside the block finds the folder to be its own (`require_free`).
    """
    if not take(folder):
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = os.pathsep.join(filter(None, [before, str(Path(folder).resolve())]))
    try:
        yield
    finally:
        release(folder)
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def take(folder: str | Path) -> bool:
    """Hold the folder until `release`, or until this process ends; False where it holds it already.

    SpkitError where another process does.
    """
    folder = Path(folder).resolve()
    if folder in _HELD:
        return False
    path = lock_file(folder)
    made = [place for place in path.parents if not place.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _opened(path)
    except OSError as error:
        raise write_error(path, error) from error
    if handle is None:
        raise SpkitError(_refused(folder, path))
    who = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M")}
    with suppress(OSError):  # a full disk: the lock holds without the name of its holder
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(who).encode())
    _HELD[folder], _MADE[folder] = handle, made
    return True


def _opened(path: Path) -> int | None:
    """The locked file, or None where another process has it."""
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if exclusive(handle):
            with suppress(FileNotFoundError):  # its last holder may have deleted it meanwhile
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        os.close(handle)
        time.sleep(0.05)  # `require_free` of another process looks for a moment
    return None


def handles() -> tuple[int, ...]:
    """The open lock files of the folders that this process holds.

    A child that is given them (pass_fds of subprocess) holds the folders, too, until it ends: so
    nothing runs into what goes on after its parent was killed.
    """
    return tuple(_HELD.values())


def release(folder: str | Path) -> None:
    """Give the folder back; nothing where it is not held."""
    folder = Path(folder).resolve()
    handle = _HELD.pop(folder, None)
    if handle is not None:
        with suppress(OSError):  # Windows deletes no open file
            lock_file(folder).unlink()
        os.close(handle)
        for place in _MADE.pop(folder, []):
            with suppress(OSError):  # something is in it by now
                place.rmdir()


def require_free(folder: str | Path) -> None:
    """SpkitError where another process holds the folder that is not a parent of this one.

    Nothing is written, and a moment later the answer may be another.
    """
    folder = Path(folder).resolve()
    path = lock_file(folder)
    parents = os.environ.get(VARIABLE, "").split(os.pathsep)
    if folder in _HELD or str(folder) in parents or not path.is_file():
        return
    try:
        handle = os.open(path, os.O_RDWR)  # NFS gives no lock on a file that is open to be read
    except FileNotFoundError:  # given back in this moment
        return
    except OSError:
        handle = os.open(path, os.O_RDONLY)
    try:
        if not exclusive(handle):
            raise SpkitError(_refused(folder, path))
    finally:
        os.close(handle)


def lock_file(folder: Path) -> Path:
    """The file that the lock is on: outside of the folder, which may be deleted or mirrored."""
    return folder.with_name(f".{folder.name}.lock")


def exclusive(handle: int) -> bool:
    """Take the lock on an open file or folder without waiting; False where another process has it.

    It is held until the handle is closed. True, too, where there are no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _gone(who: dict) -> str:
    """ "" where the holder lives, or is on another machine; else what to know of its children."""
    if who["host"] != platform.node():
        return ""
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return " (it was killed, and what it had started still works there)"
    except OSError:  # another user's
        pass
    return ""


def _refused(folder: Path, path: Path) -> str:
    """Who is in there, and what to do."""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        by = f"process {who['pid']} on {who['host']}, since {who['since']}"
        by += _gone(who)
    except (OSError, ValueError, KeyError, TypeError):
        by = "another process"
    return (
        f"{shown} is in use by {by}: wait until it ends, or end it (a notebook: shut down its "
        f"kernel), or choose another run_name"
    )
