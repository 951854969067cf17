"""The plan of the experiment: which units there are at one budget, and what each needs.

Read from top to bottom it is the experiment: backbones, bundles, tuning on dev, answers on test,
then sweeps, sizes, costs and continual stages. Nothing is run here (graph.py).
"""

import itertools
import re
from typing import Any

from spkit.comparison import steps
from spkit.comparison.ablations import ABLATIONS
from spkit.comparison.budget import Budget
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.graph import Unit
from spkit.comparison.methods import METHODS
from spkit.comparison.variants import OTHER_IMPORTANCE, USUAL
from spkit.config import Config
from spkit.method.safepatching import NAME as SAFEPATCHING

DERIVATION_SEEDS = 1000  # backbone seed + 1000 * derivation: none is drawn twice
SWEEP_MASKS = 2
# bundles that differ from the usual one in a parameter: name -> overrides
RANKS = (2, 4, 16, 32)
PAIRS = (24, 48, 96, 384)
SAMPLES = (4, 16, 128)
BUNDLES = {
    **{f"rank-{r}": {"derivation.lora.r": r, "derivation.lora.alpha": 2.0 * r} for r in RANKS},
    **{f"pairs-{n}": {"data.pairs": n} for n in PAIRS},
}
RESCORED = {
    "snip-backbone": {"importance.scored_model": "backbone"},
    "snip-question": {"importance.loss_on": "question"},
    **{f"samples-{n}": {"importance.samples": n} for n in SAMPLES},
}
RATES = (0.02, 0.06, 0.2, 0.4, 0.8)  # a and b: nearly two orders of magnitude
STRENGTH_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the chosen alpha and beta
RETENTION_RATES = (0.05, 0.1, 0.3, 0.6, 0.9, 1.0)

_MODEL = ("backbone.py", "chat.py", "data.py", "examples.py", "sandbox/*.py")
_DERIVE = (*_MODEL, "derivation.py", "importance.py", "scoring.py", "baselines/*.py")
_COMBINE = (*_DERIVE, "patching.py", "ablations.py", "balancing.py", "evaluation.py")
_STUDY = (*_COMBINE, "experiment/steps.py", "experiment/arena.py", "experiment/variants.py")
_TUNE = (*_STUDY, "experiment/tuning.py")
_CONTINUAL = (*_STUDY, "continual.py")
_COST = (*_STUDY, "experiment/cost.py")

# seconds on the reference machine (README): for the prediction alone
_TRAIN, _DERIVE_ALL, _RESCORE, _ANSWER, _LOAD = 250.0, 40.0, 4.0, 2.0, 4.0


