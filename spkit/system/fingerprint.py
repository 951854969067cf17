"""What a file holds, as one number: BLAKE3 of all its bytes, whatever its name, place and date.

    digest("model.safetensors")                     64 hex digits
    digests({"config.json": path, ...})             the same for several, large ones with a bar

A large file (weights) is read once. Its digest is kept in the user's cache, under a name that says
device, inode, size, and both times of change to the nanosecond. Nobody can set the second time
(ctime) back, so weights that were replaced and given their old date are read again.
Small files are read each time. Which files of a folder count is not known here.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from blake3 import blake3
from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.system.files import cache_folder, once

LARGE = 2**20  # bytes; from here on a digest is kept
BAR_FROM = 2 * 2**30  # bytes to be read, from which on a bar is shown
SETTLED = 2.0  # seconds; a file that has just changed may change again within one tick of the clock
BLOCK = 2**24  # bytes read at once where a file cannot be mapped

_KNOWN: dict[str, str] = {}  # of this process: {name in the cache: digest}


def digest(path: str | Path) -> str:
    """BLAKE3 of the file's bytes in hex. SpkitError where it cannot be read."""
    return digests({"": path})[""]


def digests(files: Mapping[str, str | Path]) -> dict[str, str]:
    """{name: digest} of these files; a bar where much of them is read for the first time.

    SpkitError for a file that cannot be read.
    """
    try:
        states = {name: os.stat(path) for name, path in files.items()}
        kept = {name: _kept(state) for name, state in states.items()}
        total = sum(states[name].st_size for name, known in kept.items() if known is None)
        options = {"unit": "B", "unit_scale": True, "leave": False, "total": total}
        with tqdm(desc="weights, read once", disable=total < BAR_FROM, **options) as bar:
            for name, known in kept.items():
                if known is None:
                    kept[name] = _read(Path(files[name]), states[name])
                    bar.update(states[name].st_size)
    except OSError as error:
        raise SpkitError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return kept


def combined(parts: Mapping[str, str]) -> str:
    """One digest of {name: digest}, whatever their order."""
    whole = blake3()
    for name in sorted(parts):
        whole.update(f"{name}\0{parts[name]}\0".encode())
    return whole.hexdigest()


def _name(state: os.stat_result) -> str:
    return f"{state.st_dev}-{state.st_ino}-{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def _kept(state: os.stat_result) -> str | None:
    """The digest that was kept of a large file in this state."""
    if state.st_size < LARGE or os.name == "nt":  # there ctime is when the file was made
        return None
    name = _name(state)
    if name not in _KNOWN:
        with suppress(OSError, ValueError, SpkitError):
            found = (cache_folder() / "digests" / name).read_text(encoding="ascii")
            if len(found) == 64 and int(found, 16) >= 0:
                _KNOWN[name] = found
    return _KNOWN.get(name)


def _read(path: Path, state: os.stat_result) -> str:
    found = _hash(path, state.st_size)
    if state.st_size >= LARGE:
        # kept only for the bytes that were read: nothing has changed meanwhile, nor just before
        settled = time.time() - max(state.st_mtime, state.st_ctime) > SETTLED
        if settled and _name(os.stat(path)) == _name(state):
            _KNOWN[_name(state)] = found
            with suppress(SpkitError), once(cache_folder() / "digests" / _name(state)) as place:
                place.write_text(found, encoding="ascii")  # else it is read again the next time
    return found


def _hash(path: Path, size: int) -> str:
    """All of the file by all cores where it is large, mapped into memory where that can be done."""
    if size < LARGE:
        return blake3(path.read_bytes()).hexdigest()
    with suppress(OSError, ValueError):
        return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    whole = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()
