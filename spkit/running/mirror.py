"""A second copy of a run on another disk, such as a mounted drive, for machines that vanish.

`push` makes the mirror's folder equal to the local one, `pull` brings back what is missing locally.
What differs is told by size and time of change. A reader of the mirror sees whole files only: all
that is new is copied first, under temporary names, then renamed; a record comes last.

The mirror is part of the run folder: it holds the OSM patch, too, which alone is a jailbreak. It
must stay as private as the run folder itself (no shared or public drive). This file uploads nothing
by itself, follows no symbolic links, keeps no older versions and knows nothing of stages.
"""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from spkit.errors import SpkitError
from spkit.system.files import REASONS, TEMPORARY

LAST = "record.json"  # says that the files beside it are complete, so it must not come before them
SAME_TIME_NS = 2_000_000  # some drives keep the time of a change in milliseconds


def check(mirror: str | Path, outputs: str | Path) -> None:
    """SpkitError unless the mirror can be written to and lies apart from the folder `outputs`."""
    mirror, outputs = Path(mirror), Path(outputs)
    here, there = outputs.resolve(), mirror.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise SpkitError(
            f"mirror is {str(mirror)!r}, expected: a folder on another disk, neither outputs = "
            f"{str(outputs)!r} nor inside or around it"
        )
    if not mirror.parent.is_dir():
        raise SpkitError(
            f"mirror is {str(mirror)!r}, but there is no folder {mirror.parent}: mount the drive "
            f"or create that folder first, or set mirror to null"
        )
    try:
        mirror.mkdir(exist_ok=True)
        probe = mirror / f"{TEMPORARY}probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _failed(mirror, error) from error


def push(folder: str | Path, mirror: str | Path) -> list[str]:
    """Make `mirror` hold the same files as `folder`: copy what is new or changed, remove the rest.

    Returns the names of the files that were copied, in the order in which they became visible.
    """
    folder, mirror = Path(folder), Path(mirror)
    waiting = mirror / f"{TEMPORARY}push"
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        _remove_temporary(mirror)  # what a killed push left
        mine, theirs = _files(folder), _files(mirror)
        new = [name for name in _in_order(mine) if _differ(mine[name], theirs.get(name))]
        if new:
            waiting.mkdir()
        for number, name in enumerate(new):
            _copy(folder / name, waiting / str(number), mine[name])
        for name in theirs.keys() - mine.keys():
            (mirror / name).unlink()
            _remove_empty((mirror / name).parent, mirror)
        for number, name in enumerate(new):
            path = mirror / name
            if _linked(mirror, name):
                raise SpkitError(f"{path} lies behind a symbolic link, expected: none; remove it")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(waiting / str(number), path)
    except OSError as error:
        raise _failed(mirror, error) from error
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return new


def pull(mirror: str | Path, folder: str | Path) -> list[str]:
    """Copy the files of `mirror` that `folder` lacks, and return their names; [] without a mirror.

    Nothing is copied where a file is there on both sides and differs: then `folder` has gone on
    without the mirror, and old files among its new ones would be taken for one result.
    """
    mirror, folder = Path(mirror), Path(folder)
    try:
        theirs, mine = _files(mirror), _files(folder)
        if any(_differ(mine[name], theirs[name]) for name in theirs.keys() & mine.keys()):
            return []
        lacking = [x for x in _in_order(theirs) if x not in mine and not _linked(folder, x)]
        for name in lacking:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
            try:
                _copy(mirror / name, temporary, theirs[name])
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _failed(folder, error, f"{folder} cannot be restored from mirror {mirror}") from error
    return lacking


def _files(root: Path) -> dict[str, os.stat_result]:
    """{name: state} of the ordinary files below root, but the temporary ones; {} if there is none.

    Neither links nor what lies behind a linked folder.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for place, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
        for name in names:
            path = Path(place) / name
            state = path.lstat()
            if stat.S_ISREG(state.st_mode) and not name.startswith(TEMPORARY):
                found[path.relative_to(root).as_posix()] = state
    return found


def _in_order(files: dict[str, os.stat_result]) -> list[str]:
    """As they were written, records last."""
    return sorted(files, key=lambda name: (Path(name).name == LAST, files[name].st_mtime_ns, name))


def _differ(one: os.stat_result, other: os.stat_result | None) -> bool:
    if other is None or one.st_size != other.st_size:
        return True
    return abs(one.st_mtime_ns - other.st_mtime_ns) > SAME_TIME_NS


def _copy(source: Path, target: Path, state: os.stat_result) -> None:
    """Contents and time of change; `state` is from before the copy, so a later change is seen."""
    shutil.copyfile(source, target, follow_symlinks=False)
    with target.open("r+b") as handle:
        try:
            os.fsync(handle.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a drive that knows no fsync
                raise
    # a drive without access rights or times of single files: there all is copied every time
    with suppress(PermissionError):
        os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
        target.chmod(stat.S_IMODE(state.st_mode))


def _linked(root: Path, name: str) -> bool:
    """Whether the file, or a folder between root and it, is a symbolic link."""
    parts = Path(name).parts
    return any((root / Path(*parts[: k + 1])).is_symlink() for k in range(len(parts)))


def _remove_temporary(root: Path) -> None:
    for place, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(place) / name
            if name.startswith(TEMPORARY):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _failed(path: Path, error: OSError, what: str = "") -> SpkitError:
    reason = REASONS.get(error.errno) or error.strerror or str(error)
    what = what or f"cannot write to the mirror {path}"
    return SpkitError(
        f"{what}: {reason}; make room or access, or set mirror to another folder or to null"
    )
