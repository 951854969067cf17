"""The starter of the processes, with small scripts in their place: news, failures, interrupts."""

import os
import sys
import time
from pathlib import Path

import pytest

from spkit.distributed import launch
from spkit.distributed.__main__ import FAILED
from spkit.errors import SpkitError
from spkit.system import accelerate_file, progress

BAR = '{"spkit": {"bar": {"desc": "ascent", "n": %d, "total": %d, "initial": 0, "unit": "step", '
BAR += '"postfix": "loss=1", "ended": %s}}}'


def script(text):
    return [sys.executable, "-c", text]


def test_the_command_is_accelerate_s_own(tmp_path):
    folder = Path(__file__).parents[2] / "profiles" / "accelerate"
    for name, torchrun in (("2-gpus", False), ("8-gpus-fsdp", False), ("2-processes-cpu", True)):
        path = folder / f"{name}.yaml"
        command = launch.command(accelerate_file.read("x", path), ["score", "a.yaml", "b"])
        assert command[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(path)]
        assert command[-5:] == ["-m", "spkit.distributed", "score", "a.yaml", "b"]
        assert ("--multi_gpu" in command) == torchrun


def test_news_come_in_order_and_all_else_goes_into_the_messages(tmp_path, monkeypatch, recwarn):
    made = []

    def bar(**how):
        made.append(progress.tqdm(**how, file=(tmp_path / "bar.txt").open("w")))
        return made[-1]

    monkeypatch.setattr(progress, "_made", bar)
    lines = [
        *('{"spkit": {"window": 0}}', "some library says so", BAR % (0, 8, "false")),
        *(BAR % (3, 8, "false"), BAR % (4, 4, "true"), '{"spkit": {"warning": "beware"}}'),
        '{"spkit": {"saved": true}}',
    ]
    text = f"import os, sys\nprint(os.environ['OMP_NUM_THREADS'])\nprint({chr(10).join(lines)!r})"
    found = list(launch.heard(script(text), tmp_path / "own", threads=3))
    assert found == [{"window": 0}, {"saved": True}]
    assert (tmp_path / "own" / "messages.txt").read_text().split("\n")[:2] == [
        *("3", "some library says so"),
    ]
    assert [str(warning.message) for warning in recwarn] == ["beware"]
    (shown,) = made
    assert (shown.desc, shown.n, shown.total, shown.disable) == ("ascent", 4, 4, True)


def test_the_reason_of_a_failed_process_is_one_sentence(tmp_path):
    told = '{"rank": 1, "sentence": "D_h is empty."}'
    fails = f"open({str(tmp_path / FAILED)!r}, 'w').write({told!r}); raise SystemExit(1)"
    with pytest.raises(SpkitError, match=r"^Process 1 failed: D_h is empty\. \(what .*messages"):
        list(launch.heard(script(fails), tmp_path))
    # the old reason is not taken for that of a process that was killed
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(SpkitError, match=r"^The processes ended by signal 9 without a reason"):
        list(launch.heard(script(killed), tmp_path))


WAITS = """
import json, os, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", '''
import os
while os.read(0, 1):  # as a process of spkit.distributed
    pass
'''], start_new_session=True)
print(json.dumps({"spkit": {"pids": [os.getpid(), inner.pid]}}), flush=True)
inner.wait()
time.sleep(60)
"""


def test_all_processes_end_when_the_reader_is_interrupted(tmp_path):
    """Ctrl-C in a cell, an error in it, a generator that is closed: also those that the launcher
    has started in sessions of their own, as torchrun does."""
    windows = launch.heard(script(WAITS), tmp_path)
    pids = next(windows)["pids"]
    with pytest.raises(KeyboardInterrupt):
        windows.throw(KeyboardInterrupt)
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
