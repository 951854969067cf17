"""How long each notebook takes on a device, predicted from sizes and parameters alone.

    stages = forecast(config, planned_shape(config), DEVICES["h100"])
    sum(part.seconds for part in stages["01_patch_derivation"])

A pass through the decoder takes the sum of three times: FLOPs at a share of the device's peak,
bytes of weights at its bandwidth, and a fixed time a layer (Python and kernel launches), which is
all that counts where few tokens go through a small layer. On a GPU they partly overlap, so their
sum is on the long side. What the host does with every weight (masks, ranking, norms, encoding) is
counted in nanoseconds a weight, measured on one core; a disk reads and writes at DISK.

Every number that is not counted from the parameters is a constant below, with where it is from.
docs/planning.md compares the predictions with what was measured on a CPU; on a GPU nothing was.
Steps are the most that the parameters allow: an ascent that reaches its ceiling ends earlier.
Not counted: judges, the alignment of a backbone, downloads, waiting in a queue.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.memory import GIB, ITEM, NF4, Sizes, kept_share, layers_in_a_pass
from spkit.running.sizes import Shape
from spkit.running.widths import planned_shape

FP32, INT32 = 4, 4


@dataclass(frozen=True)
class Device:
    """What a device can do; where its numbers are from stands beside DEVICES.

    half, single: FLOP/s of matrix products in 16 bits and in fp32. share: what part of that real
    layers reach. bandwidth: bytes/s of its memory. memory: bytes. layer: seconds that a decoder
    layer takes at least in a pass. start: seconds of a notebook before anything is loaded.
    """

    name: str
    half: float
    single: float
    share: float
    bandwidth: float
    memory: float
    layer: float
    start: float

    def rate(self, item: int) -> float:
        """FLOP/s that are reached by products of numbers of so many bytes."""
        return self.share * (self.half if item == 2 else self.single)


# GPUs: peak without sparsity, bandwidth and memory from NVIDIA's data sheets (Tesla T4, 2019; A100
# 80 GB SXM, 2022; H100 SXM, 2023; H200 SXM, 2024). share, layer and start are assumed. CPU: one
# thread of an AMD EPYC with AVX-512, measured by `python benchmarks/planning.py --cpu`; its share,
# layer and start were set by a look at notebook 01 of SmolLM2, before anything else was compared.
DEVICES = {
    device.name: device
    for device in (
        Device("t4", 65e12, 8.1e12, 0.4, 320e9, 15 * GIB, 0.8e-3, 20.0),
        Device("a100", 312e12, 19.5e12, 0.4, 2039e9, 79 * GIB, 0.8e-3, 20.0),
        Device("h100", 989e12, 67e12, 0.4, 3350e9, 79 * GIB, 0.6e-3, 20.0),
        Device("h200", 989e12, 67e12, 0.4, 4800e9, 140 * GIB, 0.6e-3, 20.0),
        Device("cpu", 374e9, 110e9, 0.6, 40e9, 20 * GIB, 0.3e-3, 6.0),
    )
}
DISK = 1e9  # bytes/s, read or written: assumed, of a local SSD
# seconds a weight on one core of the same CPU; `python benchmarks/planning.py --cpu`
SUMMARY_SECONDS = 60e-9  # of each patch: the histograms of notebook 02
RANK_SECONDS = 3e-9  # of each patch: its top-rate set
VARIANTS_SECONDS = 530e-9  # of notebook 03: seven variants, counted and made
DELTA_SECONDS = 95e-9  # SafePatching's alone; a whole patch takes WHOLE_SECONDS
WHOLE_SECONDS = 15e-9
PRODUCT_BYTES = 24  # a weight and sample: the product of gradient and input, made and added
VARIANTS, SPARSE = 7, 4  # answered in notebook 03; those with a sparse delta

# Mean tokens of a pair, as its batch is padded, and of a prompt, with the chat format. Counted with
# the sandbox's and SmolLM2's tokenizers, padding guessed; all others are assumed.
PAIR_TOKENS = {"sandbox": 24, "advbench": 60}
PROMPT_TOKENS = {"sandbox": 14, "advbench": 45, "over_safety": 45, "rho": 45}
OTHER_PAIR, OTHER_PROMPT = 192, 64
ROWS = {  # of a source that can be asked, all splits
    **{"advbench": 520, "beavertails_test": 1700, "xstest": 250, "oktest": 300},
    **{"over_safety": 300, "rho": 80},
}
OTHER_ROWS = 400
SANDBOX_CELLS, SANDBOX_CELL = 4, 300  # groups, and prompts in each


@dataclass(frozen=True)
class Task:
    """A task of lm-eval: documents, parts that `limit` counts apart, requests a document.

    tokens: of a request. new: tokens generated for it until its stop, in the longest of a batch.
    """

    documents: int
    parts: int
    requests: int
    tokens: int
    new: int = 0


TASKS = {  # documents, parts and requests as the tasks' files have them; lengths are assumed
    "mmlu": Task(14042, 57, 1, 150),  # four answers of one token share a pass
    "hellaswag": Task(10042, 1, 4, 110),
    "arc_challenge": Task(1172, 1, 4, 60),
    "arc_easy": Task(2376, 1, 4, 50),
    "winogrande": Task(1267, 1, 2, 40),
    "piqa": Task(1838, 1, 2, 60),
    "bbh_cot_fewshot": Task(6511, 27, 1, 1100, 300),
    "gsm8k": Task(1319, 1, 1, 900, 250),
    "hendrycks_math": Task(5000, 7, 1, 800, 500),
}
OTHER_TASK = Task(1000, 1, 4, 150)


@dataclass(frozen=True)
class Part:
    """A part of a notebook's time. host: spent on a core of the host, while the device waits."""

    name: str
    seconds: float
    host: bool = False


