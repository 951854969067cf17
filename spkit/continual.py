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

A stage's folder appears whole or not at all, so an interrupted run goes on at the stage that was
cut, and within its derivation at the last checkpoint (`derivation.checkpoint_steps`). Of the models
only the last one is kept, but each stage's patch file is, where its deltas are sparse. The OSM
patch never leaves the memory, but for such a checkpoint, which is deleted with the end of its
stage.
What this file does not do: derive, score, patch or judge by itself.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pandas as pd
from torch import Tensor

from spkit.ablations import SAFEPATCHING, Variants
from spkit.backbone import load, patched
from spkit.balancing import balanced, first_token_losses
from spkit.baselines import METHODS as BASELINES
from spkit.baselines.balanced import NAME as BALANCED
from spkit.baselines.bundle import make_bundle
from spkit.baselines.method import check_setting
from spkit.checkpoint import difference, write_patched
from spkit.checkpoint_files import local_folder
from spkit.config import Config
from spkit.data import fingerprint, load_harmful_pairs, public_name
from spkit.evaluation import COLUMNS, rates, respond
from spkit.examples import EvalPrompt
from spkit.files import atomic
from spkit.patchfile.apply import apply
from spkit.patchfile.make import About, make_patch
from spkit.resume import discard
from spkit.scoring import score_windows, top_rate_bits

PATCH = "patch.safetensors"
STAGE_SEEDS = 1000  # seed * 1000 + stage: another draw for each stage, none used twice


# method -> (its label, the entry of baselines.METHODS)
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
    pairs: list,
    config: Config,
    method: str,
    seed: int,
    checkpoints: str | Path | None = None,
    saved: Callable[[], object] | None = None,
) -> Mapping[str, Tensor]:
    """The merged delta of every weight matrix: what `method` makes of one stage's pairs.

    SafePatching has its setting from `patching`, the others from `continual.settings`. The model of
    the stage before is quantised anew for the derivation. checkpoints, saved: as in make_bundle.
    """
    model, tokenizer = load(
        source, quantization=config.derivation.quantization, **config.backbone.loading
    )
    _, name = METHODS[method]
    setting = dict(config.continual.settings.get(method, {}))
    patching = config.patching
    if name == BALANCED:
        check_setting(BALANCED, BASELINES[BALANCED].space, setting)
        over = {"balance": setting.pop("target"), "scale": "norm_matched", **setting}
        patching = patching.model_copy(update=over)
    ours, sets = name in (SAFEPATCHING, BALANCED), config.importance.save == "sets"
    bundle = make_bundle(
        *(model, tokenizer, pairs, config),
        seed=seed,
        needs=BASELINES[name].needs,
        scored=ours and not sets,
        checkpoints=checkpoints,
        saved=saved,
    )
    if not ours:
        return BASELINES[name].deltas(bundle, setting, seed)
    se, osm = bundle.patches["se"], bundle.patches["osm"]
    how = {"seed": seed, "max_tokens": config.data.max_tokens}
    if sets:
        scored = score_windows(model, tokenizer, [se, osm], pairs, config.importance, **how)
        with closing(scored) as windows:
            tops = top_rate_bits(windows, patching)
        variants = Variants(se, osm, None, None, patching, seed, (tops["se"], tops["osm"]))
    else:
        variants = Variants(se, osm, bundle.scores["se"], bundle.scores["osm"], patching, seed)
    if patching.balance is not None:
        quantization = config.evaluation.quantization
        if quantization != config.derivation.quantization:
            del model  # before the other one is loaded
            model, tokenizer = load(source, quantization=quantization, **config.backbone.loading)
        losses = first_token_losses(model, tokenizer, pairs, config.importance, **how)
        variants = balanced(variants, losses)
    return variants.deltas(SAFEPATCHING)


def run_stages(
    source: str | Path,
    config: Config,
    folder: str | Path,
    prompts: Sequence[EvalPrompt],
    *,
    identity: str,
    saved: Callable[[], object] | None = None,
) -> pd.DataFrame:
    """What every method's model answers after every stage: respond's columns and `stage` (from 1).

    The answers are not judged here: a judge may need the device for itself.
    folder: where the stages' folders `<method>/stage-<k>` go. identity: what the run is made from;
    stages that lie there with the same identity are read and not repeated. saved: called after
    each.
    """
    frames = []
    for method in config.continual.methods:
        stages = config.continual.stages
        folders = [Path(folder) / method / f"stage-{k}" for k in range(1, len(stages) + 1)]
        done = _complete(folders, identity)
        for k, categories in enumerate(stages, start=1):
            here = folders[k - 1]
            if k > done:
                base = local_folder(source, config.backbone.revision)
                from_base = k == 1 or method == "joint"
                start = base if from_base else folders[k - 2] / "model"
                print(f"{METHODS[method][0]}, stage {k} of {len(stages)}: {', '.join(categories)}")
                checkpoints = here.with_name(f"checkpoints-{k}")
                with atomic(here) as made:
                    _stage(
                        *(method, k, base, start, made, config, prompts, identity),
                        *(checkpoints / identity, saved),  # of another run: not gone on from
                    )
                discard(checkpoints)
                if saved is not None:
                    saved()
            for old in folders[: k - 1]:
                shutil.rmtree(old / "model", ignore_errors=True)
            frame = pd.read_csv(here / "responses.csv", keep_default_na=False)
            frames.append(frame.assign(stage=k))
    return pd.concat(frames, ignore_index=True)


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


