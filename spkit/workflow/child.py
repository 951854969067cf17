"""A child process that ends together with this one, with all that it started.

with child(command, log) as process:
    ...                            after an error or Ctrl-C in here, it and its children end
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from spkit.system.lock import handles

SECONDS_TO_END = 5  # what an interrupted child gets before it is killed


@contextmanager
def child(
    command: Sequence[str],
    output,
    *,
    asked_first: float = 0,
    seconds_to_end: float = SECONDS_TO_END,
) -> Iterator[subprocess.Popen]:
    """Start the command, its messages going to the open file `output`.

    asked_first: seconds that it has after an interrupt of its own, before it and its children are
    ended: Snakemake takes its jobs back from a cluster then.

    It is in this process's group, so that whoever kills the group leaves nothing behind. Where this
    process alone is killed it goes on, and so it holds the locks of this process, too.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    held = {"pass_fds": handles()} if os.name == "posix" else {}
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **held)
    before = {one: signal.signal(one, interrupt) for one in _ending()}
    try:
        yield process
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if process.poll() is None and asked_first:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(asked_first)
        if process.poll() is None:
            _end(process, seconds_to_end)


def _ending() -> list[int]:
    """Signals that end this process: a closed terminal's, too, but where it is ignored (nohup)."""
    closed = getattr(signal, "SIGHUP", None)  # Windows has none
    heard = closed is not None and signal.getsignal(closed) != signal.SIG_IGN
    return [signal.SIGTERM, *([closed] if heard else [])]


def _end(process: subprocess.Popen, seconds: float) -> None:
    """The process and its children; what does not end by itself is killed."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        everything = [*top.children(recursive=True), top]
        for one in everything:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        with suppress(KeyboardInterrupt):  # a second Ctrl-C: no more waiting
            psutil.wait_procs(everything, timeout=seconds)
        for one in everything:
            with suppress(psutil.NoSuchProcess):  # it has ended
                one.kill()
    process.wait()