@dataclass(frozen=True)
class Clock:
    """The times of one run. see: its sizes. gpus: that share one model, layer after layer."""

    see: Sizes
    device: Device
    gpus: int = 1

    @property
    def item(self) -> int:
        """Bytes of a number in the model that answers."""
        dtype = self.see.config.evaluation.dtype
        return ITEM.get(dtype or "", self.see.compute)

    # ---- one pass --------------------------------------------------------------------------------

    def passed(self, tokens: float, length: float, times: float = 0) -> float:
        """Seconds of a pass of so many tokens in rows of `length`, through all layers.

        times: of the derivation's backbone, how many forward passes it is worth: a backward pass
        through frozen weights is one more (the other half, the gradients of weights, is not
        computed), checkpointing one more. 0: one pass of the model that answers.
        """
        s, c = self.see.shape, self.see.compute if times else self.item
        config = self.see.config
        quantization = (config.derivation if times else config.evaluation).quantization
        flops = tokens * (2 * s.linear + 2 * s.hidden * s.vocabulary)
        flops += tokens * 4 * length * s.query * s.layers
        read = weight_bytes(quantization, c) * s.linear + c * s.hidden * s.vocabulary
        fixed = s.layers * self.device.layer
        once = flops / self.device.rate(c) + read / self.device.bandwidth + fixed
        return (times or 1) * once

    def delta(self, tokens: float, kept: float) -> float:
        """Seconds more of a pass where a 4-bit layer adds its delta's own product."""
        c, targeted = self.item, self.see.targeted
        flops = 2 * tokens * targeted
        moved = 2 * c * targeted + (INT32 + c) * kept  # the dense matrix is made and read each time
        return flops / self.device.rate(c) + moved / self.device.bandwidth

    def asked(self, prompts: int, rows: int, tokens: float, new: int, share: float = 0.0) -> float:
        """Seconds of answering prompts in batches of `rows`, `new` tokens each.

        share: of the targeted weights that the delta of a 4-bit model has.
        """
        quantization, s = self.see.config.evaluation.quantization, self.see.shape
        batches = math.ceil(prompts / rows)
        rows = min(rows, prompts)
        more = quantization == "nf4" and share > 0
        kept = share * self.see.targeted
        prefill = self.passed(rows * tokens, tokens)
        step = self.passed(rows, 0)
        cache = rows * (tokens + new / 2) * s.layers * 2 * s.kv * self.item
        step += cache / self.device.bandwidth
        if more:
            prefill += self.delta(rows * tokens, kept)
            step += self.delta(rows, kept)
        return batches * (prefill + new * step)

    # ---- parts of notebooks ----------------------------------------------------------------------

    def loaded(self) -> float:
        """Seconds of reading the checkpoint."""
        return self.see.shape.weights * self.see.shape.checkpoint_bytes / DISK

    def trained(self, steps: int, batch: int) -> float:
        """Seconds of so many steps of LoRA on the frozen backbone."""
        d = self.see.config.derivation
        rows = min(d.micro_batch_size or batch, batch)
        length = pair_tokens(self.see.config)
        times = 3 if d.gradient_checkpointing else 2
        one = self.passed(rows * length, length, times)
        one += 6 * rows * length * self.see.factors / self.device.rate(self.see.compute)
        return steps * math.ceil(batch / rows) * one

    def scored(self, patches: int = 2) -> float:
        """Seconds of the importances of `patches` patches, window by window."""
        i, s = self.see.config.importance, self.see.shape
        walks = patches if i.scored_model == "patched" else 1
        depth, length = layers_in_a_pass(self.see), pair_tokens(self.see.config)
        rows = min(i.batch_size, i.samples)
        share = sum(s.layers - first for first in range(0, s.layers, depth)) / s.layers
        passes = share * self.passed(rows * length, length, 2)
        products = 2 * length * self.see.targeted / (self.device.share * self.device.single)
        products += PRODUCT_BYTES * self.see.targeted / self.device.bandwidth
        return walks * (math.ceil(i.samples / rows) * passes + i.samples * products)

    def measured(self, share: float) -> float:
        """Seconds of the utility of one model: tasks, perplexity, KL, open questions."""
        u, seconds = self.see.config.utility, 0.0
        for task in (TASKS.get(name, OTHER_TASK) for name in u.tasks):
            one = min(u.limit or task.documents, math.ceil(task.documents / task.parts))
            requests = one * task.parts * task.requests
            seconds += self.asked(requests, u.batch_size, task.tokens, task.new, share)
        length = 512 if u.perplexity != "sandbox" else PROMPT_TOKENS["sandbox"]
        seconds += self.asked(u.perplexity_texts, u.batch_size, length, 0, share)
        if u.kl is not None:
            seconds += self.asked(u.kl_prompts, u.batch_size, OTHER_PROMPT, 0, share)
        if u.mt_bench.prompts is not None:
            seconds += 2 * self.asked(80, u.batch_size, 256, u.mt_bench.max_new_tokens, share)
        return seconds

    def answered(self, share: float = 0.0) -> float:
        """Seconds of the evaluation's prompts, once."""
        e = self.see.config.evaluation
        tokens = prompt_tokens(self.see.config)
        return self.asked(prompts(self.see.config), e.batch_size, tokens, e.max_new_tokens, share)

    def written(self, reads: int = 1) -> float:
        """Seconds of a patched checkpoint: read, written, and read again so often."""
        return (1 + reads) * self.loaded()


