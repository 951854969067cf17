"""The file of a sweep: which parameters are varied, over which params files and seeds.

    name: retention                  # of the results' folder; default: the file's own name
    params: params/sandbox.yaml      # or a list of params files: backbones
    seeds: [0, 1, 2]                 # default: the params file's
    set: {evaluation.prompts_per_cell: 40}     # for all points
    grid:                            # every combination of these values
      patching.retention_rate: [0.3, 0.6, 1.0]
    points:                          # values that belong together; each is crossed with the grid
      - {derivation.lora.r: 4, derivation.lora.alpha: 8}
      - {}
    last: 03_controllable_patching   # the notebook that a point ends with

Several such products in one file are `parts: [{name: a, grid: ...}, {name: b, ...}]`; what a part
does not say is as above it.

points.py makes the points of it. Nothing is loaded here but the file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from spkit.config import Config, Place
from spkit.errors import SpkitError
from spkit.validation import Section, Wrong, checked, read_yaml, refuse_tokens, with_overrides

LASTS = ("03_controllable_patching", "04_continual_psa")
# keys of a params file that a sweep has a word of its own for, or no use
ELSEWHERE = {
    "run_name": "but results go to <outputs>/sweeps/<name>, by the sweep's name",
    "seed": "but seeds have a list of their own: seeds: [0, 1, 2]",
    "mirror": "but a sweep has none: put outputs on the storage that all machines see",
}
FIXED = {  # what may be set, and decides no result
    "outputs": "which decides no result: write it under set",
    "threads": "which decides no result: write it under set",
}

Values = dict[str, Any]


class Part(Section):
    """Points that are one product: params files x entries of `points` x grid x seeds."""

    params: Place | Annotated[list[Place], Field(min_length=1)] | None = Field(
        None, description="the params file, or several"
    )
    seeds: list[Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]] | None = Field(
        None, min_length=1, description="null: the params file's seed"
    )
    set: Values = Field({}, description="dotted keys and their values, for all points")
    grid: Values = Field({}, description="dotted keys and lists of values: every combination")
    points: list[Values] = Field([], description="dotted keys and values that belong together")
    last: Literal[*LASTS] = Field(LASTS[0], description="the notebook that a point ends with")
    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        max_length=100,
        description="of a part: a column of the table; of the file: the results' folder",
    )

    @model_validator(mode="after")
    def _grid_is_lists(self):
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise Wrong(f"grid.{key}", values, "allowed: a list of values, not empty")
            if again := _twice(values):
                raise Wrong(f"grid.{key}", values, f"where {again[0]!r} stands twice")
        return self

    @model_validator(mode="after")
    def _nothing_twice(self):
        for name in ("params", "seeds", "points"):  # the table would have rows twice
            values = getattr(self, name)
            if isinstance(values, list) and (again := _twice(values)):
                raise Wrong(name, again[0], "and stands twice")
        for key in self.varied:
            if key in self.set:
                raise Wrong(f"set.{key}", self.set[key], "but it is varied, too")
        for key in self.grid:
            for number, values in enumerate(self.points, start=1):
                if key in values:
                    rule = f"but it is in entry {number} of points, too"
                    raise Wrong(f"grid.{key}", self.grid[key], rule)
        return self

    @model_validator(mode="after")
    def _keys_are_parameters(self):
        for place, key, value in self._places():
            rule = ELSEWHERE.get(key) or (not place.startswith("set") and FIXED.get(key))
            if rule and not is_none(key, value):
                raise Wrong(place, value, rule)
            try:
                with_overrides(Config, {}, {key: None})
            except SpkitError as error:
                said = str(error).removeprefix("overrides: ")
                rule = said.replace(f"unknown key {key}", "which is no parameter")
                raise Wrong(place, value, rule) from None
        return self

    def _places(self) -> Iterator[tuple[str, str, Any]]:
        """(where it stands, the dotted key, its value) of every key of a parameter."""
        for key, value in self.set.items():
            yield f"set.{key}", key, value
        for key, value in self.grid.items():
            yield f"grid.{key}", key, value
        for number, values in enumerate(self.points):
            for key, value in values.items():
                yield f"points.{number}.{key}", key, value

    @property
    def varied(self) -> list[str]:
        """The keys that points differ in, in the file's order."""
        return list(dict.fromkeys([*self.grid, *(key for point in self.points for key in point)]))

    @property
    def params_files(self) -> list[str]:
        """The params files, also where there is one."""
        return [self.params] if isinstance(self.params, str) else list(self.params or [])


class SweepFile(Part):
    """A sweep as it is written."""

    parts: list[Values] = Field([], description="each with a name, and what is not as above it")


def read(path: str | Path) -> tuple[str, list[Part]]:
    """(the sweep's name, its parts); SpkitError names the line, the key and what is expected."""
    values = read_yaml(path)
    try:
        refuse_tokens(values)
        file = checked(SweepFile, values, Path(path))
        parts = _parts(file, path) if file.parts else [file.model_copy(update={"name": ""})]
    except SpkitError as error:
        raise located(path, str(error)) from None
    try:
        name = checked(Part, {"name": file.name or Path(path).stem}).name
    except SpkitError as error:
        raise SpkitError(f"{path}: {error}; write a name into the file") from None
    return name, parts


def _parts(file: SweepFile, path: str | Path) -> list[Part]:
    """The parts of a file, each with what it takes from the file."""
    for key in ("grid", "points"):
        if getattr(file, key):
            raise SpkitError(
                f"{key} is {getattr(file, key)!r}, but where there are parts it is theirs"
            )
    common = file.model_dump(exclude={"name", "parts"}, exclude_unset=True)
    found: list[Part] = []
    for number, values in enumerate(file.parts):
        own = {**common, **values}
        if isinstance(values.get("set"), Mapping):
            own["set"] = {**file.set, **values["set"]}
        try:
            part = checked(Part, own, Path(path))
        except SpkitError as error:
            raise SpkitError(f"parts.{number}: {error}") from None
        if not part.name or part.name in [other.name for other in found]:
            raise SpkitError(
                f"parts.{number}: name is {part.name!r}, must be another than the others'"
            )
        found.append(part)
    return found


def located(path: str | Path, said: str) -> SpkitError:
    """The error with the file's name, and the line of the longest key that it names.

    Keys that it proposes do not count; a key that stands in several places has no line.
    """
    wrong = re.split(", allowed: |, did you mean ", said)[0]
    lines: dict[str, set[int]] = {}
    for key, line in _lines(yaml.compose(Path(path).read_text(encoding="utf-8"))):
        lines.setdefault(key, set()).add(line)
    named = max((key for key in lines if key in wrong), key=len, default=None)
    found = lines.get(named, ())
    where = f", line {min(found)}" if len(found) == 1 else ""
    return SpkitError(f"{path}{where}: {said}")


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(key, its line) of every key in the file; of those in grid and points without the section."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1
            yield from _lines(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _lines(value)


def is_none(key: str, value: Any) -> bool:
    """Whether it turns off the mirror of a params file, which a sweep cannot have."""
    return key == "mirror" and value is None


def _twice(values: list[Any]) -> list[Any]:
    """Entries that are not the first of their kind; 1 and 1.0 are the same, 1 and true are not."""
    return [
        value
        for number, value in enumerate(values)
        if any(type(value) is type(x) or _numbers(value, x) for x in values[:number] if x == value)
    ]


def _numbers(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


def shown(values: Mapping[str, Any]) -> str:
    """ "patching.retention_rate=0.3, derivation.lora.r=4"."""
    return ", ".join(f"{key}={value}" for key, value in values.items())
