"""Snakemake on a plan: a progress bar, what failed and why, and the same command to resume.

    outcome = run(plan, cores=2)                              on this machine
    outcome = run(plan, profile="profiles/slurm")             as that profile of Snakemake says

Snakemake's own messages go to root/snakemake.txt, a unit's to root/log. What is shown here is read
off the folder: a unit has begun when its log is new, and is done when its unit.json is there.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.system.files import make_folder
from spkit.workflow.child import child
from spkit.workflow.job import failure_note
from spkit.workflow.plan import Plan
from spkit.workflow.units import Unit, is_done

RULES = Path(__file__).with_name("units.smk")
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_CANCEL = 60  # Snakemake takes its jobs back from a cluster
BAR_SECONDS = 60  # between two lines of the bar where it goes into a file


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    places: {name: folder} of all units. failed: {name: why}. blocked: units that did not run
    because they need one that failed, or because the run was ended at the first failure.
    """

    places: Mapping[str, Path]
    failed: Mapping[str, str]
    blocked: list[str]

    @property
    def complete(self) -> bool:
        """Whether every unit is done."""
        return not self.failed and not self.blocked

    def told(self) -> str:
        """One line for each unit that failed, and how many could not run."""
        lines = [f"{name} failed: {reason}" for name, reason in self.failed.items()]
        if self.blocked:
            lines.append(f"{len(self.blocked)} more did not run, first {self.blocked[0]}")
        return "\n".join(lines)


def run(
    plan: Plan, *, cores: int = 2, profile: str | Path | None = None, keep_going: bool = True
) -> Outcome:
    """Run the units that are not done.

    cores: of this machine, where there is no profile. profile: a folder with Snakemake's options.
    keep_going: a failure stops only what needs it. SpkitError where there is no such profile, and
    where Snakemake itself fails.
    """
    todo = plan.todo()
    if profile is not None:
        require_profile(profile)
    if not todo:
        return Outcome(plan.places, {}, [])
    root = _cleared(plan.root, profile)
    file = plan.write()
    places = plan.places
    for unit in todo:  # of an earlier run
        failure_note(root, unit.name).unlink(missing_ok=True)
        _messages(root, places[unit.name]).unlink(missing_ok=True)
    command = _command(file, keep_going)
    command += _here(todo, cores) if profile is None else ["--profile", str(profile)]
    log = root / "snakemake.txt"
    asked = SECONDS_TO_CANCEL if profile else 0
    with log.open("w", encoding="utf-8") as out, child(command, out, asked_first=asked) as process:
        _watch(process, plan, todo)
    outcome = _outcome(plan, todo, log, process.returncode)
    if outcome.complete:
        make_folder(root)  # what lost jobs left
    return outcome


def _cleared(root: Path, profile: str | Path | None) -> Path:
    """The folder, without what killed jobs left. On a cluster some of an earlier run may go on."""
    if profile is None:
        return make_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    return root


def _command(file: Path, keep_going: bool) -> list[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(RULES)]
    command += ["--config", f"plan={file}"]
    command += ["--workflow-profile", "none"]  # a folder profiles/default would be one
    # a unit's folder appears whole: nothing is incomplete, also of a job that failed as its node
    # died or for another unit of its group; and a killed run left no lock
    command += ["--nolock", "--ignore-incomplete", "--keep-incomplete", "--drop-metadata"]
    command += ["--rerun-triggers", "mtime", "--scheduler", "greedy"]
    command += ["--keep-going"] * keep_going
    return [*command, "--quiet", "progress", "host", "reason"]


def _here(todo: list[Unit], cores: int) -> list[str]:
    """On this machine: so many cores, its free memory, and one unit on the GPU at a time."""
    import psutil

    free = psutil.virtual_memory().available // 2**20
    memory = max(free, *(unit.memory_mib for unit in todo))  # what is too large is tried alone
    gpus = max(unit.gpus for unit in todo)
    none = ["--profile", "none"]  # nor that of $SNAKEMAKE_PROFILE
    return [*none, "--cores", str(cores), "--resources", f"mem_mb={memory}", f"gpu={gpus}"]


def require_profile(folder: str | Path) -> None:
    """SpkitError where the folder is no profile of Snakemake."""
    if not any(Path(folder).glob("config*.yaml")):
        raise SpkitError(f"--profile {folder}: expected a folder with Snakemake's config.yaml")


def _watch(process: Popen, plan: Plan, todo: list[Unit]) -> None:
    """A bar of predicted seconds, until the process ends."""
    places, waiting, seconds = plan.places, list(todo), 0.0
    between = 0.5 if sys.stderr.isatty() else BAR_SECONDS
    total = round(sum(unit.seconds for unit in todo))
    bar = tqdm(total=total, desc=plan.label, unit="s", smoothing=0.05, mininterval=between)
    with bar:
        while True:
            ended = process.poll() is not None
            for unit in [unit for unit in waiting if is_done(places[unit.name])]:
                waiting.remove(unit)
                done = f"{len(todo) - len(waiting)} of {len(todo)} units, last {unit.name}"
                bar.set_postfix_str(done, refresh=False)
                seconds += unit.seconds
                bar.update(round(seconds) - bar.n)
            if ended:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _outcome(plan: Plan, todo: list[Unit], log: Path, code: int) -> Outcome:
    places = plan.places
    left = [unit.name for unit in todo if not is_done(places[unit.name])]
    failed = {}
    for name in left:
        note, messages = failure_note(plan.root, name), _messages(plan.root, places[name])
        if note.is_file():
            failed[name] = note.read_text(encoding="utf-8").strip()
        elif messages.is_file():  # it began
            failed[name] = f"{_last_words(messages, name)}; see {messages}"
    if code and not failed:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise SpkitError(f"{(said or ['Snakemake gave no message'])[-1]} (see {log})")
    return Outcome(places, failed, [name for name in left if name not in failed])


def _messages(root: Path, place: Path) -> Path:
    """The log of a unit. Those of earlier runs are deleted: what is there has begun in this one."""
    return root / "log" / f"{place.relative_to(root / 'units')}.txt"


def _last_words(messages: Path, name: str) -> str:
    """Why a unit failed of which there is no note."""
    lines = messages.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith(f"{name} failed: ")]
    killed = "its process was killed (often too little memory, too little time, or a full disk)"
    return said[-1].partition(": ")[2] if said else killed