def weight_bytes(quantization: str, item: int) -> float:
    """Bytes that a pass moves for a weight; a 4-bit one is read, written in full, read again."""
    return NF4 + 2 * item if quantization == "nf4" else item


def pair_tokens(config: Config) -> int:
    """The mean length of a pair of D_h, in tokens, as its batch is padded."""
    found = PAIR_TOKENS.get(config.data.harmful, OTHER_PAIR)
    return min(found, config.data.max_tokens or found)


def sources(config: Config) -> list[str]:
    """The names of the evaluation's sources."""
    named = config.data.evaluation
    return [named] if isinstance(named, str) else list(named)


def prompt_tokens(config: Config) -> float:
    """The mean length of an evaluation prompt, in tokens."""
    found = [PROMPT_TOKENS.get(name, OTHER_PROMPT) for name in sources(config)]
    return sum(found) / len(found)


def prompts(config: Config) -> int:
    """How many evaluation prompts there are, as far as that is known without reading them."""
    cell, d, count = config.evaluation.prompts_per_cell or math.inf, config.data, 0
    for name in sources(config):
        if name == "sandbox":
            count += SANDBOX_CELLS * min(SANDBOX_CELL, cell)
            continue
        dev, held_out = d.dev_share, 1 - d.dev_share
        if d.shares is not None and name == d.harmful:
            dev, held_out = d.shares.dev, 1 - d.shares.align - d.shares.harmful - d.shares.dev
        share = dev if config.evaluation.split == "dev" else held_out
        count += min(round(share * ROWS.get(name, OTHER_ROWS)), cell)
    return int(count)


# ---- notebooks -----------------------------------------------------------------------------------


def backbone(clock: Clock) -> Iterator[Part]:
    """Notebook 00: the base answers."""
    yield Part("loading", clock.loaded())
    yield Part("answers", clock.answered())
    yield Part("utility", clock.measured(0.0))


