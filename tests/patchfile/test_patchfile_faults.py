"""What a kill, a full disk, a flipped bit or a planted link leaves: never half a checkpoint.

Under the final name there is nothing, what was there before, or the whole right result; and the
same command, run again, ends right or names the file and the tensor.
"""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import plain
import pytest

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import INDEX, tensor_files
from spkit.patchfile import apply, output, revert, stream, verify
from spkit.patchfile.file import PatchFile
from spkit.patchfile.target import JOURNAL
from spkit.system import store

apply, revert = (partial(f, progress=False) for f in (apply.apply, revert.revert))
verify = partial(verify.verify, progress=False)
SHARDS = len(plain.SHAPES)
posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(backbone, patch, the files of the right result); none of them is written to."""
    root = tmp_path_factory.mktemp("good")
    backbone = plain.save(root / "backbone")
    patch = plain.patch(root / "patch.safetensors", backbone, revertible=True)
    apply(patch, backbone, root / "made")
    return backbone, patch, plain.contents(root / "made")


@pytest.fixture
def backbone(good, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(good[0], tmp_path / "backbone"))


@pytest.fixture
def patch(good, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copy(good[1], tmp_path / "patch.safetensors"))


@pytest.fixture
def written(monkeypatch):
    """The names of the shards that are written from now on."""
    names, whole = [], stream.Writing._open

    def begin(writing):
        names.append(writing.shard.path.name)
        return whole(writing)

    monkeypatch.setattr(stream.Writing, "_open", begin)
    return names


def leftover(target):
    return target.with_name(f".tmp-{target.name}")


def nth(n, error):
    """A function that raises at its n-th call, and otherwise does what `whole` does."""

    def around(whole):
        calls = []

        def call(*args, **options):
            calls.append(None)
            if len(calls) == n:
                raise error
            return whole(*args, **options)

        return call

    return around


# ---- killed --------------------------------------------------------------------------------------

KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
from threading import Lock
from traceback import print_exc

from spkit.patchfile import output, stream
from spkit.patchfile import target as target_folder
from spkit.patchfile.apply import apply
from spkit.system import store

output.LEAST = output.ALIGN  # small tensors go straight to the disk, too
patch, source, target, before = map(Path, sys.argv[1:5])
points = json.loads(sys.argv[5])
calls = written = 0
deadly, lock = None, Lock()
begin = stream.Writing._open


def half_write(file, data):
    file.write(memoryview(data)[: len(data) // 2])


def half_pages(handle, data, place):
    os.pwrite(handle, data[: len(data) // 2 // output.ALIGN * output.ALIGN], place)


def half_copy(old, new):
    data = Path(old).read_bytes()
    Path(new).write_bytes(data[: len(data) // 2])


def half_line(path, rows):
    line = store._lines(rows)
    with Path(path).open("ab") as file:
        file.write(line[: len(line) // 2])


def watched(owner, name, torn=None):
    whole = getattr(owner, name)

    def call(*args, **options):
        global calls
        with lock:
            calls += 1
            mine = calls
        if mine == deadly and mine % 2:
            if torn:
                torn(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*args, **options)
        if mine == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def counted(*args):
    global written
    written += 1
    return begin(*args)


stream.Writing._open = counted
watched(output, "_write_all", half_write)
watched(os, "pwrite", half_pages)
watched(target_folder, "_fsync")
watched(store, "append", half_line)
watched(store, "begin")
watched(shutil, "copyfile", half_copy)
watched(shutil, "rmtree")
watched(output, "_reserve")
watched(os, "replace")
for name in ("rename", "unlink", "mkdir"):
    watched(Path, name)


def run(point):
    '''(the signal that ended it, calls, shards written).'''
    global calls, deadly
    read, write = os.pipe()
    child = os.fork()
    if not child:
        calls, deadly = 0, point
        try:
            apply(patch, source, target, threads=2, overwrite=before.is_dir(), progress=False)
            os.write(write, json.dumps([calls, written]).encode())
        except BaseException:
            print_exc()
        os._exit(0)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    said = os.read(read, 100)
    os.close(read)
    return (os.WTERMSIG(status), *(json.loads(said) if said else (None, None)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reset():
    for path in target.parent.glob("*made*"):
        shutil.rmtree(path)
    if before.is_dir():
        shutil.copytree(before, target)


reset()
old = contents(target) if before.is_dir() else None
_, total, _ = run(None)
right = contents(target)
points = [round(point * total) if isinstance(point, float) else point for point in points]
found = []
for point in points:
    reset()
    killed, *_ = run(point)
    now = contents(target) if target.exists() else None
    state = "nothing" if now is None else "new" if now == right else "half"
    state = "old" if now is not None and now == old else state
    again, _, shards = run(None) if state != "new" or before.is_dir() else (0, 0, 0)
    left = sorted(path.name for path in target.parent.glob(".tmp-*"))
    done = contents(target) == right and not again and not left
    found.append([point, killed, state, shards, done])
assert "torch" not in sys.modules
print(json.dumps([total, found]))
"""