def plan(config: Config, budget: Budget) -> list[Unit]:
    """All units, each after those that it needs."""
    usual = Config()  # where results lie, and which are shown, is no reason to repeat a unit
    config = config.model_copy(update={"outputs": usual.outputs, "comparison": usual.comparison})
    units: list[Unit] = []
    seeds = range(budget.backbones)

    def add(name: str, work, code, needs=(), seconds=1.0, **inputs: Any) -> str:
        units.append(Unit(name, work, inputs, tuple(needs), code, seconds))
        return name

    def sized(size: str, seed: int) -> Config:
        of_size = budget.sizes.get(size, {})
        return changed(config, seed=seed, **{f"sandbox.{k}": v for k, v in of_size.items()})

    def backbone(size: str, seed: int) -> str:
        name = f"backbones/{slug(size)}/seed-{seed}"
        if all(unit.name != name for unit in units):
            made = sized(size, seed)
            share = _weights(made) / _weights(config)
            add(name, steps.backbone, _MODEL, seconds=_TRAIN * share, config=made)
        return name

    def bundle(size: str, seed: int, derivation: int = 0, kind: str = USUAL) -> str:
        name = f"bundles/{slug(size)}/seed-{seed}-derivation-{derivation}/{kind}"
        if all(unit.name != name for unit in units):
            needs = [backbone(size, seed)]
            rescore = bundle(size, seed, derivation) if kind in RESCORED else None
            made = changed(config, seed=seed, **BUNDLES.get(kind, RESCORED.get(kind, {})))
            patches = ("se", "osm", "npo") if kind == USUAL else ("se", "osm")
            seconds = _RESCORE if rescore else _DERIVE_ALL * len(patches) / 3
            add(
                name, steps.bundle, _DERIVE, [*needs, *([rescore] if rescore else [])], seconds,
                config=made, seed=derivation_seed(seed, derivation), patches=patches,
                rescore=rescore,
            )  # fmt: skip
        return name

    # ---- the main comparison: backbones, bundles, tuning on dev, answers on test
    models = [backbone(USUAL, seed) for seed in seeds]
    firsts = [bundle(USUAL, seed) for seed in seeds]
    tuned = {}
    for name in METHODS:
        tuned[name] = add(
            f"tuning/{slug(name)}", steps.tune, _TUNE, [*models, *firsts],
            seconds=_LOAD + budget.trials * budget.backbones * (2.0 if "balanced" in name else 0.8),
            configs=[changed(config, seed=seed) for seed in seeds],
            pairs_of_places=list(zip(models, firsts, strict=True)), seeds=list(seeds), method=name,
            trials=budget.trials, per_cell=budget.tune_cell, fronts=budget.fronts,
        )  # fmt: skip

    def answers(seed: int, derivation: int, mask: int, part: str, count: int) -> None:
        kinds = [USUAL, *(OTHER_IMPORTANCE.values() if part == "ablations" else ())]
        sources = {kind: bundle(USUAL, seed, derivation, kind) for kind in kinds}
        used = {SAFEPATCHING: tuned[SAFEPATCHING]} if part == "ablations" else tuned
        add(
            f"answers/seed-{seed}-derivation-{derivation}-mask-{mask}/{part}", steps.answer, _TUNE,
            [backbone(USUAL, seed), *sources.values(), *used.values()], _LOAD + count * _ANSWER,
            config=changed(config, seed=seed), backbone_unit=backbone(USUAL, seed),
            bundle_units=sources, tuned=used, seed=derivation_seed(seed, derivation),
            derivation=derivation, mask=mask, part=part, per_cell=budget.test_cell,
            only_masks=mask > 0,
        )  # fmt: skip

    masked = sum(method.masks for method in METHODS.values())
    for seed, derivation in itertools.product(seeds, range(budget.derivations)):
        for mask in range(budget.masks):
            count = 2 * (masked if mask else len(METHODS))
            answers(seed, derivation, mask, "methods", count)
            count = len(OTHER_IMPORTANCE) + sum(
                one.masked or not mask for one in ABLATIONS.values()
            )
            answers(seed, derivation, mask, "ablations", count)
    for seed in seeds:
        answers(seed, 0, 0, "fronts", 2 * len(METHODS) * budget.fronts)

    # ---- sweeps of SafePatching on dev
    for seed, (name, points) in itertools.product(range(budget.sweep_seeds), SWEEPS.items()):
        sources = {kind: bundle(USUAL, seed, 0, kind) for _, kind in points}
        add(
            f"sweeps/{name}/seed-{seed}", steps.sweep, _TUNE,
            [backbone(USUAL, seed), tuned[SAFEPATCHING], *dict.fromkeys(sources.values())],
            seconds=_LOAD + len(points) * SWEEP_MASKS * 0.8,
            config=changed(config, seed=seed), backbone_unit=backbone(USUAL, seed),
            tuned=tuned[SAFEPATCHING], seed=derivation_seed(seed, 0), label=name,
            points=[(values, sources[kind]) for values, kind in points], masks=SWEEP_MASKS,
            per_cell=budget.sweep_cell,
        )  # fmt: skip

    # ---- other sizes of the backbone, with the settings of the usual one
    for seed, label in itertools.product(range(budget.size_seeds), [USUAL, *budget.sizes]):
        add(
            f"sizes/{slug(label)}/seed-{seed}", steps.size, _TUNE,
            [backbone(label, seed), bundle(label, seed), *tuned.values()],
            seconds=_LOAD + (1 + len(METHODS)) * _ANSWER,
            config=sized(label, seed),
            backbone_unit=backbone(label, seed), bundle_unit=bundle(label, seed), tuned=tuned,
            label=label, seed=derivation_seed(seed, 0), per_cell=budget.test_cell,
        )  # fmt: skip

    # ---- seconds and memory
    for name in list(METHODS)[: budget.costs]:
        add(
            f"costs/{slug(name)}", steps.cost, _COST, [models[0], tuned[name]], seconds=35.0,
            config=config, backbone_unit=models[0], tuned=tuned[name], method=name,
        )  # fmt: skip

    # ---- continual stages, order after order, so that the first orders are there early
    stages = config.continual.stages
    orders = list(itertools.permutations(range(len(stages))))
    orders = [orders[0], orders[-1], *orders[1:-1]][: budget.orders]  # as given, then reversed
    for (number, order), seed, method in itertools.product(
        enumerate(orders), range(budget.continual_seeds), CONTINUAL_METHODS
    ):
        unit = tuned[CONTINUAL_METHODS[method][1]]
        over = {"stages": [stages[i] for i in order], "methods": [method]}
        add(
            f"continual/{method}/order-{number}-seed-{seed}", steps.continual, _CONTINUAL,
            [backbone(USUAL, seed), unit], _LOAD + len(stages) * (0.6 * _DERIVE_ALL + _ANSWER),
            config=changed(config, seed=seed, **{f"continual.{k}": v for k, v in over.items()}),
            backbone_unit=backbone(USUAL, seed), tuned=unit, order=number,
            per_cell=budget.test_cell,
        )  # fmt: skip
    return units


def changed(config: Config, **overrides: Any) -> Config:
    """The config with dotted keys put over it, validated anew."""
    return Config.from_sources(config.model_dump(mode="json"), overrides)


def derivation_seed(backbone_seed: int, derivation: int) -> int:
    """The seed of one derivation: of D_h's draw, the factors, the batches and the calibration."""
    return backbone_seed + DERIVATION_SEEDS * derivation


def slug(name: str) -> str:
    """A name as a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _weights(config: Config) -> int:
    made = config.sandbox
    return made.layers * made.hidden_size * (4 * made.hidden_size + 3 * made.intermediate_size)


# name -> [(values, kind of bundle)]; factors are turned into values by steps.sweep
SWEEPS: dict[str, list[tuple[dict[str, float], str]]] = {
    "retention": [({"retention_rate": p}, USUAL) for p in RETENTION_RATES],
    "top-rates": [
        ({"top_rate_se": a, "top_rate_osm": b}, USUAL) for a, b in itertools.product(RATES, RATES)
    ],
    "strengths": [
        ({"alpha_factor": x, "beta_factor": y}, USUAL)
        for x, y in itertools.product(STRENGTH_FACTORS, STRENGTH_FACTORS)
    ],
    "rank": [({"rank": float(r)}, f"rank-{r}" if r in RANKS else USUAL) for r in (2, 4, 8, 16, 32)],
    "pairs": [
        ({"pairs": float(n)}, f"pairs-{n}" if n in PAIRS else USUAL) for n in (24, 48, 96, 192, 384)
    ],
    "samples": [
        ({"samples": float(n)}, f"samples-{n}" if n in SAMPLES else USUAL) for n in (4, 16, 64, 128)
    ],
}
