"""What a stage needs of the GPU and of the host, predicted before anything is loaded.

    needs(config, "01_patch_derivation")        # a table in GiB, and one sentence: does it fit?

Counted from the shape of the backbone and the parameters, part by part, at the moments at which a
stage holds most; each column shows the moment that is worst for it. Where there is no GPU all of
it is on the host. What is read from safetensors (patches, sets, scores) is memory-mapped: the
kernel takes such pages back when it needs them, and they are not counted.

Not counted: judges, lm-eval's tasks (their texts' lengths are not ours), and what others hold of
the device. docs/memory.md has the measurements that this was fitted to and held against; on a GPU
nothing has been measured yet.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from spkit.backbone import DTYPES
from spkit.config import Config
from spkit.scoring import SHARE_OF_FREE_MEMORY
from spkit.shape import Matrix, Shape

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight, with double quantisation
FP32, INT32, INT64 = 4, 4, 8

# Lengths that the parameters leave open, in tokens.
SANDBOX_TOKENS, UNKNOWN_TOKENS = 48, 1024  # of a pair or a prompt; the latter is a guess
PERPLEXITY_TOKENS = 512  # utility/likelihood.py cuts longer texts

# Counted by hand in the code of torch, transformers and peft; docs/memory.md says how.
LOGITS_COPIES = 3  # fp32, beside the model's own: laid out anew, log-softmax, gradient
MERGE_BYTES = 22  # a weight of one matrix while two deltas are merged: fp32 ones, thinned, masks
RANK_BYTES = 14  # a weight of one matrix while it is ranked and binned: scores, bins, masks
BINS = 2**16 * 8  # bytes of a matrix's histogram in importance_summary.py, for each patch

# Measured after the imports; on a GPU assumed.
LIBRARIES = {"cpu": 0.55 * GIB, "cuda": 1.5 * GIB}
GPU_CONTEXT, GPU_FRAGMENTS = 0.5 * GIB, 0.05  # the driver's own; lost to fragments

BACKBONE, FACTORS, OPTIMIZER = "backbone", "LoRA factors", "gradients and moments"
ACTIVATIONS, LOGITS, MATRIX = "activations", "logits and loss", "one matrix in full precision"
SCORES, STORED, SUMMARY = "importance scores", "stored layer inputs", "summary for figures"
SETS, DELTA, CACHE, PATCHES = "sets of weights", "sparse delta", "KV cache", "patches on the host"
HALVES, PYTHON, CONTEXT = "kept halves", "Python and libraries", "CUDA context and fragments"
PEAK = "peak"

# part -> the parameters that make it smaller, the most effective one first; "" is the stage's own
LOWER = {
    BACKBONE: ("derivation.quantization", "evaluation.quantization", "backbone.source"),
    FACTORS: ("derivation.lora.r",),
    OPTIMIZER: ("derivation.optimizer", "derivation.lora.r"),
    ACTIVATIONS: ("data.max_tokens",),
    LOGITS: ("data.max_tokens",),
    SCORES: ("importance.layers_per_pass", "importance.save"),
    STORED: ("importance.samples", "data.max_tokens"),
    SETS: ("backbone.source",),
    DELTA: ("patching.top_rate_se", "patching.top_rate_osm"),
    HALVES: ("patching.top_rate_se", "patching.top_rate_osm", "patching.balance"),
    CACHE: ("evaluation.batch_size", "evaluation.max_new_tokens"),
}


class Moment(dict):
    """{part: [bytes on the device, bytes on the host]} of what is alive at one time."""

    def __init__(self, name: str, parameters: tuple[str, ...] = ()):
        super().__init__()
        self.name, self.parameters = name, parameters

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
    """A config and a shape, and the quantities that several moments need; bytes unless named."""

    config: Config
    shape: Shape
    device: str
    free: float | None = None  # on the device, bytes, for layers_per_pass "auto"

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute dtype; "auto" is 16 bits on any GPU, 32 on a CPU."""
        dtype = self.config.backbone.compute_dtype
        if dtype == "auto":
            return 2 if self.cuda else 4
        return DTYPES[dtype].itemsize

    @property
    def tokens(self) -> int:
        """Of one pair, at most."""
        if self.config.data.max_tokens is not None:
            return self.config.data.max_tokens
        return SANDBOX_TOKENS if self.config.data.harmful == "sandbox" else UNKNOWN_TOKENS

    @property
    def prompt_tokens(self) -> int:
        """Of one evaluation prompt, assumed to be no longer than a pair."""
        own = self.config.data.evaluation == "sandbox"
        return SANDBOX_TOKENS if own else self.tokens

    @property
    def targets(self) -> tuple[Matrix, ...]:
        return self.shape.targeted(self.config.derivation.lora.targets)

    @property
    def targeted(self) -> int:
        """Weights of all matrices with a patch."""
        return sum(m.weights * m.count for m in self.targets)

    @property
    def factors(self) -> int:
        """Numbers of one patch's factors."""
        r = self.config.derivation.lora.r
        return sum(r * (m.rows + m.columns) * m.count for m in self.targets)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix with a patch."""
        return max((m.weights for m in self.targets), default=0)

    def backbone(self, quantization: str) -> float:
        """The weights as they are loaded."""
        outside = self.compute * self.shape.outside
        each = NF4 if quantization == "nf4" else self.compute
        return outside + each * self.shape.linear

    def dequantised(self, quantization: str) -> float:
        """The one 4-bit matrix that is unpacked while its layer computes."""
        if quantization != "nf4":
            return 0.0
        return self.compute * max(m.weights for m in self.shape.matrices)

    def logits(self, rows: int, tokens: int) -> float:
        """[rows, tokens, vocabulary] with its loss: the model's own, then copies in fp32."""
        numbers = rows * tokens * self.shape.vocabulary
        upcast = FP32 if self.compute < FP32 else 0  # a 16-bit one is copied to fp32 at first
        own = 0 if self.compute == FP32 else self.compute  # an fp32 one is itself the first copy
        return numbers * (own + upcast * 0 + LOGITS_COPIES * FP32)

    def layer(self, *, trained: bool, scored: bool = False) -> float:
        """Bytes of a token that one decoder layer keeps for its backward pass.

        trained: inputs of the factors too, which peft computes in fp32. scored: the inputs that
        importance.py keeps.
        """
        s, c = self.shape, self.compute
        kept = 2 * FP32 * s.hidden + 4 * c * s.query + 3 * c * s.intermediate  # norms, SDPA, MLP
        if trained and c < FP32:  # every factor has its own fp32 copy of the layer's input
            kept += sum(FP32 * m.columns for m in self.targets)
        elif trained or scored:
            kept += c * (2 * s.hidden + s.intermediate)
        return kept

    @property
    def working(self) -> float:
        """Bytes of a token that come and go inside the layer that computes."""
        return WORKING * FP32 * self.shape.intermediate