def stage_seed(seed: int, stage: int) -> int:
    """The seed of one stage's derivation, calibration and masks [ours: a new draw each stage]."""
    return seed * STAGE_SEEDS + stage


def _stage(method, k, base, source, folder, config, prompts, identity, checkpoints, saved) -> None:
    """One stage of one method: from the model at `source` to model, responses and stage.json."""
    stages = config.continual.stages
    learnt = stages[:k] if method == "joint" else stages[k - 1 : k]
    categories = [category for stage in learnt for category in stage]
    pairs = load_harmful_pairs(config.data, seed=config.seed, categories=categories)
    seed = stage_seed(config.seed, k)
    deltas = stage_deltas(source, pairs, config, method, seed, checkpoints, saved)
    folder.mkdir()
    _write_model(method, k, source, deltas, folder, config, pairs)
    responses = _answers(base, folder / "model", deltas, config, prompts, METHODS[method][0])
    responses.to_csv(folder / "responses.csv", index=False, lineterminator="\n")
    about = {"identity": identity, "method": method, "stage": k, "categories": categories}
    (folder / "stage.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write_model(method, k, source, deltas, folder, config, pairs) -> None:
    """The stage's model; where its deltas are sparse, by way of a patch file, patch.safetensors."""
    if _whole(deltas):
        write_patched(source, deltas, folder / "model")
        return
    categories = (
        config.continual.stages[:k] if method == "joint" else [config.continual.stages[k - 1]]
    )
    alpha, beta = deltas.strengths
    backbone = public_name(config)
    if k > 1 and method != "joint":
        backbone += f", after stage {k - 1} of {METHODS[method][0]}"
    about = About(
        backbone=backbone,
        revision=config.backbone.revision,
        method={
            "name": METHODS[method][0],
            "stage": k,
            "seed": stage_seed(config.seed, k),
            "alpha": float(alpha),
            "beta": float(beta),
            "patching": config.patching.model_dump(mode="json"),
            "settings": dict(config.continual.settings.get(method, {})),
        },
        data={"fingerprint": fingerprint(pairs), "pairs": len(pairs), "categories": categories},
    )
    make_patch(source, deltas, folder / PATCH, about)
    apply(folder / PATCH, source, folder / "model")


def _whole(deltas: Mapping[str, Tensor]) -> bool:
    """Whether every weight changes: then the deltas are kept as factors (ablations.Deltas)."""
    return getattr(deltas, "factors", lambda name: None)(next(iter(deltas))) is not None


def _answers(base, model_folder, deltas, config, prompts, name) -> pd.DataFrame:
    """What the model of one stage answers, in full precision or as the 4-bit backbone + delta.

    In 4 bits the *first* backbone carries all that has changed since: quantised again, the sparse
    patches of earlier stages could vanish. A method that keeps whole patches (GA, NPO, the plain
    sum) changes every weight, which is no sparse delta: its model is quantised anew.
    """
    settings = {
        "name": name,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "batch_size": config.evaluation.batch_size,
    }
    quantization = config.evaluation.quantization
    if quantization == "none" or _whole(deltas):
        loaded = load(model_folder, quantization=quantization, **config.backbone.loading)
        return respond(*loaded, prompts, **settings)
    model, tokenizer = load(base, quantization=quantization, **config.backbone.loading)
    with patched(model, difference(base, model_folder, deltas)):
        return respond(model, tokenizer, prompts, **settings)


def _complete(folders: list[Path], identity: str) -> int:
    """How many of the first stages need not be repeated: the last of them still has its model."""
    done = 0
    for folder in folders:
        about = folder / "stage.json"
        if not about.is_file() or json.loads(about.read_text("utf-8"))["identity"] != identity:
            break
        done += 1
    while done and not (folders[done - 1] / "model").is_dir():
        done -= 1
    return done
