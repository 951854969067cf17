"""`spkit patch`: tune, patch, evaluate on test, and one page that says what came of it.

    <outputs>/<run_name>-tuned/seed-<seed>/03_controllable_patching/patch.safetensors
    <outputs>/<run_name>-tuned/seed-<seed>/03_controllable_patching/model/
    <outputs>/<run_name>-tuned/seed-<seed>/report.md

Nothing is done twice: the search resumes, and so do the notebooks 00 to 03 with what it has chosen.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spkit.comparison.report import to_markdown
from spkit.config import Config, load_params
from spkit.evaluation.labels import labelled
from spkit.evaluation.rates import headline
from spkit.evaluation.sentences import sentence
from spkit.evaluation.utility import short_table
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.running import walkthrough
from spkit.running.runs import run_folder, stage_folder
from spkit.system.files import atomic
from spkit.tuning.run import summary, tune

LAST = "03_controllable_patching"
TUNED = "-tuned"  # behind the run's name: the run that was there stays


def patch(params: str | Path, given: Mapping[str, Any], *, cores: int = 2) -> Path:
    """All of it; the report. given: overrides. SpkitError as in tuning and in the notebooks."""
    config = load_params(params, given)
    points = tune(params, given)
    chosen = run_folder(config) / "tuning" / "chosen.yaml"
    name = {"run_name": f"{config.run_name}{TUNED}"}
    made = walkthrough.run(chosen, name, cores=cores, last=LAST)
    path = run_folder(made) / "report.md"
    with atomic(path) as temporary:
        temporary.write_text(report(made, points), encoding="utf-8")
    print(f"Report: {path}")
    return path


def report(config: Config, points: pd.DataFrame) -> str:
    """The page: what was chosen on dev, what it does on test, where the files are."""
    stages = [stage_folder(config, stage) for stage in ("00_backbone", LAST)]
    results = pd.concat([pd.read_csv(s / "results.csv", keep_default_na=False) for s in stages])
    skills = pd.concat([pd.read_csv(stage / "utility.csv") for stage in stages])
    shown = labelled(results, config.patching)
    ours = labelled(SAFEPATCHING, config.patching)
    setting = config.patching.model_dump(mode="json")
    parts = [
        f"# {config.backbone.public_name}, patched",
        f"seed {config.seed}, split {config.evaluation.split}, confidence "
        f"{config.evaluation.confidence}",
        "## Chosen on dev",
        f"```\n{summary(points)}\n```",
        to_markdown(pd.DataFrame({"patching": setting.keys(), "value": setting.values()})),
        "## On held-out prompts",
        to_markdown(headline(shown).round(1).reset_index(names="model")),
        f"* {sentence(shown, ours, 'base', config.evaluation.confidence)}",
        "## Skill",
        to_markdown(
            labelled(short_table(skills), config.patching).round(3).reset_index(names="model")
        ),
        "## Files",
        f"* the patch: `{stages[1] / 'patch.safetensors'}` and its card, `patch_card.md`",
        f"* the patched checkpoint: `{stages[1] / 'model'}`",
        "* do not publish the run folder: it holds the OSM patch and answers of unsafe models",
    ]
    return "\n\n".join(parts) + "\n"
