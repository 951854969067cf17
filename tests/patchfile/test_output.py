"""Files written by place: whole pages straight to the disk, the rest shared between neighbours."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from spkit.patchfile import output
from spkit.patchfile.output import ALIGN, Output

WAYS = ["straight", "copied", "refused", "no such flag", "in small parts", "in odd parts"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """All that a system may do with O_DIRECT: nothing, refuse it, or take a part of the bytes."""
    monkeypatch.setattr(output, "LEAST", ALIGN)
    whole = getattr(os, "pwrite", None)

    def refuse(*_):
        raise OSError(errno.EINVAL, "refused")

    if request.param == "copied":
        monkeypatch.setattr(output, "_open_direct", lambda path: None)
    elif request.param == "refused":
        monkeypatch.setattr(os, "pwrite", refuse, raising=False)
    elif request.param == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif request.param == "in small parts":
        monkeypatch.setattr(os, "pwrite", lambda h, data, at: whole(h, data[:ALIGN], at))
    elif request.param == "in odd parts":  # as at the end of a full disk: 512 bytes are a sector
        monkeypatch.setattr(os, "pwrite", lambda h, data, at: whole(h, data[: ALIGN + 512], at))
    return request.param


def write(path, right, cuts, in_place, parts, threads=1):
    """`right` in stretches that end at `cuts`, each in blocks of `parts` bytes."""
    file = Output(path, len(right))

    def stretch(first, last):
        out = file.stretch(first)
        for start in range(first, last, parts):
            data = right[start : min(start + parts, last)]
            if in_place:
                room = np.frombuffer(out.room(len(data)), dtype=np.uint8)
                room[:] = data
                data = room
            out.write(data)
        out.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stretch, [0, *cuts], [*cuts, len(right)]))
    file.finish()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new array"])
def test_every_byte_is_written(way, in_place, tmp_path):
    draw = np.random.default_rng(0)
    for case in range(40):
        size = int(draw.integers(1, 12 * ALIGN))
        right = draw.integers(0, 256, size, dtype=np.uint8)
        cuts = sorted(int(cut) for cut in draw.integers(0, size + 1, int(draw.integers(0, 6))))
        parts = int(draw.choice([1000, ALIGN - 1, ALIGN, 2 * ALIGN + 7, 5 * ALIGN]))
        write(tmp_path / str(case), right, cuts, in_place, parts, threads=3)
        assert (tmp_path / str(case)).read_bytes() == right.tobytes(), (size, cuts, parts)


@pytest.mark.parametrize("cuts", [[1], [ALIGN - 1], [ALIGN], [ALIGN + 1], [3, 5, 5, ALIGN, ALIGN]])
def test_cuts_at_the_edges_of_a_page(way, cuts, tmp_path):
    right = np.arange(3 * ALIGN, dtype=np.uint32).astype(np.uint8)
    write(tmp_path / "file", right, cuts, True, 2 * ALIGN)
    assert (tmp_path / "file").read_bytes() == right.tobytes()


def test_missing_bytes_are_found(tmp_path, monkeypatch):
    """Not where everything is copied: no page waits there."""
    file = Output(tmp_path / "file", 2 * ALIGN)
    if not file.direct:
        pytest.skip("no O_DIRECT here")
    out = file.stretch(5)
    out.write(np.ones(ALIGN, dtype=np.uint8))
    out.close()
    with pytest.raises(RuntimeError, match=r"bytes of the pages \[0, 1\] missing"):
        file.finish()


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    if hasattr(os, "posix_fallocate"):
        monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(output, "_open_direct", lambda path: os.open(path, os.O_WRONLY))
    with pytest.raises(OSError, match="full"):
        Output(tmp_path / "file", 10)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_other_errors_of_the_disk_are_not_passed_over(code, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "LEAST", ALIGN)
    file = Output(tmp_path / "file", 4 * ALIGN)
    if not file.direct:
        pytest.skip("no O_DIRECT here")

    def broken(*_):
        raise OSError(code, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="broken"):
        file.stretch(0).write(np.zeros(4 * ALIGN, dtype=np.uint8))
    file.close()
    file.close()


def test_a_file_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Output(tmp_path / "file", 10)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_whole_pages_go_straight_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "LEAST", ALIGN)
    file, seen, whole = Output(tmp_path / "file", 5 * ALIGN), [], getattr(os, "pwrite", None)
    if not file.direct:
        pytest.skip("no O_DIRECT here")

    def watch(handle, data, place):
        seen.append((place, len(data)))
        return whole(handle, data, place)

    monkeypatch.setattr(os, "pwrite", watch)
    for first, last in ((0, 5), (5, 5 * ALIGN)):
        out = file.stretch(first)
        for start in range(first, last, 2 * ALIGN):
            out.write(np.ones(min(2 * ALIGN, last - start), dtype=np.uint8))
        out.close()
    file.finish()
    assert seen == [(ALIGN, ALIGN), (2 * ALIGN, 2 * ALIGN), (4 * ALIGN, ALIGN)]
    assert (tmp_path / "file").read_bytes() == b"\1" * (5 * ALIGN)
