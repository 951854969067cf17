"""A unit of work fills one folder, whole or not at all, and is never repeated.

A unit's folder is `<root>/<name>-<digest>`; the digest names all that decides what is in it: the
unit's inputs, the code that it runs, and the digests of the units that it needs. So an interrupted
run resumes where it was cut, and after a change exactly the units that it touches are run again.
Dates decide nothing. The code of a unit is the module of its function, with all that this imports
(system/made_from.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError
from spkit.system.made_from import code

DONE = "unit.json"  # in a unit's folder: it is complete
DIGITS = 10


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    name: unique, with slashes as folders; the first part is its kind, such as "bundles".
    work(folder, places, **inputs): fills the folder; places is {name of a needed unit: its folder}.
    inputs: what decides the result, with a stable repr. needs: names of units.
    identity: what decides the result, as JSON, where inputs and code are not it; None: they are.
    seconds: how long it is likely to take. memory_mib, threads, gpus: what it is to be given.
    """

    name: str
    work: Callable[..., None]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    identity: Any = None
    seconds: float = 1.0
    memory_mib: int = 2048
    threads: int = 1
    gpus: int = 0

    @property
    def kind(self) -> str:
        """The first part of the name: units of a kind are one rule of the workflow."""
        return self.name.partition("/")[0]


def slug(name: str) -> str:
    """A name as a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def places(units: Iterable[Unit], root: str | Path) -> dict[str, Path]:
    """{name: folder} of all units; SpkitError for a need that no earlier unit meets."""
    digests: dict[str, str] = {}
    for unit in units:
        if unit.name in digests:
            raise SpkitError(f"two units have the name {unit.name!r}")
        for need in unit.needs:
            if need not in digests:
                raise SpkitError(f"unit {unit.name!r} needs {need!r}, which is not before it")
        needed = [digests[need] for need in unit.needs]
        text = json.dumps([unit.name, unit.work.__qualname__, made_from(unit), needed])
        digests[unit.name] = hashlib.sha256(text.encode()).hexdigest()
    return {name: Path(root) / f"{name}-{digest[:DIGITS]}" for name, digest in digests.items()}


def made_from(unit: Unit) -> Any:
    """What decides a unit's result, besides the units that it needs."""
    if unit.identity is not None:
        return json.loads(json.dumps(unit.identity, sort_keys=True))
    inputs = {key: repr(value) for key, value in sorted(unit.inputs.items())}
    return {"inputs": inputs, "code": code([unit.work.__module__])}


def is_done(folder: Path) -> bool:
    """Whether the unit of that folder is complete."""
    return (folder / DONE).is_file()
