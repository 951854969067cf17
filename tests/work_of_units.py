"""A plan of small units for tests/workflow: a job imports it by name. Nothing heavy is in here.

It is a -> b -> d and c -> d. What a unit does is told by files in the folder $NOTES.
"""

import os
import signal
import time
from pathlib import Path

from spkit.workflow.units import Unit

NEEDS = {"one/a": (), "one/deep/b": ("one/a",), "two/c": (), "two/d": ("one/deep/b", "two/c")}


def planned(given, only=None):
    """The four units; given: {"texts": {unit: another text than the last letter of its name}}."""
    return [
        Unit(
            name,
            work,
            {"text": given.get("texts", {}).get(name, name[-1])},
            needs,
            seconds=2.0,
            memory_mib=100,
        )
        for name, needs in NEEDS.items()
    ]


def work(folder, places, text):
    """text and all that the needed units wrote; one line in $NOTES/log.

    A file $NOTES/<text>.<what> makes it fail, be killed or wait, after half of the work.
    """
    notes = Path(os.environ["NOTES"])
    print("NEWS that no user wants to read")
    before = [(place / "text").read_text() for place in places.values()]
    (folder / "half").write_text("half")
    if (notes / f"{text}.fail").exists():
        raise ValueError("no such luck")
    if (notes / f"{text}.kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if (notes / f"{text}.wait").exists():
        (notes / f"{text}.waits").write_text(str(os.getpid()))
        time.sleep(120)
    (folder / "half").unlink()
    (folder / "text").write_text("".join([*before, text]))
    with open(notes / "log", "a") as file:
        file.write(f"{text}\n")


def write(folder, places, text=""):
    """For units that are planned and never run."""
    raise AssertionError
