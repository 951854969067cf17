"""A plan: all units of one experiment or sweep. Its file is how a job finds its unit again.

    plan.json   {"planner": "module:function", "given": {...}, "label": ..., "units": {name: {...}}}

A job is a process of its own, on any machine that sees the folder. It has the name of its unit and
this file: it asks the planner again with the same values, and takes the unit of that name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from spkit.errors import SpkitError
from spkit.system.files import atomic
from spkit.workflow.units import Unit, is_done, places

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What is to run, and where.

    root: the folder of all that it writes; the units' are in root/units. planner: "module:function"
    of a function(given, only) that gives the units for the values `given` (JSON). label: the
    progress bar's.
    """

    root: Path
    label: str
    planner: str
    given: Mapping[str, Any]
    units: list[Unit]

    def __post_init__(self):
        _require_plain(self.root)

    @classmethod
    def of(cls, root: str | Path, label: str, planner: str, given: Mapping[str, Any]) -> "Plan":
        """The plan that `planner` makes of `given`."""
        return cls(Path(root), label, planner, given, planned(planner, given))

    @cached_property  # it hashes what each unit is made of; also, it is as it was at the start
    def places(self) -> dict[str, Path]:
        """{name of a unit: its folder}."""
        return places(self.units, self.root / "units")

    def todo(self) -> list[Unit]:
        """The units that are not done yet."""
        found = self.places
        return [unit for unit in self.units if not is_done(found[unit.name])]

    def write(self) -> Path:
        """root/plan.json, which the rules and the jobs read."""
        found = self.places
        units = {
            unit.name: {
                "folder": found[unit.name].as_posix(),
                "needs": list(unit.needs),
                "seconds": unit.seconds,
                "memory_mib": unit.memory_mib,
                "threads": unit.threads,
                "gpus": unit.gpus,
            }
            for unit in self.units
        }
        whole = {"planner": self.planner, "given": dict(self.given), "label": self.label}
        with atomic(self.root / FILE) as path:
            text = json.dumps({**whole, "units": units}, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
        return self.root / FILE


def _require_plain(root: Path) -> None:
    """SpkitError for a folder that Snakemake takes for something else: it gets it as YAML, without
    quotes around it, and braces are its wildcards.
    """
    text = str(root / FILE)
    try:
        same = yaml.load(text, yaml.BaseLoader) == text
    except yaml.YAMLError:  # then it is taken as it stands
        same = True
    if not same or text.strip("'\"") != text or set("{}\n\r") & {*text}:
        raise SpkitError(
            f"outputs: Snakemake cannot write to {str(root)!r}: choose a folder without braces, "
            f"line breaks, ': ' and ' #', and without ' \" ! at its start"
        )


def planned(planner: str, given: Mapping[str, Any], only: str | None = None) -> list[Unit]:
    """The units that "module:function" gives for these values.

    only: the unit that is asked for; the planner may leave out what it does not need.
    """
    module, _, function = planner.partition(":")
    return getattr(import_module(module), function)(given, only)


def read(file: str | Path) -> dict[str, Any]:
    """What stands in a plan's file."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


def unit_of(file: str | Path, name: str) -> tuple[Unit, dict[str, Path]]:
    """(the unit of that name, the folders of it and of what it needs), planned anew.

    SpkitError where its folder is another than in the file: the code has changed meanwhile.
    """
    file = Path(file)
    found = read(file)
    if name not in found["units"]:
        raise SpkitError(f"{file} has no unit {name!r}")
    units = planned(found["planner"], found["given"], name)
    here = places(units, file.parent / "units")
    if name not in here or here[name].as_posix() != found["units"][name]["folder"]:
        raise SpkitError(
            f"{name}: the code or an input file was changed after the run began; start it again"
        )
    return next(unit for unit in units if unit.name == name), here
