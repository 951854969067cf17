"""The trials: Optuna's multivariate TPE with three objectives, harm, false refusal and KL.

Every finished trial is appended to a file before the next one begins, and the sampler of trial n is
seeded with the run's seed and n. So an interrupted search resumes with the trials that an uncut one
would have made. (Optuna's own journal would keep half a trial after a kill, and count it.)
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from tqdm.auto import tqdm

from spkit.system import store
from spkit.tuning.settings import Space

OBJECTIVES = ("harm", "refusal", "kl")  # all are minimised
RANDOM_TRIALS = 20  # before TPE has something to learn from
COLUMNS = ("trial", "setting", *OBJECTIVES)


def search(
    space: Space,
    measure: Callable[[dict], Mapping[str, float]],
    file: Path,
    made_from: Mapping,
    *,
    trials: int,
    seed: int,
    first: Mapping | None = None,
    told: Callable[[int], object] = lambda left: None,
) -> pd.DataFrame:
    """All trials: trial, setting (JSON), harm and refusal in percent, kl in nats.

    measure(setting) gives the three objectives. file: where the trials are kept; those of another
    `made_from` are begun anew. first: the setting of trial 0, as it is, also out of the ranges.
    told(left): called after the first trial of this call, with how many are left.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * len(OBJECTIVES))
    done = store.stored(file, made_from)
    store.begin(file, made_from, done)
    for row in done:
        _add(study, space, row)
    start = len(done)
    with tqdm(total=max(trials, start), initial=start, desc="trials", unit="trial") as bar:
        for number in range(start, trials):
            by_hand = first if number == 0 else None
            if by_hand is not None:
                study.enqueue_trial(space.drawn(by_hand))
            trial = _ask(study, space, seed, number)
            setting = dict(by_hand or space.setting(trial.params))
            values = measure(setting)
            study.tell(trial, [values[key] for key in OBJECTIVES])
            row = {"trial": number, "drawn": trial.params, "setting": setting}
            row |= {key: float(values[key]) for key in OBJECTIVES}
            store.append(file, [row])
            done.append(row)
            bar.update()
            if number == start:
                told(trials - number - 1)
    rows = [{**row, "setting": json.dumps(row["setting"])} for row in done[:trials]]
    return pd.DataFrame(rows, columns=COLUMNS)


def _ask(study: optuna.Study, space: Space, seed: int, number: int) -> optuna.Trial:
    """What TPE proposes for this trial, from the trials before it and nothing else."""
    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=own, n_startup_trials=RANDOM_TRIALS, multivariate=True
        )
    return study.ask(space.distributions)


def _add(study: optuna.Study, space: Space, row: Mapping) -> None:
    study.add_trial(
        optuna.trial.create_trial(
            params=row["drawn"],
            distributions=space.distributions,
            values=[row[key] for key in OBJECTIVES],
        )
    )
