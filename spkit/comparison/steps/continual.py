"""One method of the continual study, in one order of the stages."""

import json
import shutil
from pathlib import Path

import pandas as pd

from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.continual import run_methods
from spkit.comparison.steps.shared import Places, Site, chosen
from spkit.comparison.variants import BASE
from spkit.config import Config
from spkit.evaluation.judges import judged
from spkit.method.safepatching import NAME as SAFEPATCHING

KEPT = ["stage", "id", "group", "category", "phrasing", "verdict"]


def continual(folder: Path, places: Places, site: Site, tuned: str, order: int) -> None:
    """continual.csv: verdicts after every stage; stages.json: the stages in their order.

    The method is the one of site.config.continual.methods, with the setting that was chosen for a
    single stage; none is tuned for three.
    """
    (method,) = site.config.continual.methods
    config = with_setting(site.config, method, chosen(places[tuned]))
    arena, work = site.arena(places), folder / "work"
    source = places[site.backbone] / "model"
    answers = run_methods(source, config, work, arena.prompts, identity="experiment")
    answers = judged(answers, arena.prompts, config)
    shutil.rmtree(work)  # it holds whole models
    base_answers = arena.answers({}, BASE).assign(stage=0)
    whole = pd.concat([base_answers, answers], ignore_index=True)[KEPT]
    whole = whole.assign(method=method, order=order, backbone=config.seed)
    whole.to_csv(folder / "continual.csv", index=False, lineterminator="\n")
    stages = json.dumps(config.continual.stages)
    (folder / "stages.json").write_text(stages + "\n", encoding="utf-8")


def with_setting(config: Config, method: str, setting: dict[str, float]) -> Config:
    """The config with the setting put where the continual study looks for it."""
    if CONTINUAL_METHODS[method][1] == SAFEPATCHING:
        over = {**setting, "scale": "norm_matched", "balance": None}
        return config.model_copy(update={"patching": config.patching.model_copy(update=over)})
    stages = config.continual.model_copy(update={"settings": {method: setting}})
    return config.model_copy(update={"continual": stages})
