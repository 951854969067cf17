"""Fuzz the readers of patch files and checkpoints: thousands of wrong files, each one numbered.

    python tests/patchfile/fuzz_patchfile.py --files 20000 --seed 0
    python tests/patchfile/fuzz_patchfile.py --seed 0 --only 4711 --keep found    one file, kept

A case is a function of (seed, number) alone, so what is found can be replayed: `random.Random`
chooses, because it gives the same sequence everywhere. hypothesis looks for new examples and
shrinks them; it gives neither numbers nor the same 200,000 files twice (test_fuzz.py uses it on
single functions). Other releases of zstd may pack other bytes.

On each case (fuzz_cases.py) run PatchFile.check, apply, verify and revert. They may succeed or
raise SpkitError. Everything else is a finding:

    another exception, a warning, no end in LIMIT seconds, a process that dies
    more memory than BOUND above that of an idle process, or memory that could not be had
    a file made, changed or opened for writing outside of the target; a socket, process or pickle
    something under the target's name after an error
    a result that is not what the manifest promises, has new NaNs, or that safetensors cannot read
    positions or values that were let through though they are out of order or range
    an intact case that is refused; an error of more than a page, or with control characters

What this file does not do: kill processes or fill disks, as tests/test_patchfile*.py do. Nothing is
synced here (os.fsync does nothing): that is not the parser's part, and it would take most time.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import safetensors
import zstandard
from blake3 import blake3
from fuzz_cases import (
    NOWHERE,
    PARTS,
    SINGLE,
    Case,
    assemble,
    body_of,
    make_case,
    shard,
    split,
    valid_patches,
    write,
)
from tqdm import tqdm

from spkit.errors import SpkitError
from spkit.patchfile import encoding, file, floats
from spkit.patchfile.apply import apply
from spkit.patchfile.revert import revert
from spkit.patchfile.verify import Verified, verify

LIMIT = 10  # seconds for a case (of hundreds of thousands of blocks: more); then its process ends
BOUND = 512 * 2**20  # bytes above an idle process
LONGEST_MESSAGE = 4_000


# ---- one run -------------------------------------------------------------------------------------


class Hang(BaseException):
    """Raised by the alarm; no handler of the kit catches it."""


FORBIDDEN = (
    "socket.",
    "subprocess.",
    "pickle.",
    "os.exec",
    "os.system",
    "os.posix_spawn",
    "os.fork",
)
ONE_PATH = (
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.utime",
    "os.symlink",
)


class Guard:
    """Watches, through Python's audit events, what is written where while a case runs."""

    hooked: "Guard | None" = None

    def __init__(self, allowed: Path):
        self.allowed, self.active, self.seen = os.path.realpath(allowed), False, []
        if Guard.hooked is None:
            sys.addaudithook(lambda event, args: Guard.hooked._event(event, args))
        Guard.hooked = self

    def _event(self, event: str, args) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = args
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if isinstance(flags, int) and flags & writing:
                self._check(event, path)
        elif event in ONE_PATH:
            if args[-1] == -1 or not isinstance(args[-1], int):  # else relative to a watched folder
                self._check(event, args[1] if event == "os.symlink" else args[0])
        elif event in ("os.rename", "os.link"):
            self._check(event, args[0])
            self._check(event, args[1])
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r:.100}")

    def _check(self, event: str, path) -> None:
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if event in ("open", "os.truncate"):
            place = os.path.realpath(path)
        else:  # the name itself is made or removed, not what it points to
            place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if place != self.allowed and not place.startswith(self.allowed + os.sep):
            self.seen.append(f"{event} {place}")


