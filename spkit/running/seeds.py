"""The same walkthrough over several seeds: means, intervals, and paired differences from base.

`spkit seeds params/x.yaml 0 1 2 3 4` runs what is missing and shows this. A seed gives its own
backbone, D_h, patches and retention masks, so the intervals (Student's t over the seeds) hold for
"another run like these", not only for another set of prompts.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from statsmodels.stats.weightstats import DescrStatsW
from tabulate import tabulate

from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.evaluation.labels import labelled
from spkit.evaluation.rates import headline
from spkit.running.runs import run_folder
from spkit.running.summary import collect
from spkit.system.files import save_csv

Given = Mapping[str, Any]
BASE = "base"
NOTEBOOKS = ("00_backbone", "03_controllable_patching")
CONFIDENCE = 0.95


def per_seed(
    params: str | Path, seeds: list[int], given: Given = MappingProxyType({})
) -> pd.DataFrame:
    """The headline figures in percent: one row per seed and model, in the models' order.

    given: overrides. SpkitError where a seed has no results yet.
    """
    tables = {}
    for seed in seeds:
        frame = collect(load_params(params, {**given, "seed": seed}))
        frame = frame[frame["notebook"].isin(NOTEBOOKS)].astype({"n": int, "k": int})
        tables[seed] = headline(frame)
        if list(tables[seed].index) != list(tables[seeds[0]].index):
            raise SpkitError(f"seed {seed} has other models than seed {seeds[0]}: run it again")
    return pd.concat(tables, names=["seed", "model"])


def over_seeds(figures: pd.DataFrame) -> pd.DataFrame:
    """Tidy: model, metric, kind ("rate" or "minus base"), n seeds, mean, low, high (percent).

    "minus base" is paired: each seed's model minus the same seed's base. Needs two seeds at least.
    """
    seeds = figures.index.unique("seed")
    if len(seeds) < 2:
        raise SpkitError(f"an interval over seeds needs two seeds at least; there is {len(seeds)}")
    base = figures.xs(BASE, level="model")
    rows = []
    for model in figures.index.unique("model"):
        own = figures.xs(model, level="model")
        for kind, values in (("rate", own), ("minus base", own - base)):
            for metric in figures:
                stats = DescrStatsW(values[metric].to_numpy())
                low, high = stats.tconfint_mean(alpha=1 - CONFIDENCE)
                row = {"model": model, "metric": metric, "kind": kind, "n": len(seeds)}
                rows.append({**row, "mean": stats.mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, kind: str) -> str:
    """A table for a README: a row a model, "mean ± half the interval" in every cell."""
    part = table[table["kind"] == kind]
    if kind == "minus base":
        part = part[part["model"] != BASE]
    half = (part["high"] - part["low"]) / 2
    sign = "+" if kind == "minus base" else ""
    cells = part.assign(
        cell=[f"{m:{sign}.1f} ± {h:.1f}" for m, h in zip(part["mean"], half, strict=True)]
    )
    wide = cells.pivot(index="model", columns="metric", values="cell")
    wide = wide.loc[part["model"].unique(), part["metric"].unique()]
    return tabulate(wide, headers="keys", tablefmt="github", disable_numparse=True)


def write(params: str | Path, seeds: list[int], given: Given = MappingProxyType({})):
    """Write seeds.csv (tidy) and per_seed.csv beside the seeds' folders.

    Returns the path of the first, its frame, and the patching section. given: overrides.
    """
    config = load_params(params, given)
    folder = run_folder(config).parent
    figures = per_seed(params, seeds, given)
    table = over_seeds(figures)
    save_csv(folder / "per_seed.csv", figures.reset_index())
    return save_csv(folder / "seeds.csv", table), table, config.patching


def report(params: str | Path, seeds: list[int], given: Given = MappingProxyType({})) -> str:
    """Both tables as markdown, written by `write`; SpkitError where a seed has no results yet."""
    path, table, patching = write(params, seeds, given)
    table = labelled(table, patching)
    listed, percent = ", ".join(map(str, seeds)), f"{100 * CONFIDENCE:g} %"
    return "\n".join(
        [
            f"Seeds {listed}: mean ± half of the {percent} interval, percent\n",
            markdown(table, "rate"),
            "\nPaired difference from base, percentage points\n",
            markdown(table, "minus base"),
            f"\nAll rows: {path}",
        ]
    )
