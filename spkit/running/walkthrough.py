"""All notebooks of a params file, by Snakemake, with progress that fits a terminal.

    config = run("params/sandbox.yaml", {"seed": 1}, cores=2)

Snakemake's own messages go to <run folder>/log/snakemake.txt. What is shown here is read off the
run folder: a notebook has begun when its messages file is new, and is done when its stamp is there.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import yaml
from rich.console import Console

from spkit.config import Config, SandboxConfig, load_params
from spkit.errors import SpkitError
from spkit.paths import at_root
from spkit.running import checks
from spkit.running.aligned import align
from spkit.running.effects import OWNER, remarks
from spkit.running.notebook import why_failed
from spkit.running.runs import (
    STAGES,
    Run,
    forget_other_weights,
    read_record,
    require_free,
    run_folder,
    stage_folder,
    stamp,
)
from spkit.system.collector import paused
from spkit.system.files import atomic, make_folder
from spkit.system.lock import locked
from spkit.validation import read_value
from spkit.workflow.child import child

# seconds on two cores, one thread a notebook; used where no run has been timed yet
SANDBOX_SECONDS = dict(zip(STAGES, (10, 35, 14, 25, 90, 18), strict=True))
SECONDS_BETWEEN_LOOKS = 0.2


def overrides(options: Sequence[str], **top_level: Any) -> dict[str, Any]:
    """{dotted key: value} of options such as "patching.beta=1.5", and of what is not None.

    A value is read as YAML, as in a params file. SpkitError for an option without "=".
    """
    given = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise SpkitError(f"-o {option}: expected key=value, such as -o patching.beta=1.5")
        try:
            given[key] = read_value(key, text)
        except yaml.YAMLError as error:
            why = f": {error.problem}" if "what you mean" in str(error) else ""
            raise SpkitError(f"-o {option}: {text!r} is no value in YAML{why}") from None
    return given | {key: value for key, value in top_level.items() if value is not None}


def run(
    params: str | Path,
    given: Mapping[str, Any],
    *,
    cores: int = 2,
    overwrite: bool = False,
    last: str | None = None,
) -> Config:
    """Run every notebook that is not done yet, then write the table of results.

    given: overrides. overwrite: also where another params file made the results that are replaced.
    last: the stage after which it ends; then no table is written. The working folder becomes the
    repository's root. SpkitError says which notebook failed and why.
    """
    params = at_root(params)
    config = load_params(params, given)
    if not Path("Snakefile").is_file():
        raise SpkitError(
            "there is no Snakefile here or above: change into a clone of the repository, "
            "where the notebooks are"
        )
    if said := remarks(config, given, params):
        print(said, end="\n\n")
    with locked(run_folder(config)):
        _run(config, params, cores, overwrite, last)
    return config


def _run(config: Config, params: Path, cores: int, overwrite: bool, last: str | None) -> None:
    Run.restore(config)  # what a mirror holds and this machine lacks
    _run_once(config, params, cores, overwrite, last)
    if forget_other_weights(config):  # notebook 00 has made others: what is behind it is of the old
        _run_once(config, params, cores, overwrite, last)


def _run_once(config: Config, params: Path, cores: int, overwrite: bool, last: str | None) -> None:
    if old := forget_other_weights(config):
        print(f"made with other weights of the backbone: {', '.join(old)}")
    planned = Planned(config, last)
    _require_owner(config, params, planned, overwrite)
    require_free(config, planned.todo)
    if planned.todo:
        with paused():
            checks.require(config)
        align(config)
    together = max(1, cores // (config.threads or cores))
    print(planned.opening(os.path.relpath(params), together), flush=True)
    if planned.todo or (last is None and not _table_is_new(config)):
        _remember_owner(config, params)
        _run_snakemake(planned, cores, together)


class Planned:
    """The notebooks that are to run, and what is known of their times."""

    def __init__(self, config: Config, last: str | None = None):
        """last: the stage after which it ends; none: all of them are run."""
        self.config = config
        stages = list(STAGES)
        self.stages = stages[: stages.index(last) + 1] if last else stages
        self.whole = last is None
        self.stamps = {stage: stamp(config, stage) for stage in self.stages}
        self.todo = [stage for stage in self.stages if not self.stamps[stage].exists()]
        self.seconds = {stage: _expected(config, stage) for stage in self.todo}
        self.began: dict[str, float] = {}  # by time.monotonic, in the order in which they began
        self.done: list[str] = []
        self.took: dict[str, float] = {}  # seconds of those that are done

    def opening(self, params: str, together: int) -> str:
        """One line: what runs, and for how long; together as in `left`."""
        where = f"{params}: {run_folder(self.config)}"
        if not self.todo:
            return f"{where}: nothing to be done, all {len(self.stages)} notebooks are there"
        parts = [f"{where}: {len(self.todo)} of {len(self.stages)} notebooks to run"]
        return ", ".join(parts + [left for left in (self.left(together),) if left])

    def title(self, stage: str) -> str:
        """ "[2/6] 01 patch derivation"; numbered as they began."""
        number = list(self.began).index(stage) + 1
        return f"[{number}/{len(self.todo)}] {stage.replace('_', ' ')}"

    def left(self, together: int) -> str:
        """How long the rest takes, in words; "" where a notebook has never been timed here.

        together: how many notebooks run at the same time.
        """
        rest = {}
        for stage in (stage for stage in self.todo if stage not in self.done):
            if self.seconds[stage] is None:
                return ""
            passed = time.monotonic() - self.began.get(stage, time.monotonic())
            rest[stage] = max(1.0, self.pace() * self.seconds[stage] - passed)
        longest: dict[str, float] = {}  # until it is done, where nothing waits for a core
        for stage, seconds in rest.items():
            before = [longest[need] for need in STAGES[stage].needs if need in longest]
            longest[stage] = seconds + max(before, default=0.0)
        whole = max(max(longest.values(), default=0.0), sum(rest.values()) / together)
        return f"about {duration(whole)} left" if rest else ""

    def pace(self) -> float:
        """How much longer the notebooks that are done have taken than expected, 1 at least."""
        known = [stage for stage in self.took if self.seconds[stage]]
        expected = sum(self.seconds[stage] for stage in known)
        took = sum(self.took[stage] for stage in known)
        return max(1.0, took / expected) if expected else 1.0


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _expected(config: Config, stage: str) -> float | None:
    """Seconds of this notebook: the last time, of another seed, or as measured on the sandbox."""
    folder = stage_folder(config, stage)
    for path in (folder, *sorted(folder.parents[1].glob(f"seed-*/{stage}"))):
        try:
            return float(json.loads((path / "record.json").read_text("utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or no record that could be read
    plain = config.backbone.source == "sandbox" and config.sandbox == SandboxConfig()
    return SANDBOX_SECONDS[stage] if plain else None


# ---- whose results these are ---------------------------------------------------------------------


def _require_owner(config: Config, params: Path, planned: Planned, overwrite: bool) -> None:
    """SpkitError where results would be replaced that another params file has made."""
    note = run_folder(config) / "log" / OWNER
    finished = [stage for stage in planned.todo if read_record(config, stage) is not None]
    if overwrite or not finished or not note.is_file():
        return
    owner = note.read_text(encoding="utf-8").strip()
    if _name(params) not in (owner, _name(run_folder(config) / "params.yaml")):
        raise SpkitError(
            f"{run_folder(config)} holds the results of {owner}, and {_name(params)} would replace "
            f"them: give it a run_name of its own, or replace them with --overwrite"
        )


def _remember_owner(config: Config, params: Path) -> None:
    folder = make_folder(run_folder(config) / "log")
    if params != (run_folder(config) / "params.yaml").resolve():
        with atomic(folder / OWNER) as path:
            path.write_text(_name(params) + "\n", encoding="utf-8")


def _name(path: Path) -> str:
    """From the repository's root where it is in there."""
    path, root = path.resolve(), Path.cwd()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


