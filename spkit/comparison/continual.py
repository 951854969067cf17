"""Continual PSA: harmful categories arrive one after another, each stage patches the last model.

Stage k starts from the model that stage k-1 left, derives, scores and patches on its own D_h alone
[paper], and then answers *all* evaluation prompts, so that forgetting is visible: of the categories
patched before, of harmless requests, and of utility. Methods run side by side:

    safepatching     theta_k = theta_{k-1} + alpha * P_SE + beta * P_OSM on the kept sets
    ga, npo          theta_k = theta_{k-1} + strength * P: gradient ascent, or NPO, alone
    task_arithmetic  theta_k = theta_{k-1} + alpha * P_SE + beta * P_OSM, every weight
    balanced         SafePatching with alpha found on the stage's pairs (balancing.py)
    joint            SafePatching of the first model on the pairs of all stages so far: no method
                     of continual learning, but the reference for what one could have learnt

A stage's folder appears whole or not at all, so an interrupted run resumes at the stage that was
cut, and within its derivation at the last checkpoint (`derivation.checkpoint_steps`). Of the models
only the last one is kept, but each stage's patch file is, where its deltas are sparse. The OSM
patch never leaves the memory, but for such a checkpoint, which is deleted with the end of its
stage. Adapters (`derivation.se`, `derivation.osm`) are not used: they are of all of D_h, not of a
stage's.
The loop over the stages is method/continual.py's.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
from safetensors import safe_open
from torch import Tensor

from spkit.comparison.methods import METHODS as BASELINES
from spkit.comparison.methods.balanced import NAME as BALANCED
from spkit.comparison.methods.bundle import calibrate, make_bundle
from spkit.comparison.methods.method import check_setting
from spkit.config import Config, PatchingConfig
from spkit.data.selection import load_harmful_pairs
from spkit.evaluation.answers import counted, generated, read_answers, respond
from spkit.evaluation.answers import fingerprint as asked
from spkit.evaluation.rates import COLUMNS, rates
from spkit.examples import EvalPrompt, HarmfulPair, fingerprint
from spkit.method.balancing import balanced, first_token_losses
from spkit.method.continual import run_stages, stage_seed
from spkit.method.importance import score_windows, top_rate_bits
from spkit.method.patch import MergedPatch
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching
from spkit.method.sets import Lazy
from spkit.method.training import Checkpoints
from spkit.models.checkpoint_files import local_folder
from spkit.models.loading import load
from spkit.models.patched import patched
from spkit.models.stored_names import places_in
from spkit.patchfile.add import add_deltas
from spkit.patchfile.apply import apply
from spkit.patchfile.make import About, make_patch
from spkit.system.files import atomic
from spkit.system.resume import discard

PATCH = "patch.safetensors"


# method -> (its label, the entry of comparison.methods.METHODS)
METHODS = {
    "safepatching": (SAFEPATCHING, SAFEPATCHING),
    "ga": ("GA", "GA"),
    "npo": ("NPO", "NPO"),
    "task_arithmetic": ("Task Arithmetic", "Task Arithmetic"),
    "balanced": (BALANCED, BALANCED),
    "joint": ("joint training", SAFEPATCHING),
}


def stage_deltas(
    source: str | Path,
    pairs: list[HarmfulPair],
    config: Config,
    method: str,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> MergedPatch:
    """The merged delta of every weight matrix: what `method` makes of one stage's pairs.

    SafePatching has its setting from `patching`, the others from `continual.settings`. The model of
    the stage before is quantised anew for the derivation. checkpoints: as in make_bundle.
    """
    quantization = config.derivation.quantization
    model, tokenizer = load(source, quantization=quantization, **config.backbone.loading)
    name, setting = METHODS[method][1], dict(config.continual.settings.get(method, {}))
    ours = name in (SAFEPATCHING, BALANCED)
    patching = _patching(config, name, setting)
    bundle = make_bundle(
        *(model, tokenizer, pairs, config),
        seed=seed,
        needs=BASELINES[name].needs,
        scored=ours and config.importance.save == "scores",
        checkpoints=checkpoints,
    )
    if not ours:
        return BASELINES[name].deltas(bundle, setting, seed)
    calibration = calibrate(pairs, config, seed)
    se, osm = bundle.patches["se"], bundle.patches["osm"]
    found = bundle.scores
    if config.importance.save == "sets":
        with closing(score_windows(model, tokenizer, [se, osm], calibration)) as windows:
            found = top_rate_bits(windows, patching)
    made = SafePatching(se, osm, (found["se"], found["osm"]), patching, seed)
    if patching.balance is None:
        return made.deltas()
    if config.evaluation.quantization != quantization:
        del model  # before the other one is loaded
        model, tokenizer = load(source, **config.answering)
    found = balanced(made, first_token_losses(model, tokenizer, calibration))
    print(f"balanced: alpha {found.config.alpha:.3g}, beta {found.config.beta:.3g} (parameters)")
    return found.deltas()


def _patching(config: Config, name: str, setting: dict[str, float]) -> PatchingConfig:
    if name != BALANCED:
        return config.patching
    check_setting(BALANCED, BASELINES[BALANCED].space, setting)
    over = {"balance": setting.pop("target"), "scale": "norm_matched", **setting}
    return config.patching.model_copy(update=over)


@dataclass(frozen=True)
class Stages:
    """The stages of a run, one method after the other.

    source: the first model, a folder or a hub id. folder: where `<method>/stage-<k>` go. prompts:
    asked after every stage. identity: what all stages are made from, but for the method's own
    setting, the categories and the prompts, which `made_from` adds. saved: called after each stage.
    """

    source: str | Path
    config: Config
    folder: Path
    prompts: Sequence[EvalPrompt]
    identity: str
    saved: Callable[[], object] = lambda: None

    @cached_property
    def backbone(self) -> Path:
        """Its folder, where a stage needs it: a complete run asks for no model."""
        return local_folder(self.source, self.config.backbone.revision)

    def run(self, method: str) -> Iterator[pd.DataFrame]:
        """The responses after every stage, with a column `stage`; finished stages are read."""
        stages = self.config.continual.stages
        folders = [self.folder / method / f"stage-{k}" for k in range(1, len(stages) + 1)]
        done = _complete(folders, [self.made_from(method, k) for k in range(1, len(stages) + 1)])
        first = None if done else self.backbone
        last = folders[done - 1] / "model" if done else None
        models = run_stages(first, stages, partial(self.step, method), done, last)
        for k, here in enumerate(folders, start=1):
            if k > done:
                next(models)
            for old in folders[: k - 1]:
                shutil.rmtree(old / "model", ignore_errors=True)
            responses = read_answers(here / "responses.csv")
            about = json.loads((here / "stage.json").read_text("utf-8")) if k > done else {}
            yield counted(responses.assign(stage=k), about.get("generated_tokens", 0))

    def made_from(self, method: str, k: int) -> str:
        """Names all that decides stage k of a method: what comes after it does not.

        So another method, or one stage more, keeps the stages that are there.
        """
        config = self.config
        own = [config.continual.settings.get(method), config.continual.stages[:k]]
        evaluation = [config.evaluation.max_new_tokens, config.evaluation.batch_size]
        parts = [self.identity, method, own, evaluation, asked(self.prompts)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def step(self, method: str, k: int, source: Path, categories: list[str]) -> Path:
        """One stage: derive, patch and answer into stage-<k>; returns the folder of its model."""
        if method == "joint":  # the first model, on the pairs of all stages so far
            source = self.backbone
            categories = [name for stage in self.config.continual.stages[:k] for name in stage]
        here = self.folder / method / f"stage-{k}"
        stages = len(self.config.continual.stages)
        print(f"{METHODS[method][0]}, stage {k} of {stages}: {', '.join(categories)}")
        state = here.with_name(f"checkpoints-{k}")
        with atomic(here) as made:
            self._fill(made, method, k, source, categories)
        discard(state)
        self.saved()
        return here / "model"

    def _fill(self, folder: Path, method: str, k: int, source: Path, categories: list) -> None:
        """model/, responses.csv and stage.json of one stage."""
        config, seed = self.config, stage_seed(self.config.seed, k)
        pairs = load_harmful_pairs(config.data, seed=config.seed, categories=categories)
        state = self.folder / method / f"checkpoints-{k}" / self.made_from(method, k)[:16]
        deltas = stage_deltas(source, pairs, config, method, seed, Checkpoints(state, self.saved))
        folder.mkdir()
        self._write(folder, method, k, source, deltas, pairs)
        responses = self._answers(folder / "model", deltas, METHODS[method][0])
        responses.to_csv(folder / "responses.csv", index=False, lineterminator="\n")
        about = {"identity": self.made_from(method, k), "method": method, "stage": k}
        about |= {"categories": categories, "generated_tokens": generated(responses)}
        (folder / "stage.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def _write(self, folder, method: str, k: int, source: Path, deltas, pairs) -> None:
        """The stage's model; where its deltas are sparse, by way of a patch file."""
        if deltas.whole:
            add_deltas(source, deltas, folder / "model", identity=self.made_from(method, k))
            return
        about = self._about(method, k, deltas.strengths, pairs)
        make_patch(source, deltas, folder / PATCH, about)
        apply(folder / PATCH, source, folder / "model")

    def _about(self, method: str, k: int, strengths: tuple[float, float], pairs) -> About:
        config, label = self.config, METHODS[method][0]
        joint = method == "joint"
        first = 0 if joint else k - 1
        backbone = config.backbone.public_name
        if k > 1 and not joint:
            backbone += f", after stage {k - 1} of {label}"
        return About(
            backbone=backbone,
            revision=config.backbone.revision,
            method={
                "name": label,
                "stage": k,
                "seed": stage_seed(config.seed, k),
                "alpha": float(strengths[0]),
                "beta": float(strengths[1]),
                "patching": config.patching.model_dump(mode="json"),
                "settings": dict(config.continual.settings.get(method, {})),
            },
            data={
                "fingerprint": fingerprint(pairs),
                "pairs": len(pairs),
                "categories": config.continual.stages[first:k],
            },
        )

    def _answers(self, model_folder: Path, deltas: MergedPatch, name: str) -> pd.DataFrame:
        """What the model of one stage answers, in full precision or as the 4-bit backbone + delta.

        In 4 bits the *first* backbone carries all that has changed since: quantised again, the
        sparse patches of earlier stages could vanish. A method that keeps whole patches (GA, NPO,
        the plain sum) changes every weight, which is no sparse delta: its model is quantised anew.
        """
        evaluation, loading = self.config.evaluation, self.config.answering
        settings = {
            "name": name,
            "max_new_tokens": evaluation.max_new_tokens,
            "batch_size": evaluation.batch_size,
        }
        if evaluation.quantization == "none" or deltas.whole:
            loaded = load(model_folder, **loading)
            return respond(*loaded, self.prompts, **settings)
        model, tokenizer = load(self.backbone, **loading)
        with patched(model, difference(self.backbone, model_folder, deltas)):
            return respond(model, tokenizer, self.prompts, **settings)


