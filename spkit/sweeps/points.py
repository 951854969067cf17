"""The points of a sweep: each is a params file, a seed and values, validated as a run's parameters.

    sweep = expand("params/sweeps/retention.yaml", {})
    sweep.points[3].config       the whole parameters of the fourth point
    sweep.given()                the same as JSON, small: what the jobs make their units of

A point's number is its place in the file: parts, params files, entries of `points`, the grid in its
order, seeds last. Nothing is loaded here but the files.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.sweeps.file import ELSEWHERE, Part, is_none, located, read, shown

MOST = 20_000  # points; more is a mistake in a grid rather than a plan


@dataclass(frozen=True)
class Base:
    """What points share: a params file in a part, with what is set for all of its points.

    last: the notebook that the points end with.
    """

    part: str
    params: str
    last: str
    config: Config


@dataclass(frozen=True)
class Point:
    """One run. values: what it has of the varied keys, as written."""

    number: int
    base: Base
    seed: int
    values: Mapping[str, Any]
    config: Config

    @property
    def label(self) -> str:
        """ "patching.retention_rate=0.3, seed 0, params/sandbox.yaml"."""
        parts = [self.part, shown(self.values), f"seed {self.seed}", self.params]
        return ", ".join(filter(None, parts))

    @property
    def part(self) -> str:
        """The name of its part; "" where the file has none."""
        return self.base.part

    @property
    def params(self) -> str:
        """Its params file."""
        return self.base.params

    @property
    def last(self) -> str:
        """The notebook that it ends with."""
        return self.base.last


@dataclass(frozen=True)
class Sweep:
    """All points of a file. keys: the varied ones."""

    name: str
    keys: list[str]
    bases: list[Base]
    points: list[Point]

    @property
    def root(self) -> Path:
        """<outputs>/sweeps/<name>: everything that the sweep writes."""
        return Path(self.bases[0].config.outputs) / "sweeps" / self.name

    def given(self) -> dict[str, Any]:
        """The sweep as JSON; `of_given` makes the same points of it, without a params file."""
        bases = [[b.part, b.params, b.last, b.config.model_dump(mode="json")] for b in self.bases]
        points = [[self.bases.index(p.base), p.seed, dict(p.values)] for p in self.points]
        return {"name": self.name, "keys": self.keys, "bases": bases, "points": points}


def expand(path: str | Path, given: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep of a file, every point of it validated.

    given: further values for all points, as of -o. SpkitError names the line, the key, the value
    and the point.
    """
    (name, parts), given = read(path), dict(given or {})
    _require_few(path, parts)
    bases: list[Base] = []
    points: list[Point] = []
    for part in parts:
        _require_free(part, given)
        own = [_base(path, params, part, given) for params in part.params_files]
        points += _points(path, part, own, len(points))
        bases += own
    _require_one_place(path, bases)
    _require_different(path, points)
    keys = dict.fromkeys(key for part in parts for key in part.varied)
    return Sweep(name, list(keys), bases, points)


def of_given(given: Mapping[str, Any]) -> Sweep:
    """The sweep of what `Sweep.given` gave."""
    bases = [
        Base(part, params, last, Config.from_sources(dump))
        for part, params, last, dump in given["bases"]
    ]
    points = [
        Point(number, bases[index], seed, values, _config(bases[index], values, seed))
        for number, (index, seed, values) in enumerate(given["points"], start=1)
    ]
    return Sweep(given["name"], list(given["keys"]), bases, points)


def _require_free(part: Part, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in ELSEWHERE and not is_none(key, value):
            raise SpkitError(f"-o {key}={value}: {key} is set, {ELSEWHERE[key]}")
        if key in part.varied:
            raise SpkitError(f"-o {key}={value}: the sweep varies {key}, change it in its file")


def _require_few(path: str | Path, parts: list[Part]) -> None:
    count = 0
    for part in parts:
        sizes = [len(part.params_files), len(part.points or [{}])]
        sizes += [*map(len, part.grid.values()), len(part.seeds or [0])]
        count += math.prod(sizes)
        if count > MOST:
            said = f"{count:,} points ({' x '.join(map(str, sizes))}), at most {MOST:,}"
            raise SpkitError(f"{path}: {said}: make it several files")
        if not part.params_files:
            raise located(path, "params is missing, allowed: a params file, or a list of them")


def _base(path: str | Path, params: str, part: Part, given: Mapping[str, Any]) -> Base:
    """The parameters of a params file, with what the sweep sets for all points."""
    if not Path(params).is_file():
        raise located(path, f"params is {params!r}, and there is no such file")
    try:
        config = load_params(params, {**part.set, **given})
    except SpkitError as error:
        raise located(path, f"for all points: {error}") from None
    if config.mirror is not None:
        none = ", and write {mirror: null} under set"
        raise SpkitError(f"{params}: mirror is {config.mirror!r}, {ELSEWHERE['mirror']}{none}")
    return Base(part.name, params, part.last, config)


def _points(path: str | Path, part: Part, bases: list[Base], number: int) -> Iterator[Point]:
    """number: how many points there are before them."""
    for base in bases:
        for entry, *values in itertools.product(part.points or [{}], *part.grid.values()):
            own = {**entry, **dict(zip(part.grid, values, strict=True))}
            own = {key: own[key] for key in part.varied if key in own}
            for seed in part.seeds or [base.config.seed]:
                number += 1
                try:
                    config = _config(base, own, seed)
                except SpkitError as error:
                    label = Point(number, base, seed, own, base.config).label
                    raise located(path, f"point {number} ({label}): {error}") from None
                yield Point(number, base, seed, own, config)


def _config(base: Base, values: Mapping[str, Any], seed: int) -> Config:
    """One point's parameters; relative paths in the values are meant as in its params file."""
    given = {**values, "seed": seed}
    return Config.from_sources(base.config.model_dump(), given, Path(base.params))


def _require_one_place(path: str | Path, bases: list[Base]) -> None:
    """SpkitError where params files, or parts, name different root folders."""
    first = bases[0]
    for base in bases:
        one, other = first.config.outputs, base.config.outputs
        if Path(one) != Path(other):
            whose = [", ".join(filter(None, [b.part, b.params])) for b in (first, base)]
            said = f"outputs is {one!r} in {whose[0]} and {other!r} in {whose[1]}: a sweep has one "
            raise SpkitError(f"{path}: {said}folder, write outputs under the file's own set")


def _require_different(path: str | Path, points: list[Point]) -> None:
    """SpkitError where two points of a part have the same parameters."""
    seen: dict[tuple[str, str], Point] = {}
    for point in points:
        first = seen.setdefault((point.part, point.config.model_dump_json()), point)
        if first is not point:
            said = f"points {first.number} ({first.label}) and {point.number} ({point.label}) "
            raise SpkitError(f"{path}: {said}have the same parameters")
