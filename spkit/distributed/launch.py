"""Start the processes of an Accelerate config file, hear from them, and end them all together.

    for news in heard(command(file, ["derive", ...]), folder):     {"window": 3}, {"saved": True}

Progress bars and warnings of the first process are shown here. Where one process fails, all end,
and its reason is one SpkitError. An interrupt here (Ctrl-C, a stopped cell) ends them, too; where
this process is killed, they find their input closed and end by themselves.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spkit.distributed.__main__ import FAILED
from spkit.errors import SpkitError
from spkit.system import progress
from spkit.system.accelerate_file import AccelerateFile

MESSAGES = "messages.txt"  # what libraries print
GRACE = 20  # seconds to end in, before they are killed


def command(file: AccelerateFile, arguments: Sequence[str]) -> list[str]:
    """`accelerate launch` with this file, and spkit.distributed in each process."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file.path)]
    launch += ["--main_process_port", "0"]  # any that is free: other runs may be on this machine
    if file.on_cpu and not file.sharded and file.processes > 1:
        launch.append("--multi_gpu")  # with torchrun: for MULTI_CPU it would ask for MPI
    return [*launch, "-m", "spkit.distributed", *arguments]


def heard(command: Sequence[str], folder: Path, threads: int | None = None) -> Iterator[dict]:
    """What the processes tell, in order, but for bars and warnings; all have ended at the end.

    folder: theirs; what they print is in its messages.txt. threads: of each on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    bars = Bars()
    with (folder / MESSAGES).open("w", encoding="utf-8") as messages:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": messages}
        started = subprocess.Popen(
            command, **pipes, env=_environment(threads), text=True, start_new_session=True
        )
        try:
            for line in started.stdout:
                news = _news(line)
                if news is None:
                    messages.write(line)
                elif "bar" in news:
                    bars.show(news["bar"])
                elif "warning" in news:
                    warnings.warn(news["warning"], stacklevel=2)
                else:
                    yield news
            code = started.wait()
        finally:
            _end(started)
            bars.close()
    if code:
        raise SpkitError(_why(folder, code))


def _environment(threads: int | None) -> dict[str, str]:
    """This process's, with this spkit first on the path and so many threads a process."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return found if threads is None else {**found, "OMP_NUM_THREADS": str(threads)}


def _news(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)["spkit"]
    except (ValueError, KeyError, TypeError):
        return None


def _end(started: subprocess.Popen) -> None:
    """All processes: each ends where its input does, and the launcher when it is told to."""
    for pipe in (started.stdin, started.stdout):
        pipe.close()
    if started.poll() is None:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _why(folder: Path, code: int) -> str:
    """One sentence on the process that failed first."""
    messages = folder / MESSAGES
    try:
        told = json.loads((folder / FAILED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        end = f"with code {code}" if code > 0 else f"by signal {-code}"
        return (
            f"The processes ended {end} without a reason: one was killed (often too little memory) "
            f"or could not start; what they printed is in {messages}."
        )
    return f"Process {told['rank']} failed: {told['sentence']} (what they printed: {messages})"


class Bars:
    """The first process's progress bars, shown here."""

    def __init__(self):
        self.shown: dict[str, Any] = {}

    def show(self, state: Mapping[str, Any]) -> None:
        """Make a bar of this name, or bring it up to date."""
        bar = self.shown.get(state["desc"])
        if bar is None:
            how = {name: state[name] for name in ("desc", "total", "initial", "unit")}
            bar = self.shown[state["desc"]] = progress.bar(**how)
        if state["postfix"]:
            bar.set_postfix_str(state["postfix"], refresh=False)
        bar.update(state["n"] - bar.n)
        if state["ended"] and not bar.disable:  # perhaps before its limit
            progress.complete(bar, state["postfix"] or "")
            bar.close()

    def close(self) -> None:
        for bar in self.shown.values():
            bar.close()
