"""`spkit apply` against copying the checkpoint and against mergekit: time and peak memory.

    .venv/bin/python benchmarks/apply.py                                       about four minutes
    .venv/bin/python benchmarks/apply.py --mergekit mk/bin/mergekit-yaml --out apply.csv

Random bf16 Llamas of 0.25, 0.5 and 1.1 B parameters are made on the spot, and for each a patch that
keeps 1.5 % of the projections' weights (a = 3 %, b = 2 %, p = 30 %, sets that do not overlap). Then
each of these runs as a process of its own, its start and imports included:

    apply       spkit apply PATCH BACKBONE TARGET --quiet, which syncs what it writes by itself
    cp + sync   cp -r BACKBONE TARGET && sync
    mergekit    task arithmetic of the patched checkpoint with weight 1 on the base, in bfloat16

One repetition runs all of them, every other one in the reverse order, and a ratio is of two runs of
one repetition. Before each run the target is deleted, `sync` called, and --pause seconds waited: a
virtual machine gives freed memory back to its host, and what a run finds of it should not depend
on the run before. The sources were read before the first run, so that they are in the page cache
for all. (On a file system that copies by reference, such as Btrfs, cp does not copy.)

mergekit runs in three ways (MERGEKIT below), of which its best one counts, for time and for memory
apart; nothing makes it sync, and its time ends with its process. It computes deltas in bfloat16, so
that a few patched weights come out otherwise. It needs an environment of its own, as its pins are
not ours:

    python -m venv mk && mk/bin/pip install torch mergekit==0.1.5

Memory: ru_maxrss, where pages of mapped files count; "without files" is the highest RssAnon, read
every 5 ms, which is fairer to a library that maps its files. Once a size, and not timed, `verify`
compares what was written with base + patch, bit for bit. Linux only.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from spkit.bench import random_checkpoint
from spkit.bench.stages.apply import MERGE, commands, make, run, warm
from spkit.patchfile.verify import verify
from spkit.system.machine import hardware, versions

MODELS = {  # hidden, layers, intermediate, heads, kv heads, head_dim, vocabulary, tied
    "0.25 B": [1024, 14, 2816, 16, 16, 64, 32000, False],
    "0.5 B": [1536, 14, 4224, 24, 24, 64, 32000, False],
    "1.1 B": [2048, 22, 5632, 32, 4, 64, 32000, False],
}
SMALL = ["--lazy-unpickle", "--out-shard-size", "100M"]  # by default all output is held at once
MERGEKIT = {
    "mergekit, defaults": [],
    "mergekit, low memory": SMALL,
    "mergekit, threads": [*SMALL, "-j", str(os.cpu_count()), "--async-write"],
}


# ---- what is measured ----------------------------------------------------------------------------


def measure(folder: Path, name: str, given) -> list[dict]:
    """One row a run, for one size."""
    sizes = dict(zip(random_checkpoint.SIZES, MODELS[name], strict=True))
    parameters = make(folder, sizes, given.seed)
    base, patch, target = folder / "base", folder / "patch.safetensors", folder / "target"
    own = dict(zip(("apply", "cp + sync"), commands(base, patch, target), strict=True))
    run(own["apply"], target)
    verified = verify(patch, base, target, progress=False)
    print(f"{name}: {parameters:,} parameters, patch {patch.stat().st_size:,} bytes; ", end="")
    print(f"what apply wrote is {'' if verified.ok else 'NOT '}base + patch", flush=True)

    sources, merges = [base], {}
    if given.mergekit and name == list(MODELS)[-1]:
        other = target.rename(folder / "patched")
        sources.append(other)
        (folder / "merge.yaml").write_text(MERGE.format(base=base, other=other), encoding="utf-8")
        start = [given.mergekit, str(folder / "merge.yaml"), str(target)]
        merges = {way: [*start, "--quiet", *options] for way, options in MERGEKIT.items()}
        subprocess.run([given.mergekit, "--help"], stdout=subprocess.DEVNULL)  # its libraries, too
    warm(sources)
    rows = []
    for number in range(given.repetitions):
        todo = own | (merges if number < given.merges else {})
        for what in reversed(todo) if number % 2 else todo:
            about = {"model": name, "parameters": parameters, "repetition": number}
            rows.append(about | {"command": what} | run(todo[what], target, given.pause))
            print(f"  {what}: {rows[-1]['seconds']:.2f} s, {rows[-1]['MiB']:.0f} MiB", flush=True)
    shutil.rmtree(folder)
    return rows


# ---- the report ----------------------------------------------------------------------------------


def goals(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a goal: median, lowest and highest of the repetitions."""
    rows = []

    def add(what: str, goal: str, values: pd.Series) -> None:
        found = {"median": values.median(), "low": values.min(), "high": values.max()}
        rows.append({"figure": what, "goal": goal} | found)

    last = runs["model"].iloc[-1]
    for name, of_model in runs.groupby("model", sort=False):
        seconds = of_model.pivot(index="repetition", columns="command", values="seconds")
        goal = "<= 1.5" if name == last else ""
        add(f"{name}: seconds of apply / cp + sync", goal, seconds["apply"] / seconds["cp + sync"])
    ways = [way for way in MERGEKIT if way in seconds]
    for measured in ("seconds", "MiB", "MiB without files") if ways else ():
        of_way = of_model.pivot(index="repetition", columns="command", values=measured)
        best = min(ways, key=lambda way: of_way[way].median())
        for way in ways:
            ratio = (of_way[way] / of_way["apply"]).dropna()
            goal = {"seconds": ">= 5", "MiB": ">= 4"}.get(measured, "") if way == best else ""
            add(f"{last}: {measured} of {way} / apply", goal, ratio)
    peaks = runs[runs["command"] == "apply"].groupby("model", sort=False)["MiB"]
    for name, values in peaks:
        add(f"{name}: peak MiB of apply", "", values)
    medians = peaks.median()
    add(
        f"peak of apply, {last} / {medians.index[0]}",
        "flat",
        peaks.get_group(last).reset_index(drop=True) / medians.iloc[0],
    )
    return pd.DataFrame(rows)


