"""An experiment that is killed over and over must end with the tables of one that was not.

    make test-kills                                            20 kills, some minutes
    python tests/comparison/killed_at_random.py --kills 3 --seed 1

Each time all its processes are killed at once (SIGKILL), at a random moment; then the same command
goes on. Last of all it is left alone, and its tables are compared byte for byte with those of a run
in another folder. costs.csv holds seconds and about.csv the machine: they are not compared.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "params" / "micro.yaml"
MEASURED = {"costs.csv", "about.csv"}
MOMENTS = (2.0, 25.0)  # seconds after the start


def started(outputs: Path) -> subprocess.Popen:
    """The experiment in a process group of its own, its messages in a file beside `outputs`."""
    outputs.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(MICRO.read_text()) | {"outputs": str(outputs), "threads": 1}
    params = outputs.with_suffix(".yaml")
    params.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "spkit.cli", "experiment", str(params), "--budget", "micro"]
    with outputs.with_suffix(".txt").open("a") as out:
        quiet = {"stdout": out, "stderr": subprocess.STDOUT, "cwd": ROOT}
        return subprocess.Popen(command, start_new_session=True, **quiet)


def done(outputs: Path) -> int:
    """How many units are complete."""
    return sum(1 for _ in outputs.rglob("unit.json"))


def tables(outputs: Path) -> dict[str, bytes]:
    """{name: bytes} of the tables that must be equal."""
    (folder,) = [*outputs.rglob("tables/methods.csv"), *outputs.glob("methods.csv")]
    return {p.name: p.read_bytes() for p in folder.parent.iterdir() if p.name not in MEASURED}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", type=Path, help="to compare with; default: those of a new run")
    given = parser.parse_args()
    moments, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder) / "killed", Path(folder) / "whole"
        for number in range(1, given.kills + 1):
            process, seconds = started(killed), moments.uniform(*MOMENTS)
            try:
                process.wait(seconds)
                print(f"it had ended before kill {number}", flush=True)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = f"kill {number} after {seconds:.1f} s: {done(killed)} units are done"
            print(said, flush=True)
        for outputs in (killed,) if given.tables else (killed, whole):
            if started(outputs).wait():
                print(outputs.with_suffix(".txt").read_text()[-2000:])
                return 1
        one, other = tables(killed), tables(given.tables or whole)
    minutes = (time.monotonic() - began) / 60
    wrong = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    same = f"{len(one) - len(wrong)} of {len(one)} tables are the same bytes"
    print(f"{same} as those of a run that was left alone; {minutes:.0f} minutes")
    return 1 if wrong or not one else 0


if __name__ == "__main__":
    sys.exit(main())
