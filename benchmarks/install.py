"""Installing the kit by pip and by uv, with the same pins: time, CPU time and bytes.

    python -m venv /tmp/uv && /tmp/uv/bin/pip install uv
    .venv/bin/python benchmarks/install.py --uv /tmp/uv/bin/uv                 patch files alone
    .venv/bin/python benchmarks/install.py --uv /tmp/uv/bin/uv --extras all    what make installs

All wheels are made once in a folder (`pip wheel`); their size is what is downloaded. Each run makes
a new virtual environment and installs into it, pip and uv in turn:

    registry    downloaded; nothing is cached before
    wheels      from that folder, without a network; uv also with what it has unpacked before

uv is asked to compile the Python files, as pip always does. The environments are the same in the
end, or the script ends with an error.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tabulate import tabulate

from spkit.system.machine import hardware

ROOT = Path(__file__).parents[1]
WAYS = (
    *(("pip", "registry"), ("uv", "registry")),
    *(("pip", "wheels"), ("uv", "wheels"), ("uv", "wheels, unpacked before")),
)
LIST = """
import json
from importlib.metadata import distributions
found = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
print(json.dumps({k: v for k, v in found.items() if k not in ("pip", "setuptools", "spkit")}))
"""


@dataclass(frozen=True)
class Place:
    """uv: the program. wheels: the folder of them. extras: "" or "[all]". work: for all else."""

    uv: str
    wheels: Path
    extras: str
    work: Path

    def steps(self, tool: str, source: str) -> list[list[str]]:
        """The commands that make an environment and install the kit into it."""
        here, cache = self.work / "environment", self.work / "cache"
        if tool == "pip":
            make = [sys.executable, "-m", "venv", str(here)]
            install = [str(here / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        else:
            make = [self.uv, "venv", "--quiet", "--python", sys.executable, str(here)]
            install = [self.uv, "pip", "install", "--quiet", "--compile-bytecode"]
            install += ["--python", str(here / "bin" / "python")]
        install += ["--cache-dir", str(cache), "--constraint", str(ROOT / "constraints.txt")]
        if source == "registry":
            return [make, [*install, f"{ROOT}{self.extras}"]]
        local = ["--no-index", "--find-links", str(self.wheels)]
        return [make, [*install, *local, f"spkit{self.extras}"]]

    def run(self, tool: str, source: str) -> dict:
        """{seconds, cpu, bytes, packages} of one installation; the environment is removed."""
        if "before" not in source:
            shutil.rmtree(self.work / "cache", ignore_errors=True)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for step in self.steps(tool, source):
            subprocess.run(step, check=True)
        took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
        here = self.work / "environment"
        asked = [here / "bin" / "python", "-c", LIST]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        size = size_of(here)
        shutil.rmtree(here)
        print(f"{tool}, {source}: {took:.1f} s", file=sys.stderr, flush=True)
        return {"seconds": took, "cpu": cpu, "bytes": size, "packages": json.loads(said)}


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(
        os.lstat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(folder)
        for name in names
    )


def same_packages(found: dict[tuple[str, str], list[dict]]) -> dict[str, str]:
    """{package: version}, the same of every run; SystemExit where two differ."""
    runs = [run["packages"] for several in found.values() for run in several]
    for packages in runs:
        different = sorted(set(runs[0].items()) ^ set(packages.items()))
        if different:
            raise SystemExit(f"pip and uv installed different versions: {different}")
    return runs[0]


def rows(found: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """The table: medians, and the lowest and highest of the times."""
    table = []
    for (tool, source), runs in found.items():
        times = [run["seconds"] for run in runs]
        table.append(
            {
                "tool": tool,
                "from": source,
                "seconds": f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})",
                "CPU seconds": round(median(run["cpu"] for run in runs), 1),
                "MB installed": round(runs[0]["bytes"] / 1e6),
            }
        )
    return table


def measure(place: Place, runs: int) -> None:
    """Print the table, the machine and the versions."""
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--quiet", "--wheel-dir", str(place.wheels)]
    wheel += ["--constraint", str(ROOT / "constraints.txt"), f"{ROOT}{place.extras}"]
    subprocess.run(wheel, check=True)
    found = defaultdict(list)
    for _ in range(runs):
        for way in WAYS:
            found[way].append(place.run(*way))
    packages = same_packages(found)
    print(tabulate(rows(found), headers="keys", tablefmt="github"))
    size = sum(file.stat().st_size for file in place.wheels.glob("*.whl"))
    print(f"\nspkit{place.extras}: {len(packages)} packages, {size / 1e6:.0f} MB of wheels; {runs}")
    print("runs of each way in turn: medians, and lowest and highest.")
    for asked in (pip, [place.uv]):
        told = subprocess.run([*asked, "--version"], capture_output=True, text=True).stdout
        print(" ".join(told.split()[:2]), end=", ")
    print(hardware())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uv", default=shutil.which("uv"), help="the program uv")
    parser.add_argument("--extras", default="", help='"all" for what make installs')
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    if not asked.uv:
        raise SystemExit("uv is missing: python -m venv /tmp/uv && /tmp/uv/bin/pip install uv")
    extras = f"[{asked.extras}]" if asked.extras else ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        measure(Place(asked.uv, work / "wheels", extras, work), asked.runs)


if __name__ == "__main__":
    main()
