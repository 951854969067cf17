"""One new file that several threads write into, past the page cache where the system lets them.

A checkpoint is written once and is larger than most memories. Written the usual way, each of its
pages is first copied into the system's cache, for which memory has to be found, and in a virtual
machine fetched from its host: measured, that is most of the time of `cp`. With O_DIRECT (Linux) the
disk reads the patched block where it lies. It wants whole pages of 4096 bytes, in memory and in the
file, and tensors begin and end anywhere:

    pages of the file   |---------|---------|---------|---------|---------|
    a stretch                [....|.........|.........|.........|...]
                        shared        straight to the disk       shared
                        with what lies before             with what lies behind

A page that two blocks of a stretch share is carried over from one to the next.
Where O_DIRECT is not known or refused, everything is copied as usual.
"""

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

ALIGN = 4096  # bytes; a page, and no disk's sectors are longer
LEAST = 1 << 16  # bytes; for fewer, waiting for the disk takes longer than copying
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_LOCAL = threading.local()


class Output:
    """A new file of `size` bytes; all of them must be written, each once. May be closed twice."""

    def __init__(self, path: Path, size: int):
        self._file, self._lock, self._size = path.open("xb", buffering=0), threading.Lock(), size
        self._direct: int | None = None
        self._shared: dict[int, tuple[bytearray, list[int]]] = {}  # {page: (bytes, lengths of it)}
        try:
            self._direct = _open_direct(path)
            _reserve(self._file, size, self.direct)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, which is not synced yet."""
        self._file.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def finish(self) -> None:
        """Close the whole file; RuntimeError where bytes are missing in a page."""
        self.close()
        if self._shared:
            raise RuntimeError(
                f"{self._file.name}: bytes of the pages {sorted(self._shared)} missing"
            )

    def stretch(self, place: int) -> "Stretch":
        """Bytes that one thread writes, one behind the other, from `place` on."""
        return Stretch(self, place)

    def share(self, data: memoryview, place: int) -> None:
        """Write a part of a page, together with its other parts."""
        number, first = divmod(place, ALIGN)
        with self._lock:
            page, lengths = self._shared.setdefault(number, (bytearray(ALIGN), []))
            page[first : first + len(data)] = data
            lengths.append(len(data))
            whole = min(ALIGN, self._size - number * ALIGN)
            if sum(lengths) < whole:
                return
            del self._shared[number]
        self.copy(memoryview(page)[:whole], number * ALIGN)

    def straight(self, data: memoryview, place: int) -> None:
        """Write whole pages that begin with a page of the memory."""
        done = 0
        while len(data) - done >= LEAST and done % ALIGN == 0:
            try:
                done += os.pwrite(self._direct, data[done:], place + done)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                break
        self.copy(data[done:], place + done)

    def copy(self, data: memoryview, place: int) -> None:
        """Write anything anywhere, by the system's cache."""
        # the system lets one thread at a time copy into a file, and has the others wait for it
        # at full speed, on a core; with a lock they sleep
        with self._lock:
            self._file.seek(place)
            _write_all(self._file, data)

    @property
    def direct(self) -> bool:
        """Whether it is written past the system's cache."""
        return self._direct is not None


class Stretch:
    """Consecutive bytes of an Output, written by one thread. Call `close` behind the last ones."""

    def __init__(self, output: Output, place: int):
        self._output, self._place = output, place
        self._first = place % ALIGN  # where its bytes begin in the page that is carried

    def room(self, size: int) -> memoryview:
        """Memory for the next bytes. What is read into it and then written is not copied."""
        return memory(self._place % ALIGN, size)

    def write(self, data: np.ndarray) -> None:
        """Write the next bytes (uint8)."""
        place, count = self._place, len(data)
        self._place += count
        if not self._output.direct:
            self._output.copy(data.data, place)
            return
        first, end = place % ALIGN, place % ALIGN + count
        held = memory(0, end)
        here = np.frombuffer(held, dtype=np.uint8)[first:]
        if here.ctypes.data != data.ctypes.data:  # a new array, such as one of another dtype
            here[:] = data
        whole = end // ALIGN * ALIGN
        if whole:
            begin, page = 0, place - first
            if self._first:
                self._output.share(held[self._first : ALIGN], page + self._first)
                begin, self._first = ALIGN, 0
            self._output.straight(held[begin:whole], page + begin)
            held[: end - whole] = held[whole:end]

    def close(self) -> None:
        """Write what is carried."""
        last = self._place % ALIGN
        if self._output.direct and last > self._first:
            part = memory(0, last)[self._first :]
            self._output.share(part, self._place - len(part))


def memory(first: int, size: int) -> memoryview:
    """So much of this thread's own memory, which begins with a page; kept from block to block.

    Fresh memory for each block would cost a fault a page.
    """
    held = getattr(_LOCAL, "memory", None)
    if held is None or len(held) < first + size:
        more = memoryview(mmap.mmap(-1, (first + size + ALIGN - 1) // ALIGN * ALIGN or ALIGN))
        if held is not None:
            more[: len(held)] = held
        _LOCAL.memory = held = more
    return held[first : first + size]


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def _reserve(file: BinaryIO, size: int, direct: bool) -> None:
    """Give the file its size, and take the room for what is written straight to the disk.

    Measured on ext4: that is then a tenth faster. What is copied is slower by half, as it has to
    be turned into data when it is synced.
    """
    if direct and size:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in REFUSED:
                raise
    file.truncate(size)


def _open_direct(path: Path) -> int | None:
    """A second handle; None where this system or file system has none of that kind."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return None
