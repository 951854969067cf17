"""All results of one run in one table: results.csv of its stages, one below the other.

`python -m spkit.running.summary params/x.yaml` writes it again and prints a short table. Numbers are only
copied here, never computed.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.evaluation.rates import COLUMNS, headline
from spkit.running.runs import STAGES, read_record, run_folder, stage_folder
from spkit.system.files import save_csv


def collect(config: Config) -> pd.DataFrame:
    """The results of every complete stage, in the stages' order, with a first column `notebook`."""
    frames = []
    for stage in STAGES:
        path = stage_folder(config, stage) / "results.csv"
        if STAGES[stage].results and read_record(config, stage) is not None:
            try:
                frame = pd.read_csv(path, keep_default_na=False, dtype=str)
            except (OSError, ValueError) as error:
                raise SpkitError(f"{path}: cannot be read ({error}); run {stage} again") from None
            frame.insert(0, "notebook", stage)
            frames.append(frame)
    if not frames:
        raise SpkitError(f"{run_folder(config)} holds no results yet: run make walkthrough first")
    return pd.concat(frames, ignore_index=True).fillna("")


def write(config: Config) -> tuple[Path, pd.DataFrame]:
    """Write outputs/<run_name>/seed-<seed>/results.csv, its numbers as the stages wrote them."""
    frame, path = collect(config), run_folder(config) / "results.csv"
    return save_csv(path, frame), frame


def short_table(frame: pd.DataFrame) -> str:
    """The headline figures in percent, a row a notebook and model, for the terminal.

    A column that `evaluation` does not know (the step of a continual run) is one more row key.
    """
    keys = [name for name in frame if name not in COLUMNS]
    frame = frame.astype({"n": int, "k": int})
    parts = []
    for values, part in frame.groupby(keys, sort=False):
        table = headline(part).rename_axis("model").reset_index()
        for position, (key, value) in enumerate(zip(keys, values, strict=True)):
            table.insert(position, key, value)
        parts.append(table)
    table = pd.concat(parts, ignore_index=True)
    table = table.astype(object).where(table.notna(), None)  # tabulate would print "nan"
    table.columns = [name.replace(" ", "\n") for name in table.columns]
    return tabulate(table, headers="keys", showindex=False, floatfmt=".1f", missingval="")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m spkit.running.summary", description=__doc__)
    parser.add_argument("params", help="the run's params file")
    parser.add_argument("--seed", type=int, help="instead of the file's")
    parser.add_argument("--run-name", help="instead of the file's")
    given = vars(parser.parse_args(arguments))
    params = given.pop("params")
    config = load_params(params, {key: value for key, value in given.items() if value is not None})
    path, frame = write(config)
    print(f"{short_table(frame)}\n\nAll rows, with intervals: {path}")


if __name__ == "__main__":
    try:
        main()
    except SpkitError as error:
        sys.exit(str(error))
