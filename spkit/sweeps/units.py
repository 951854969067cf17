"""The notebooks of a sweep's points as units of work: what points share is one unit.

    graph = build(sweep)
    graph.units             each once, those that others need first
    graph.chains[3]         {notebook: unit} of the fourth point

A notebook is one unit for two points where runs.identity says that its results are the same, by the
parameters of the sections that it depends on, the seed, input files and code. `planned` is the
planner that a job asks again (workflow/plan.py); it reads no params file and imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spkit.alignment import made
from spkit.config import Config
from spkit.data.inputs import OF_PAIRS, of_pairs
from spkit.errors import SpkitError
from spkit.running.runs import STAGES, code_of, identity
from spkit.sweeps.points import Point, Sweep, of_given
from spkit.sweeps.work import run_notebook
from spkit.workflow.units import Unit

PLANNER = "spkit.sweeps.units:planned"
KINDS = {  # of units, after which the workflow's rules are called
    "00_backbone": "backbone",
    "01_patch_derivation": "derivation",
    "02_importance_analysis": "importance",
    "03_controllable_patching": "patching",
    "04_continual_psa": "continual",
}
DIGITS = 10


@dataclass
class Graph:
    """units: in an order in which they can run. chains: for each point, {stage: its unit}."""

    units: list[Unit]
    chains: list[dict[str, str]]

    @property
    def first(self) -> dict[str, int]:
        """{unit: the first point that uses it, from 0}."""
        numbered = reversed(list(enumerate(self.chains)))
        return {unit: number for number, chain in numbered for unit in chain.values()}


def planned(given: Mapping[str, Any], only: str | None = None) -> list[Unit]:
    """The units of `Sweep.given`, with what they need of a machine in given["resources"].

    only: a unit; then the chain of the first point that uses it, in place of thousands.
    """
    if only is not None:
        point = given["points"][given["first"][only]]
        given = {**given, "points": [point]}
    return build(of_given(given), given.get("resources", {})).units


def build(
    sweep: Sweep, resources: Mapping[str, Mapping[str, Any]] | None = None, *, files: bool = True
) -> Graph:
    """resources: {unit: seconds, memory_mib, threads, gpus}. files: False for a forecast, which
    needs none of the input files.

    SpkitError where two points differ in nothing that a notebook of theirs depends on.
    """
    builder = _Builder(sweep, resources or {}, files)
    bases = {_derived(point): point.base.config for point in reversed(sweep.points)}
    chains: list[dict[str, str]] = []
    seen: dict[tuple, Point] = {}
    for point in sweep.points:
        stages = list(STAGES)[: list(STAGES).index(point.last) + 1]
        base = bases[_derived(point)]  # of the first part that has such a derivation
        chain = {stage: builder.unit(stage, point.config, base) for stage in stages}
        first = seen.setdefault((point.part, *chain.values()), point)
        if first is not point:
            raise SpkitError(
                f"points {first.number} ({first.label}) and {point.number} ({point.label}) differ "
                f"in nothing that a notebook up to {point.last} depends on"
            )
        chains.append(chain)
    return Graph(list(builder.units.values()), chains)


@dataclass
class _Builder:
    """Makes each unit once."""

    sweep: Sweep
    resources: Mapping[str, Mapping[str, Any]]
    files: bool
    units: dict[str, Unit] = field(default_factory=dict)
    _known: dict[tuple, str] = field(default_factory=dict)
    _code: dict[tuple, tuple[dict[str, str], str]] = field(default_factory=dict)

    def unit(self, stage: str, config: Config, base: Config) -> str:
        """The name of this stage's unit for a point's parameters; base: those that others go by."""
        key = _parts(config, stage)
        if key not in self._known:
            before = without_others(config, base, stage)
            needs = {up: self.unit(up, before, base) for up in STAGES[stage].needs}
            self._known[key] = self._add(stage, config, needs)
        return self._known[key]

    def _add(self, stage: str, config: Config, needs: dict[str, str]) -> str:
        own = (stage, config.backbone.source == "sandbox")
        if own not in self._code:
            code = code_of(config, stage)
            self._code[own] = code, _digest(code)
        made_from = identity(config, stage, self._code[own][0], files=self.files)
        # the name says with which parameters; the folder's digest also with which files and code
        name = _digest([stage, config.seed, made_from["params"], needs])[:DIGITS]
        name = f"{KINDS[stage]}/seed-{config.seed}-{name}"
        if name not in self.units:
            self.units[name] = Unit(
                name,
                run_notebook,
                {
                    "config": config,
                    "stage": stage,
                    "upstream": needs,
                    "root": self.sweep.root,
                    "name": name,
                },
                tuple(needs.values()),
                _digest(made_from),
                **self.resources.get(name, {}),
            )
        return name


def without_others(config: Config, base: Config, stage: str) -> Config:
    """The parameters for what `stage` reads from, with the values of `base` where they are others'.

    Notebook 00 also answers the evaluation's prompts, which a derivation does not care for. Points
    with other evaluations share a derivation; it is behind the backbone of the first part that has
    it. An alignment is judged by all of these parameters: then nothing is replaced.
    """
    if made.needed(config):
        return config
    mine = STAGES[stage].sections
    other = {name for up in STAGES[stage].needs for name in STAGES[up].sections if name not in mine}
    changed = {name: getattr(base, name) for name in other}
    if "evaluation" not in mine:
        kept = {*OF_PAIRS.split(), "sources"}
        asked = {key: getattr(base.data, key) for key in type(base.data).model_fields}
        asked = {key: value for key, value in asked.items() if key not in kept}
        changed["data"] = config.data.model_copy(update=asked)
    return config.model_copy(update=changed)


def _derived(point: Point) -> tuple:
    """What decides a point's derivation, of its parameters."""
    config = point.config
    sections = (config.backbone, config.sandbox, config.align, config.derivation)
    dumped = (section.model_dump_json() for section in sections)
    return point.params, point.seed, json.dumps(of_pairs(config.data)), *dumped


def _parts(config: Config, stage: str) -> tuple:
    """All of the parameters that runs.identity may look at for this stage."""
    if made.needed(config) or config.importance.save == "sets":
        return stage, config.model_dump_json()
    parts = [getattr(config, name).model_dump_json() for name in STAGES[stage].sections]
    return stage, config.seed, *parts


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