class Box:
    """A folder to run cases in: inputs, a target's place, and baits around it.

    valid/<n>/          the backbones; valid/<n>-patched: what their patches make
    case/               the patch, and a backbone that differs
    outside/            what links and names try to reach
    out/target          the one place that may change (and temporary names beside it)
    """

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        self.target = self.out / "target"
        self.case = root / "case"
        self.out.mkdir(parents=True)
        self.case.mkdir()
        write(root / "outside", {"bait.safetensors": shard({"x": ("U8", [1], b"x")})})
        for number, valid in enumerate(valid_patches()):
            write(root / "valid" / str(number), valid.backbone)
            patch = self.case / "patch.safetensors"
            patch.write_bytes(assemble(valid.tree, body_of(valid.tree, valid.frames)))
            made = root / "valid" / f"{number}-patched"
            apply(patch, root / "valid" / str(number), made, progress=False, threads=1)
        self.guard = Guard(self.out)

    def fill(self, case: Case) -> tuple[Path, Path]:
        """(the patch's path, the backbone's folder)."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        write(self.case, {"patch.safetensors": case.patch})
        backbone = self.root / "valid" / str(case.valid)
        if case.changed:
            backbone = self.case / "backbone"
            write(backbone, case.backbone)
        if case.write and case.leftover:
            self._leftover(case.leftover)
        return self.case / "patch.safetensors", backbone

    def _leftover(self, kind: str) -> None:
        temporary = self.out / ".tmp-target"
        if kind == "link":
            temporary.symlink_to(self.root / "outside")
        elif kind == "file":
            temporary.write_bytes(b"x")
        elif kind == "old":
            (self.out / ".tmp-old-target").symlink_to(self.root / "outside")
        else:
            temporary.mkdir()
            for name in (
                "spkit-journal.jsonl",
                SINGLE,
                "model-00001-of-00002.safetensors",
                "LICENSE",
            ):
                if kind == "inside":
                    (temporary / name).symlink_to(self.root / "outside" / "bait.safetensors")
                else:
                    (temporary / name).write_bytes(b"\0" * 64)

    def snapshot(self) -> dict[str, tuple]:
        """Everything but the target's place, so that a change is seen."""
        found = {}
        folders = [str(self.root)]
        while folders:
            for entry in os.scandir(folders.pop()):
                about = entry.stat(follow_symlinks=False)
                if entry.path == str(self.out):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    found[entry.path] = (about.st_ino, about.st_mode)
                else:
                    found[entry.path] = (about.st_ino, about.st_size, about.st_mtime_ns)
        return found


@dataclass(frozen=True)
class Outcome:
    """accepted: by apply; message: why not. peak: bytes above an idle process."""

    accepted: bool
    message: str
    findings: tuple[str, ...]
    seconds: float
    peak: int


def run_case(case: Case, box: Box, base: int = 0) -> Outcome:
    """Run everything on one case. base: bytes that the idle process holds."""
    patch, backbone = box.fill(case)
    case.findings.clear()
    before = box.snapshot()
    _reset_peak()
    begun = time.perf_counter()
    box.guard.seen.clear()
    box.guard.active = True
    previous = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, LIMIT * case.patience)
    accepted, message = False, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ResourceWarning)
            accepted, message = _calls(case, box, patch, backbone)
    except Hang:
        case.findings.append(f"no end in {LIMIT * case.patience} seconds")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        box.guard.active = False
    seconds = time.perf_counter() - begun
    peak = max(0, _peak() - base)
    if peak > BOUND:
        case.findings.append(f"{peak / 2**20:.0f} MiB of memory")
    case.findings += [f"outside of the target: {event}" for event in box.guard.seen]
    after = box.snapshot()
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            case.findings.append(f"changed: {path}")
    if os.path.lexists(NOWHERE):
        case.findings.append(f"made: {NOWHERE}")
    if case.intact and not (accepted or _rightly_refused(case, message)):
        case.findings.append(f"an intact patch is refused: {message}")
    return Outcome(accepted, message, tuple(dict.fromkeys(case.findings)), seconds, peak)


