"""Peak memory of each stage, predicted by `spkit memory` over measured.

benchmarks/memory_budget.py makes a checkpoint of random weights and pairs, prompts and texts whose
lengths differ as real ones do; the prediction reads them, as that of a run reads its own. Nothing
in it was fitted to these sizes. Peaks differ little from run to run, so each is measured once.
"""

import subprocess
import sys

import pandas as pd

from spkit.bench import random_checkpoint
from spkit.bench.bench import FIGURE, Bench
from spkit.bench.sizes import Size
from spkit.bench.timing import Spread
from spkit.errors import SpkitError
from spkit.paths import repository_root

SCRIPT = "benchmarks/memory_budget.py"
FLAGS = dict(
    zip(
        random_checkpoint.SIZES[:6],
        ("hidden", "layers", "intermediate", "heads", "kv-heads", "head-dim"),
        strict=True,
    )
)


def measure(bench: Bench) -> None:
    """A row for each stage of all sizes."""
    root = repository_root()
    if not (root / SCRIPT).is_file():
        bench.absent("all rows", f"{SCRIPT} is in the repository, and not in the package")
        return
    for size in bench.of("50 M", "135 M"):
        out = bench.folder / "memory.csv"
        command = [sys.executable, SCRIPT, *options(size), "--device", bench.device]
        done = subprocess.run(
            [*command, "--out", str(out)], cwd=root, capture_output=True, text=True
        )
        if done.returncode:
            raise SpkitError(f"{SCRIPT} ended with {done.returncode}: {done.stderr[-500:]}")
        for row in pd.read_csv(out).to_dict("records"):
            name = row["stage"] if row["memory"] == "host" else f"{row['stage']}, GPU"
            note = f"{row['predicted GiB']:.2f} and {row['measured GiB']:.2f} GiB"
            found = {"goal": ">= 0.85 and <= 1.15", "note": note}
            once = Spread.of([row["ratio"]])
            bench.add(size, name, FIGURE, "predicted / measured", once, **found)


def options(size: Size) -> list[str]:
    """Of the script, for this size and the parameters of the real model's file."""
    sizes = size.sizes
    vocabulary = ["--vocab", str(sizes["vocab_size"])]
    found = ["--params", "params/smollm2-135m.yaml", "--spread", *vocabulary]
    for key, flag in FLAGS.items():
        found += [f"--{flag}", str(sizes[key])]
    return [*found, "--tied"] if sizes["tie_word_embeddings"] else found