def kill(files, tmp_path, points, before="/nothing"):
    """(number of watched calls, [point, signal, state after it, shards the rerun wrote, right])."""
    backbone, patch = files
    command = [sys.executable, "-c", KILLER, patch, backbone, tmp_path / "made", before]
    command.append(json.dumps(points))
    one = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one)
    assert not done.returncode and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(backbone of twelve shards, a patch for every second one of them)."""
    root = tmp_path_factory.mktemp("many")
    weights = plain.weights({f"layer.{i}.weight": (90, 80) for i in range(12)})
    deltas = plain.deltas(weights, list(weights)[::2])
    backbone = plain.save(root / "backbone", weights)
    return backbone, plain.patch(root / "patch.safetensors", backbone, deltas)


@posix
def test_killed_at_fifty_points(many, tmp_path):
    """Before and after calls, and in the middle of a write, a copy and a journal's line."""
    total, found = kill(many, tmp_path, [(k + 1) / 50 for k in range(50)])  # of the whole run
    assert total >= 60 and len({point for point, *_ in found}) == 50
    for point, killed, state, _, right in found:
        assert killed == signal.SIGKILL, point
        assert state in ("nothing", "new") and right, (point, state)
    states = [state for _, _, state, _, _ in found]
    assert states[0] == "nothing"
    # the later the kill, the fewer shards are written again
    written = [shards for _, _, state, shards, _ in found if state == "nothing"]
    assert written[0] == 12 and min(written) <= 2 and len(set(written)) > 6


@posix
def test_killed_at_the_end_of_an_overwrite(many, tmp_path):
    """All calls from the last shard on: between the two renames the old state is only put aside."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "model.safetensors").write_bytes(b"of the run before")
    total, _ = kill(many, tmp_path, [1], before)
    _, found = kill(many, tmp_path, list(range(total - 14, total + 1)), before)
    for point, killed, state, _, right in found:
        assert killed == signal.SIGKILL and right, point
        assert state in ("old", "nothing", "new"), (point, state)
    states = [state for _, _, state, _, _ in found]
    assert states[0] == "old" and states[-1] == "new" and states.count("nothing") <= 2


def test_what_was_put_aside_comes_back(good, tmp_path):
    """Even to someone who did not ask for overwriting."""
    backbone, patch, _ = good
    aside = tmp_path / ".tmp-old-made"
    aside.mkdir()
    (aside / "mine").write_text("mine")
    with pytest.raises(SpkitError, match="made exists already"):
        apply(patch, backbone, tmp_path / "made")
    assert plain.contents(tmp_path / "made") == {"mine": b"mine"}
    assert os.listdir(tmp_path) == ["made"]


@posix
def test_interrupted_by_hand(good, tmp_path, monkeypatch, written):
    """Ctrl-C comes while the third shard is written."""
    backbone, patch, right = good
    whole = output._reserve

    def press(*args):
        whole(*args)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the main thread hears of it while this shard is on its way

    # a shell that runs the tests in the background has them ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(output, "_reserve", press)
            with pytest.raises(KeyboardInterrupt):
                apply(patch, backbone, tmp_path / "made", threads=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == [".tmp-made"]
    journal = (tmp_path / ".tmp-made" / JOURNAL).read_text().splitlines()[1:]
    done = [json.loads(line)["shard"] for line in journal]
    assert done[:2] == written[:2] and len(done) < SHARDS
    written.clear()
    apply(patch, backbone, tmp_path / "made")
    assert set(written) | set(done) == {path.name for path in tensor_files(backbone).values()}
    assert not set(written) & set(done)
    assert plain.contents(tmp_path / "made") == right
    assert os.listdir(tmp_path) == ["made"]


HALTED = """
import os, signal, sys
from spkit.patchfile import output
from spkit.patchfile.apply import apply
whole = output._reserve
def halt(*args):
    output._reserve = whole
    os.kill(os.getpid(), signal.SIGSTOP)
    whole(*args)
