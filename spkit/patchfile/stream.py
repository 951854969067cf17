"""Walk through a checkpoint block by block with some tensors edited, and write what comes out.

    temporary folder -> shard after shard, each synced and noted in a journal -> rename

In memory are a few blocks of 2 million weights, whatever the size of tensors and model. Headers and
untouched tensors are copied as bytes. Several threads work, each on another tensor, in two shards
at a time; the disk syncs one while the next is made.

What this file does not do: know the edits (apply.py, revert.py, verify.py), how a file is written
(output.py), and what a killed run leaves for the next one to resume from (target.py).
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import About, load_json, other_files, read_header, tensor_files
from spkit.patchfile import floats
from spkit.patchfile.encoding import blocks
from spkit.patchfile.output import Output, memory
from spkit.patchfile.target import copy_others, new_folder, note_shard

CHUNK = 4 * 2**20  # bytes copied at once
MOST_THREADS = 4  # more gain nothing where the disk is the limit


class Edit(Protocol):
    """What becomes of one tensor. `block` is called once a block, in order; then `close`."""

    def block(self, bits: np.ndarray) -> np.ndarray:
        """The bits to write for these bits of the tensor, which may be changed in place."""

    def close(self) -> int:
        """A count, to be added up over all tensors; SpkitError where the tensor was a wrong one."""


Edits = Mapping[str, Callable[[], Edit]]  # {tensor name: makes its edit}
Job = Callable[[], tuple[int, int]]  # returns (bytes done, the edit's count)
Work = Callable[[Output], tuple[int, int]]  # the same, once there is a file to write into


@dataclass(frozen=True)
class Streamed:
    """bytes: of the edited tensors that were read, or of all files that were written.

    count: the sum of what the edits' `close` returned.
    """

    bytes: int
    count: int


def stream(
    source: str | Path,
    edits: Edits,
    target: str | Path | None,
    *,
    identity: Mapping[str, Any],
    dtype: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
    progress: bool = True,
    label: str = "apply",
) -> Streamed:
    """Write `source`, edited, to the new folder `target`; None: only run the edits.

    identity: what decides the result besides the source's files; a journal with another one is not
    gone on from. dtype: of all float tensors in the target (then edits give that one's bits).
    overwrite: whether a checkpoint that is there is replaced, in the end and as a whole. inputs:
    what else is read, and must not be in it.
    SpkitError where the source is no checkpoint, where
    an edited tensor is missing, and where the target cannot be written.
    """
    source = Path(source)
    files = tensor_files(source)
    for name in edits:
        if name not in files:
            raise SpkitError(f"The checkpoint {source} has no tensor {name!r}.")
    try:
        shards = [Shard(path, files, dtype) for path in sorted(set(files.values()))]
    except OSError as error:
        raise SpkitError(f"{error.filename} cannot be read: {error.strerror}") from None
    total = sum(shard.bytes if target is not None else shard.size_of(edits) for shard in shards)
    # one more than there are cores: some thread always waits for the system
    workers = threads or min(MOST_THREADS, 1 + (os.cpu_count() or 1))
    with tqdm(
        total=total, desc=label, unit="B", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        if target is None:
            jobs = [
                partial(_edited, s, name, edits, None) for s in shards for name in s.named(edits)
            ]
            return Streamed(total, _run(jobs, workers, bar))
        stamps = {path.name: list(_stamp(path)) for path in sorted({*files.values()})}
        about = {**identity, "dtype": dtype, "source": stamps}
        size = sum(shard.new_size for shard in shards)
        size += sum(path.stat().st_size for path in other_files(source))
        with new_folder(target, about, (source, *map(Path, inputs)), size, overwrite) as (
            made,
            done,
        ):
            copy_others(source, made, dtype, sum(s.new_size - s.new_start for s in shards))
            left = [shard for shard in shards if shard.path.name not in done]
            bar.update(sum(shard.bytes for shard in shards if shard not in left))
            done |= _write(left, made, edits, dtype, workers, bar)
    return Streamed(size, sum(done.values()))


class Shard:
    """One safetensors file: where its tensors lie, and where they will lie in the new dtype."""

    def __init__(self, path: Path, files: Mapping[str, Path], dtype: str | None):
        self.path = path
        with path.open("rb") as file:
            self.tensors, self.start = read_header(file, path)
            file.seek(0)
            self.header = file.read(self.start)
        self.about: dict[str, About] = dict(self.tensors)
        for name in sorted({n for n, f in files.items() if f == path} - set(self.about)):
            raise SpkitError(f"{path} has no tensor {name!r}, which the index puts there.")
        self.places = {name: self.start + a["data_offsets"][0] for name, a in self.tensors}
        self.bytes = path.stat().st_size - self.start
        self.new_header, self.new_places, self.new_size = self.header, self.places, self.bytes
        if dtype is not None:
            self._convert(dtype)
        self.new_start = len(self.new_header)
        self.new_size += self.new_start

    def _convert(self, dtype: str) -> None:
        tree = load_json(self.header[8:])
        end = 0
        for name, about in self.tensors:  # in the order of the data
            size = about["data_offsets"][1] - about["data_offsets"][0]
            new = dict(about)
            if about["dtype"] in floats.BITS:
                size = prod(about["shape"]) * floats.BITS[dtype].itemsize
                new["dtype"] = dtype
            tree[name] = new | {"data_offsets": [end, end + size]}
            end += size
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.new_header = len(text).to_bytes(8, "little") + text
        first = len(self.new_header)
        self.new_places = {n: first + tree[n]["data_offsets"][0] for n, _ in self.tensors}
        self.new_size = end

    def named(self, names: Mapping) -> list[str]:
        """Those of its tensors, in the order of the data."""
        return [name for name, _ in self.tensors if name in names]

    def size_of(self, names: Mapping) -> int:
        """The bytes of those of its tensors."""
        offsets = (self.about[name]["data_offsets"] for name in self.named(names))
        return sum(last - first for first, last in offsets)


# ---- shards --------------------------------------------------------------------------------------


def _write(shards: list[Shard], made: Path, edits: Edits, dtype, workers: int, bar) -> dict:
    """Write them all; returns {name: the edits' count}."""
    with ThreadPoolExecutor(1) as syncer:  # the disk works while the next shard is made
        writings = [Writing(shard, made, edits, dtype, syncer) for shard in shards]
        try:
            _run(_in_turns([writing.jobs for writing in writings]), workers, bar)
            return {writing.shard.path.name: writing.finished() for writing in writings}
        finally:
            for writing in writings:
                writing.close()


def _in_turns(shards: list[list[Job]]) -> list[Job]:
    """The jobs of two shards in turns, then of the next two: a file takes one thread at a time.

    Not of all shards: a run that is killed begins again with those that were not finished.
    """
    pairs = [shards[i : i + 2] for i in range(0, len(shards), 2)]
    turns = chain.from_iterable(zip_longest(*pair) for pair in pairs)
    return [job for turn in turns for job in turn if job]


class Writing:
    """One new shard: made by the first of its jobs to run, closed and synced behind the last."""

    def __init__(self, shard: Shard, made: Path, edits: Edits, dtype: str | None, syncer: Executor):
        self.shard, self._made, self._syncer = shard, made, syncer
        self.jobs = [partial(self._job, work) for work in _works(shard, edits, dtype)]
        self._left, self._count, self._lock = len(self.jobs), 0, threading.Lock()
        self._output: Output | None = None
        self._synced: Future | None = None

    def _job(self, work: Work) -> tuple[int, int]:
        with self._lock:
            if self._output is None:
                self._output = self._open()
        size, count = work(self._output)
        with self._lock:
            self._count += count
            self._left -= 1
            if not self._left:
                self._output.finish()
                name = self.shard.path.name
                self._synced = self._syncer.submit(note_shard, self._made, name, self._count)
        return size, count

    def _open(self) -> Output:
        path = self._made / self.shard.path.name
        path.unlink(missing_ok=True)  # of a run that was cut in it
        output = Output(path, self.shard.new_size)
        header = output.stretch(0)
        header.write(np.frombuffer(self.shard.new_header, dtype=np.uint8))
        header.close()
        return output

    def finished(self) -> int:
        """Wait until it is synced and noted; returns the edits' count."""
        self._synced.result()
        return self._count

    def close(self) -> None:
        """Close the file, where it is open."""
        if self._output is not None:
            self._output.close()


def _works(shard: Shard, edits: Edits, dtype: str | None) -> list[Work]:
    """What is to be done for the shard, each part by one thread."""
    edits = dict(edits)
    if dtype is not None:
        for name, about in shard.tensors:
            if name not in edits and about["dtype"] in floats.BITS and about["dtype"] != dtype:
                edits[name] = lambda a=about, n=name: Convert(a["dtype"], dtype, shard.path, n)
    works = [partial(_copy, shard.path, *run) for run in _untouched(shard, edits)]
    works += [partial(_edited, shard, name, edits) for name in shard.named(edits)]
    return works or [lambda output: (0, 0)]  # a file may hold no tensor


def _edited(shard: Shard, name: str, edits: Edits, output: Output | None) -> tuple[int, int]:
    """One tensor through its edit, block by block."""
    about = shard.about[name]
    if about["dtype"] not in floats.BITS:
        known = ", ".join(floats.BITS)
        what = f"{shard.path}: {name!r} is {about['dtype']}; a patch needs one of {known}."
        raise SpkitError(what)
    edit, width = edits[name](), floats.BITS[about["dtype"]]
    out = output.stretch(shard.new_places[name]) if output else None
    with shard.path.open("rb", buffering=0) as old:
        old.seek(shard.places[name])
        for _, length in blocks(prod(about["shape"])):
            size = length * width.itemsize
            data = _read_into(old, out.room(size) if out else memory(0, size))
            bits = edit.block(np.frombuffer(data, dtype=width))
            if out:
                out.write(bits.view(np.uint8))
    if out:
        out.close()
    return about["data_offsets"][1] - about["data_offsets"][0], edit.close()


class Convert:
    """The edit of a tensor that the patch does not touch, but that gets another dtype."""

    def __init__(self, dtype: str, out: str, path: Path, name: str):
        self.dtype, self.out, self.where = dtype, out, f"{path}: {name!r}"

    def block(self, bits: np.ndarray) -> np.ndarray:
        made, values = (
            floats.convert(bits, self.dtype, self.out),
            floats.to_float32(bits, self.dtype),
        )
        if (np.isfinite(values) & ~np.isfinite(floats.to_float32(made, self.out))).any():
            raise SpkitError(f"{self.where} has values that are too large for {self.out}.")
        return made

    def close(self) -> int:
        return 0


def _untouched(shard: Shard, edits: Edits) -> Iterator[tuple[int, int, int]]:
    """(first byte, number, place in the new file) of the longest runs of bytes without an edit."""
    run = None
    for name, about in shard.tensors:
        first, size = shard.places[name], about["data_offsets"][1] - about["data_offsets"][0]
        if name in edits:
            if run:
                yield run
            run = None
        else:
            begin, count, place = run or (first, 0, shard.new_places[name])
            run = (begin, count + size, place)
    if run:
        yield run


def _run(jobs: list[Job], workers: int, bar) -> int:
    """Do all jobs; returns the sum of their counts.

    After the first error, or Ctrl-C, those that have not begun are dropped.
    """
    failed = threading.Event()

    def guarded(job: Job) -> tuple[int, int]:
        if failed.is_set():
            return 0, 0
        try:
            return job()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(guarded, job) for job in jobs]
        total = 0
        try:
            for future in futures:
                done, count = future.result()
                bar.update(done)
                total += count
            return total
        except BaseException:
            failed.set()
            raise


def read_exactly(file, count: int) -> bytearray:
    """`count` bytes; SpkitError where the file ends before."""
    data = bytearray(count)
    _read_into(file, memoryview(data))
    return data


def _read_into(file, view: memoryview) -> memoryview:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise SpkitError(f"{file.name} has become shorter while it was read.")
        done += got
    return view


def _copy(source: Path, first: int, count: int, place: int, output: Output) -> tuple[int, int]:
    out = output.stretch(place)
    with source.open("rb", buffering=0) as old:
        old.seek(first)
        for start in range(0, count, CHUNK):
            data = _read_into(old, out.room(min(CHUNK, count - start)))
            out.write(np.frombuffer(data, dtype=np.uint8))
    out.close()
    return count, 0


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
