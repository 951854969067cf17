"""The results of a sweep's points in one table, its means over seeds, and figures.

    results.csv     a row for each point, model and metric: counts, rate, its interval over prompts
    table.csv       a row for each params file, values, model and headline figure: mean over seeds
    figures/        as figures.py draws the table

Rows are in the points' order, and numbers are the notebooks' own. So the same points give the same
bytes, on whatever machines and in whatever order they were run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from spkit.errors import SpkitError
from spkit.evaluation.rates import cell_rows, headline_cells
from spkit.running.runs import STAGES
from spkit.running.seeds import CONFIDENCE, NOTEBOOKS
from spkit.sweeps.points import Point, Sweep
from spkit.sweeps.units import Graph
from spkit.sweeps.work import stage_of
from spkit.system.files import save_csv

OF_A_RUN = ["run", "seed"]  # columns of a stage's results that a point has of its own
DECIMALS = 3  # of percentages: less than what another processor's last bit can change


def write(sweep: Sweep, graph: Graph, places: Mapping[str, Path], complete: Sequence[int]) -> str:
    """Write the tables and figures of these points; returns the short table.

    complete: which of sweep.points, from 0.
    """
    from spkit.sweeps import figures, shown

    results = collect(sweep, graph, places, complete)
    table = summarise(results, sweep.keys)
    save_csv(sweep.root / "results.csv", results)
    save_csv(sweep.root / "table.csv", table)
    figures.write(sweep.root / "figures", table, sweep.keys)
    return f"\n{shown.short(table, sweep.keys)}\n\nAll rows: {sweep.root}/table.csv, results.csv"


def collect(
    sweep: Sweep, graph: Graph, places: Mapping[str, Path], complete: Sequence[int]
) -> pd.DataFrame:
    """Tidy: point, part, params, the varied keys, seed, notebook, and a stage's own columns."""
    frames = []
    for index in complete:
        point, chain = sweep.points[index], graph.chains[index]
        about = {"point": point.number, "part": point.part, "params": point.params}
        about |= {**{key: _value(point, key) for key in sweep.keys}, "seed": point.seed}
        for stage in (stage for stage in chain if STAGES[stage].results):
            path = stage_of(places[chain[stage]], stage, point.seed) / "results.csv"
            try:
                frame = pd.read_csv(path, keep_default_na=False, dtype=str)
                frame = frame.drop(columns=OF_A_RUN)
            except (OSError, ValueError, KeyError) as error:
                unit = places[chain[stage]]
                raise SpkitError(f"{path}: cannot be read ({error}); delete {unit}") from None
            for place, (name, value) in enumerate({**about, "notebook": stage}.items()):
                frame.insert(place, name, value)
            frames.append(frame)
    found = pd.concat(frames, ignore_index=True).fillna("")
    return found if found["part"].any() else found.drop(columns="part")


def summarise(results: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The figures of the short table in percent, over the seeds of the same values.

    Columns: part, params, the varied keys, model, metric, seeds (how many), mean, low, high,
    interval. With one seed it is the Wilson interval of that seed, over prompts.
    """
    own = results[results["notebook"].isin(NOTEBOOKS)].astype({"n": int, "k": int})
    by = [name for name in ("part", "params", *keys) if name in own]
    rows = []
    for values, part in own.groupby(by, sort=False, dropna=False):
        cells = headline_cells(part)
        for model, of_model in part.groupby("model", sort=False):
            for metric, cell in cells.items():
                counted = cell_rows(of_model, cell).groupby("seed", sort=False)[["k", "n"]].sum()
                if len(counted):
                    about = {**dict(zip(by, values, strict=True)), "model": model, "metric": metric}
                    rows.append({**about, **_interval(counted)})
    table = pd.DataFrame(rows)
    return table.round(dict.fromkeys(("mean", "low", "high"), DECIMALS))  # and no varied value


def _interval(counted: pd.DataFrame) -> dict[str, Any]:
    """counted: k and n of each seed."""
    if len(counted) > 1:
        stats = DescrStatsW((100 * counted["k"] / counted["n"]).to_numpy())
        mean, kind = stats.mean, "Student's t over seeds"
        low, high = stats.tconfint_mean(alpha=1 - CONFIDENCE)
    else:
        k, n = (int(counted[name].iloc[0]) for name in ("k", "n"))
        mean, kind = 100 * k / n, "Wilson over prompts"
        ends = proportion_confint(k, n, alpha=1 - CONFIDENCE, method="wilson")
        low, high = (100 * end for end in ends)
    return {"seeds": len(counted), "mean": mean, "low": low, "high": high, "interval": kind}


def _value(point: Point, key: str) -> Any:
    """What a point has of a key, also where it is its params file's; lists as JSON.

    A text is as it was written: a path of this machine does not enter the table.
    """
    if isinstance(point.values.get(key), str):
        return point.values[key]
    value: Any = point.config.model_dump(mode="json")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return json.dumps(value) if isinstance(value, list | dict) else "" if value is None else value
