"""What the parts of a GPU session share: parameters, clocks, peaks, a random checkpoint.

Times on a GPU are those of its own events, or of the clock after it has ended its work.
"""

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from gpu_facts import facts
from gpu_session import Results

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.running.memory import CONTEXT, PEAK, PYTHON, Sizes, predict
from spkit.running.shape import shape_of
from spkit.system.determinism import make_deterministic
from spkit.system.machine import layers_that_fit, own_memory

ROOT = Path(__file__).parents[1]
PARAMS = ROOT / "params" / "llama2-7b-chat.yaml"
GIB = 2**30
# what torch may take of a GPU with 16 GB: a T4 shows 14.75 GiB, and CUDA itself needs some of it
CAP_GIB = 14.0
STEPS = 6  # of ascent and of descent; the first is not timed
RANKED_LAYERS = 4  # whose weights are ranked and patched: the CPU's work, a GPU would wait for it
# random weights lose about log(vocabulary) nats a token: neither clamped nor stopped there
FEW = {
    **{"backbone.revision": None, "derivation.checkpoint_steps": None},
    **{"derivation.ascent.max_steps": STEPS, "derivation.ascent.warmup_steps": 1},
    **{"derivation.ascent.stop_mean_loss": 50.0, "derivation.ascent.token_loss_clamp": 60.0},
    **{"derivation.descent.max_steps": STEPS, "derivation.descent.warmup_steps": 1},
    **{"importance.samples": 8, "evaluation.max_new_tokens": 64},
}
TINY = {
    **{"threads": 1, "backbone.device": "cpu", "data.max_tokens": 32, "derivation.lora.r": 2},
    **{"derivation.micro_batch_size": 2, "derivation.ascent.batch_size": 4},
    **{"derivation.descent.batch_size": 4, "importance.samples": 2},
    **{"evaluation.batch_size": 2, "evaluation.max_new_tokens": 3},
}
TINY_SIZES = [64, 2, 128, 4, 4, 16, 300, False]  # more than a token for every byte
UNBOUNDED = ("environment", "nf4", "tests", "unquantised", "notebooks")


@dataclass
class Bench:
    """One part of a session: its parameters, its folder, and where its figures go.

    cap: bytes that torch may take of the GPU; None: all.
    """

    part: str
    results: Results
    config: Config
    folder: Path
    cap: float | None
    tiny: bool

    def figure(self, name: str, value: float | int | str, unit: str = "") -> None:
        """Keep one figure at once."""
        self.results.figure(self.part, name, value, unit)

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"; the session has seen that there is a GPU."""
        return "cpu" if self.tiny else "cuda"

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to be asked for times and peaks."""
        return not self.tiny

    @property
    def place(self) -> str:
        """The device, as memory.predict takes it."""
        return "cuda" if self.cuda else "cpu"

    @cached_property
    def shape(self):
        """The backbone's shape, of its config.json."""
        return shape_of(self.config)

    def changed(self, **values) -> "Bench":
        """The same with other parameters: "patching__alpha" is patching.alpha."""
        given = {key.replace("__", "."): value for key, value in values.items()}
        return replace(self, config=Config.from_sources(self.config.model_dump(), given))

    def scored_by_windows(self) -> "Bench":
        """importance.layers_per_pass as "auto" takes it on a GPU of `cap` bytes.

        "auto" asks the driver, which knows of no bound that a process has set itself.
        """
        config = self.config
        if config.importance.layers_per_pass != "auto":
            return self
        sizes = Sizes(config, self.shape, self.device)
        left = (self.cap or CAP_GIB * GIB) - sizes.backbone(config.derivation.quantization)
        depth = layers_that_fit(left, sizes.targeted, self.shape.layers, patches=2)
        return self.changed(importance__layers_per_pass=depth)


def bench_of(given: argparse.Namespace) -> Bench:
    """The part's parameters, folder and bound; the GPU's allocator is bounded from here on."""
    default = "outputs/gpu-rehearsal-work" if given.rehearse else "outputs/gpu-work"
    folder = Path(given.work or default).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    changes = FEW | {"backbone.source": str(folder / "model")} | (TINY if given.rehearse else {})
    for pair in given.set:
        key, _, value = pair.partition("=")
        changes[key] = json.loads(value)
    config = load_params(PARAMS, changes)
    cap = CAP_GIB if given.cap_gib is None else given.cap_gib
    cap = None if given.part in UNBOUNDED or not cap else cap * GIB
    if not given.rehearse:
        torch.zeros(1, device="cuda")  # the CUDA context is no part of a peak
        if cap is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    make_deterministic(config.seed, config.threads)
    results = Results(
        given.out, json.loads(given.facts) if given.facts else facts(given.rehearse, None)
    )
    return Bench(given.part, results, config, folder, cap, given.rehearse)


# ---- clocks and peaks ----------------------------------------------------------------------------


