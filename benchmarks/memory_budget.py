"""Predicted and measured peak memory and time of every stage, with random weights made on the spot.

    python benchmarks/memory_budget.py --hidden 1024 --layers 12 --intermediate 2816 --heads 16
    python benchmarks/memory_budget.py --shape llama2-7b --device cuda --cap-gib 16
    python benchmarks/memory_budget.py --params params/smollm2-135m.yaml --spread --hidden 512

Nothing is downloaded. Each stage runs in a process of its own, with as few steps, samples, prompts
and new tokens as show its peak, and all texts as long as `data.max_tokens` allows. With --spread
pairs, prompts and texts are files in which lengths differ as they do in real ones (log-normal), the
prediction reads them, as that of a run does. The sets of
weights are drawn as disjoint as the top rates allow, which is the most that a patch can keep.

Measured on the host: RssAnon + RssShmem of /proc/self/status, every 10 ms, minus the value after
the imports. File-backed pages are left out: memory-mapped safetensors are given back by the kernel
as soon as another needs the room. On a GPU: torch's peak of allocated bytes, and of reserved ones.
--cap-gib bounds the GPU's allocator; the host is not bounded.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from spkit.bench import random_checkpoint
from spkit.comparison.ablations import ablated
from spkit.config import Config
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.evaluation.answers import respond
from spkit.evaluation.utility.likelihood import MAX_TOKENS, perplexity, perplexity_texts
from spkit.examples import EvalPrompt, HarmfulPair
from spkit.method import importance
from spkit.method.balancing import balanced, first_token_losses
from spkit.method.derivation import derive
from spkit.method.importance import Calibration, save_windows, score_windows
from spkit.method.overlap import ImportanceSummary
from spkit.method.patch import Factors
from spkit.method.sets import BitSets
from spkit.method.training import Checkpoints, TrainingSet
from spkit.models.chat import encode_prompt
from spkit.models.loading import load, resolve_device
from spkit.models.patched import patched
from spkit.models.weights import target_weights
from spkit.patchfile.apply import apply
from spkit.patchfile.make import About, make_patch
from spkit.running.batches import read
from spkit.running.memory import Sizes, predict
from spkit.running.patch_of_run import load_safepatching
from spkit.running.shape import shape_of
from spkit.running.sizes import Batches, Shape
from spkit.system.determinism import make_deterministic
from spkit.system.machine import hardware, own_memory, versions
from spkit.validation import read_yaml

GIB = 2**30
# what is to be as in params/llama2-7b-chat.yaml where no --params are given
LIKE_7B = {
    "backbone.compute_dtype": "auto",
    "threads": None,
    "data.max_tokens": 512,
    "derivation.gradient_checkpointing": True,
    "derivation.micro_batch_size": 4,
    "derivation.optimizer": "paged_adamw_8bit",
    "derivation.lora.r": 16,
    "importance.batch_size": 1,
    "importance.layers_per_pass": 2,
    "importance.save": "sets",
    "patching.retention_rate": 0.3,
    "patching.top_rate_se": 0.03,
    "patching.top_rate_osm": 0.02,
    "evaluation.quantization": "nf4",
    "evaluation.batch_size": 8,
    "evaluation.max_new_tokens": 256,
}
# whatever --params say: the texts are random words, and nothing is aligned
ONLY_FILES = {
    "backbone.sha256": None,
    "data.responses": None,
    "data.as_questions": 0.0,
    "data.shares": None,
    "data.dev_share": 0.1,
    "data.wrappers": "none",
    "align.harmful": None,
    "utility.kl": None,
    "utility.tasks": [],
}
# glibc keeps what was freed in blocks below 32 MiB; so told, it gives back what is above 64 KiB
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
PATCH_SCALE = 1e-3  # standard deviation of random factors


class Sampler:
    """The highest RssAnon + RssShmem since `restart`, in bytes, read by a thread."""

    def __init__(self, every: float = 0.01):
        self._every, self._stop, self.peak = every, threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.peak = max(self.peak, own_memory())

    def restart(self) -> None:
        self.peak = own_memory()

    def stop(self) -> None:
        self._stop.set()


# ---- what a stage does: the notebooks' cells, with few of everything ----------------------------


def prompt_text(tokenizer, tokens: int, number: int) -> str:
    """Words of which the rendered prompt has exactly `tokens` tokens."""
    words = random_checkpoint.WORDS
    room = tokens - len(encode_prompt(tokenizer, ""))
    return " ".join(words[(number + i * i) % len(words)] for i in range(room))


def own_texts(config: Config) -> bool:
    """Whether the pairs are a file that was written for this (--spread)."""
    return Path(config.data.harmful).is_file()


def pairs_for(config: Config, tokenizer) -> list[HarmfulPair]:
    """Pairs of `data.max_tokens` tokens, half prompt and half answer; or those of the file."""
    if own_texts(config):
        return load_harmful_pairs(config.data, seed=config.seed)
    half = config.data.max_tokens // 2
    return [
        HarmfulPair(str(i), prompt_text(tokenizer, half, i), "w1 " * config.data.max_tokens, "any")
        for i in range(2 * config.derivation.ascent.batch_size)
    ]


def calibration(config: Config, tokenizer) -> Calibration:
    """The pairs that are scored, of the greatest length."""
    pairs = pairs_for(config, tokenizer)
    return Calibration(pairs, config.importance, config.seed, config.data.max_tokens)


def stage_load(config: Config, folder: Path) -> None:
    load(folder / "model", quantization=config.derivation.quantization, **config.backbone.loading)


def stage_derivation(config: Config, folder: Path) -> None:
    model, tokenizer = load(
        folder / "model", quantization=config.derivation.quantization, **config.backbone.loading
    )
    data = TrainingSet.of(tokenizer, pairs_for(config, tokenizer), config.data.max_tokens)
    patches = []
    for direction in ("ascent", "descent"):
        checkpoints = Checkpoints(folder / "checkpoints" / direction)
        patch, _ = derive(model, data, direction, config.derivation, config.seed, checkpoints)
        patches.append(patch)


def stage_importance(config: Config, folder: Path) -> None:
    model, tokenizer = load(
        folder / "model", quantization=config.derivation.quantization, **config.backbone.loading
    )
    patches = [Factors.load(folder / f"{name}.safetensors") for name in ("se", "osm")]
    made = folder / "scored"
    made.mkdir(exist_ok=True)
    windows = score_windows(model, tokenizer, patches, calibration(config, tokenizer))
    seen = ImportanceSummary().watch(windows)
    save_windows(seen, config.importance.save, config.patching, made)


def stage_patching(config: Config, folder: Path) -> None:
    method = load_safepatching(folder, folder, config)
    if config.patching.balance is not None:
        model, tokenizer = load(folder / "model", **config.answering)
        losses = first_token_losses(model, tokenizer, calibration(config, tokenizer))
        method = balanced(method, losses)
        del model, losses
    file = folder / "patch.safetensors"
    make_patch(folder / "model", method.deltas(), file, About("random"))
    apply(file, folder / "model", folder / "written")


def stage_evaluation(config: Config, folder: Path) -> None:
    method = load_safepatching(folder, folder, config)
    model, tokenizer = load(folder / "model", **config.answering)
    prompts, texts = to_answer(config, tokenizer)
    with patched(model, ablated(method, "without retention (same α)").deltas()):
        respond(
            *(model, tokenizer, prompts),
            name="any",
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=config.evaluation.batch_size,
        )
        perplexity(model, tokenizer, texts, batch_size=config.utility.batch_size)


def to_answer(config: Config, tokenizer) -> tuple[list[EvalPrompt], list[str]]:
    """Prompts and texts of the greatest length, or those of the files."""
    if own_texts(config):
        return load_eval_prompts(config.data, config.evaluation), perplexity_texts(config)
    tokens = config.data.max_tokens
    prompts = [
        EvalPrompt(str(i), prompt_text(tokenizer, tokens, i), "harmful", "seen", "any", "plain", "")
        for i in range(config.evaluation.batch_size)
    ]
    return prompts, [" ".join(random_checkpoint.WORDS * 8)] * config.utility.batch_size


STAGES = {
    "load": stage_load,
    "derivation": stage_derivation,
    "importance": stage_importance,
    "patching": stage_patching,
    "evaluation": stage_evaluation,
}


# ---- a stage in a process of its own ------------------------------------------------------------


def child(stage: str, config: Config, folder: Path, cap_gib: float | None) -> None:
    """Run one stage and print what it took as one line of JSON."""
    make_deterministic(config.seed, config.threads)
    cuda = resolve_device(config.backbone.device) == "cuda"
    if cuda:
        torch.zeros(1, device="cuda")  # the CUDA context is no part of a stage
        if cap_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total))
        torch.cuda.reset_peak_memory_stats()
    warm_up(config)
    gc.collect()
    sampler, before, start = Sampler(), own_memory(), time.perf_counter()
    STAGES[stage](config, folder)
    found = {"seconds": time.perf_counter() - start, "host": sampler.peak - before}
    found["libraries"] = before
    if cuda:
        found["GPU"] = torch.cuda.max_memory_allocated()
        found["GPU reserved"] = torch.cuda.max_memory_reserved()
    print(json.dumps(found))


def warm_up(config: Config) -> None:
    """What any stage imports and sets up once: the model's code, PEFT, bitsandbytes, torch's pools.

    It belongs to the libraries; a stage should be charged for its tensors.
    """
    import bitsandbytes.optim  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401

    shape_of(config)
    device = resolve_device(config.backbone.device)
    layer = torch.nn.Linear(512, 512, device=device)
    torch.nn.functional.silu(layer(torch.ones(64, 512, device=device))).sum().backward()


def prepare(config: Config, folder: Path, sizes: dict, architecture: str) -> None:
    """The checkpoint, two random patches, and sets or scores that overlap as little as they can."""
    random_checkpoint.write(folder / "model", sizes, architecture)
    model = random_checkpoint.meta_model(random_checkpoint.configuration(architecture, sizes))
    layers = target_weights(model, config.derivation.lora.targets)
    write_texts(folder)
    draw_patches(config, folder, layers)
    draw_sets(config, folder, layers)


def write_texts(folder: Path, seed: int = 0) -> None:
    """pairs.jsonl, prompts.jsonl and texts.jsonl of random words; how long each is, is drawn."""
    drawn = random.Random(seed)

    def said(words: float, spread: float, most: int) -> str:
        count = min(most, max(3, round(drawn.lognormvariate(math.log(words), spread))))
        return " ".join(drawn.choices(random_checkpoint.WORDS, k=count))

    pairs = [
        {"prompt": said(20, 0.5, 120), "response": said(60, 0.7, 300), "category": "any"}
        for _ in range(16)
    ]
    prompts = [
        {"prompt": said(20, 0.5, 120), "objective": name, "category": "any"}
        for name in ("harmful", "over_safety")
        for _ in range(24)
    ]
    texts = [{"text": said(100, 0.5, 400)} for _ in range(16)]
    for name, rows in (("pairs", pairs), ("prompts", prompts), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def draw_patches(config: Config, folder: Path, layers: dict) -> None:
    """se.safetensors and osm.safetensors with random factors. layers: of target_weights."""
    lora, generator = config.derivation.lora, torch.Generator().manual_seed(0)
    for name in ("se", "osm"):
        factors = {
            tensor: tuple(
                PATCH_SCALE * torch.randn(shape, generator=generator)
                for shape in ((lora.r, layer.in_features), (layer.out_features, lora.r))
            )
            for tensor, layer in layers.items()
        }
        manifest = {"lora": lora.model_dump()}
        Factors(name, factors, lora.alpha / lora.r, manifest).save(folder / f"{name}.safetensors")


def draw_sets(config: Config, folder: Path, layers: dict) -> None:
    """Random top_<patch>.safetensors, or importance_<patch>: what importance.save asks for."""
    generator = torch.Generator().manual_seed(1)
    own, other = config.patching.top_rate_se, config.patching.top_rate_osm
    first = {"se": 0.0, "osm": min(own, 1 - other)}  # where in [0, 1) the set begins
    rates = {"se": own, "osm": other}
    sets = {name: BitSets(about={"top_rate": rate}) for name, rate in rates.items()}
    scores = {"se": {}, "osm": {}}
    for tensor, layer in layers.items():
        draw = torch.rand((layer.out_features, layer.in_features), generator=generator)
        for name, rate in rates.items():
            score = (draw - first[name]).remainder_(1.0).neg_().add_(1.0)
            if config.importance.save == "scores":
                scores[name][tensor] = score
            else:
                sets[name].add(tensor, score > 1 - rate)
    for name in rates:
        if config.importance.save == "scores":
            importance.save(scores[name], folder / f"importance_{name}.safetensors")
        else:
            sets[name].save(folder / f"top_{name}.safetensors")


def in_process(arguments: list[str]) -> dict | None:
    """This file again in a fresh process; the last line that it prints, read as JSON."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.stderr.write(done.stderr[-2000:])
        reason = f"signal {-done.returncode}" if done.returncode < 0 else "an error"
        print(f"{arguments[1]} ended by {reason}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def few(config: Config, new_tokens: int) -> Config:
    """The same parameters with as few steps, samples and tokens as show a stage's peak."""
    micro = config.derivation.micro_batch_size or config.derivation.ascent.batch_size
    batch = 2 * micro if config.derivation.micro_batch_size else micro
    spread = own_texts(config)
    steps = {"max_steps": 1, "warmup_steps": 0, "batch_size": batch}  # two batches are read
    # never ends before its step: the loss of random weights is near log(vocabulary)
    ascent = {"stop_mean_loss": 50.0, "token_loss_clamp": 60.0}
    values = config.model_dump()
    values["derivation"]["descent"] |= steps
    values["derivation"]["ascent"] |= steps | ascent
    values["importance"]["samples"] = 2 * config.importance.batch_size
    values["evaluation"]["max_new_tokens"] = min(new_tokens, config.evaluation.max_new_tokens)
    if not spread:
        values["utility"]["perplexity"] = "texts"  # of MAX_TOKENS tokens, unlike the sandbox's
    if config.importance.layers_per_pass == "auto":
        values["importance"]["layers_per_pass"] = 2
    return Config.from_sources(values)


def batches_of(config: Config, shape: Shape, device: str) -> Batches:
    """Those of the files; without them, half of each pair is its answer and counts in the loss."""
    if config.data.harmful != "sandbox":
        return read(config)
    whole = Sizes(config, shape, device).batches
    trained, scored = (
        tuple(replace(batch, counted=batch.counted // 2) for batch in batches)
        for batches in (whole.derivation, whole.importance)
    )
    return replace(whole, derivation=trained, importance=scored)


def measure(config: Config, folder: Path, stages: list[str], cap_gib: float | None) -> pd.DataFrame:
    """One row a stage: predicted and measured GiB, their ratio, seconds."""
    shape, device = shape_of(config), resolve_device(config.backbone.device)
    (folder / "config.json").write_text(json.dumps(config.model_dump()), encoding="utf-8")
    known, rows = batches_of(config, shape, device), []
    for stage in stages:
        cap = [] if cap_gib is None else ["--cap-gib", str(cap_gib)]
        found = in_process(["--child", stage, "--folder", str(folder), *cap])
        predicted = predict(config, shape, stage, device, known=known)
        for place in ("GPU", "host") if device == "cuda" else ("host",):
            need = predicted.loc["peak", f"{place} GiB"]
            if place == "host":
                need -= predicted.loc["Python and libraries", "host GiB"]
            row = {"stage": stage, "memory": place, "predicted GiB": need}
            if found is not None:
                row["measured GiB"] = found[place] / GIB
                row["ratio"] = need / row["measured GiB"]
                row["seconds"] = found["seconds"]
                if place == "GPU":
                    row["reserved GiB"] = found["GPU reserved"] / GIB
            rows.append(row)
            print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def sizes_of(given) -> tuple[str, dict]:
    """(architecture, sizes) of the command line."""
    if given.shape:
        architecture, values = random_checkpoint.SHAPES[given.shape]
        return architecture, dict(zip(random_checkpoint.SIZES, values, strict=True))
    kv_heads = given.kv_heads or given.heads
    head_dim = given.head_dim or given.hidden // given.heads
    values = [given.hidden, given.layers, given.intermediate, given.heads, kv_heads, head_dim]
    values += [given.vocab, given.tied or given.architecture == "gemma"]
    return given.architecture, dict(zip(random_checkpoint.SIZES, values, strict=True))


def config_of(given, folder: Path) -> Config:
    """The parameters: of --params, else like those of LLaMA-2-7B; --set over them."""
    values = read_yaml(given.params) if given.params else {}
    overrides = {**(values.pop("overrides", None) or {}), **({} if given.params else LIKE_7B)}
    for pair in given.set:
        key, _, value = pair.partition("=")
        overrides[key] = json.loads(value)
    place = {"backbone.source": str(folder / "model"), "backbone.revision": None}
    overrides |= place | {"backbone.device": given.device}
    if given.spread:
        files = {name: str(folder / f"{name}.jsonl") for name in ("pairs", "prompts", "texts")}
        overrides |= ONLY_FILES | {
            "data.harmful": files["pairs"],
            "data.evaluation": [files["prompts"]],
            "utility.perplexity": files["texts"],
        }
    config = Config.from_sources(values, overrides)
    if not given.spread and config.data.max_tokens is None:
        config = Config.from_sources(config.model_dump(), {"data.max_tokens": MAX_TOKENS})
    return few(config, given.new_tokens)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(random_checkpoint.SHAPES))
    parser.add_argument("--architecture", choices=list(random_checkpoint.CONFIGS), default="llama")
    for name, default in (("hidden", 1024), ("layers", 12), ("intermediate", 2816), ("heads", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--tied", action="store_true", help="lm_head and embeddings are one")
    parser.add_argument("--params", help="YAML; without it the settings are those for a 7B model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--spread", action="store_true", help="texts of different lengths")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cap-gib", type=float, help="bound of the GPU's allocator")
    parser.add_argument("--new-tokens", type=int, default=4, help="an answer's, at most")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--work", help="folder for the checkpoint; else a temporary one")
    parser.add_argument("--out", help="table as .csv or .md")
    parser.add_argument("--child", choices=[*STAGES, "prepare"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def report(table: pd.DataFrame, config: Config, weights: int, command: str) -> str:
    """The table as Markdown with what it was measured on."""
    machine, found = hardware(), versions()
    libraries = ", ".join(f"{name} {found[name]}" for name in found if name != "spkit")
    return "\n".join(
        [
            f"`{command}`",
            "",
            f"{weights / 1e6:,.0f} M weights; {machine['gpu'] or 'no GPU'}; {machine['cpu']}, "
            f"{machine['cores']} cores, {machine['memory_gib']} GiB; {libraries}",
            "",
            table.round(3).to_markdown(index=False),
            "",
        ]
    )


def main() -> None:
    """The command line."""
    given = parser().parse_args()
    if given.child:
        folder = Path(given.folder)
        config = Config.from_sources(json.loads((folder / "config.json").read_text("utf-8")))
        child(given.child, config, folder, given.cap_gib)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(given.work or stack.enter_context(tempfile.TemporaryDirectory()))
        architecture, sizes = sizes_of(given)
        config = config_of(given, folder)
        if not (folder / "model").is_dir():
            prepare(config, folder, sizes, architecture)
        table = measure(config, folder, given.stages, given.cap_gib)
        weights = shape_of(config).weights
    text = report(table, config, weights, shlex.join(["python", *sys.argv]))
    print(text)
    if given.out:
        out = Path(given.out)
        out.write_text(table.to_csv(index=False) if out.suffix == ".csv" else text, "utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
