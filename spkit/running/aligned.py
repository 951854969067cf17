"""The alignment stage of a run: where it is, and the parameters that come of it.

<run folder>/align/    alignment/stage.py says what is in there
"""

import json
import subprocess
import sys
from pathlib import Path

from spkit.alignment import made
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.models.gguf import is_gguf
from spkit.running.runs import run_folder


def align_folder(config: Config) -> Path:
    """The folder of the stage in this run."""
    return run_folder(config) / "align"


def align(config: Config) -> None:
    """Run the stage in a process of its own, unless it is finished or not asked for.

    SpkitError where it fails: its own sentence is on the screen already.
    """
    folder = align_folder(config)
    if not made.needed(config) or made.finished(config, folder):
        return
    question = {"config": config.model_dump(mode="json"), "folder": str(folder)}
    command = [sys.executable, "-m", made.STAGE]
    done = subprocess.run(command, input=json.dumps(question), text=True, check=False)
    if done.returncode:
        raise SpkitError("the alignment failed (its reason is above); the same command resumes")


def after_alignment(config: Config, *, make: bool) -> Config:
    """The parameters of the notebooks: they name what the stage has made.

    make: run the stage here where it is not finished, as notebook 00 does. Otherwise SpkitError.
    """
    if not made.needed(config) and not is_gguf(config.backbone):
        return config
    folder = align_folder(config)
    if made.needed(config) and not made.finished(config, folder):
        if not make:
            raise SpkitError(f"{folder} is missing or outdated: run notebooks/00_backbone.ipynb")
        from spkit.alignment import stage

        stage.run(config, folder)
    return made.resolved(config, folder)