WORKING = 3


# ---- the moments at which a stage holds most -----------------------------------------------------


def _loaded(see: Sizes) -> list[Moment]:
    quantization = see.config.derivation.quantization
    moment = Moment("loading").add(BACKBONE, see.backbone(quantization))
    return [moment.add(MATRIX, see.dequantised(quantization))]


def _derivation(see: Sizes) -> list[Moment]:
    d, s = see.config.derivation, see.shape
    rows = d.micro_batch_size or max(d.ascent.batch_size, d.descent.batch_size)
    tokens = rows * see.tokens
    moment_bytes = 2 * FP32 if d.optimizer == "adamw" else 2
    hint = ("derivation.micro_batch_size", "derivation.gradient_checkpointing")

    def common(name: str) -> Moment:
        moment = Moment(name, hint).add(BACKBONE, see.backbone(d.quantization))
        moment.add(FACTORS, FP32 * see.factors)
        moment.add(OPTIMIZER, (FP32 + moment_bytes) * see.factors)
        return moment.add(PATCHES, host=FP32 * see.factors)  # the ascent's

    one = see.layer(trained=True)
    all_layers = s.layers * (see.compute * s.hidden if d.gradient_checkpointing else one)
    loss = common("loss").add(ACTIVATIONS, tokens * all_layers)
    loss.add(LOGITS, see.logits(rows, see.tokens))
    below = all_layers + one if d.gradient_checkpointing else all_layers
    backward = common("backward").add(ACTIVATIONS, tokens * (below + see.working))
    backward.add(MATRIX, see.dequantised(d.quantization))
    moments = [loss, backward]
    if d.checkpoint_steps is not None:
        write = common("checkpoint")
        moments.append(write.add("checkpoint", host=(FP32 + moment_bytes) * see.factors))
    return moments


def _importance(see: Sizes) -> list[Moment]:
    i, d, s = see.config.importance, see.config.derivation, see.shape
    walks = 2 if i.scored_model == "patched" else 1
    depth = _depth(see)
    rows = min(i.batch_size, i.samples)
    tokens = rows * see.tokens
    window = FP32 * see.targeted * depth / s.layers
    hint = ("importance.batch_size",)
    moments = []
    for start in {0, min(depth, s.layers - 1)}:  # the first window, and one with windows before it
        before = start > 0
        moment = Moment("scoring", hint).add(BACKBONE, see.backbone(d.quantization))
        if walks == 2:
            moment.add(FACTORS, walks * FP32 * see.factors)
        kept = (s.layers - start) * see.layer(trained=False)
        kept += depth * (see.layer(trained=False, scored=True) - see.layer(trained=False))
        moment.add(ACTIVATIONS, tokens * kept)
        moment.add(LOGITS, see.logits(rows, see.tokens))
        moment.add(MATRIX, see.dequantised(d.quantization) + FP32 * see.largest)
        device = (walks + before) * window
        host = (2 * before + walks - 1) * window  # what is on the host only
        if not see.cuda:
            device, host = (walks + 2 * before) * window, 0
        moment.add(SCORES, device, host)
        if i.save == "scores":
            moment.add(SCORES, 0, 2 * FP32 * see.targeted * start / s.layers)
        else:
            moment.add(SETS, 0, 2 * see.targeted / 8)
        if before:
            moment.add(STORED, 0, (walks + 1) * i.samples * see.tokens * s.hidden * see.compute)
        moment.add(SUMMARY, 0, 2 * BINS * sum(m.count for m in see.targets))
        moments.append(moment)
    return moments