class Marks:
    """Moments on the device: events of the GPU, or the clock of a CPU."""

    def __init__(self, cuda: bool):
        self.cuda, self.all = cuda, []

    def mark(self) -> None:
        """Now, in the order in which the device works."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.all.append(event)
        else:
            self.all.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each moment and the next."""
        pairs = list(zip(self.all, self.all[1:], strict=False))
        if not self.cuda:
            return [1000 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def seconds(bench: Bench, work: Callable[[], object]) -> float:
    """How long it takes, until the device has done all of it."""
    start = time.perf_counter()
    work()
    if bench.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def peaks(bench: Bench, stage: str, what: str = "") -> Iterator[None]:
    """Predicted and measured peaks of what happens inside: tensors on the GPU, the host's own.

    stage: of memory.predict. The CUDA context and the imports are left out on both sides.
    """
    from memory_budget import Sampler, warm_up

    with suppress(ImportError):  # what the libraries set up once is no part of a stage
        warm_up(bench.config)
    what = f"{what}, " if what else ""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampler, before = Sampler(), own_memory()
    sampler.restart()
    try:
        yield
    finally:
        sampler.stop()
        table = predict(bench.config, bench.shape, stage, bench.place, bench.cap)
        if bench.cuda:
            need = (table.loc[PEAK, "GPU GiB"] - table.loc[CONTEXT, "GPU GiB"]) * GIB
            found = torch.cuda.max_memory_allocated()
            bench.figure(f"{what}GPU peak, predicted", need / GIB, "GiB")
            bench.figure(f"{what}GPU peak, allocated", found / GIB, "GiB")
            held = torch.cuda.max_memory_reserved()
            bench.figure(f"{what}GPU peak, reserved by torch", held / GIB, "GiB")
            bench.figure(f"{what}GPU peak, predicted / allocated", need / found)
        need = (table.loc[PEAK, "host GiB"] - table.loc[PYTHON, "host GiB"]) * GIB
        bench.figure(f"{what}host peak, predicted", need / GIB, "GiB")
        bench.figure(f"{what}host peak, measured", (sampler.peak - before) / GIB, "GiB")


# ---- what several parts need ---------------------------------------------------------------------


def checkpoint(bench: Bench) -> Path:
    """The folder of the random checkpoint, made where it is missing."""
    from spkit.bench import random_checkpoint

    folder = bench.folder / "model"
    if folder.is_dir():
        return folder
    architecture, values = "llama", TINY_SIZES
    if not bench.tiny:
        architecture, values = random_checkpoint.SHAPES["llama2-7b"]
    sizes = dict(zip(random_checkpoint.SIZES, values, strict=True))
    free, needed = shutil.disk_usage(bench.folder).free, 1 if bench.tiny else 30 * GIB
    if free < needed:
        raise SpkitError(f"{bench.folder} has {free / GIB:.0f} GiB free, 30 are needed (--work)")
    part = bench.folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    took = seconds(
        bench,
        lambda: random_checkpoint.write(part, sizes, architecture, device=bench.device),
    )
    part.rename(folder)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    bench.figure("making the random checkpoint", took, "s")
    bench.figure("its weights", written / 1e9, "GB")
    return folder


def loaded(bench: Bench, quantization: str):
    """(model, tokenizer) of the random checkpoint."""
    from spkit.models.loading import load

    return load(checkpoint(bench), quantization=quantization, **bench.config.backbone.loading)


def layers_of(bench: Bench) -> dict:
    """The targeted layers, without weights."""
    from spkit.models.weights import target_weights
    from spkit.running.shape import model_on_meta

    return target_weights(model_on_meta(bench.config, False), bench.config.derivation.lora.targets)


def patches(bench: Bench) -> list:
    """The patches of the part "derivation", and random ones where it has left none."""
    import memory_budget

    from spkit.method.patch import Factors

    checkpoint(bench)
    files, made = left(bench, "patches", ("se", "osm"))
    if not made:
        memory_budget.draw_patches(bench.config, bench.folder / "random", layers_of(bench))
    return [Factors.load(path) for path in files]


def left(bench: Bench, what: str, names: tuple[str, ...]) -> tuple[list[Path], bool]:
    """(files, True) that an earlier part has left, else (files to be drawn at random, False)."""
    made = all((bench.folder / f"{name}.safetensors").is_file() for name in names)
    folder = bench.folder if made else bench.folder / "random"
    folder.mkdir(exist_ok=True)
    bench.figure(what, "of the parts before" if made else "random")
    return [folder / f"{name}.safetensors" for name in names], made


def first_layers(names: Iterable[str]) -> list[str]:
    """The tensors of the first RANKED_LAYERS decoder layers."""
    from spkit.models.checkpoint_files import place

    return [name for name in names if 0 <= place(name)["layer"] < RANKED_LAYERS]


def safepatching(bench: Bench):
    """SafePatching of the first layers: the patches and sets of the parts before, else random."""
    import memory_budget

    from spkit.method.safepatching import SafePatching
    from spkit.method.sets import BitSets

    pair = patches(bench)
    files, made = left(bench, "sets of weights", ("top_se", "top_osm"))
    if not made:
        layers = layers_of(bench)
        own = {name: layers[name] for name in first_layers(layers)}
        memory_budget.draw_sets(bench.config, bench.folder / "random", own)
    sets = tuple(BitSets.load(path) for path in files)
    pair = [replace(p, factors={name: p.factors[name] for name in sets[0]}) for p in pair]
    return SafePatching(*pair, sets, bench.config.patching, bench.config.seed)
