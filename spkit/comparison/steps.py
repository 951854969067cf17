"""What the units of the experiment do, one function a kind; each fills the folder it is given.

    backbone   train the sandbox backbone of one seed (and size)
    bundle     derive SE, OSM and NPO, and score SE and OSM
    tune       one method's studies on the dev pool, under both scores
    answer     verdicts of many variants on the test pool: one backbone, derivation and mask
    sweep      SafePatching with one or two parameters varied, on the dev pool
    size       the chosen settings on a backbone of another size
    continual  one method, one order of the stages
    cost       seconds and memory of one method, in a process of its own

Nothing is averaged here (tables.py).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from spkit.comparison.arena import Arena, mask_seed, shares
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.continual import run_methods
from spkit.comparison.methods import METHODS, Bundle
from spkit.comparison.methods.bundle import calibrate, load_bundle, make_bundle, save_bundle
from spkit.comparison.tuning import best_setting, front, search
from spkit.comparison.variants import BASE, Variant, ablations, base, of_method
from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.evaluation.judges import judged
from spkit.method.importance import score_patch
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.models.loading import load
from spkit.sandbox.backbone import prepare_backbone
from spkit.system.determinism import make_deterministic

KEPT = ["id", "group", "category", "phrasing", "verdict", "response"]


def backbone(folder: Path, places: Mapping[str, Path], config: Config) -> None:
    """model/: the backbone of config.seed."""
    make_deterministic(config.seed, config.threads)
    prepare_backbone(config, folder / "model")


def bundle(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    seed: int,
    patches: tuple[str, ...],
    rescore: str | None = None,
) -> None:
    """bundle/: patches derived with `seed`; with `rescore`, that bundle's patches scored anew."""
    make_deterministic(seed, config.threads)
    (source,) = (place for name, place in places.items() if name != rescore)
    quantization = config.derivation.quantization
    model, tokenizer = load(source / "model", quantization=quantization, **config.backbone.loading)
    pairs = load_harmful_pairs(config.data, seed=seed)
    if rescore is None:
        made = make_bundle(model, tokenizer, pairs, config, seed=seed, needs=patches)
    else:
        old = load_bundle(places[rescore] / "bundle", config.patching)
        scores = {
            name: score_patch(model, tokenizer, old.patch(name), calibrate(pairs, config, seed))
            for name in ("se", "osm")
        }
        made = Bundle({name: old.patch(name) for name in ("se", "osm")}, scores, config.patching)
    save_bundle(made, folder / "bundle")


def tune(
    folder: Path,
    places: Mapping[str, Path],
    configs: list[Config],
    pairs_of_places: list[tuple[str, str]],
    seeds: list[int],
    method: str,
    trials: int,
    per_cell: int,
    fronts: int,
) -> None:
    """trials-<score>.csv, settings.json: {score: {"setting": ..., "front": [...]}} of one method.

    pairs_of_places: for every backbone the units that made it and its bundle. seeds: those of the
    derivations; the first mask of each is used.
    """
    arenas = [
        Arena(config, places[model] / "model", split="dev", per_cell=per_cell)
        for config, (model, _) in zip(configs, pairs_of_places, strict=True)
    ]
    bundles = [
        arena.bundle(places[name] / "bundle", seed)
        for arena, (_, name), seed in zip(arenas, pairs_of_places, seeds, strict=True)
    ]

    def ask(setting: dict) -> list[dict[str, float]]:
        variant = of_method(method, setting)
        return [
            shares(arena.answers(variant.deltas(given, mask_seed(seed, 0)), method))
            for arena, given, seed in zip(arenas, bundles, seeds, strict=True)
        ]

    was = [shares(arena.answers({}, BASE)) for arena in arenas]
    lost = sum(100 - found.get("utility correct", 0.0) for found in was) / len(was)
    chosen = {}
    for score, frame in search(METHODS[method].space, ask, was, trials=trials, seed=0).items():
        frame.to_csv(folder / f"trials-{score}.csv", index=False, lineterminator="\n")
        settings = front(frame, fronts, lost)
        chosen[score] = {"setting": best_setting(frame), "front": settings}
    (folder / "settings.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")


def settings(place: Path) -> dict:
    """What `tune` chose: {score: {"setting": ..., "front": [...]}}."""
    return json.loads((place / "settings.json").read_text(encoding="utf-8"))


def answer(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    backbone_unit: str,
    bundle_units: dict[str, str],
    tuned: dict[str, str],
    seed: int,
    derivation: int,
    mask: int,
    part: str,
    per_cell: int,
    only_masks: bool,
) -> None:
    """answers.parquet: one row for every variant and prompt of the test pool.

    part: "methods", "fronts" or "ablations". seed: the derivation's. only_masks: leave out the
    variants that this mask does not change.
    """
    arena = Arena(config, places[backbone_unit] / "model", split="test", per_cell=per_cell)
    bundles = {
        kind: arena.bundle(places[name] / "bundle", seed) for kind, name in bundle_units.items()
    }
    frames = []
    for score, variant in _variants(part, tuned, places):
        if only_masks and not variant.masks:
            continue
        deltas = variant.deltas(bundles[variant.bundle], mask_seed(seed, mask))
        frame = arena.answers(deltas, variant.label)[KEPT]
        # most answers are right or a refusal, and known; only the broken ones are worth reading
        frame.loc[frame["verdict"] != "broken", "response"] = ""
        frames.append(frame.assign(tuned=score, variant=variant.label))
    if not frames:
        return
    whole = pd.concat(frames, ignore_index=True)
    whole = whole.assign(backbone=config.seed, derivation=derivation, mask=mask)
    text = whole.select_dtypes("object").columns
    whole[text] = whole[text].astype("category")
    whole.to_parquet(folder / "answers.parquet", index=False)