def _calls(case: Case, box: Box, patch: Path, backbone: Path) -> tuple[bool, str]:
    """(whether apply went through, else its message); findings go into the case."""
    how = {"threads": 1, "progress": False}
    whole = _try(case, "check", _check, patch)
    target = box.target if case.write else None
    if target is not None and case.overwrite:
        target.mkdir()
        (target / "old.safetensors").write_bytes(b"old")
    applied = _try(
        case,
        "apply",
        lambda: apply(patch, backbone, target, dtype=case.dtype, overwrite=case.overwrite, **how),
    )
    accepted = not isinstance(applied, str)
    if accepted and isinstance(whole, str):
        case.findings.append(f"applied, though check says: {whole}")
    if target is not None:
        if accepted:
            case.findings += _wrong_result(case, backbone, target)
        else:
            old = [path.name for path in target.iterdir()] if target.exists() else []
            if old != (["old.safetensors"] if case.overwrite else []):
                case.findings.append(f"under the target's name after an error: {old}")
    checkpoint = {"patched": box.root / "valid" / f"{case.valid}-patched", "backbone": backbone}
    checkpoint["result"] = target if accepted else None
    other = checkpoint.get(case.checkpoint)
    verified = _try(case, "verify", lambda: verify(patch, None, **how))
    _say(case, verified)
    if other is not None:
        _say(case, _try(case, "verify", lambda: verify(patch, None, other, **how)))
    verified = _try(case, "verify", lambda: verify(patch, backbone, other, **how))
    _say(case, verified)
    if accepted and isinstance(verified, Verified) and not verified.findings[0].ok:
        case.findings.append(f"applied, though verify says: {verified}")
    right = case.checkpoint == "result" and other is not None or case.intact and other is None
    known = verified.ok if isinstance(verified, Verified) else "config.json" in str(verified)
    if right and accepted and not known:
        case.findings.append(f"verify does not know its own result: {verified}")
    if accepted and target is not None and case.dtype is None:
        back = _try(case, "revert", lambda: revert(patch, target, None, **how))
        if case.intact and isinstance(back, str) and "not made revertible" not in back:
            case.findings.append(f"an intact patch cannot be taken back: {back}")
        _try(case, "revert", lambda: revert(patch, target, None, backbone=backbone, **how))
    return accepted, applied if isinstance(applied, str) else ""


def _try(case: Case, what: str, call: Callable, *args):
    """The result, or the message of a SpkitError; anything else is a finding."""
    try:
        return call(*args)
    except SpkitError as error:
        cause = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                case.findings.append(f"{what}: memory that could not be had")
            cause = cause.__context__
        _check_message(case, str(error))
        return str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        case.findings.append(f"{what}: {type(error).__name__} at {where}: {error!s:.200}")
        return f"{type(error).__name__}"


def _check_message(case: Case, text: str) -> None:
    if len(text) > LONGEST_MESSAGE:
        case.findings.append(f"a message of {len(text):,} characters: {text:.200}")
    if not text.replace("\n", "").isprintable():
        case.findings.append(f"a message with control characters: {text!r:.300}")


def _say(case: Case, verified) -> None:
    if isinstance(verified, Verified):
        for finding in verified.findings:
            _check_message(case, finding.detail)


def _check(path: Path) -> None:
    """PatchFile.check, and once more what it promises, in other words."""
    with file.PatchFile(path) as patch:
        patch.check()
        for name, matrix in patch.manifest.tensors.items():
            places = encoding.blocks(matrix.weights)
            for kept, block, (_, length) in zip(
                patch.kept(name), matrix.blocks, places, strict=True
            ):
                positions = kept.positions.astype(np.int64)
                assert len(positions) == len(kept.deltas) == block.kept, "another count"
                assert (np.diff(positions) > 0).all(), "positions that do not ascend"
                assert not len(positions) or positions[-1] < length, "range"
                assert np.isfinite(kept.deltas).all(), "a value that is not finite"
                chosen = kept.replaced[0].astype(np.int64)
                assert len(chosen) == block.exceptions and (np.diff(chosen) > 0).all(), "replaced"
                assert not len(chosen) or chosen[-1] < block.kept, "replaced"
        if sum(matrix.size("values") for matrix in patch.manifest.tensors.values()) < 2**20:
            _check_frames(path, patch)


def _check_frames(path: Path, patch: file.PatchFile) -> None:
    """Another reader of zstd (as a stream) finds one frame each, and nothing behind it."""
    _, body = split(path.read_bytes())
    end = 0
    for matrix in patch.manifest.tensors.values():
        for part in (part for part in PARTS if part in matrix.sha256):
            for block in matrix.blocks:
                for size in block.frames(part):
                    reader = zstandard.ZstdDecompressor(max_window_size=2**26).decompressobj()
                    reader.decompress(body[end : end + size])
                    assert reader.eof and not reader.unused_data, "not one whole frame"
                    end += size


