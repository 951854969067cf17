"""All stages, one process each; table, figures and bench.json in the end.

<folder>/stages/<stage>.json     a stage's rows; a finished one is not measured again
<folder>/bench.json              all rows, with machine, versions and commit
<folder>/table.md, .csv          ratios, goals, whether they are met
<folder>/ratios.png, growth.png  (and .svg)
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spkit.bench import bench as results
from spkit.bench import figures, tables
from spkit.bench.sizes import SHAPES
from spkit.bench.stages import NAMES
from spkit.errors import SpkitError
from spkit.figures import save
from spkit.paths import repository_root
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.lock import locked
from spkit.system.machine import git_state, hardware, versions
from spkit.validation import nearest

SMALL = ("1 M",)  # sizes


@dataclass(frozen=True)
class Asked:
    """What is measured. sizes: None for each stage's own. peers: whether they may be installed.
    backbone: a params file whose model the evaluation asks, too."""

    stages: tuple[str, ...] = NAMES
    rounds: int = 5
    sizes: tuple[str, ...] | None = None
    threads: int | None = None
    device: str = "cpu"
    peers: bool = False
    backbone: str | None = None


def run(asked: Asked, folder: Path) -> list[str]:
    """Measure, write, and return the stages that failed. SpkitError for a wrong name."""
    check(asked)
    with locked(make_folder(folder)):
        failed = []
        for number, stage in enumerate(asked.stages, start=1):
            print(f"[{number}/{len(asked.stages)}] {stage}", flush=True)
            if not _measured(stage, asked, folder):
                failed.append(stage)
        publish(asked, folder)
    return failed


def check(asked: Asked) -> None:
    """SpkitError for a stage or size that there is not."""
    for what, given, known in (
        ("stage", asked.stages, NAMES),
        ("size", asked.sizes or (), tuple(SHAPES)),
    ):
        for name in given:
            if name not in known:
                near = nearest(name, list(known))
                raise SpkitError(f"there is no {what} {name!r}{near}")


def _measured(stage: str, asked: Asked, folder: Path) -> bool:
    """Whether the stage's rows are there, from this run or from one before with the same code."""
    file, identity = folder / "stages" / f"{stage}.json", _identity(asked)
    if file.is_file() and not identity["code"]["changed"]:
        _, about = results.read(file)
        if about["made_from"] == identity and about["finished"]:
            print("  measured already")
            return True
    file.unlink(missing_ok=True)
    work = folder / "work" / stage
    shutil.rmtree(work, ignore_errors=True)
    given = json.dumps({"asked": asdict(asked), "made_from": identity})
    command = [sys.executable, "-m", "spkit.bench.stage", stage, str(folder), given]
    code = subprocess.run(command, cwd=repository_root()).returncode
    shutil.rmtree(work, ignore_errors=True)
    return code == 0


def _identity(asked: Asked) -> dict:
    """What decides a stage's figures, the machine's load aside; as JSON gives it back."""
    settings = {key: value for key, value in asdict(asked).items() if key != "stages"}
    code = git_state() or {"commit": None, "changed": True}
    found = {"settings": settings, "versions": versions(), "hardware": hardware(), "code": code}
    return json.loads(json.dumps(found))


def publish(asked: Asked, folder: Path) -> None:
    """bench.json, the tables and the figures, of the stages that have rows; and print the table."""
    rows, notes, identity = [], [], _identity(asked)
    for stage in NAMES:
        file = folder / "stages" / f"{stage}.json"
        if stage in asked.stages and file.is_file():
            found, about = results.read(file)
            rows += found
            notes += about["notes"]
    results.write(folder / "bench.json", rows, {"made_from": identity, "notes": notes})
    with atomic(folder / "table.md") as part:
        part.write_text(tables.markdown(rows, notes, identity), encoding="utf-8")
    save_csv(folder / "table.csv", tables.frame(rows))
    if any(row.role in (results.PEER, results.LIMIT) for row in rows):
        save(folder, "ratios", figures.ratios(rows))
    if any(row.role == results.GROWTH for row in rows):
        save(folder, "growth", figures.growth(rows))
    print(f"\n{tables.text(rows, notes)}\n\nAll files: {folder}")


def only(names: Sequence[str] | None) -> tuple[str, ...]:
    """The stages that were asked for, in their order; all for none."""
    return NAMES if not names else tuple(dict.fromkeys(names))


def as_asked(given: Mapping) -> Asked:
    """What `asdict` made of it, back from JSON."""
    stages, sizes = tuple(given["stages"]), given["sizes"]
    return Asked(**{**given, "stages": stages, "sizes": sizes and tuple(sizes)})
