"""Notebooks 01 and 02 in several processes: the same patches, curves and scores.

    derive_in_processes(config, model, source, run)            `derive` in both directions
    score_in_processes(config, model, source, run, patches)    importance.score_windows

The processes read the backbone themselves, so the notebook gives its own back before they start.
Where the parameter `accelerate` is null nothing here is used.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from torch import nn

from spkit.config import Config
from spkit.distributed import launch
from spkit.distributed.work import CURVES, WINDOW
from spkit.method.derivation import NAMES
from spkit.method.importance import Scores
from spkit.method.patch import Factors
from spkit.models.devices import release
from spkit.system import accelerate_file
from spkit.system.tensors import load_tensors

FOLDER = "processes"  # in the stage's own: gone when they have ended well


def derive_in_processes(
    config: Config, model: nn.Module, source: str | Path, run
) -> tuple[dict[str, Factors], pd.DataFrame]:
    """({"se": P_SE, "osm": P_OSM}, loss curves) by the processes of `derivation.accelerate`.

    model: the notebook's own, which is given back first and is empty then. source: where the
    processes find it. run: the open stage (running/runs.py); they resume from its checkpoints.
    SpkitError where a process fails.
    """
    own = _begin(config, model, run)
    file = accelerate_file.read("derivation.accelerate", config.derivation.accelerate)
    told = ["derive", *_arguments(own, source), "--checkpoints", str(run.checkpoints())]
    for _ in launch.heard(launch.command(file, told), own, config.threads):
        run.push()  # a checkpoint was written
    patches = [Factors.load(own / f"{name}.safetensors") for name in NAMES.values()]
    exact = {"loss": float, "grad_norm": float}  # pandas' own reading may miss the last bit
    curves = pd.read_csv(own / CURVES, converters=exact, keep_default_na=False)
    shutil.rmtree(own)
    return {patch.name: patch for patch in patches}, curves


def score_in_processes(
    config: Config, model: nn.Module, source: str | Path, run, patches: Sequence[Factors]
) -> Iterator[Scores]:
    """As importance.score_windows, by the processes of `importance.accelerate`; bits are the same.

    model, source, run: as for `derive_in_processes`. At most two windows are on the disk at a time.
    """
    own = _begin(config, model, run)
    for patch in patches:
        patch.save(own / f"{patch.name}.safetensors")
    file = accelerate_file.read("importance.accelerate", config.importance.accelerate)
    told = ["score", *_arguments(own, source)]
    for news in launch.heard(launch.command(file, told), own, config.threads):
        yield _window(own / WINDOW.format(news["window"]), [patch.name for patch in patches])
    shutil.rmtree(own)


def _begin(config: Config, model: nn.Module, run) -> Path:
    """The folder of the processes, with the parameters in it; the model's memory is given back."""
    release(model)
    own = run.folder / FOLDER
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    (own / "params.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return own


def _arguments(own: Path, source: str | Path) -> list[str]:
    return [str(own / "params.json"), str(own), "--backbone", str(source), "--told"]


def _window(path: Path, names: Sequence[str]) -> Scores:
    """Scores in the model's order; the file is taken away, so that the next one is written."""
    tensors, order = load_tensors(path, "importances")
    path.unlink()
    scores: Scores = {}
    for key in order:
        patch, _, tensor = key.partition("|")
        scores.setdefault(patch, {})[tensor] = tensors[key]
    return {name: scores.get(name, next(iter(scores.values()))) for name in names}
