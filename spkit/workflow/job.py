"""What a job runs: `python -m spkit.workflow.job outputs/x/plan.json bundles/usual/seed-0`.

One unit, in a process of its own, on whatever machine it was sent to. The unit works in a folder of
its own name and this process's; that becomes the unit's folder by one renaming, at the end. So
nothing is half-written when a machine dies, two processes that do the same unit are in nobody's
way, and no lock is needed. Why it failed is left in root/failed.
"""

import json
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from spkit.errors import SpkitError
from spkit.system.collector import paused
from spkit.system.files import atomic, once
from spkit.workflow.plan import unit_of
from spkit.workflow.units import DONE, Unit, is_done

REASON = ".txt"


def main(file: str, name: str, attempt: str = "1") -> int:
    """Do the unit; exit code 1 and one sentence where it fails.

    A second attempt is for a process that was killed, with its node or by a limit of time. A unit
    that has said why it failed would fail again.
    """
    note = failure_note(Path(file).parent, name)
    if int(attempt) > 1 and note.is_file():
        print(f"{name} failed before: {note.read_text(encoding='utf-8')}", file=sys.stderr)
        return 1
    note.unlink(missing_ok=True)
    try:
        with paused():
            unit, places = unit_of(file, name)
        do(unit, places)
    except Exception as error:
        reason = str(error) or type(error).__name__
        with suppress(SpkitError), atomic(note) as path:  # of a full disk the log may tell
            path.write_text(reason + "\n", encoding="utf-8")
        if not isinstance(error, SpkitError):
            traceback.print_exc()
        print(f"{name} failed: {reason}", file=sys.stderr)
        return 1
    return 0


def do(unit: Unit, places: Mapping[str, Path]) -> Path:
    """The unit's folder, made where it is not there yet."""
    folder = places[unit.name]
    if is_done(folder):
        return folder
    needed = {need: places[need] for need in unit.needs}
    for need, place in needed.items():
        if not is_done(place):
            raise SpkitError(f"{unit.name} needs {need}, which is not done")
    if folder.exists():  # Snakemake makes it beforehand, and takes unit.json out where it gave up
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    with once(folder) as temporary:
        temporary.mkdir()
        unit.work(temporary, needed, **unit.inputs)
        seconds = round(time.perf_counter() - started, 2)
        about = {"unit": unit.name, "seconds": seconds, "predicted": unit.seconds}
        (temporary / DONE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folder


def failure_note(root: str | Path, name: str) -> Path:
    """Where a unit that failed says why."""
    return Path(root) / "failed" / f"{name}{REASON}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