def _variants(part: str, tuned: dict[str, str], places) -> list[tuple[str, Variant]]:
    """(the score for which it was tuned, the variant)."""
    if part == "ablations":
        setting = settings(places[tuned[SAFEPATCHING]])["paper"]["setting"]
        return [("paper", variant) for variant in ablations(setting)]
    found = [("", base())] if part == "methods" else []
    for name, unit in tuned.items():
        for score, chosen in settings(places[unit]).items():
            if part == "methods":
                found.append((score, of_method(name, chosen["setting"])))
            else:
                for number, setting in enumerate(chosen["front"]):
                    found.append((score, of_method(name, setting, f"{name} #{number}")))
    return found


def sweep(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    backbone_unit: str,
    tuned: str,
    seed: int,
    label: str,
    points: list[tuple[dict[str, float], str]],
    masks: int,
    per_cell: int,
) -> None:
    """sweep.csv: shares of verdicts on the dev pool; one row for every point and mask.

    points: ({parameter: value}, the unit of the bundle): put over SafePatching's chosen setting
    where it is one of its parameters; alpha_factor and beta_factor multiply the chosen strengths;
    else only written down (a rank is in the bundle).
    """
    arena = Arena(config, places[backbone_unit] / "model", split="dev", per_cell=per_cell)
    chosen = settings(places[tuned])["paper"]["setting"]
    rows = [{"backbone": config.seed, "mask": -1, **shares(arena.answers({}, BASE))}]
    bundles = {
        unit: arena.bundle(places[unit] / "bundle", seed)
        for unit in dict.fromkeys(unit for _, unit in points)
    }
    for values, unit in points:
        over = {key: value for key, value in values.items() if key in chosen}
        for key in ("alpha", "beta"):
            over[key] = chosen[key] * values.get(f"{key}_factor", 1.0)
        variant = of_method(SAFEPATCHING, {**chosen, **over})
        for mask in range(masks):
            deltas = variant.deltas(bundles[unit], mask_seed(seed, mask))
            found = shares(arena.answers(deltas, label))
            rows.append({"backbone": config.seed, "mask": mask, **values, **found})
    frame = pd.DataFrame(rows).fillna({c: 0.0 for row in rows for c in row if " " in c})
    frame.insert(0, "sweep", label)
    frame.to_csv(folder / "sweep.csv", index=False, lineterminator="\n")


def size(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    backbone_unit: str,
    bundle_unit: str,
    tuned: dict[str, str],
    label: str,
    seed: int,
    per_cell: int,
) -> None:
    """size.csv: shares of verdicts on the test pool, with the settings chosen on the usual size."""
    arena = Arena(config, places[backbone_unit] / "model", split="test", per_cell=per_cell)
    given = arena.bundle(places[bundle_unit] / "bundle", seed)
    weights = sum(parameter.numel() for parameter in arena.model.parameters())
    variants = [base()]
    for name, unit in tuned.items():
        variants.append(of_method(name, settings(places[unit])["paper"]["setting"]))
    rows = [
        {
            "size": label,
            "weights": weights,
            "backbone": config.seed,
            "variant": variant.label,
            **shares(arena.answers(variant.deltas(given, mask_seed(seed, 0)), variant.label)),
        }
        for variant in variants
    ]
    frame = pd.DataFrame(rows).fillna(0.0)
    frame.to_csv(folder / "size.csv", index=False, lineterminator="\n")


def continual(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    backbone_unit: str,
    tuned: str,
    order: int,
    per_cell: int,
) -> None:
    """continual.csv: verdicts after every stage of one method (config.continual.methods) and order.

    The method has the setting that was chosen for a single stage; none is tuned for three.
    """
    (method,) = config.continual.methods
    chosen = settings(places[tuned])["paper"]["setting"]
    if CONTINUAL_METHODS[method][1] == SAFEPATCHING:
        patching = config.patching.model_copy(
            update={**chosen, "scale": "norm_matched", "balance": None}
        )
        config = config.model_copy(update={"patching": patching})
    else:
        stages = config.continual.model_copy(update={"settings": {method: chosen}})
        config = config.model_copy(update={"continual": stages})
    source = places[backbone_unit] / "model"
    arena = Arena(config, source, split="test", per_cell=per_cell)
    work = folder / "work"
    answers = run_methods(source, config, work, arena.prompts, identity="experiment")
    answers = judged(answers, arena.prompts, config)
    shutil.rmtree(work)  # it holds whole models
    base_answers = arena.answers({}, BASE).assign(stage=0)
    whole = pd.concat([base_answers, answers], ignore_index=True)[["stage", *KEPT[:-1]]]
    whole = whole.assign(method=method, order=order, backbone=config.seed)
    whole.to_csv(folder / "continual.csv", index=False, lineterminator="\n")
    stages = json.dumps(config.continual.stages)
    (folder / "stages.json").write_text(stages + "\n", encoding="utf-8")


def cost(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    backbone_unit: str,
    tuned: str,
    method: str,
) -> None:
    """cost.json: seconds and peak memory from backbone to deltas, in a fresh process."""
    chosen = settings(places[tuned])["paper"]["setting"]
    question = {
        "model": str(places[backbone_unit] / "model"),
        "config": config.model_dump(mode="json"),
        "method": method,
        "setting": chosen,
    }
    done = subprocess.run(
        [sys.executable, "-m", "spkit.comparison.cost"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    (folder / "cost.json").write_text(done.stdout.splitlines()[-1] + "\n", encoding="utf-8")
