"""Installing the kit by pip and by uv, with the same pins: time, CPU time and bytes.

    python -m venv /tmp/uv && /tmp/uv/bin/pip install uv
    .venv/bin/python benchmarks/install.py --uv /tmp/uv/bin/uv                 patch files alone
    .venv/bin/python benchmarks/install.py --uv /tmp/uv/bin/uv --extras all    what make installs

Each run makes a new virtual environment and installs this folder into it, editable, as make does.
pip and uv take turns. "empty" is a cache in a new folder: everything is downloaded. "filled" is
that cache once more. uv is asked to compile the Python files, as pip always does. Downloaded is
what pip's cache holds afterwards; a wheel of a local folder (PIP_FIND_LINKS) is in no cache. The
environments are the same in the end, or the script ends with an error.
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
from pathlib import Path
from statistics import median

from tabulate import tabulate

from spkit.system.machine import hardware

ROOT = Path(__file__).parents[1]
LIST = """
import json
from importlib.metadata import distributions
found = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
print(json.dumps({name: v for name, v in sorted(found.items()) if name not in ("pip", "spkit")}))
"""


def command(tool: str, uv: str, python: Path, cache: Path, extras: str) -> list[str]:
    """What installs the kit into the environment of `python`."""
    if tool == "pip":
        start = [str(python), "-m", "pip", "install", "--quiet", "--cache-dir", str(cache)]
    else:
        start = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--cache-dir", str(cache)]
        start += ["--python", str(python)]
    return [*start, "--constraint", "constraints.txt", "--editable", f".{extras}"]


def environment(tool: str, uv: str, folder: Path) -> list[str]:
    """What makes an empty environment; uv puts no pip into it."""
    if tool == "pip":
        return [sys.executable, "-m", "venv", str(folder)]
    return [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]


def installed(tool: str, uv: str, folder: Path, cache: Path, extras: str) -> dict:
    """{seconds, cpu_seconds, bytes, packages} of one run."""
    python = folder / "bin" / "python"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for step in (
        environment(tool, uv, folder),
        command(tool, uv, python, cache, extras),
    ):
        subprocess.run(step, cwd=ROOT, check=True)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    listed = subprocess.run([python, "-c", LIST], capture_output=True, text=True, check=True)
    packages = json.loads(listed.stdout)
    size = size_of(folder)
    return {"seconds": took, "cpu_seconds": cpu, "bytes": size, "packages": packages}


def size_of(folder: Path) -> int:
    """Bytes of all files; one with several names counts once."""
    seen = {}
    for place, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(place, name))
            seen[found.st_ino] = found.st_size
    return sum(seen.values())


def rounds(uv: str, extras: str, runs: int, folder: Path) -> dict[tuple[str, str], list[dict]]:
    """{(tool, cache): its runs}, pip and uv in turn."""
    found = defaultdict(list)
    for number in range(runs):
        caches = {tool: folder / f"cache-{tool}" for tool in ("pip", "uv")}
        for state in ("empty", "filled"):
            for tool in list(caches)[:: -1 if number % 2 else 1]:
                here = folder / "environment"
                run = installed(tool, uv, here, caches[tool], extras)
                run["cache"] = size_of(caches[tool])
                found[tool, state].append(run)
                shutil.rmtree(here)
                print(f"{tool}, {state}: {run['seconds']:.1f} s", file=sys.stderr, flush=True)
        for cache in caches.values():
            shutil.rmtree(cache)
    return found


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
    for (tool, state), runs in found.items():
        times = [run["seconds"] for run in runs]
        table.append(
            {
                "tool": tool,
                "cache": state,
                "seconds": f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})",
                "CPU seconds": round(median(run["cpu_seconds"] for run in runs), 1),
                "MB in the environment": round(runs[0]["bytes"] / 1e6),
                "MB in its cache": round(runs[0]["cache"] / 1e6),
            }
        )
    return table


def main() -> None:
    """Print the table, the machine and the versions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uv", default=shutil.which("uv"), help="the program uv")
    parser.add_argument("--extras", default="", help='"all" for what make installs')
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    if not asked.uv:
        raise SystemExit(
            "uv is not installed: python -m venv /tmp/uv && /tmp/uv/bin/pip install uv"
        )
    extras = f"[{asked.extras}]" if asked.extras else ""
    with tempfile.TemporaryDirectory() as folder:
        found = rounds(asked.uv, extras, asked.runs, Path(folder))
    packages = same_packages(found)
    print(tabulate(rows(found), headers="keys", tablefmt="github"))
    pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True)
    uv = subprocess.run([asked.uv, "--version"], capture_output=True, text=True)
    print(f"\n.{extras}: {len(packages)} packages, the same of both; {asked.runs} runs each")
    print(f"{' '.join(pip.stdout.split()[:2])}, {' '.join(uv.stdout.split()[:2])}; {hardware()}")


if __name__ == "__main__":
    main()
