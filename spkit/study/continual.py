"""Notebook 04's rates of one run as a short table: every method after every stage, the base first.

python -m spkit.study.continual outputs/smollm2-135m/seed-0 docs/smollm2/continual.csv
"""

import sys
from pathlib import Path

import pandas as pd

from spkit.errors import SpkitError
from spkit.study.tables import SHOWN
from spkit.study.variants import BASE
from spkit.system.files import save_csv

BACKBONE, CONTINUAL = "00_backbone", "04_continual_psa"


def rates(run_folder: str | Path) -> pd.DataFrame:
    """model, stage (0: base), source, metric, n, rate, low, high in percent.

    SpkitError where a notebook of the run is missing.
    """
    frames = []
    for stage in (BACKBONE, CONTINUAL):
        path = Path(run_folder) / stage / "results.csv"
        if not path.is_file():
            raise SpkitError(f"{path} is missing: run notebooks/{stage}.ipynb, or make real")
        frames.append(pd.read_csv(path, keep_default_na=False))
    frames[0] = frames[0][frames[0]["model"] == BASE].assign(stage=0)
    whole = pd.concat(frames, ignore_index=True)
    whole = whole[(whole["category"] == "all") & whole["metric"].isin(SHOWN.values())]
    whole[["rate", "low", "high"]] *= 100
    columns = ["model", "stage", "group", "metric", "n", "rate", "low", "high"]
    return whole[columns].rename(columns={"group": "source"}).astype({"stage": int})


if __name__ == "__main__":
    save_csv(sys.argv[2], rates(sys.argv[1]))
