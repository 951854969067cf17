"""One process at a time: refused while another is in there, free as soon as that one is gone."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spkit.errors import SpkitError
from spkit.system import lock
from spkit.system.lock import locked, release, require_free, take

HOLD = """
import sys
from spkit.system.lock import take
take(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A process that holds the folder "run" until it is killed."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[2])}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_was_made_for_a_lock_is_gone_with_it(tmp_path):
    with lock.locked(tmp_path / "outputs" / "run" / "seed-0"):
        assert (tmp_path / "outputs" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with lock.locked(tmp_path / "there" / "run" / "seed-0"):
        (tmp_path / "there" / "run" / "kept").touch()
    assert (tmp_path / "there" / "run" / "kept").exists()
    with lock.locked(tmp_path / "there" / "seed-0"):
        pass
    assert (tmp_path / "there").is_dir()


def test_another_process_is_named_and_what_a_killed_one_leaves_is_no_lock(other, tmp_path):
    said = (
        rf"^run is in use by process {other.pid} on {re.escape(os.uname().nodename)}, since 20.*: "
        r"wait until it ends, or end it \(a notebook: shut down its kernel\), or choose another run"
    )
    for attempt in (lambda: take("run"), lambda: require_free("run")):
        with pytest.raises(SpkitError, match=said):
            attempt()
    with pytest.raises(SpkitError, match="is in use by"), locked("run"):
        raise AssertionError("entered")
    assert take("another") and not Path("run").exists()
    release("another")
    other.kill()
    other.wait()
    assert Path(".run.lock").is_file()
    require_free("run")
    with locked("run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.skipif(os.name != "posix", reason="hands an open file to a child")
def test_what_a_killed_process_has_started_still_holds_the_folder(tmp_path, monkeypatch):
    """Snakemake goes on after kill -9, and deletes what a second run made where its own fails."""
    monkeypatch.chdir(tmp_path)
    script = """
import subprocess, sys, time
from spkit.system.lock import handles, take
take("run")
child = subprocess.Popen(["sleep", "60"], pass_fds=handles())
print(child.pid, flush=True)
time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[2])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        said = (
            rf"in use by process {process.pid} on .* \(it was killed, and what it had started still"
        )
        with pytest.raises(SpkitError, match=said):
            take("run")
        os.kill(child, signal.SIGKILL)
    patience = time.monotonic() + 10
    while time.monotonic() < patience:  # until the system has seen it end
        try:
            require_free("run")
            break
        except SpkitError:
            time.sleep(0.02)
    assert take("run")
    release("run")


def test_a_lock_that_only_a_writer_gets_is_seen(other, monkeypatch):
    """As on NFS, where flock on a file that is open for reading is an error (EBADF)."""
    import fcntl

    real = fcntl.flock

    def as_on_nfs(handle, how):
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(handle, how)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with pytest.raises(SpkitError, match="is in use by"):
        require_free("run")


def test_a_folder_in_the_place_of_the_lock_is_one_sentence(tmp_path):
    lock.lock_file(tmp_path / "run").mkdir()
    with pytest.raises(SpkitError, match=r"cannot write .*\.run\.lock"):
        take(tmp_path / "run")
    require_free(tmp_path / "run")


def test_what_a_parent_holds_is_free_for_what_it_starts(other, monkeypatch):
    monkeypatch.setenv(lock.VARIABLE, os.pathsep.join(["/elsewhere", str(Path("run").resolve())]))
    require_free("run")
    with pytest.raises(SpkitError, match="is in use by"):
        take("run")


def test_a_process_may_take_its_own_again_and_keeps_it_to_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.environ.get(lock.VARIABLE)
    with locked("a/run"):
        assert os.environ[lock.VARIABLE].split(os.pathsep)[-1] == str(tmp_path / "a" / "run")
        with locked(tmp_path / "a" / "run"):
            require_free("a/run")
        assert not take("a/run") and lock.lock_file(tmp_path / "a" / "run").is_file()
    assert os.environ.get(lock.VARIABLE) == before
    assert take("a/run")
    release("a/run")
    release("a/run")


def test_where_no_lock_can_be_written_it_is_one_sentence(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(SpkitError, match="cannot write .*: a file stands where a folder should be"):
        take(tmp_path / "a" / "run")
