"""Run the experiment: `spkit experiment params/sandbox.yaml --budget quick`.

It prints an estimate, shows a bar, and resumes where it was cut. It ends with the tables and with
notebook 05 executed on them.
"""

import time
from pathlib import Path

import pandas as pd

from spkit.comparison import graph, tables
from spkit.comparison.budget import Budget, budget_of
from spkit.comparison.plan import plan
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.notebook import differing, why_failed
from spkit.running.runs import NOTEBOOKS
from spkit.system.files import make_folder, save_csv
from spkit.system.lock import locked
from spkit.system.machine import git_state, hardware, versions

NOTEBOOK = "05_comparison.ipynb"
REFERENCE_STEP = 0.25  # seconds of a training step of the sandbox backbone where plan.py was timed


def folder_of(config: Config, budget: str) -> Path:
    """outputs/experiment/<budget>; with another run_name than the sandbox's, below that."""
    named = () if config.run_name == "sandbox" else (config.run_name,)
    return Path(config.outputs).joinpath("experiment", *named, budget)


def run(config: Config, budget_name: str, jobs: int) -> Path:
    """All units, then the tables; returns the folder of the tables."""
    budget = budget_of(budget_name)
    root = folder_of(config, budget_name)
    with locked(root):
        return _run(config, budget_name, budget, jobs, make_folder(root))


def _run(config: Config, budget_name: str, budget: Budget, jobs: int, root: Path) -> Path:
    units = plan(config, budget)
    places = graph.places(units, root / "units")
    seconds = graph.remaining_seconds(units, places, jobs) * pace(config)
    missing = sum(not places[unit.name].is_dir() for unit in units)
    print(
        f"Budget {budget_name}: {len(units)} units, {missing} to do, "
        f"about {seconds / 60:.0f} minutes on {jobs} process{'es' * (jobs > 1)}; results in {root}",
        flush=True,
    )
    started = time.time()
    places = graph.run(units, root / "units", jobs=jobs, label=f"experiment, {budget_name}")
    print(
        f"Units done after {(time.time() - started) / 60:.1f} minutes; now the tables", flush=True
    )
    made = root / "tables"
    tables.write(places, made, draws=budget.draws, confidence=config.evaluation.confidence)
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
    facts = {
        "budget": budget_name,
        "command": f"make experiment BUDGET={budget_name}",
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
