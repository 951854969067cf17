"""The tables of a study: rates by source, differences from the base, and skills, with intervals.

    answers.csv       a row for every variant, backbone, derivation and prompt: its verdict, no text
    rates.csv         variant x source: failure rate in percent with its interval
    differences.csv   the same minus the base's, on the same backbones and prompts
    skills.csv        variant x measure: mean over units, difference from the base with an interval
    about.csv         seeds, derivations, command, machine, commit, versions

Intervals of rates: the hierarchical bootstrap of comparison/bootstrap.py, over backbones,
derivations and prompts. Those of skills: Student's t over the backbones' means.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from spkit.comparison import bootstrap
from spkit.config import Config
from spkit.evaluation.verdicts import METRICS
from spkit.study.unit import Unit
from spkit.study.variants import BASE
from spkit.system.files import make_folder, save_csv
from spkit.system.machine import git_state, hardware

DRAWS = 10_000
SHOWN = {"harmful": "harmful", "over_safety": "refusal"}  # objective -> metric
KEYS = ["variant", "backbone", "derivation"]


def write(units: Sequence[Unit], config: Config, folder: Path, given: Mapping[str, Any]) -> Path:
    """Write all tables of these units; the folder. given: overrides, told in about.csv."""
    folder, confidence = make_folder(folder), config.evaluation.confidence
    answers, skills = gathered(units, "responses.csv"), gathered(units, "utility.csv")
    columns = [*KEYS, "id", "objective", "group", "category", "verdict"]
    save_csv(folder / "answers.csv", answers[columns])
    parts = [_of_source(part, confidence) for part in _sources(answers)]
    save_csv(folder / "rates.csv", pd.concat([rates for rates, _ in parts], ignore_index=True))
    save_csv(folder / "differences.csv", pd.concat([d for _, d in parts], ignore_index=True))
    save_csv(folder / "skills.csv", skill_table(skills, confidence))
    save_csv(folder / "about.csv", about(units, config, given))
    return folder


def about(units: Sequence[Unit], config: Config, given: Mapping[str, Any]) -> pd.DataFrame:
    """what, value: all that a reader needs to repeat the study; of a file its name alone."""
    seeds = list(dict.fromkeys(unit.config.seed for unit in units))
    derivations = len({unit.derivation for unit in units} - {None})
    numbers, state = " ".join(map(str, seeds)), git_state() or {}
    params = f"params/{config.run_name}.yaml"
    options = "".join(f' -o "{key}={_told(key, value)}"' for key, value in given.items())
    found = {
        "backbones": len(seeds),
        "seeds": numbers,
        "derivations": derivations,
        "command": f"spkit study {params} {numbers} --derivations {derivations}{options}",
        "machine": machine(),
        "commit": str(state.get("commit", "unknown"))[:12],
    }
    return pd.DataFrame({"what": found.keys(), "value": found.values()})


def _told(key: str, value: Any) -> str:
    if key.endswith(".path"):
        return Path(str(value)).name
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def machine() -> str:
    """The processor and its cores, and the GPU where there is one, in a few words."""
    told = hardware()
    cores = f"{told['cores']} cores"
    return ", ".join([cores, *(str(told[key]) for key in ("cpu", "gpu") if told.get(key))])


def gathered(units: Sequence[Unit], name: str) -> pd.DataFrame:
    """One file of all units, with the columns variant, backbone, derivation."""
    frames = []
    for unit in units:
        frame = pd.read_csv(unit.folder / name, keep_default_na=False, na_values=[""])
        frame = frame.rename(columns={"model": "variant"})
        frames.append(frame.assign(backbone=unit.config.seed, derivation=unit.derivation or 0))
    return pd.concat(frames, ignore_index=True)


def _sources(answers: pd.DataFrame):
    """The answers of each source and metric that a study shows."""
    for objective, metric in SHOWN.items():
        part = answers[answers["objective"] == objective]
        for source, own in part.groupby("group", sort=False):
            for name in (metric, f"{metric}, strict"):
                yield source, name, own


def _of_source(part, confidence: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rates, differences from the base) of one source and metric."""
    source, metric, answers = part
    frame = answers.assign(mask=0)[bootstrap.COLUMNS]
    outcomes = bootstrap.Outcomes.from_frame(frame, METRICS[metric][1])
    drawn = bootstrap.resample(*outcomes.values.shape[1:], draws=DRAWS)
    rates = bootstrap.summary(outcomes, drawn, confidence)
    differences = bootstrap.paired(outcomes, drawn, BASE, confidence)
    for place, (key, value) in enumerate({"source": source, "metric": metric}.items()):
        rates.insert(place, key, value)
        differences.insert(place, key, value)
    return rates, differences


def skill_table(skills: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """variant, task, metric, n, mean, difference, low, high: units averaged within a backbone.

    Of lm-eval's metrics the accuracy alone. The interval is that of the difference from the base.
    """
    kept = skills["kind"].ne("lm-eval") | skills["metric"].str.startswith("acc,")
    frame = skills[kept]
    means = frame.groupby(["task", "metric", "variant", "backbone"], sort=False)["value"].mean()
    rows = []
    for (task, metric), part in means.groupby(["task", "metric"], sort=False):
        wide = part.droplevel(["task", "metric"]).unstack("variant")
        for variant in frame["variant"].unique():
            gap = (wide[variant] - wide[BASE]).to_numpy()
            low, high = _t_interval(gap, confidence)
            about = {"variant": variant, "task": task, "metric": metric, "backbones": len(gap)}
            mean = {"mean": wide[variant].mean(), "difference": gap.mean()}
            rows.append({**about, **mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def _t_interval(values, confidence: float) -> tuple[float, float]:
    error = stats.sem(values)
    if not error > 0:  # all equal, as the base is to itself
        return float(values.mean()), float(values.mean())
    low, high = stats.t.interval(confidence, len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)
