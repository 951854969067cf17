"""The points of a sweep: each is a params file, a seed and values, validated as a run's parameters.

    sweep = expand("params/sweeps/retention.yaml", {})
    sweep.points[3].config       the whole parameters of the fourth point
    sweep.given()                the same as JSON, small: what the jobs make their units of

A point's number is its place in the file: params files, then entries of `points`, then the grid in
its order, seeds last. Nothing is loaded here but the files.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.sweeps.file import ELSEWHERE, SweepFile, located, read, shown

MOST = 20_000  # points; more is a mistake in a grid rather than a plan


@dataclass(frozen=True)
class Point:
    """One run. params: its params file. values: what it has of the varied keys, as written."""

    number: int
    params: str
    seed: int
    values: Mapping[str, Any]
    config: Config

    @property
    def label(self) -> str:
        """ "patching.retention_rate=0.3, seed 0, params/sandbox.yaml"."""
        return ", ".join(filter(None, [shown(self.values), f"seed {self.seed}", self.params]))


@dataclass(frozen=True)
class Sweep:
    """All points of a file. keys: the varied ones. bases: {params file: its parameters}."""

    name: str
    last: str
    keys: list[str]
    bases: Mapping[str, Config]
    points: list[Point]

    @property
    def root(self) -> Path:
        """<outputs>/sweeps/<name>: everything that the sweep writes."""
        return Path(next(iter(self.bases.values())).outputs) / "sweeps" / self.name

    def given(self) -> dict[str, Any]:
        """The sweep as JSON; `of_given` makes the same points of it, without a params file."""
        return {
            "name": self.name,
            "last": self.last,
            "keys": self.keys,
            "params": {path: base.model_dump(mode="json") for path, base in self.bases.items()},
            "points": [[point.params, point.seed, dict(point.values)] for point in self.points],
        }


def expand(path: str | Path, given: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep of a file, every point of it validated.

    given: further values for all points, as of -o. SpkitError names the line, the key, the value
    and the point.
    """
    file, given = read(path), dict(given or {})
    _require_free(file, given)
    _require_few(path, file)
    bases = {params: _base(path, params, file, given) for params in file.params_files}
    points = list(_points(path, file, bases))
    _require_different(path, points)
    return Sweep(str(file.name), file.last, file.varied, bases, points)


def of_given(given: Mapping[str, Any]) -> Sweep:
    """The sweep of what `Sweep.given` gave."""
    bases = {path: Config.from_sources(dump, {}) for path, dump in given["params"].items()}
    points = [
        Point(number, params, seed, values, _config(params, bases[params], values, seed))
        for number, (params, seed, values) in enumerate(given["points"], start=1)
    ]
    return Sweep(given["name"], given["last"], list(given["keys"]), bases, points)


def _require_free(file: SweepFile, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in ELSEWHERE:
            raise SpkitError(f"-o {key}={value}: {key} is set, {ELSEWHERE[key]}")
        if key in file.varied:
            raise SpkitError(f"-o {key}={value}: the sweep varies {key}, change it in its file")


def _require_few(path: str | Path, file: SweepFile) -> None:
    sizes = [len(file.params_files), len(file.points or [{}])]
    sizes += [*map(len, file.grid.values()), len(file.seeds or [0])]
    if math.prod(sizes) > MOST:
        said = f"{math.prod(sizes):,} points ({' x '.join(map(str, sizes))}), at most {MOST:,}"
        raise SpkitError(f"{path}: {said}: make it several files")


def _base(path: str | Path, params: str, file: SweepFile, given: Mapping[str, Any]) -> Config:
    """The parameters of a params file, with what the sweep sets for all points."""
    if not Path(params).is_file():
        raise located(path, f"params is {params!r}, and there is no such file")
    try:
        base = load_params(params, {**file.set, **given})
    except SpkitError as error:
        raise located(path, f"for all points: {error}") from None
    if base.mirror is not None:
        raise SpkitError(f"{params}: mirror is {base.mirror!r}, {ELSEWHERE['mirror']}")
    return base


def _points(path: str | Path, file: SweepFile, bases: Mapping[str, Config]) -> Iterator[Point]:
    number = 0
    for params, base in bases.items():
        for entry, *values in itertools.product(file.points or [{}], *file.grid.values()):
            own = {**entry, **dict(zip(file.grid, values, strict=True))}
            own = {key: own[key] for key in file.varied if key in own}
            for seed in file.seeds or [base.seed]:
                number += 1
                try:
                    config = _config(params, base, own, seed)
                except SpkitError as error:
                    label = Point(number, params, seed, own, base).label
                    raise located(path, f"point {number} ({label}): {error}") from None
                yield Point(number, params, seed, own, config)


def _config(params: str, base: Config, values: Mapping[str, Any], seed: int) -> Config:
    """One point's parameters; relative paths in the values are meant as in its params file."""
    return Config.from_sources(base.model_dump(), {**values, "seed": seed}, Path(params))


def _require_different(path: str | Path, points: list[Point]) -> None:
    """SpkitError where two points have the same parameters: an entry that only repeats defaults."""
    seen: dict[str, Point] = {}
    for point in points:
        own = point.config.model_dump_json()
        if own in seen:
            first = seen[own]
            said = f"points {first.number} ({first.label}) and {point.number} ({point.label}) "
            raise SpkitError(f"{path}: {said}have the same parameters")
        seen[own] = point