def _tensors(folder: Path) -> dict[tuple[str, str], tuple[str, list[int], bytes]]:
    """{(file, tensor): (dtype, shape, bytes)}, without the kit's own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file():
            text, body = split(path.read_bytes())
            for name, about in json.loads(text).items():
                if name != "__metadata__":
                    data = body[slice(*about["data_offsets"])]
                    found[path.name, name] = (about["dtype"], about["shape"], data)
    return found


def _wrong_result(case: Case, backbone: Path, target: Path) -> list[str]:
    """What is wrong with a checkpoint that apply has written."""
    wrong = []
    out = None if case.dtype is None else floats.TORCH_NAMES[case.dtype]
    text = json.loads(split(case.patch)[0])["__metadata__"]["spkit_patch"]
    matrices = json.loads(text)["tensors"]
    made = _tensors(target)
    for path in target.glob("*.safetensors"):
        if _readable(backbone / path.name) and not _readable(path):
            wrong.append(f"safetensors cannot read the result {path.name}")
    for path in target.iterdir():
        if not stat.S_ISREG(path.lstat().st_mode):
            wrong.append(f"no regular file in the result: {path.name}")
    given = {key: value for key, value in _tensors(backbone).items() if (target / key[0]).exists()}
    if given.keys() != made.keys():
        wrong.append(f"other tensors: {sorted(given.keys() ^ made.keys())}")
    for (path, name), (dtype, shape, data) in given.items():
        new_dtype, new_shape, new = made.get((path, name), ("", [], b""))
        if new_shape != shape or new_dtype != (out if out and dtype in floats.BITS else dtype):
            wrong.append(f"{name!r} is {new_dtype} {new_shape}")
        elif dtype not in floats.BITS or (name not in matrices and new_dtype == dtype):
            if new != data:
                wrong.append(f"{name!r} was changed")
        else:
            promised = name in matrices and out is None
            if promised and blake3(new).hexdigest() != matrices[name]["after"]:
                wrong.append(f"{name!r} is not what the manifest promises")
            old, now = _finite(data, dtype), _finite(new, new_dtype)
            if (old & ~now).any():
                wrong.append(f"{name!r} has {(old & ~now).sum()} new values that are not finite")
    return wrong


def _finite(data: bytes, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.isfinite(floats.to_float32(np.frombuffer(data, floats.BITS[dtype]), dtype))


def _readable(path: Path) -> bool:
    try:
        safetensors.deserialize(path.read_bytes())
        return True
    except (OSError, safetensors.SafetensorError):
        return False


def _rightly_refused(case: Case, message: str) -> bool:
    """Intact, and yet no: its weights of 1e5 are none in 16 bits of which 5 are the exponent."""
    return case.dtype == "float16" and "single" in case.what and "F16" in message


def _alarm(*_) -> None:
    raise Hang


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # else it is the peak of all cases so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    try:
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- many runs -----------------------------------------------------------------------------------


@dataclass
class Summary:
    """What came of many cases. refused: {kind of message: how often}; findings: by number."""

    files: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    findings: dict[int, tuple[str, ...]] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    peak: tuple[int, int] = (0, -1)

    def add(self, number: int, outcome: Outcome) -> None:
        self.files += 1
        self.accepted += outcome.accepted
        if not outcome.accepted:
            self.refused[kind_of(outcome.message)] += 1
        if outcome.findings:
            self.findings[number] = outcome.findings
        self.slowest = max(self.slowest, (outcome.seconds, number))
        self.peak = max(self.peak, (outcome.peak, number))

    def __str__(self) -> str:
        lines = [
            f"files      {self.files:>9,}",
            f"accepted   {self.accepted:>9,}",
            f"refused    {self.files - self.accepted:>9,}",
        ]
        lines += [f"  {count:>9,}  {kind}" for kind, count in self.refused.most_common(40)]
        rest = self.refused.most_common()[40:]
        if rest:
            lines.append(f"  {sum(c for _, c in rest):>9,}  (of {len(rest)} other kinds)")
        lines += [
            f"slowest    {self.slowest[0]:>9.2f} s (number {self.slowest[1]})",
            f"memory     {self.peak[0] / 2**20:>9.0f} MiB above an idle process "
            f"(number {self.peak[1]}; bound {BOUND // 2**20})",
            f"findings   {len(self.findings):>9,}",
        ]
        return "\n".join(lines)


def kind_of(message: str) -> str:
    """The first words of a message, without what is different each time."""
    text = re.sub(r"/\S*/(case|valid|out|outside)(/\S*)?", "", message)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"\[[^\]]*\]|-?\d[\d,.e+]*", "N", text)
    for words in ("cannot be read as a patch:", "is no checkpoint in safetensors files:"):
        text = text.split(words)[-1]
    return " ".join(text.strip(" :,").split())[:64]


def run_many(
    seed: int, numbers: Iterable[int], workers: int = 2, keep: Path | None = None, progress=True
) -> Summary:
    """Run these cases; 0 workers: in this process."""
    numbers, summary = list(numbers), Summary()
    with (
        tempfile.TemporaryDirectory(prefix="spkit-fuzz-") as root,
        tqdm(total=len(numbers), unit="file", disable=not progress, smoothing=0.01) as bar,
    ):

        def add(number: int, outcome: Outcome) -> None:
            summary.add(number, outcome)
            bar.update()
            for finding in outcome.findings:
                tqdm.write(f"{number}: {finding}")
            if outcome.findings and keep:
                with contextlib.suppress(Exception):  # as it stands in the findings then
                    keep_case(seed, number, outcome.findings, keep)

        if not workers:
            box = Box(Path(root, "box"))
            for number in numbers:
                add(number, run_case(make_case(seed, number), box, _resident()))
        else:
            _run_processes(seed, numbers, workers, Path(root), add)
    return summary


def _run_processes(seed: int, numbers: list[int], workers: int, root: Path, add) -> None:
    """Each worker has every n-th number; one that dies is a finding, and another goes on."""
    context = multiprocessing.get_context("spawn")
    running = {}

    def start(rest: list[int], name: str) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, seed, rest, root / name), daemon=True)
        process.start()
        theirs.close()
        running[ours] = (process, rest, name)

    for i in range(workers):
        start(numbers[i::workers], str(i))
    while running:
        for connection in wait(list(running)):
            process, rest, name = running[connection]
            try:
                number, outcome = connection.recv()
                assert number == rest.pop(0)
                add(number, outcome)
            except EOFError:
                process.join()
                del running[connection]
                if rest and process.exitcode:
                    what = f"the process ended with {process.exitcode} (a crash, or no end)"
                    add(rest.pop(0), Outcome(False, what, (what,), 0.0, 0))
                if rest:
                    start(rest, f"{name}+")


def _work(connection, seed: int, numbers: list[int], root: Path) -> None:
    import resource

    os.fsync = lambda handle: None
    sys.dont_write_bytecode = True
    box = Box(root)
    run_case(make_case(seed, 0), box)  # whatever is loaded late is loaded now
    base = _resident()
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    limit = mapped + 8 * BOUND  # address space, much of which threads reserve and never use
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        try:
            case = make_case(seed, number)
        except Exception as error:  # a fault of the fuzzer ends no long run, and is not passed over
            what = f"the case cannot be made: {error!r}"
            connection.send((number, Outcome(False, what, (what,), 0.0, 0)))
            continue
        if number % 256 == 0:
            gc.collect()
        faulthandler.dump_traceback_later(2 * LIMIT * case.patience, exit=True)
        outcome = run_case(case, box, base)
        faulthandler.cancel_dump_traceback_later()
        connection.send((number, outcome))
    connection.close()


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def keep_case(seed: int, number: int, findings: Iterable[str], folder: Path) -> None:
    """The patch, its backbone, and what was found, in a folder of its own."""
    case, place = make_case(seed, number), Path(folder) / f"{seed}-{number}"
    write(place / "backbone", case.backbone)
    write(place / "patch", {"patch.safetensors": case.patch})
    about = replace(case, patch=b"", backbone={}, findings=list(findings))
    (place / "about.txt").write_text(f"{about}\n" + "\n".join(findings) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for cases with findings")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases to run again")
    options = parser.parse_args()
    begun = time.perf_counter()
    numbers = options.only if options.only else range(options.files)
    workers = min(options.workers, len(numbers))
    summary = run_many(options.seed, numbers, workers, options.keep)
    print(f"seed       {options.seed:>9}")
    print(summary)
    print(f"seconds    {time.perf_counter() - begun:>9.0f} ({workers} processes)")
    for number, findings in sorted(summary.findings.items()):
        print(f"{number}: " + "; ".join(findings))
    return 1 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())
