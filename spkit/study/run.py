"""A whole study: alignment, base and derivations of every held-out backbone, one unit at a time.

    <outputs>/<run_name>/study/seed-<k>/base/
    <outputs>/<run_name>/study/seed-<k>/derivation-<d>/
    <outputs>/<run_name>/study/tables/

Finished units are kept, so an interrupted study resumes. The alignment of a seed is shared with
that seed's run (spkit run).
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spkit.comparison.plan import changed, derivation_seed
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running import checks
from spkit.running.aligned import after_alignment, align
from spkit.running.walkthrough import duration
from spkit.study import tables
from spkit.study.unit import Unit
from spkit.system.lock import locked

SEEDS, DERIVATIONS = (0, 1, 2), 2


def study_folder(config: Config) -> Path:
    """Where the units and tables of a study are."""
    return Path(config.outputs) / config.run_name / "study"


def run(
    config: Config,
    seeds: Sequence[int] = SEEDS,
    derivations: int = DERIVATIONS,
    given: Mapping[str, Any] | None = None,
) -> Path:
    """Run what is missing, then write the tables; their folder.

    seeds: of the backbones. given: the overrides in `config`, to be told in about.csv. SpkitError
    where there are fewer than two seeds, of which no interval can be made, and as in the stages.
    """
    if len(set(seeds)) < 2:
        raise SpkitError(
            f"a study needs two backbones at least for intervals; seeds: {list(seeds)}"
        )
    with locked(study_folder(config)):
        return _run(config, seeds, derivations, given or {})


def _run(config: Config, seeds: Sequence[int], derivations: int, given: Mapping[str, Any]) -> Path:
    total, done, began, times = len(seeds) * (1 + derivations), 0, time.monotonic(), []
    units: list[Unit] = []
    checks.require(config)
    for seed in seeds:
        own = changed(config, seed=seed)
        print(f"backbone {seed}", flush=True)
        align(own)
        after = after_alignment(own, make=False)
        base = study_folder(config) / f"seed-{seed}" / "base"
        for unit in _units(after, seed, derivations, base):
            was, fresh = time.monotonic(), not unit.finished()
            unit.run(base)
            done += 1
            units.append(unit)
            if fresh:
                times.append(time.monotonic() - was)
            print(f"[{done}/{total}] {unit.folder}{_left(times, total - done)}", flush=True)
    made = tables.write(units, config, study_folder(config) / "tables", given)
    print(f"{total} units in {duration(time.monotonic() - began)}: {made}")
    return made


def _units(after: Config, seed: int, derivations: int, base: Path) -> list[Unit]:
    first = Unit(after, None, seed, base)
    return [first] + [
        Unit(after, d, derivation_seed(seed, d), base.with_name(f"derivation-{d}"))
        for d in range(derivations)
    ]


def _left(times: list[float], units: int) -> str:
    return f", about {duration(units * max(times))} left" if times and units else ""