def derivation(clock: Clock) -> Iterator[Part]:
    """Notebook 01: ascent and descent, where no adapter stands for them."""
    d = clock.see.config.derivation
    yield Part("loading", clock.loaded())
    for name, given, how in (("ascent", d.se, d.ascent), ("descent", d.osm, d.descent)):
        if given is None:
            yield Part(name, clock.trained(how.max_steps, how.batch_size))


def importance(clock: Clock) -> Iterator[Part]:
    """Notebook 02: both patches scored, ranked and summed up."""
    yield Part("loading", clock.loaded())
    yield Part("scores", clock.scored())
    each = SUMMARY_SECONDS + (RANK_SECONDS if clock.see.config.importance.save == "sets" else 0)
    yield Part("ranks and histograms", 2 * each * clock.see.targeted, host=True)


def patching(clock: Clock) -> Iterator[Part]:
    """Notebook 03: seven variants made and answered, SafePatching's utility, its patch file."""
    config = clock.see.config
    full, kept = kept_share(config, 1.0), kept_share(config, config.patching.retention_rate)
    yield Part("loading", clock.loaded())
    made = (VARIANTS_SECONDS + DELTA_SECONDS) * clock.see.targeted
    yield Part("variants made", made, host=True)
    sparse = SPARSE * clock.answered(full if config.evaluation.quantization == "nf4" else 0.0)
    yield Part("answers", sparse + (VARIANTS - SPARSE) * clock.answered())
    yield Part("utility", clock.measured(kept))
    yield Part("patch file and checkpoint", clock.written(reads=3))


def continual(clock: Clock) -> Iterator[Part]:
    """Notebook 04: every stage of every method derives, patches, writes and answers."""
    config = clock.see.config
    stages, d = len(config.continual.stages), config.derivation
    up, down = (clock.trained(how.max_steps, how.batch_size) for how in (d.ascent, d.descent))
    npo = config.baselines.npo
    train = {"ga": up, "npo": 2 * clock.trained(npo.max_steps, npo.batch_size)}  # and a reference
    for name in config.continual.methods:
        ours = name in ("safepatching", "balanced", "joint")
        seconds = clock.loaded() + train.get(name, up + down)
        seconds += clock.written() + (clock.scored() if ours else 0.0)
        share = kept_share(config, config.patching.retention_rate) if ours else 0.0
        yield Part(name, stages * (seconds + clock.answered(min(1.0, stages * share))))
        host = DELTA_SECONDS + 2 * RANK_SECONDS if ours else WHOLE_SECONDS
        yield Part(f"{name}, deltas", stages * host * clock.see.targeted, host=True)


STAGES = {
    "00_backbone": backbone,
    "01_patch_derivation": derivation,
    "02_importance_analysis": importance,
    "03_controllable_patching": patching,
    "04_continual_psa": continual,
}


def forecast(
    config: Config, shape: Shape, device: Device, gpus: int = 1
) -> dict[str, tuple[Part, ...]]:
    """{notebook: its parts, "start" first} on `gpus` of this device that share the layers.

    They work one after the other, so more of them give more memory and no more speed.
    """
    see = sized(config, shape, device, gpus)
    start = Part("start", device.start)
    clock = Clock(see, device, gpus)
    return {stage: (start, *parts(clock)) for stage, parts in STAGES.items()}


def sized(config: Config, shape: Shape, device: Device, gpus: int = 1) -> Sizes:
    """The sizes of a run on this device, whose memory importance.layers_per_pass "auto" goes by."""
    see = Sizes(config, shape, "cpu" if device.name == "cpu" else "cuda")
    rest = (1 - 1 / gpus) * see.backbone(config.derivation.quantization)  # is on the other GPUs
    return replace(see, free=device.memory + rest)


def seconds(parts: tuple[Part, ...]) -> float:
    """All parts together."""
    return sum(part.seconds for part in parts)


def seconds_of(config: Config, stage: str, device: str) -> float | None:
    """Of one notebook on a device of DEVICES; None where the backbone's sizes are not known."""
    try:
        shape = planned_shape(config)
    except SpkitError:
        return None
    return seconds(forecast(config, shape, device_named(device, config.threads))[stage])


def device_named(name: str, threads: int | None = None) -> Device:
    """A device of DEVICES; a CPU computes on so many threads. SpkitError for another name."""
    if name not in DEVICES:
        raise SpkitError(f"device is {name!r}, allowed: {', '.join(DEVICES)}")
    found = DEVICES[name]
    if name == "cpu" and threads:
        return replace(found, half=threads * found.half, single=threads * found.single)
    return found
