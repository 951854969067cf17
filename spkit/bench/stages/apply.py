"""`spkit apply` against its limit, copying the checkpoint and syncing it, and against mergekit.

Each runs as a process of its own, its start and imports included; apply syncs what it writes by
itself. Before each run the target is deleted and `sync` called. The sources are in the page cache
for all. On a file system that copies by reference, such as Btrfs, cp does not copy. mergekit, whose
pins are not ours, has an environment of its own: benchmarks/apply.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from spkit.bench import random_checkpoint
from spkit.bench.bench import LIMIT, Bench
from spkit.bench.timing import Own
from spkit.bench.watched import WATCH
from spkit.errors import SpkitError
from spkit.method.sets import Lazy
from spkit.models.checkpoint_files import read_header, tensor_files
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.verify import verify

SHARD = 300 * 2**20  # bytes: several shards for all but the smallest
KEPT, DEVIATION = 0.3 * (0.03 + 0.02), 1e-3  # a = 3 %, b = 2 %, p = 30 %, nothing in common


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
        goal = "<= 1" if size.name == "1 B" else ""
        others = {"cp -r, sync": (LIMIT, lambda copy=copy, to=target: timed(copy, to), goal)}
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


def timed(command: list[str], target: Path) -> Own:
    """The command's own seconds, without the deleting before it."""
    return Own(run(command, target)["seconds"])


def run(command: list[str], target: Path, pause: float = 0.0) -> dict:
    """Seconds and MiB of one command that writes `target`, which is deleted before.

    pause: seconds between the deleting and the command.
    """
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    time.sleep(pause)
    watched = [sys.executable, "-I", "-S", "-c", WATCH, *command]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
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
