"""Seconds of five stages against the size of a model: none may grow faster than the model.

The same few pairs at every size: importance and one step of derivation compute in proportion to the
weights; composition, `apply` and `verify` read them.
"""

import shutil
from collections.abc import Callable

from spkit.bench import random_checkpoint
from spkit.bench.bench import GROWTH, Bench
from spkit.bench.sizes import Size, factors, pairs
from spkit.bench.stages.importance import TARGETS, batches
from spkit.bench.timing import Spread, seconds
from spkit.config import DerivationConfig, PatchingConfig
from spkit.method.derivation import derive
from spkit.method.patch import MergedPatch
from spkit.method.safepatching import SafePatching
from spkit.method.sets import Lazy
from spkit.method.snip import snip
from spkit.method.training import TrainingSet
from spkit.patchfile.apply import apply
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.verify import verify

SAMPLES = 4
STEPS = 2
PATCHING = {"scale": "norm_matched", "top_rate_se": 0.03, "top_rate_osm": 0.02}
ENOUGH = 20.0  # seconds after which a large size is not timed again


def measure(bench: Bench) -> None:
    """Rows for all sizes."""
    for size in bench.of("10 M", "50 M", "135 M", "500 M", "1 B"):
        model = size.model(bench.device)
        merged = _in_memory(bench, size, model)
        del model
        if bench.device == "cpu":
            _on_disk(bench, size, merged)


def _in_memory(bench: Bench, size: Size, model) -> MergedPatch:
    calibration = batches(SAMPLES, SAMPLES)
    _time(bench, size, "importance", lambda: snip(model, calibration, TARGETS))
    data = TrainingSet.of(random_checkpoint.tokenizer(), pairs(SAMPLES))
    config = _steps()
    name = f"derivation, {STEPS} steps"
    _time(bench, size, name, lambda: derive(model, data, "descent", config, 0))
    scores = snip(model, calibration, TARGETS)
    se, osm = (factors(model, key, TARGETS) for key in ("se", "osm"))
    method = SafePatching(se, osm, (scores, scores_of_other(scores)), PatchingConfig(**PATCHING), 0)

    def compose() -> None:
        for delta in method.deltas().values():
            del delta

    _time(bench, size, "composition", compose)
    return method.deltas()


def _on_disk(bench: Bench, size: Size, merged: MergedPatch) -> None:
    folder = bench.folder / "growth"
    base = random_checkpoint.write(folder / "base", size.sizes)
    patch, target = folder / "patch.safetensors", folder / "target"
    make_patch(base, merged, patch, About("random", method={"kept": "random"}), progress=False)

    def applied() -> None:
        shutil.rmtree(target, ignore_errors=True)
        apply(patch, base, target, progress=False)

    _time(bench, size, "apply", applied)
    right = verify(patch, base, target, progress=False).ok
    bench.right("what apply wrote and backbone + patch", right)
    _time(bench, size, "verify", lambda: verify(patch, base, target, progress=False))
    shutil.rmtree(folder)


def _time(bench: Bench, size: Size, name: str, run: Callable[[], object]) -> None:
    """One row: at least one run after a first one, until there are `rounds` or enough seconds."""
    first = seconds(run, bench.finish)
    found: list[float] = []
    while not found or (len(found) < bench.rounds and first + sum(found) < ENOUGH):
        found.append(seconds(run, bench.finish))
    bench.add(size, name, GROWTH, "seconds", Spread.of(found))
    print(f"  {size.name}, {name}: {bench.rows[-1].median:.3g} s", flush=True)


def _steps() -> DerivationConfig:
    descent = {"max_steps": STEPS, "batch_size": SAMPLES, "warmup_steps": 0}
    return DerivationConfig(
        quantization="none", lora={"r": 8, "alpha": 16, "targets": TARGETS}, descent=descent
    )


def scores_of_other(scores) -> Lazy:
    """Other scores of the same sizes, in place of the second patch's."""
    return Lazy(scores, lambda name: scores[name].flip(0))