output._reserve = halt
apply(*sys.argv[1:], progress=False)
"""


@posix
def test_two_at_once(good, tmp_path):
    """The second one says so and disturbs nothing; the first one goes on."""
    backbone, patch, right = good
    made = tmp_path / "made"
    with subprocess.Popen([sys.executable, "-c", HALTED, patch, backbone, made]) as first:
        try:
            _, status = os.waitpid(first.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            there = plain.contents(leftover(made))
            for _ in range(2):
                with pytest.raises(SpkitError, match="another process is writing .*: wait"):
                    apply(patch, backbone, made)
            assert plain.contents(leftover(made)) == there
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert plain.contents(made) == right


# ---- a full disk ---------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PLACES = {  # (where, its name, the number of the call that fails, shards that are done by then)
    "room for a shard": (output, "_reserve", 3, 2),
    "a write": (output, "_write_all", 4, 1),
    "the journal": (store, "_lines", 3, 1),
    "the journal's beginning": (store, "_lines", 1, 0),
    "a configuration": (shutil, "copyfile", 1, 0),
    "the last step": (os, "replace", 2, 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk(place, good, tmp_path, monkeypatch, written):
    backbone, patch, right = good
    owner, name, call, done = PLACES[place]
    made = tmp_path / "made"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, nth(call, FULL)(getattr(owner, name)))
        with pytest.raises(SpkitError) as caught:
            apply(patch, backbone, made, threads=1)
    sentence = f"cannot write {made}: the disk is full; make room or access, or choose another"
    assert str(caught.value).startswith(sentence) and ".tmp-made" in str(caught.value)
    assert os.listdir(tmp_path) == [".tmp-made"]
    written.clear()
    apply(patch, backbone, made)
    assert len(written) <= SHARDS - done
    assert plain.contents(made) == right and os.listdir(tmp_path) == ["made"]


def test_not_enough_room_is_found_before_the_work(good, tmp_path, monkeypatch, written):
    backbone, patch, right = good
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9_000))
        with pytest.raises(SpkitError, match=r"made: \d\d,\d{3} bytes are needed and 9,000 are fr"):
            apply(patch, backbone, tmp_path / "made")
    assert not written and not (tmp_path / "made").exists()
    apply(patch, backbone, tmp_path / "made")
    assert plain.contents(tmp_path / "made") == right


LIMITED = """
import resource, sys
from spkit.errors import SpkitError
from spkit.patchfile.apply import apply
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    apply(*sys.argv[1:], threads=1, progress=False)
except SpkitError as error:
    sys.exit(str(error))
