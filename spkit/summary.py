"""All results of one run in one table: results.csv of its stages, one below the other.

`python -m spkit.summary params/x.yaml` writes it again and prints a short table. Numbers are only
copied here, never computed. The short table shows `rate` in percent, a row a model, from the rows
that cover a whole group (category "all").
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.files import atomic
from spkit.runs import STAGES, read_record, run_folder, stage_folder


def collect(config: Config) -> pd.DataFrame:
    """The results of every complete stage, in the stages' order, with a first column `stage`."""
    frames = []
    for stage in STAGES:
        path = stage_folder(config, stage) / "results.csv"
        if STAGES[stage].results and read_record(config, stage) is not None:
            try:
                frame = pd.read_csv(path, keep_default_na=False, dtype=str)
            except (OSError, ValueError) as error:
                raise SpkitError(f"{path}: cannot be read ({error}); run {stage} again") from None
            frame.insert(0, "stage", stage)
            frames.append(frame)
    if not frames:
        raise SpkitError(f"{run_folder(config)} holds no results yet: run make walkthrough first")
    return pd.concat(frames, ignore_index=True).fillna("")


def write(config: Config) -> tuple[Path, pd.DataFrame]:
    """Write outputs/<run_name>/seed-<seed>/results.csv, its numbers as the stages wrote them."""
    frame, path = collect(config), run_folder(config) / "results.csv"
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    return path, frame


def short_table(frame: pd.DataFrame) -> str:
    """A row a model, a column a group and metric, rates in percent; for the terminal."""
    if "category" in frame and (frame["category"] == "all").any():
        frame = frame[frame["category"] == "all"]
    columns = [name for name in ("group", "metric") if name in frame]
    if not columns or not {"model", "rate"} <= set(frame):
        return tabulate(frame, headers="keys", showindex=False)
    rows = [name for name in ("stage", "step", "model") if name in frame]
    percent = frame.assign(rate=100 * pd.to_numeric(frame["rate"], errors="coerce"))
    wide = percent.pivot_table(index=rows, columns=columns, values="rate", sort=False)
    wide.columns = ["\n".join((c,) if isinstance(c, str) else c) for c in wide.columns]
    return tabulate(wide.reset_index(), headers="keys", showindex=False, floatfmt=".1f")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m spkit.summary", description=__doc__)
    parser.add_argument("params", help="the run's params file")
    parser.add_argument("--seed", type=int, help="instead of the file's")
    parser.add_argument("--run-name", help="instead of the file's")
    given = vars(parser.parse_args(arguments))
    params = given.pop("params")
    config = load_params(params, {key: value for key, value in given.items() if value is not None})
    path, frame = write(config)
    print(f"{short_table(frame)}\n\nRates in percent. All rows with intervals: {path}")


if __name__ == "__main__":
    try:
        main()
    except SpkitError as error:
        sys.exit(str(error))
