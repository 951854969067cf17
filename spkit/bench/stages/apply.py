"""`spkit apply` against its limit, copying the checkpoint and syncing it, and against mergekit.

Each runs as a process of its own, its start and imports included; apply syncs what it writes by
itself. Before each run the target is deleted and `sync` called. The sources are in the page cache
for all. On a file system that copies by reference, such as Btrfs, cp does not copy.

mergekit adds the same change by task arithmetic, of the patched checkpoint with weight 1 on the
backbone. It computes deltas in bfloat16, so a few weights come out otherwise; nothing makes it
sync. benchmarks/apply.py has its other ways, and its memory.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import safe_open

from spkit.bench import random_checkpoint
from spkit.bench.bench import LIMIT, PEER, Bench
from spkit.bench.peers import MERGEKIT
from spkit.bench.sizes import Size
from spkit.bench.timing import Own
from spkit.bench.watched import WATCH
from spkit.errors import SpkitError
from spkit.method.sets import Lazy
from spkit.models.checkpoint_files import read_header, tensor_files
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.verify import verify

SHARD = 300 * 2**20  # bytes: several shards for all but the smallest
KEPT, DEVIATION = 0.3 * (0.03 + 0.02), 1e-3  # a = 3 %, b = 2 %, p = 30 %, nothing in common

MERGE = """merge_method: task_arithmetic
base_model: {base}
models:
  - model: {other}
    parameters: {{weight: 1.0}}
dtype: bfloat16
"""


def measure(bench: Bench) -> None:
    """Rows for all sizes."""
    for size in bench.of("135 M", "500 M", "1 B"):
        folder = bench.folder / size.name.replace(" ", "")
        make(folder, size.sizes, seed=0)
        base, patch, target = (folder / name for name in ("base", "patch.safetensors", "target"))
        apply, copy = commands(base, patch, target)
        run(apply, target)
        right = verify(patch, base, target, progress=False).ok
        bench.right("what apply wrote and backbone + patch", right)
        warm([base])
        goal = "<= 0.6" if size.name == "1 B" else ""
        others = {
            "cp -r, sync": (LIMIT, lambda copy=copy, to=target: timed(copy, to), goal),
            **_mergekit(bench, size, folder),
        }
        bench.compare(size, lambda apply=apply, to=target: timed(apply, to), others)
        shutil.rmtree(folder)


def commands(base: Path, patch: Path, target: Path) -> tuple[list[str], list[str]]:
    """(spkit apply, cp and sync)."""
    apply = [
        sys.executable,
        "-m",
        "spkit.cli",
        "apply",
        *map(str, (patch, base, target)),
        "--quiet",
    ]
    return apply, ["sh", "-c", 'cp -r "$0" "$1" && sync', str(base), str(target)]


def _mergekit(bench: Bench, size: Size, folder: Path) -> dict:
    """The peer, where it can be installed; of one size, for it is slow."""
    if size.name != "500 M" and bench.sizes is None:
        return {}
    try:
        place = bench.peers.place(MERGEKIT)
    except SpkitError as error:
        bench.absent("mergekit", str(error))
        return {}
    patched = folder / "patched"
    (folder / "target").rename(patched)
    (folder / "merge.yaml").write_text(
        MERGE.format(base=folder / "base", other=patched), encoding="utf-8"
    )
    target = folder / "merged"
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "merge.yaml")]
    command += [str(target), "--quiet", "--lazy-unpickle", "--out-shard-size", "100M"]
    path = {"PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])}
    run(command, target, more=path)
    bench.right("apply's weights and mergekit's", _differ(patched, target) < 1e-3)
    return {"mergekit": (PEER, lambda: timed(command, target, path), "")}


def _differ(one: Path, other: Path) -> float:
    """The share of weights that are not the same in two checkpoints."""
    apart = total = 0
    files, others = tensor_files(one), tensor_files(other)
    for name, path in files.items():
        with safe_open(path, "pt") as a, safe_open(others[name], "pt") as b:
            found = a.get_tensor(name) != b.get_tensor(name)
        apart, total = apart + int(found.sum()), total + found.numel()
    return apart / total


def make(folder: Path, sizes: dict, seed: int) -> int:
    """folder/base and folder/patch.safetensors; returns the number of parameters."""
    base = random_checkpoint.write(folder / "base", sizes, seed=seed, shard=SHARD)
    shapes, parameters = {}, 0
    for path in sorted(set(tensor_files(base).values())):
        with path.open("rb") as file:
            for name, about in read_header(file, path)[0]:
                parameters += int(np.prod(about["shape"]))
                if name.endswith("proj.weight"):
                    shapes[name] = about["shape"]
    numbers = {name: number for number, name in enumerate(shapes)}

    def delta(name: str) -> np.ndarray:
        generator = np.random.default_rng([seed, numbers[name]])
        kept = generator.random(shapes[name], dtype=np.float32) < KEPT
        merged = np.zeros(shapes[name], dtype=np.float32)
        merged[kept] = DEVIATION * generator.standard_normal(int(kept.sum()), dtype=np.float32)
        return merged

    about = About("random", method={"kept": KEPT, "seed": seed})
    path = folder / "patch.safetensors"
    make_patch(base, Lazy(shapes, delta), path, about, progress=False)
    return parameters


def timed(command: list[str], target: Path, more: Mapping[str, str] = MappingProxyType({})) -> Own:
    """The command's own seconds, without the deleting before it."""
    return Own(run(command, target, more=more)["seconds"])


def run(
    command: list[str],
    target: Path,
    pause: float = 0.0,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict:
    """Seconds and MiB of one command that writes `target`, which is deleted before.

    pause: seconds between the deleting and the command. more: of the environment.
    """
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    time.sleep(pause)
    watched = [sys.executable, "-I", "-S", "-c", WATCH, *command]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(more)
    done = subprocess.run(watched, capture_output=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    if found.pop("exit"):
        raise SpkitError(f"{' '.join(command)}: {done.stderr.decode()[-2000:]}")
    return found


def warm(folders: Iterable[Path]) -> None:
    """Read all files once."""
    for path in (path for folder in folders for path in folder.iterdir()):
        with path.open("rb") as file:
            while file.read(2**22):
                pass
