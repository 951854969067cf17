"""A sweep on a SLURM of two nodes, one of which dies in the middle: `make test-slurm`.

The sweep runs once on this machine, then through profiles/slurm-without-accounting on a SLURM that
is started for it (loopback.py). When some units are done, a node that is at work is killed, with
its running steps. Every point must end, and tables and patch files must be those of the first
run, byte by byte.

No test of `make test`: it takes minutes. Without Debian's packages slurm-wlm and munge, or where
their daemons cannot start, it says so and ends well. Results and the log are in outputs/test-slurm.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback import CannotStart, Loopback

from spkit.comparison.blocks import fill_pages, filled

ROOT = Path(__file__).parents[2]
SWEEP = "params/sweeps/micro.yaml"
PROFILE = "profiles/slurm-without-accounting"
HERE = ROOT / "outputs" / "test-slurm"
VICTIM = "n1"
DONE_BEFORE = 8  # units, when the node dies
PATIENCE = 60 * 60  # seconds that a run may take; a busy machine is slow
POINTS = 24
TABLES = ("results.csv", "table.csv")


def main() -> int:
    """Exit code 0: all is as it should be, or there is no SLURM on this machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slurmd-alone", action="store_true", help="its steps live on")
    parser.add_argument("--resume", action="store_true", help="keep what the local run has done")
    parser.add_argument("--into", type=Path, help="a page whose block of the log to fill")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons are stopped, too
    shutil.rmtree(HERE / "slurm" if given.resume else HERE, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            with Loopback(Path(folder)) as cluster:
                log = {"sweep": SWEEP, "profile": PROFILE, "machine": f"{os.cpu_count()} cores"}
                log["SLURM"] = cluster.ask("sinfo", "--version").stdout.strip()
                log |= on_this_machine() | on_the_cluster(cluster, given.slurmd_alone)
        except CannotStart as reason:
            print(f"skipped: {reason}")
            return 0
        log["processes left"] = len(cluster.processes())
    fine = told(log)
    if given.into and fine:
        fill_pages([given.into], lambda page: filled(page, "slurm", {"log": block}, log))
    return 0 if fine else 1


@contextmanager
def sweep(name: str, environment, *options: str) -> Iterator[subprocess.Popen]:
    """`spkit sweep` into outputs/test-slurm/<name>, its messages in a file beside it."""
    HERE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "spkit.cli", "sweep", SWEEP]
    command += ["-o", f"outputs={HERE / name}", *options]
    with (HERE / f"{name}.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def on_this_machine() -> dict:
    """The sweep without a cluster."""
    started = time.monotonic()
    with sweep("local", os.environ) as process:
        code = process.wait(PATIENCE)
    return {"seconds here": round(time.monotonic() - started), "exit code here": code}


def on_the_cluster(cluster: Loopback, alone: bool) -> dict:
    """The sweep, with a node's death; what there is to tell of it."""
    started = time.monotonic()
    with sweep("slurm", cluster.environment, "--profile", PROFILE) as process:
        before = until_at_work(cluster, process)
        jobs = cluster.running(VICTIM)
        killed = cluster.kill(VICTIM, steps=not alone)
        code = process.wait(PATIENCE)
    states = cluster.ask("squeue", "-h", "--states=all", "-o", "%T").stdout.split()
    return {
        "seconds on SLURM": round(time.monotonic() - started),
        "exit code on SLURM": code,
        "units": len(units("slurm")),
        "units done before the node died": before,
        "jobs that it had": len(jobs),
        "killed": f"{'slurmd alone' if alone else 'slurmd and its steps'}: {killed} processes",
        "jobs": dict(Counter(states).most_common()),
    }


def until_at_work(cluster: Loopback, process: subprocess.Popen) -> int:
    """Wait until some units are done and the victim is at work on others; how many are done."""
    while process.poll() is None:
        done = len(units("slurm"))
        busy = [pid for pid in cluster.processes(VICTIM) if b"spkit.workflow.job" in command(pid)]
        if done >= DONE_BEFORE and busy:
            return done
        time.sleep(0.5)
    raise SystemExit(f"the sweep ended before a node was killed; see {HERE / 'slurm.txt'}")


def command(pid: int) -> bytes:
    """The command line of a process, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def units(name: str) -> list[Path]:
    """The units of that run that are done."""
    return list((HERE / name).glob("sweeps/*/units/**/unit.json"))


def patches(root: Path) -> dict[Path, bytes]:
    """{place: bytes} of the patch files of a run."""
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*/patch.safetensors")}


def told(log: dict) -> bool:
    """Compare, write and print; whether all is as it should be."""
    local, slurm = (next((HERE / name).glob("sweeps/*")) for name in ("local", "slurm"))
    with (slurm / "results.csv").open() as table:
        log["points"] = len({line.split(",")[0] for line in table}) - 1
    wrong = [name for name in TABLES if (local / name).read_bytes() != (slurm / name).read_bytes()]
    log["tables that differ"] = wrong
    # this backbone has hardly learnt to speak, and its rates say little: patches have every bit
    here, there = patches(local), patches(slurm)
    log["patch files"] = len(here)
    log["patch files that differ"] = sum(here.get(p) != there.get(p) for p in {*here, *there})
    (HERE / "log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log, indent=2))
    survived = log["jobs"].get("NODE_FAIL", 0) or log["killed"].startswith("slurmd alone")
    fine = not wrong and log["points"] >= POINTS and survived and not log["processes left"]
    fine = fine and here and not log["patch files that differ"]
    fine = fine and log["exit code here"] == log["exit code on SLURM"] == 0
    print("Tables and patch files are the same, byte by byte." if fine else "NOT as it should be")
    return bool(fine)


def block(log: dict) -> str:
    """The log as a table of a page."""
    shown = log | {"jobs": ", ".join(f"{n} {state}" for state, n in log["jobs"].items())}
    shown |= {"tables that differ": len(log["tables that differ"])}
    rows = [f"| {name} | {value} |" for name, value in shown.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
