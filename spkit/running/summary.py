"""All results of one run in one table: results.csv of its stages, one below the other.

`python -m spkit.running.summary params/x.yaml` writes it, for the Snakefile, and prints the short
table that `spkit run` ends with. Numbers are only copied here, never computed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spkit.config import Config, PatchingConfig, load_params
from spkit.errors import SpkitError
from spkit.evaluation.labels import labelled
from spkit.evaluation.rates import COLUMNS, headline
from spkit.running.runs import STAGES, read_record, run_folder, stage_folder
from spkit.system.files import save_csv

HEADS = {  # of columns of evaluation.rates.headline, in two lines; a source's name is the second
    "harmful seen %": ("harmful", "seen"),
    "harmful unseen %": ("harmful", "unseen"),
    "broken on harmful %": ("broken,", "harmful"),
    "false refusal %": ("false", "refusal"),
    "broken on harmless %": ("broken,", "harmless"),
    "utility %": ("utility", ""),
}
NARROWEST = 8  # characters of a column


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


def short_table(frame: pd.DataFrame, patching: PatchingConfig | None = None) -> str:
    """The headline figures in percent, under a line for each notebook; 80 columns wide.

    A column that `evaluation` does not know (the stage of a continual run) begins a part of its
    own. patching: the run's, by which its method is called as everywhere else.
    """
    parts = [name for name in frame if name not in COLUMNS]
    frame = frame.astype({"n": int, "k": int})
    rows: list[list[str]] = []
    titles = list(headline(frame))
    for values, part in frame.groupby(parts, sort=False):
        notebook, *more = (f"{k} {v}" for k, v in zip(parts, values, strict=True) if v != "")
        title = notebook.removeprefix("notebook ").replace("_", " ").replace("psa", "PSA")
        rows.append([", ".join([title, *more])])
        figures = headline(part) if patching is None else labelled(headline(part), patching)
        for model, cells in figures.reindex(columns=titles).iterrows():
            shown = ("" if pd.isna(cell) else f"{cell:.1f}" for cell in cells)
            rows.append([f"  {model}", *shown])
    return _lined_up(rows, [_head(title) for title in titles])


def _head(title: str) -> tuple[str, str]:
    """The two lines over a column."""
    upper, _, name = title.removesuffix(" %").partition(", ")
    return HEADS.get(title, (f"{upper.removeprefix('false ')},", name))


def _lined_up(rows: list[list[str]], heads: list[tuple[str, str]]) -> str:
    """The rows under the two lines of the heads; a row of one cell is the title of a part."""
    first = max(len(row[0]) for row in rows if len(row) > 1)
    widths = [max(NARROWEST, *(len(line) + 1 for line in head)) for head in heads]

    def line(name: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return (name.ljust(first) + "".join(padded)).rstrip()

    lines = [line("percent", [head[0] for head in heads]), line("", [head[1] for head in heads])]
    for name, *cells in rows:
        lines += [line(name, cells)] if cells else ["", name]
    return "\n".join(lines)


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
    print(f"{short_table(frame, config.patching)}\n\nAll rows, with intervals: {path}")


if __name__ == "__main__":
    try:
        main()
    except SpkitError as error:
        sys.exit(str(error))