"""


@posix
def test_a_file_larger_than_allowed(good, tmp_path, written):
    """RLIMIT_FSIZE: the first shard fits, the second does not."""
    backbone, patch, right = good
    made = tmp_path / "made"
    command = [sys.executable, "-c", LIMITED, patch, backbone, made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    sentence = f"cannot write {made}: the file would be larger than is allowed here; make room"
    assert done.stderr.startswith(sentence) and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == [".tmp-made"]
    apply(patch, backbone, made)
    assert len(written) == SHARDS - 1 and plain.contents(made) == right


@pytest.mark.parametrize(
    "code, reason",
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission to write there"),
    ],
)
def test_a_target_that_is_read_only(code, reason, good, tmp_path, monkeypatch):
    backbone, patch, _ = good
    monkeypatch.setattr(os, "mkdir", nth(2, OSError(code, os.strerror(code)))(os.mkdir))
    with pytest.raises(SpkitError, match=f"cannot write {tmp_path}/made: {reason}; make room"):
        apply(patch, backbone, tmp_path / "made")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_is_read_only(good, tmp_path):
    backbone, patch, _ = good
    (tmp_path / "drive").mkdir(mode=0o555)
    with pytest.raises(SpkitError, match="no permission to write there"):
        apply(patch, backbone, tmp_path / "drive" / "made")


def test_a_target_below_a_file(good, tmp_path):
    backbone, patch, _ = good
    (tmp_path / "file").touch()
    with pytest.raises(SpkitError, match="a file stands where a folder should be"):
        apply(patch, backbone, tmp_path / "file" / "made")


# ---- going on ------------------------------------------------------------------------------------


def cut(good, tmp_path, monkeypatch, shards=3, **options):
    """A run that stops after so many shards; its target."""
    backbone, patch, _ = good
    with monkeypatch.context() as patched:
        patched.setattr(output, "_reserve", nth(shards + 1, FULL)(output._reserve))
        with pytest.raises(SpkitError, match="the disk is full"):
            apply(patch, backbone, tmp_path / "made", threads=1, **options)
    return tmp_path / "made"


def test_a_rerun_counts_what_the_cut_run_did(good, tmp_path, monkeypatch, written):
    backbone, patch, right = good
    whole = apply(patch, backbone, tmp_path / "other")
    made = cut(good, tmp_path, monkeypatch)
    written.clear()
    done = apply(patch, backbone, made)
    assert len(written) == SHARDS - 3
    assert (done.lost, done.kept, done.bytes) == (whole.lost, whole.kept, whole.bytes)
    assert done.lost > 0 and plain.contents(made) == right


def test_another_run_goes_on_from_nothing(good, tmp_path, monkeypatch, written):
    """Neither another patch, nor another dtype, nor another command, nor changed shards."""
    backbone, patch, right = good
    other = plain.patch(tmp_path / "other", backbone, plain.deltas(seed=7))
    touched = Path(shutil.copytree(backbone, tmp_path / "touched"))
    os.utime(tensor_files(touched)["a.weight"], ns=(0, 0))
    for command in (
        lambda made: apply(other, backbone, made),
        lambda made: apply(patch, backbone, made, dtype="float32"),
        lambda made: apply(patch, touched, made),
        lambda made: revert(patch, tmp_path / "done", made),
    ):
        if not (tmp_path / "done").exists():
            apply(patch, backbone, tmp_path / "done")
        made = cut(good, tmp_path, monkeypatch)
        written.clear()
        command(made)
        assert len(written) == SHARDS
        shutil.rmtree(made)
    made = cut(good, tmp_path, monkeypatch)
    written.clear()
    apply(patch, backbone, made)
    assert len(written) == SHARDS - 3 and plain.contents(made) == right


def test_a_finished_shard_that_is_not_as_it_was_is_written_again(good, tmp_path, monkeypatch):
    backbone, patch, right = good
    for change in (Path.unlink, lambda path: path.write_bytes(b"short")):
        made = cut(good, tmp_path, monkeypatch)
        change(sorted(leftover(made).glob("*.safetensors"))[0])
        apply(patch, backbone, made)
        assert plain.contents(made) == right
        shutil.rmtree(made)


def test_a_torn_journal(good, tmp_path, monkeypatch, written):
    """Cut anywhere, it names only what is whole."""
    backbone, patch, right = good
    made = cut(good, tmp_path, monkeypatch)
    journal = leftover(made) / JOURNAL
    kept = Path(shutil.copytree(leftover(made), tmp_path / "kept"))
    text = journal.read_bytes()
    for length in (0, 5, text.index(b"\n"), text.index(b"\n") + 9, len(text) - 1):
        shutil.rmtree(leftover(made), ignore_errors=True)
        shutil.copytree(kept, leftover(made))
        journal.write_bytes(text[:length])
        written.clear()
        apply(patch, backbone, made)
        whole = max(0, text[:length].count(b"\n") - 1)
        assert len(written) == SHARDS - whole
        assert plain.contents(made) == right
        shutil.rmtree(made)


# ---- planted -------------------------------------------------------------------------------------


def test_a_link_in_the_place_of_the_temporary_folder(good, tmp_path):
    backbone, patch, right = good
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    for to in (elsewhere, tmp_path / "nothing", elsewhere / "mine", backbone):
        made = tmp_path / "made"
        leftover(made).symlink_to(to)
        apply(patch, backbone, made)
        assert plain.contents(made) == right and not made.is_symlink()
        shutil.rmtree(made)
    assert plain.contents(elsewhere) == {"mine": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["elsewhere"]


def test_links_in_the_temporary_folder(good, tmp_path, monkeypatch):
    """A finished shard, one to come, the journal, a configuration and a folder, all links."""
    backbone, patch, right = good
    outside = tmp_path / "outside"
    outside.mkdir()
    made = cut(good, tmp_path, monkeypatch)
    folder = leftover(made)
    names = sorted(path.name for path in backbone.glob("*.safetensors"))
    for name in (names[0], names[-1], "config.json", JOURNAL):
        size = (folder / name).stat().st_size if (folder / name).is_file() else 10
        (outside / name).write_bytes(b"x" * size)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / name)
    (folder / "folder").symlink_to(outside)
    before = plain.contents(outside)
    apply(patch, backbone, made)
    assert plain.contents(outside) == before
    assert plain.contents(made) == right
    assert not any(path.is_symlink() for path in made.iterdir())


def test_a_journal_that_names_what_it_should_not(good, tmp_path, monkeypatch, written):
    backbone, patch, right = good
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"mine")
    made = cut(good, tmp_path, monkeypatch)
    names = sorted(path.name for path in backbone.glob("*.safetensors"))
    (leftover(made) / "foreign.safetensors").write_bytes(b"foreign")
    (leftover(made) / "folder").mkdir()
    rows = [
        {"shard": "../outside.safetensors", "size": 4, "count": 1},
        {"shard": str(outside), "size": 4, "count": 1},
        {"shard": "foreign.safetensors", "size": 7, "count": 1},
        {"shard": "folder", "size": -1, "count": 1},
        {"shard": [], "size": 4, "count": 1},
        {"shard": names[-1]},
        {"shard": names[-1], "size": "4", "count": None},
        {"shard": names[-1], "size": -1, "count": 0},
        {},
    ]
    store.append(leftover(made) / JOURNAL, rows)
    written.clear()
    apply(patch, backbone, made)
    assert len(written) == SHARDS - 3
    assert plain.contents(made) == right
    assert outside.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["made", "outside.safetensors"]


@posix
def test_a_lock_that_is_held_is_respected(good, tmp_path):
    backbone, patch, right = good
    made = tmp_path / "made"
    leftover(made).mkdir()
    handle = os.open(leftover(made), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(SpkitError, match="another process is writing"):
        apply(patch, backbone, made)
    assert leftover(made).is_dir() and not made.exists()
    os.close(handle)
    apply(patch, backbone, made)
    assert plain.contents(made) == right


# ---- damaged patches -----------------------------------------------------------------------------


def regions(path):
    """{region: positions in it}: the length, the header, and each part of each tensor."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    manifest = raw.index(b"spkit-patch", 8)
    found = {"length": range(8), "head": range(8, manifest, 3)}
    found["manifest"] = range(manifest, start - 1, 23)
    found["end of the header"] = range(start - 150, start)
    header = json.loads(raw[8:start])
    for name, about in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in about["data_offsets"])
            found[name] = sorted({first, first + 5, (first + last) // 2, last - 1})
    return found


def refused(path, sentence, backbone, there):
    """SpkitError that begins with the file's name, and nothing new in its folder."""
    made = path.parent / "made"
    with pytest.raises(SpkitError, match=sentence) as caught:
        apply(path, backbone, made)
    assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()
    assert sorted(os.listdir(path.parent)) == there


def test_a_flipped_bit_anywhere_in_a_patch(good, tmp_path):
    backbone, patch, _ = good
    draw, raw = random.Random(0), patch.read_bytes()
    path, seen = tmp_path / "patch.safetensors", 0
    for region, places in regions(patch).items():
        for place in places:
            for bit in range(8) if region == "length" else [draw.randrange(8)]:
                damaged = bytearray(raw)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                sentence = "cannot be read as a patch: "
                if region.endswith((".positions", ".values", ".replaced", ".originals")):
                    sentence = f"tensor '{region.rsplit('.', 1)[0]}': "
                refused(path, sentence, backbone, [path.name])
                seen += 1
    assert seen > 300


def test_a_truncated_or_longer_patch(good, tmp_path):
    backbone, patch, _ = good
    raw, path = patch.read_bytes(), tmp_path / "patch.safetensors"
    start = 8 + int.from_bytes(raw[:8], "little")
    lengths = [0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(raw) - 1]
    for length in [*lengths, *range(start, len(raw), 997)]:
        path.write_bytes(raw[:length])
        refused(path, "cannot be read as a patch: ", backbone, [path.name])
    for more in (b"\0", raw):
        path.write_bytes(raw + more)
        refused(path, r"it has \d+ bytes of data, \d+ expected", backbone, [path.name])


def test_parts_that_were_swapped(good, tmp_path):
    """Two frames of the same length, each right in itself, in each other's place."""
    backbone, patch, _ = good
    raw = bytearray(patch.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8:start]))
    first, last = header["a.weight.originals"]["data_offsets"]
    with PatchFile(patch) as opened:
        sizes = opened.manifest.tensors["a.weight"].blocks[0].originals
    middle = start + first + sizes[0]
    one, two = bytes(raw[start + first : middle]), bytes(raw[middle : start + last])
    raw[start + first : start + last] = two + one
    path = tmp_path / "patch.safetensors"
    path.write_bytes(raw)
    refused(path, "tensor 'a.weight': ", backbone, [path.name])