def _deriving(config: Config) -> Config:
    """The parameters with no adapter: one's own patch is of all of D_h, and a stage has its own."""
    given = [f"derivation.{name}" for name in ("se", "osm") if getattr(config.derivation, name)]
    if not given:
        return config
    print(f"{' and '.join(given)}: not used here, every stage derives from its own pairs")
    derivation = config.derivation.model_copy(update={"se": None, "osm": None})
    return config.model_copy(update={"derivation": derivation})


def run_methods(
    source: str | Path,
    config: Config,
    folder: str | Path,
    prompts: Sequence[EvalPrompt],
    *,
    identity: str,
    saved: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """What every method's model answers after every stage: respond's columns and `stage` (from 1).

    The answers are not judged here: a judge may need the device for itself. Stages that are in
    `folder` with the same identity are read and not repeated. `answers.generated(frame)` counts the
    tokens of the others.
    """
    config = _deriving(config)
    stages = Stages(source, config, Path(folder), prompts, identity, saved)
    frames = [frame for method in config.continual.methods for frame in stages.run(method)]
    return counted(pd.concat(frames, ignore_index=True), generated(*frames))


def difference(before: str | Path, after: str | Path, names: Iterable[str]) -> Lazy:
    """{tensor name: after - before, fp32}, each read and subtracted when it is asked for.

    For a backbone in memory that is to answer as a later checkpoint does (models/patched.py).
    """
    names = list(names)
    old, new = places_in(before, names), places_in(after, names)

    def subtract(name: str) -> Tensor:
        values = []
        for path, stored in (new[name], old[name]):
            with safe_open(path, framework="pt") as file:
                values.append(file.get_tensor(stored).float())
        return values[0] - values[1]

    return Lazy(names, subtract)


def stage_patches(folder: str | Path, method: str) -> list[Path]:
    """The patch files of a method's stages, in their order; empty where it keeps whole patches.

    Each is for the model that the stage before it left (joint training's are all for the backbone),
    so patchfile.stack makes one of them.
    """
    found = Path(folder, method).glob(f"stage-*/{PATCH}")
    return sorted(found, key=lambda path: int(path.parent.name.removeprefix("stage-")))


def continual_rates(responses: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The tidy frame of evaluation.rates with the column `stage` (0: the base) behind."""
    parts = [
        rates(
            part,
            run=config.run_name,
            seed=config.seed,
            split=config.evaluation.split,
            confidence=config.evaluation.confidence,
        ).assign(stage=stage)
        for stage, part in responses.groupby("stage", sort=True)
    ]
    return pd.concat(parts, ignore_index=True)[[*COLUMNS, "stage"]]


def _complete(folders: list[Path], identities: list[str]) -> int:
    """How many of the first stages need not be repeated: the last of them still has its model."""
    done = 0
    for folder, identity in zip(folders, identities, strict=True):
        about = folder / "stage.json"
        if not about.is_file() or json.loads(about.read_text("utf-8"))["identity"] != identity:
            break
        done += 1
    while done and not (folders[done - 1] / "model").is_dir():
        done -= 1
    return done
