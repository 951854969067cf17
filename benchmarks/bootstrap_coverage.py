"""How often the experiment's 95 % intervals cover the truth: simulated experiments without effect.

    .venv/bin/python benchmarks/bootstrap_coverage.py          about five minutes on one core

Two methods with the same true rate are "evaluated" on 5 backbones x 4 derivations x 2 masks x 200
prompts; what differs from run to run is drawn from normal distributions on the log-odds scale. An
interval of their paired difference should cover 0 in 95 % of the simulated experiments. Prints one
row for each place where the variance may lie.
"""

import argparse

import numpy as np
from tabulate import tabulate

from spkit.comparison.bootstrap import Outcomes, paired, resample

SHAPE = (5, 4, 2, 200)  # backbones, derivations, masks, prompts
CASES = {  # standard deviations between backbones, derivations and masks, in log-odds
    "between backbones": (1.0, 0.1, 0.1),
    "between backbones and derivations": (0.6, 0.6, 0.1),
    "between derivations": (0.0, 1.0, 0.1),
    "none between runs": (0.0, 0.0, 0.0),
}


def simulate(rng: np.random.Generator, spread: tuple[float, float, float]) -> Outcomes:
    """Two variants of one true rate, each with its own effects of runs; prompts share effects."""
    backbones, derivations, masks, items = SHAPE
    easy = rng.normal(0, 0.5, items)
    values = []
    for _ in range(2):
        logit = -1.0 + easy + rng.normal(0, spread[0], (backbones, 1, 1, 1))
        logit = logit + rng.normal(0, spread[1], (backbones, derivations, 1, 1))
        logit = logit + rng.normal(0, spread[2], (backbones, derivations, masks, 1))
        values.append(rng.random((*SHAPE[:3], items)) < 1 / (1 + np.exp(-logit)))
    names, seeds = ["one", "other"], list(range(backbones))
    runs = [backbones * derivations * masks] * 2
    prompts = [str(i) for i in range(items)]
    return Outcomes(np.array(values, dtype=np.float32), names, seeds, prompts, runs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=300)
    given = parser.parse_args()
    rows = []
    for name, spread in CASES.items():
        rng = np.random.default_rng(0)
        covered = 0
        for number in range(given.experiments):
            draws = resample(*SHAPE, draws=1000, seed=number)
            row = paired(simulate(rng, spread), draws, "one", 0.95).iloc[0]
            covered += row["low"] <= 0 <= row["high"]
        rows.append([name, given.experiments, f"{100 * covered / given.experiments:.1f} %"])
    print(tabulate(rows, headers=["variance", "experiments", "intervals that cover 0"]))


if __name__ == "__main__":
    main()
