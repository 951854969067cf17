"""The plan of the experiment: which units there are at one budget, and what each needs.

`plan` is the experiment in short: backbones, bundles, tuning on dev, answers on test, then sweeps,
sizes, costs and continual stages, and the tables of all of them. Nothing is run here
(spkit/workflow).
"""

import itertools
from collections.abc import Mapping
from typing import Any

from spkit.comparison.ablations import ABLATIONS
from spkit.comparison.budget import Budget, budget_of
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.methods import METHODS
from spkit.comparison.steps.answer import answer
from spkit.comparison.steps.backbone import backbone
from spkit.comparison.steps.bundle import bundle
from spkit.comparison.steps.continual import continual
from spkit.comparison.steps.cost import cost
from spkit.comparison.steps.shared import Site
from spkit.comparison.steps.size import size
from spkit.comparison.steps.sweep import sweep
from spkit.comparison.steps.tables import write_tables
from spkit.comparison.steps.tune import tune
from spkit.comparison.sweeps import BUNDLES, RESCORED, SWEEPS
from spkit.comparison.variants import OTHER_IMPORTANCE, USUAL
from spkit.config import Config
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.workflow.units import Unit, slug

DERIVATION_SEEDS = 1000  # backbone seed + 1000 * derivation: none is drawn twice
TABLES = "tables/all"  # the last unit
# seconds on the machine where this was timed: for the prediction alone
_TRAIN, _DERIVE, _RESCORE, _ANSWER, _LOAD, _COST, _DRAW = 250.0, 40.0, 4.0, 2.0, 4.0, 35.0, 0.006
MEMORY_MIB = 2048  # of a unit on the sandbox: 0.9 to 1.3 GiB were measured


def plan(config: Config, budget: Budget) -> list[Unit]:
    """All units, each after those that it needs."""
    usual = Config()  # where results lie, and which are shown, is no reason to repeat a unit
    config = config.model_copy(update={"outputs": usual.outputs, "comparison": usual.comparison})
    made = Planner(config, budget)
    made.tuning()
    made.answers()
    made.sweeps()
    made.sizes()
    made.costs()
    made.continual()
    made.tables()
    return list(made.units.values())


def planned(given: Mapping[str, Any], only: str | None = None) -> list[Unit]:
    """The plan as a job asks for it: {"config": all parameters, "budget": a name}; always all."""
    return plan(Config.from_sources(given["config"]), budget_of(given["budget"]))