# ---- Snakemake -----------------------------------------------------------------------------------


def _table_is_new(config: Config) -> bool:
    """Whether results.csv is younger than the records of all that it is made from."""
    table = run_folder(config) / "results.csv"
    made = [stage for stage in STAGES if STAGES[stage].results]
    records = [stage_folder(config, stage) / "record.json" for stage in made]
    times = [path.stat().st_mtime_ns for path in records if path.is_file()]
    return table.is_file() and table.stat().st_mtime_ns >= max(times, default=0)


def _run_snakemake(planned: Planned, cores: int, together: int) -> None:
    config = planned.config
    resolved = run_folder(config) / "params.yaml"
    with atomic(resolved) as path:
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    # --nolock: a killed run would leave a lock behind, and the next one is to resume there
    targets = [] if planned.whole else [str(path) for path in planned.stamps.values()]
    command = [sys.executable, "-m", "snakemake", *targets, "--cores", str(cores)]
    command += ["--rerun-incomplete"]
    command += ["--nolock", "--quiet", "progress", "host", "reason"]
    command += ["--config", f"params={resolved}"]
    log = run_folder(config) / "log" / "snakemake.txt"
    with log.open("w", encoding="utf-8") as file, child(command, file) as process:
        _watch(process, planned, together)
    if process.returncode:
        raise SpkitError(_why(planned, log))


def _watch(process: Popen, planned: Planned, together: int) -> None:
    """Print a line where a notebook begins and one where it is done, until the child ends."""
    log = run_folder(planned.config) / "log"
    messages = {stage: log / f"{stage}.txt" for stage in planned.todo}
    before = {stage: _changed(path) for stage, path in messages.items()}
    console = Console(highlight=False, markup=False)
    with console.status("starting") as status:
        while True:
            ended = process.poll() is not None
            for stage in planned.todo:
                if stage not in planned.began and _changed(messages[stage]) != before[stage]:
                    planned.began[stage] = time.monotonic()
                    console.print(f"{planned.title(stage)} ...")
            for stage in planned.began:
                if stage not in planned.done and planned.stamps[stage].exists():
                    planned.done.append(stage)
                    planned.took[stage] = time.monotonic() - planned.began[stage]
                    parts = [f"{planned.took[stage]:.0f} s"]
                    parts += [left] if (left := planned.left(together)) else []
                    console.print(f"{planned.title(stage)}: {', '.join(parts)}")
            status.update(planned.left(together) or "running")
            if ended:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _why(planned: Planned, log: Path) -> str:
    """One sentence for each notebook that failed, else what Snakemake said last."""
    failed = [stage for stage in planned.began if stage not in planned.done]
    if failed:
        return "\n".join(why_failed(log.with_name(f"{stage}.ipynb")) for stage in failed)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("spkit: ") for line in lines if line.startswith("spkit: ")]
    return f"{(own or lines or ['no message'])[-1]} (see {log})"
