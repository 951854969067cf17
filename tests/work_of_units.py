"""What the units of test_graph.py do: a spawned process imports it from here."""

import os
import time


def write(folder, places, text="", log=None):
    """text and all that the needed units wrote; one line in the log."""
    before = [(place / "text").read_text() for place in places.values()]
    (folder / "text").write_text("".join([*before, text]))
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{text}\n")


def other(folder, places, text="", log=None):
    write(folder, places, text, log)


def fail_while(folder, places, flag, error, log=None, text=""):
    """An error of that kind as long as the file `flag` is there, after half of the work."""
    (folder / "half").write_text("half")
    if flag.exists():
        raise {"value": ValueError, "interrupt": KeyboardInterrupt}[error]("no such luck")
    write(folder, places, text, log)


def sleep_and_tell(folder, places, started, ended):
    started.touch()
    time.sleep(120)
    ended.touch()


def fail_once(folder, places, awaited):
    """An error as soon as the file `awaited` is there."""
    deadline = time.monotonic() + 60
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    raise ValueError("no such luck")


def tell_and_sleep(folder, places, told):
    """Who does the work, and then nothing for long."""
    told.with_suffix(".tmp").write_text(str(os.getpid()))
    told.with_suffix(".tmp").rename(told)
    time.sleep(60)


def print_loudly(folder, places):
    print("NEWS")
