"""Run the experiment: `spkit experiment params/sandbox.yaml --budget quick`.

It prints an estimate, shows a bar, and resumes where it was cut. It ends with the tables and with
notebook 05 executed on them.
"""

import shutil
import time
from pathlib import Path

import pandas as pd

from spkit.comparison import tables
from spkit.comparison.budget import budget_of
from spkit.comparison.plan import TABLES
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.notebook import differing, why_failed
from spkit.running.runs import NOTEBOOKS
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.lock import locked
from spkit.system.machine import git_state, hardware, versions
from spkit.workflow import engine
from spkit.workflow.plan import Plan

PLANNER = "spkit.comparison.plan:planned"
NOTEBOOK = "05_comparison.ipynb"
REFERENCE_STEP = 0.25  # seconds of a training step of the sandbox backbone where plan.py was timed


def folder_of(config: Config, budget: str) -> Path:
    """outputs/experiment/<budget>; with another run_name than the sandbox's, below that."""
    named = () if config.run_name == "sandbox" else (config.run_name,)
    return Path(config.outputs).joinpath("experiment", *named, budget)


def planned(config: Config, budget_name: str) -> Plan:
    """All units of one budget, and where they lie; SpkitError for an unknown budget."""
    budget_of(budget_name)
    given = {"config": config.model_dump(mode="json"), "budget": budget_name}
    root, label = folder_of(config, budget_name), f"experiment, {budget_name}"
    return Plan.of(root, label, PLANNER, given)


def run(
    config: Config,
    budget_name: str,
    jobs: int,
    profile: str | Path | None = None,
    keep_going: bool = True,
) -> Path:
    """All units, the tables last; returns the folder of the tables.

    jobs: processes at once, where there is no profile of Snakemake. keep_going: a unit that fails
    stops only what needs it. SpkitError names all that failed; the same command resumes.
    """
    plan = planned(config, budget_name)
    if profile is not None:
        engine.require_profile(profile)
    with locked(plan.root):
        todo = plan.todo()
        where = f"on {jobs} process{'es' * (jobs > 1)}" if profile is None else f"by {profile}"
        seconds = sum(unit.seconds for unit in todo) / jobs * pace(config)
        about_minutes = f"about {seconds / 60:.0f} minutes " if profile is None else ""
        print(
            f"Budget {budget_name}: {len(plan.units)} units, {len(todo)} to do, "
            f"{about_minutes}{where}; results in {plan.root}",
            flush=True,
        )
        started = time.time()
        outcome = engine.run(plan, cores=jobs, profile=profile, keep_going=keep_going)
        if not outcome.complete:
            raise SpkitError(f"{outcome.told()}\nWhat is done is kept: the same command resumes")
        minutes = (time.time() - started) / 60
        print(f"Units done after {minutes:.1f} minutes", flush=True)
        made = make_folder(plan.root / "tables")
        for name in tables.TABLES:
            with atomic(made / f"{name}.csv") as path:
                shutil.copyfile(outcome.places[TABLES] / f"{name}.csv", path)
        save_csv(made / "about.csv", about(config, budget_name))
    return made


def show(config: Config, made: Path) -> Path | None:
    """Execute notebook 05 on the tables in `made`; returns its copy, beside their folder.

    None where the working folder is not the repository's root, as there is no notebook then.
    """
    source, executed = NOTEBOOKS / NOTEBOOK, made.parent / NOTEBOOK
    if not source.is_file():
        return None
    import papermill

    values = {**differing(config), "comparison": {"tables": str(made)}}
    try:
        papermill.execute_notebook(
            source, executed, values, kernel_name="python3", progress_bar=False
        )
    except papermill.exceptions.PapermillExecutionError:
        raise SpkitError(why_failed(executed)) from None
    return executed


def about(config: Config, budget_name: str) -> pd.DataFrame:
    """What the tables were made with: budget, code, libraries, machine."""
    budget = budget_of(budget_name)
    state = git_state() or {}
    own = config.run_name != Config().run_name  # of another params file, which has its name, mostly
    params = f"PARAMS=params/{config.run_name}.yaml " if own else ""
    facts = {
        "budget": budget_name,
        "command": f"make experiment {params}BUDGET={budget_name}",
        "backbone seeds": ", ".join(map(str, range(budget.backbones))),
        "derivations": budget.derivations,
        "masks": budget.masks,
        "trials": budget.trials,
        "draws": budget.draws,
        "confidence": config.evaluation.confidence,
        "commit": state.get("commit", "unknown"),
        **{f"machine: {key}": value for key, value in hardware().items()},
        **{f"version: {key}": value for key, value in versions().items()},
    }
    return pd.DataFrame({"key": list(facts), "value": [str(value) for value in facts.values()]})


def pace(config: Config) -> float:
    """How much slower than the reference machine this one trains; a few seconds' measurement."""
    import torch

    from spkit.sandbox.tokenizer import build_tokenizer
    from spkit.sandbox.train import build_model

    torch.set_num_threads(config.threads or torch.get_num_threads())
    model = build_model(config.sandbox, len(build_tokenizer()))
    batch = torch.randint(3, 200, (config.sandbox.batch_size, 24))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        times.append(time.perf_counter() - started)
    return min(times) / REFERENCE_STEP
