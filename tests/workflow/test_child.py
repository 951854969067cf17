"""A child process that ends with this one, by whatever signal."""

import os
import signal
import sys
import threading
from functools import partial

import pytest

from spkit.workflow.child import child

SLEEPS = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"]
STUBBORN = [*SLEEPS[:2], "import signal; signal.signal(15, signal.SIG_IGN);" + SLEEPS[2]]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


def wait_until_up(path):
    while not path.read_text():
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_child_and_handlers_are_as_before(number, tmp_path):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), log.open("w") as out, child(SLEEPS, out) as process:
        wait_until_up(log)
        signal.raise_signal(number)
    assert process.poll() is not None
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


def test_under_nohup_a_closed_terminal_is_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (tmp_path / "log").open("w") as out, child(SLEEPS, out) as process:
            signal.raise_signal(signal.SIGHUP)
            assert process.poll() is None
            process.kill()
            process.wait()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_kills_what_does_not_end(tmp_path):
    log = tmp_path / "log"
    again = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    stubborn = partial(child, STUBBORN, seconds_to_end=600)
    with pytest.raises(KeyboardInterrupt), log.open("w") as out, stubborn(out) as process:
        wait_until_up(log)
        again.start()
        raise KeyboardInterrupt
    again.join()
    assert process.poll() == -signal.SIGKILL