def _depth(see: Sizes) -> int:
    """importance.layers_per_pass as a number; "auto" as scoring.py takes it, 1 if free is None."""
    wanted, s = see.config.importance.layers_per_pass, see.shape
    if wanted != "auto":
        return min(wanted or s.layers, s.layers)
    if see.free is None:
        return 1
    a_layer = 3 * FP32 * see.targeted / s.layers
    left = see.free - see.backbone(see.config.derivation.quantization)
    return max(1, min(s.layers, int(SHARE_OF_FREE_MEMORY * left / a_layer)))


def kept_share(see: Sizes, retention: float) -> float:
    """The share of the targeted weights that both difference sets hold together, at most."""
    own, other = see.config.patching.top_rate_se, see.config.patching.top_rate_osm
    shared = max(0.0, own + other - 1)
    return min(1.0, retention * (own + other - 2 * shared))


def _patching(see: Sizes) -> list[Moment]:
    p, e, i = see.config.patching, see.config.evaluation, see.config.importance
    sets = see.targeted / 8
    write = Moment("writing").add(SETS, 0, 2 * sets)
    write.add(MATRIX, 0, MERGE_BYTES * see.largest)
    moments = [write]
    if p.balance is not None:
        kept = kept_share(see, p.retention_rate) * see.targeted
        rows = min(i.batch_size, i.samples)
        moment = Moment("balancing").add(BACKBONE, see.backbone(e.quantization))
        moment.add(HALVES, 0, (INT32 + FP32) * kept)
        moment.add(DELTA, (INT32 + see.compute) * kept)
        moment.add(MATRIX, see.dequantised(e.quantization) + see.compute * see.largest)
        moment.add(LOGITS, see.logits(rows, see.tokens))
        moments.append(moment)
    return moments


def _answers(see: Sizes, share: float) -> list[Moment]:
    """Generating, and perplexity, with a delta on this share of the targeted weights."""
    e, u, s = see.config.evaluation, see.config.utility, see.shape
    kept = share * see.targeted
    own = u.perplexity == "sandbox"
    tokens = min(see.tokens, PERPLEXITY_TOKENS) if own else PERPLEXITY_TOKENS
    total = see.prompt_tokens + e.max_new_tokens
    cache = e.batch_size * total * s.layers * 2 * s.kv * see.compute

    def common(name: str) -> Moment:
        moment = Moment(name).add(BACKBONE, see.backbone(e.quantization))
        if share:
            moment.add(DELTA, (INT32 + see.compute) * kept)
        dense = see.compute * see.largest if share and e.quantization == "nf4" else 0
        return moment.add(MATRIX, see.dequantised(e.quantization) + dense)

    generate = common("generating").add(CACHE, cache)
    generate.add(ACTIVATIONS, e.batch_size * see.prompt_tokens * see.working)
    read = common("perplexity").add(ACTIVATIONS, u.batch_size * tokens * see.working)
    own_logits = u.batch_size * tokens * s.vocabulary * see.compute
    read.add(LOGITS, own_logits + tokens * s.vocabulary * FP32 * LOGITS_COPIES)
    return [generate, read]


def _evaluation(see: Sizes) -> list[Moment]:
    moments = _answers(see, kept_share(see, 1.0))  # the largest variant: without retention
    for moment in moments:
        moment.add(SETS, 0, 2 * see.targeted / 8)
    return moments


STAGES: dict[str, tuple[Callable[[Sizes], list[Moment]], ...]] = {
    "load": (_loaded,),
    "derivation": (_derivation,),
    "importance": (_importance,),
    "patching": (_patching,),
    "evaluation": (_evaluation,),
}


def predict(config, shape, stage, device, free=None) -> pd.DataFrame:
    see = Sizes(config, shape, device, free)
    moments = [m for make in STAGES[stage] for m in make(see)]
    for m in moments:
        m.add(PYTHON, 0, LIBRARIES[device])
    if device != "cuda":
        for m in moments:
            for held in m.values():
                held[1] += held[0]
                held[0] = 0
    worst = max(moments, key=lambda m: m.total(1))
    frame = pd.DataFrame({"host GiB": {k: v[1] / GIB for k, v in worst.items()}})
    frame.loc[PEAK] = frame.sum()
    frame.attrs["moment"] = worst.name
    return frame


def needs(config: Config, stage: str) -> pd.DataFrame:
    return pd.DataFrame()