def mergekit_version(executable: str) -> str:
    """What the Python beside the executable says."""
    code = "from importlib.metadata import version; print(version('mergekit'))"
    command = [str(Path(executable).with_name("python")), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--mergekit", help="the executable mergekit-yaml; without it, not compared")
    parser.add_argument("--merges", type=int, default=3, help="repetitions of mergekit")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to make and delete 10 GB; else the system's place")
    parser.add_argument("--out", help="the figures as .csv; every run beside it as -runs.csv")
    given = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        if given.folder:
            Path(given.folder).mkdir(parents=True, exist_ok=True)
        work = stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder))
        for name in given.models:
            rows += measure(Path(work) / name.replace(" ", ""), name, given)
    runs = pd.DataFrame(rows)
    table = goals(runs)
    measured = runs.drop(columns=["parameters", "repetition"])
    medians = measured.groupby(["model", "command"], sort=False).median().reset_index()
    for one, digits in ((medians, 2), (table, 3)):
        print("\n" + tabulate(one.round(digits), "keys", "pipe", showindex=False))
    machine, found = hardware(), versions()
    about = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "versions": ", ".join(f"{name} {found[name]}" for name in ("python", "spkit", "numpy")),
        "seed": given.seed,
    }
    if given.mergekit:
        about["versions"] += f", mergekit {mergekit_version(given.mergekit)}"
    print("\n" + "; ".join(f"{key} {value}" for key, value in about.items()))
    if given.out:
        out = Path(given.out)
        table.assign(**about).to_csv(out, index=False)
        runs.to_csv(out.with_name(f"{out.stem}-runs.csv"), index=False)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