def test_a_patch_that_becomes_shorter_while_it_is_read(good, patch, tmp_path, monkeypatch):
    backbone, made = good[0], tmp_path / "made"

    def shorten(*args):
        os.truncate(patch, patch.stat().st_size // 2)

    monkeypatch.setattr(output, "_reserve", shorten)
    with pytest.raises(SpkitError, match=f"^{patch}, tensor '.*': the file has become shorter"):
        apply(patch, backbone, made)
    assert os.listdir(tmp_path) == [patch.name]


# ---- damaged backbones ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.weight", "embed.weight"])
def test_a_flipped_bit_in_the_header_of_a_shard(name, good, backbone, tmp_path):
    """Found, or of no meaning to the patch and then copied as it is."""
    _, patch, right = good
    shard, made, draw = tensor_files(backbone)[name], tmp_path / "made", random.Random(0)
    raw, found = shard.read_bytes(), 0
    start = 8 + int.from_bytes(raw[:8], "little")
    for place in range(start):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        shard.write_bytes(damaged)
        try:
            apply(patch, backbone, made)
        except SpkitError as error:
            assert str(shard) in str(error) or str(backbone) in str(error)
            assert repr(name) in str(error) or str(shard) in str(error)
            found += 1
        else:
            assert (made / shard.name).read_bytes() == damaged[:start] + right[shard.name][start:]
            shutil.rmtree(made)
        assert os.listdir(tmp_path) == ["backbone"]
    assert found > 0.7 * start


def test_a_flipped_bit_in_a_touched_tensor(good, backbone, tmp_path):
    _, patch, _ = good
    for name in plain.TOUCHED:
        shard = tensor_files(backbone)[name]
        raw = shard.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for place in (start, start + 1, (start + len(raw)) // 2, len(raw) - 2, len(raw) - 1):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << (place % 8)
            shard.write_bytes(damaged)
            with pytest.raises(SpkitError, match=f"^{patch}, tensor '{name}': "):
                apply(patch, backbone, tmp_path / "made")
            assert os.listdir(tmp_path) == ["backbone"]
        shard.write_bytes(raw)


def test_a_flipped_bit_elsewhere_is_found_by_verify(good, backbone, tmp_path):
    """The patch knows the tensors that it touches; for the others one needs the right backbone."""
    original, patch, _ = good
    shard, made = tensor_files(backbone)["a.norm"], tmp_path / "made"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 4
    shard.write_bytes(raw)
    apply(patch, backbone, made)
    assert (made / shard.name).read_bytes() == raw
    (no,) = [finding for finding in verify(patch, original, made).findings if finding.ok is False]
    assert no.detail == f"{made / shard.name}: 'a.norm' differs from the backbone's"


@pytest.mark.parametrize("name", ["a.weight", "embed.weight"])
def test_a_truncated_shard(name, good, backbone, tmp_path):
    _, patch, _ = good
    shard = tensor_files(backbone)[name]
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for length in (0, 3, 8, start - 1, start, start + 1, len(raw) // 2, len(raw) - 1):
        shard.write_bytes(raw[:length])
        with pytest.raises(SpkitError, match=f"^{shard} is no intact safetensors file: "):
            apply(patch, backbone, tmp_path / "made")
        assert os.listdir(tmp_path) == ["backbone"]


@pytest.mark.parametrize("name", ["a.weight", "embed.weight"])
def test_a_shard_that_becomes_shorter_while_it_is_read(name, good, backbone, tmp_path, monkeypatch):
    _, patch, _ = good
    shard = tensor_files(backbone)[name]

    def shorten(*args):
        if shard.stat().st_size > 1000:
            os.truncate(shard, 1000)

    monkeypatch.setattr(output, "_reserve", shorten)
    with pytest.raises(SpkitError, match=f"^{shard} has become shorter while it was read"):
        apply(patch, backbone, tmp_path / "made")
    assert os.listdir(tmp_path) == ["backbone"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": 1}', b"\xff", b"null"])
def test_a_damaged_index(text, good, backbone, tmp_path):
    _, patch, _ = good
    (backbone / INDEX).write_bytes(text)
    with pytest.raises(SpkitError, match=f"^{backbone} is no checkpoint in safetensors files"):
        apply(patch, backbone, tmp_path / "made")
    assert os.listdir(tmp_path) == ["backbone"]


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b'{"dtype": NaN}'])
def test_a_damaged_config(text, good, backbone, tmp_path):
    """It is copied, for the weights decide, unless its dtype has to be changed."""
    _, patch, right = good
    (backbone / "config.json").write_bytes(text)
    with pytest.raises(SpkitError, match="config.json of the checkpoint is no JSON object"):
        apply(patch, backbone, tmp_path / "made", dtype="float32")
    assert os.listdir(tmp_path) == ["backbone"]
    apply(patch, backbone, tmp_path / "made")
    assert plain.contents(tmp_path / "made") == right | {"config.json": text}


def test_damage_to_a_patched_checkpoint_is_found_when_it_is_taken_back(good, tmp_path):
    backbone, patch, right = good
    made = tmp_path / "made"
    apply(patch, backbone, made)
    for name in plain.TOUCHED:
        shard = tensor_files(made)[name]
        raw = bytearray(shard.read_bytes())
        raw[-3] ^= 1
        shard.write_bytes(raw)
        with pytest.raises(
            SpkitError, match=f"^{patch}, tensor '{name}': the checkpoint's weights"
        ):
            revert(patch, made, tmp_path / "back")
        shard.write_bytes(right[shard.name])
    assert os.listdir(tmp_path) == ["made"]
    revert(patch, made, tmp_path / "back")
    assert plain.contents(tmp_path / "back") == plain.contents(backbone)
