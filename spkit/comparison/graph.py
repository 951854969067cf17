"""A graph of units of work: each writes one folder, whole or not at all, and none is repeated.

A unit's folder is `<root>/<name>-<digest>`; the digest names all that decides what is in it: the
unit's inputs, the code that it runs, and the digests of the units that it needs. So an interrupted
experiment resumes where it was cut, and after a change exactly the units that it touches are run
again. The code of a unit is the module of its function, with all that this imports
(system/made_from.py).
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.system.files import atomic
from spkit.system.made_from import code


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    name: unique, with slashes as folders. work(folder, places, **inputs) fills the folder; places
    is {name of a needed unit: its folder}. inputs: what decides the result, picklable, with a
    stable repr. needs: names of units. seconds: how long it is likely to take, for the prediction
    and the progress bar.
    """

    name: str
    work: Callable[..., None]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 1.0


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
        made_from = {
            "inputs": {key: repr(value) for key, value in unit.inputs.items()},
            "needs": [digests[need] for need in unit.needs],
            "code": code([unit.work.__module__]),
        }
        text = json.dumps([unit.name, unit.work.__qualname__, made_from], sort_keys=True)
        digests[unit.name] = hashlib.sha256(text.encode()).hexdigest()
    return {name: Path(root) / f"{name}-{digest[:10]}" for name, digest in digests.items()}


def remaining_seconds(units: Iterable[Unit], folders: Mapping[str, Path], jobs: int) -> float:
    """The predicted wall time of the units that are not done yet, on `jobs` cores."""
    return sum(unit.seconds for unit in units if not folders[unit.name].is_dir()) / jobs


def run(units: list[Unit], root: str | Path, *, jobs: int, label: str) -> dict[str, Path]:
    """Run all units that are not done, `jobs` at a time; returns {name: folder}.

    Each worker is a process of its own. An error in a unit stops the rest and is raised as
    SpkitError naming the unit; what is finished by then stays.
    """
    folders = places(units, root)
    waiting = [unit for unit in units if not folders[unit.name].is_dir()]
    if not waiting:
        return folders
    done = {unit.name for unit in units} - {unit.name for unit in waiting}
    total = round(sum(unit.seconds for unit in waiting))
    with _hushed(), tqdm(total=total, desc=label, unit="s", smoothing=0.05) as bar:
        # spawn: a fork of a process in which torch has run may hang
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet)
        try:
            _work_off(waiting, done, folders, pool, jobs, bar)
        except BaseException:
            # after Ctrl-C or an error what still runs is stopped; shutdown drops the rest
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return folders


def _work_off(waiting: list[Unit], done: set[str], folders: Mapping, pool, jobs: int, bar) -> None:
    """Start every unit whose needs are done, at most `jobs` at a time, until none is left."""
    running: dict = {}
    while waiting or running:
        for unit in [u for u in waiting if set(u.needs) <= done]:
            if len(running) == jobs:
                break
            needed = {need: folders[need] for need in unit.needs}
            running[pool.submit(_do, unit, folders[unit.name], needed)] = unit
            waiting.remove(unit)
            bar.set_postfix_str(unit.name, refresh=True)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            try:
                future.result()
            except Exception as error:
                raise SpkitError(f"{unit.name} failed: {error}") from error
            done.add(unit.name)
            bar.update(round(unit.seconds))


@contextmanager
def _hushed() -> Iterator[None]:
    """No bars of the workers: it is in their environment before they start and import tqdm."""
    hushed = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = {key: os.environ.get(key) for key in hushed}
    os.environ.update(hushed)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _quiet() -> None:
    """In a worker: no bars and no news, which would tear the experiment's own bar apart."""
    # whatever the libraries were told on import, and however they write
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)  # the experiment was killed

    threading.Thread(target=end_with_parent, daemon=True).start()


def _do(unit: Unit, folder: Path, needed: dict[str, Path]) -> None:
    started = time.perf_counter()
    with atomic(folder) as temporary:
        temporary.mkdir(parents=True)
        unit.work(temporary, needed, **unit.inputs)
        seconds = round(time.perf_counter() - started, 2)
        about = {"unit": unit.name, "seconds": seconds, "predicted": unit.seconds}
        (temporary / "unit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