class Planner:
    """The units so far, by name. Backbones and bundles are added when a unit first needs them."""

    def __init__(self, config: Config, budget: Budget):
        self.config, self.budget = config, budget
        self.units: dict[str, Unit] = {}
        self.tuned: dict[str, str] = {}  # method -> the unit that tunes it

    def add(self, name: str, work, needs=(), seconds: float = 1.0, **inputs: Any) -> str:
        given = {"seconds": seconds, "memory_mib": MEMORY_MIB, "threads": self.config.threads or 1}
        needed = tuple(dict.fromkeys(needs))
        self.units[name] = Unit(name, work, inputs, needed, **given)
        return name

    # ---- what the others stand on

    def sized(self, size: str, seed: int) -> Config:
        """The parameters for one size of the backbone and one seed."""
        of_size = self.budget.sizes.get(size, {})
        return changed(self.config, seed=seed, **{f"sandbox.{k}": v for k, v in of_size.items()})

    def backbone(self, size: str, seed: int) -> str:
        name = f"backbones/{slug(size)}/seed-{seed}"
        if name not in self.units:
            made = self.sized(size, seed)
            seconds = _TRAIN * _weights(made) / _weights(self.config)
            self.add(name, backbone, seconds=seconds, config=made)
        return name

    def bundle(self, size: str, seed: int, derivation: int = 0, kind: str = USUAL) -> str:
        name = f"bundles/{slug(size)}/seed-{seed}-derivation-{derivation}/{kind}"
        if name not in self.units:
            needs = [self.backbone(size, seed)]
            rescore = self.bundle(size, seed, derivation) if kind in RESCORED else None
            patches = ("se", "osm", "npo") if kind == USUAL else ("se", "osm")
            self.add(
                name,
                bundle,
                [*needs, rescore] if rescore else needs,
                _RESCORE if rescore else _DERIVE * len(patches) / 3,
                config=changed(self.config, seed=seed, **(BUNDLES | RESCORED).get(kind, {})),
                seed=derivation_seed(seed, derivation),
                patches=patches,
                rescore=rescore,
            )
        return name

    def site(self, split: str, per_cell: int, seed: int, derivation=0, kinds=(USUAL,)) -> Site:
        """The usual backbone of one seed, with bundles of these kinds."""
        return Site(
            changed(self.config, seed=seed),
            self.backbone(USUAL, seed),
            split,
            per_cell,
            derivation_seed(seed, derivation),
            {kind: self.bundle(USUAL, seed, derivation, kind) for kind in kinds},
        )

    # ---- the main comparison

    def tuning(self) -> None:
        """Every method on the dev pool of all backbones at once."""
        budget = self.budget
        sites = [self.site("dev", budget.tune_cell, seed) for seed in range(budget.backbones)]
        for name in METHODS:
            a_trial = 2.0 if "balanced" in name else 0.8  # balancing asks the backbone, too
            self.tuned[name] = self.add(
                f"tuning/{slug(name)}",
                tune,
                [*(site.backbone for site in sites), *(site.bundles[USUAL] for site in sites)],
                _LOAD + budget.trials * budget.backbones * a_trial,
                sites=sites,
                method=name,
                trials=budget.trials,
                fronts=budget.fronts,
            )

    def answers(self) -> None:
        """Methods, ablations and fronts on the test pool: backbones x derivations x masks."""
        budget = self.budget
        masked = sum(method.masks for method in METHODS.values())
        for seed, derivation in itertools.product(
            range(budget.backbones), range(budget.derivations)
        ):
            for mask in range(budget.masks):
                variants = 2 * (masked if mask else len(METHODS))
                self._answer(seed, (derivation, mask), "methods", variants)
                ablated = sum(one.masked or not mask for one in ABLATIONS.values())
                self._answer(seed, (derivation, mask), "ablations", ablated + len(OTHER_IMPORTANCE))
        for seed in range(budget.backbones):
            self._answer(seed, (0, 0), "fronts", 2 * len(METHODS) * budget.fronts)

    def _answer(self, seed: int, draw: tuple[int, int], part: str, variants: int) -> None:
        derivation, mask = draw
        kinds = [USUAL, *(OTHER_IMPORTANCE.values() if part == "ablations" else ())]
        site = self.site("test", self.budget.test_cell, seed, derivation, kinds)
        tuned = self.tuned
        if part == "ablations":
            tuned = {SAFEPATCHING: tuned[SAFEPATCHING]}
        self.add(
            f"answers/seed-{seed}-derivation-{derivation}-mask-{mask}/{part}",
            answer,
            [site.backbone, *site.bundles.values(), *tuned.values()],
            _LOAD + variants * _ANSWER,
            site=site,
            tuned=dict(tuned),
            part=part,
            draw=draw,
        )

    # ---- the rest

    def sweeps(self) -> None:
        """SafePatching on the dev pool."""
        for seed, what in itertools.product(range(self.budget.sweep_seeds), SWEEPS):
            kinds = dict.fromkeys(kind for _, kind in what.points)
            site = self.site("dev", self.budget.sweep_cell, seed, kinds=kinds)
            unit = self.tuned[SAFEPATCHING]
            self.add(
                f"sweeps/{what.label}/seed-{seed}",
                sweep,
                [site.backbone, unit, *site.bundles.values()],
                _LOAD + len(what.points) * what.masks * 0.8,
                site=site,
                tuned=unit,
                what=what,
            )

    def sizes(self) -> None:
        """Other sizes of the backbone, with the settings of the usual one."""
        sizes = [USUAL, *self.budget.sizes]
        for seed, label in itertools.product(range(self.budget.size_seeds), sizes):
            site = Site(
                self.sized(label, seed),
                self.backbone(label, seed),
                "test",
                self.budget.test_cell,
                derivation_seed(seed, 0),
                {USUAL: self.bundle(label, seed)},
            )
            self.add(
                f"sizes/{slug(label)}/seed-{seed}",
                size,
                [site.backbone, *site.bundles.values(), *self.tuned.values()],
                _LOAD + (1 + len(METHODS)) * _ANSWER,
                site=site,
                tuned=dict(self.tuned),
                label=label,
            )

    def costs(self) -> None:
        """Seconds and memory of the first so many methods."""
        for name in list(METHODS)[: self.budget.costs]:
            site = Site(self.config, self.backbone(USUAL, 0), "test", 1)
            needs = [site.backbone, self.tuned[name]]
            self.add(
                f"costs/{slug(name)}",
                cost,
                needs,
                _COST,
                site=site,
                tuned=self.tuned[name],
                method=name,
            )

    def continual(self) -> None:
        """Every method on every order of the stages, so that the first orders are there early."""
        stages, budget = self.config.continual.stages, self.budget
        orders = list(itertools.permutations(range(len(stages))))
        orders = [orders[0], orders[-1], *orders[1:-1]][: budget.orders]  # as given, then reversed
        for (number, order), seed, method in itertools.product(
            enumerate(orders), range(budget.continual_seeds), CONTINUAL_METHODS
        ):
            over = {"stages": [stages[i] for i in order], "methods": [method]}
            config = changed(
                self.config, seed=seed, **{f"continual.{k}": v for k, v in over.items()}
            )
            site = Site(config, self.backbone(USUAL, seed), "test", budget.test_cell)
            unit = self.tuned[CONTINUAL_METHODS[method][1]]
            self.add(
                f"continual/{method}/order-{number}-seed-{seed}",
                continual,
                [site.backbone, unit],
                _LOAD + len(stages) * (0.6 * _DERIVE + _ANSWER),
                site=site,
                tuned=unit,
                order=number,
            )

    def tables(self) -> None:
        """From all units, so it comes last."""
        confidence = self.config.evaluation.confidence
        seconds = _LOAD + _DRAW * self.budget.draws
        draws = self.budget.draws
        self.add(
            TABLES, write_tables, list(self.units), seconds, draws=draws, confidence=confidence
        )


def changed(config: Config, **overrides: Any) -> Config:
    """The config with dotted keys put over it, validated anew."""
    return Config.from_sources(config.model_dump(mode="json"), overrides)


def derivation_seed(backbone_seed: int, derivation: int) -> int:
    """The seed of one derivation: of D_h's draw, the factors, the batches and the calibration."""
    return backbone_seed + DERIVATION_SEEDS * derivation


def _weights(config: Config) -> int:
    made = config.sandbox
    return made.layers * made.hidden_size * (4 * made.hidden_size + 3 * made.intermediate_size)
