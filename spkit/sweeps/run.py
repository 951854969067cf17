"""A sweep from its file to its tables.

    run("params/sweeps/retention.yaml", {}, cores=2)

Everything is looked at first: the file, every point's parameters, and what `spkit check` looks at.
Then the units run that are not done; then the results of all complete points are gathered. What
failed is told at the end, with the points that it stops. The same command does only the rest.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError
from spkit.running import checks
from spkit.running.effects import without_effect
from spkit.running.walkthrough import duration
from spkit.sweeps.points import Point, Sweep, expand
from spkit.sweeps.resources import resources
from spkit.sweeps.units import PLANNER, Graph, build
from spkit.system.lock import locked
from spkit.workflow.engine import Outcome
from spkit.workflow.plan import Plan

SHOWN = 3  # points that a failed unit stops, by their values
CHECKED = ("backbone", "sandbox", "data", "align", "judges", "utility")


@dataclass(frozen=True)
class Planned:
    """A sweep, the graph of its notebooks, and the plan that the engine runs."""

    sweep: Sweep
    graph: Graph
    plan: Plan

    def opening(self, cores: int | None) -> str:
        """How many points and units, what they share, an estimate. cores: None on a cluster."""
        sweep, units, todo = self.sweep, self.plan.units, self.plan.todo()
        alone = sum(len(chain) for chain in self.graph.chains)
        lines = [f"{sweep.name}: {len(sweep.points)} points in {sweep.root}"]
        shared = f"{alone} notebooks, {len(units)} of them different"
        if not todo:
            return f"{lines[0]}\n{shared}: all are done"
        work = sum(unit.seconds for unit in todo)
        left = f"about {duration(work / cores)}" if cores else f"{duration(work)} of work"
        return f"{lines[0]}\n{shared}: {len(todo)} to run, {left}"


def remarks(sweep: Sweep) -> list[str]:
    """A line for each varied key that changes nothing beside a point's other parameters."""
    said = Counter(x for p in sweep.points for x in without_effect(p.config, p.values))
    return [f"{sentence} ({count} points)" for sentence, count in said.items()]


def plan_of(sweep: Sweep, *, cluster: bool = False) -> Planned:
    """cluster: whether the units will run on other machines."""
    given = sweep.given()
    found = resources(build(sweep).units, sweep.root, cluster)
    graph = build(sweep, found)
    given |= {"first": graph.first, "resources": found}
    plan = Plan(sweep.root, sweep.name, PLANNER, given, graph.units)
    return Planned(sweep, graph, plan)


def require_runnable(sweep: Sweep, *, cluster: bool = False) -> None:
    """SpkitError where a point could not end: `spkit check` of each different backbone and data.

    cluster: whether it will run on other machines, whose devices are not looked at from here.
    """
    seen: set[str] = set()
    problems: dict[str, Point] = {}
    for point in sweep.points:
        config, derivation = point.config, point.config.derivation
        parts = [getattr(config, name).model_dump_json() for name in CHECKED]
        parts += [json.dumps([derivation.se, derivation.osm, derivation.lora.targets])]
        if (alike := " ".join(parts)) in seen:
            continue
        seen.add(alike)
        own = config.model_copy(update={"outputs": str(sweep.root), "run_name": "units"})
        found = checks.findings(own, fetch=True)
        found = [each for each in found if not cluster or each.key != "backbone.device"]
        for sentence in checks.problems(found):
            problems.setdefault(sentence, point)
    if problems:
        said = [f"point {point.number} ({point.label}): {s}" for s, point in problems.items()]
        raise SpkitError("\n".join(said))


def run(
    path: str | Path,
    given: Mapping[str, Any],
    *,
    cores: int = 2,
    profile: str | Path | None = None,
    keep_going: bool = True,
) -> bool:
    """Run a sweep and write its tables; whether every point is complete.

    given: values of -o. profile: a folder of Snakemake's options, for a cluster.
    """
    from spkit.sweeps import gather
    from spkit.workflow import engine

    sweep = expand(path, given)
    if profile is not None:
        engine.require_profile(profile)
    with locked(sweep.root):
        planned = plan_of(sweep, cluster=profile is not None)
        if planned.plan.todo():
            require_runnable(sweep, cluster=profile is not None)
        for said in remarks(sweep):
            print(said)
        print(planned.opening(None if profile else cores), flush=True)
        outcome = engine.run(planned.plan, cores=cores, profile=profile, keep_going=keep_going)
        left = {*outcome.failed, *outcome.blocked}
        chains = enumerate(planned.graph.chains)
        complete = [number for number, chain in chains if not left & {*chain.values()}]
        try:
            if complete:
                print(gather.write(sweep, planned.graph, outcome.places, complete))
        finally:  # also where what is complete cannot be read
            if not outcome.complete:
                print(failures(planned, outcome))
    return outcome.complete


def failures(planned: Planned, outcome: Outcome) -> str:
    """Each failed unit: why, its executed notebook, and the points that end there."""
    points, chains = planned.sweep.points, planned.graph.chains
    lines = []
    for name, reason in outcome.failed.items():
        stopped = [p for p, chain in zip(points, chains, strict=True) if name in chain.values()]
        lines.append(f"\nfailed: {reason}")
        lines += [f"  point {point.number}: {point.label}" for point in stopped[:SHOWN]]
        if len(stopped) > SHOWN:
            lines.append(f"  and {len(stopped) - SHOWN} points more")
    count = sum(any(unit in outcome.failed for unit in chain.values()) for chain in chains)
    left = {*outcome.failed, *outcome.blocked}
    rest = sum(any(unit in left for unit in chain.values()) for chain in chains) - count
    more = f", {rest} did not run" * (rest > 0)  # with --stop
    said = f"{count} of {len(points)} points failed{more}; the same command does what is missing"
    lines.append(f"\n{said}")
    return "\n".join(lines)


def forecast(path: str | Path, given: Mapping[str, Any], *, device: str, cores: int) -> str:
    """What a sweep would take; nothing is loaded, and its input files may not be here."""
    from spkit.sweeps.forecast import Work, table

    sweep = expand(path, given)
    graph = build(sweep, files=False)
    used = Counter(unit for chain in graph.chains for unit in chain.values())
    units = [Work(u.inputs["stage"], u.inputs["config"], used[u.name]) for u in graph.units]
    return table(sweep.name, sweep.points, units, device, cores)
