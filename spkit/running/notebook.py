"""The first line of every notebook: check its parameters, fix all seeds, open its run folder.

    from spkit.running.notebook import start
    config, run = start("01_patch_derivation", globals())

Works the same under papermill (from the repository's root), JupyterLab and nbclient (from
notebooks/). `why_failed` says in one sentence why an executed notebook ended early.
This file computes nothing.
"""

import json
import os
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.paths import repository_root
from spkit.running import checks
from spkit.running.aligned import after_alignment
from spkit.running.dotted import show_errors_as_sentences
from spkit.running.effects import left_out, remarks
from spkit.running.runs import STAGES, Run, run_folder
from spkit.system.collector import paused
from spkit.system.determinism import make_deterministic
from spkit.validation import Section, nearest, refuse_tokens

KEYS = [*Config.model_fields, "overrides"]
LITERALS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))
FIRST = next(iter(STAGES))  # it may be opened by hand, before anything was run
IPYTHON = {"In", "Out"}  # the shell's own history
# what all notebooks import, and with it torch, peft and seaborn: here while the collector is paused
HEAVY = ("spkit.figures", "spkit.method.importance", "spkit.evaluation.judges")


def start(stage: str, namespace: Mapping[str, Any]) -> tuple[Config, Run]:
    """Validate the parameters in a notebook's globals() and open its stage.

    The working folder becomes the repository's root, so that a relative path in the parameters
    means the same wherever the notebook was started. What differs from the params file of this name
    is shown. Raises SpkitError, shown as one sentence, also for what would end the run later on.
    """
    show_errors_as_sentences()
    # no news to a reader, and it would show paths of the machine in an executed notebook
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.chdir(repository_root())
    _check_names(namespace)
    values = {key: namespace[key] for key in Config.model_fields if key in namespace}
    config = Config.from_sources(values, namespace.get("overrides"))
    if said := remarks(config, namespace.get("overrides") or {}):
        print(said)
    for said in left_out(config, namespace):
        print(said)
    with paused():
        checks.require(config, stage)  # before any work, and before the folder is opened
        for module in HEAVY:
            import_module(module)
    make_deterministic(config.seed, config.threads)
    without_loading_bars()
    run = Run(config, stage)
    print(f"{stage}: seed {config.seed}, results in {run.folder}")
    return after_alignment(config, make=stage == FIRST), run


def opened(
    params: str, overrides: Mapping[str, Any] | None = None
) -> tuple[Config, Path, Path | str]:
    """(parameters, run folder, backbone) of finished notebooks, to read and not to write to.

    For solutions of exercises, which are no stage of their own. params: the file that the notebooks
    were run with. The backbone is a folder or hub id.
    """
    show_errors_as_sentences()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.chdir(repository_root())
    config = after_alignment(load_params(params, overrides), make=False)
    make_deterministic(config.seed, config.threads)
    without_loading_bars()
    folder, own = run_folder(config), config.backbone.source == "sandbox"
    source = folder / "00_backbone" / "model" if own else config.backbone.source
    return config, folder, source


def differing(config: Config) -> dict[str, Any]:
    """{name: value} of what is not as in params/sandbox.yaml, of sections the differing keys alone.

    This is what papermill puts into a notebook: what is not named there is at its default.
    """
    return _differing(config, Config(), config.model_dump(mode="json"))


def _differing(values: Section, usual: Section, plain: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name in type(values).model_fields:
        mine, default = getattr(values, name), getattr(usual, name)
        if isinstance(mine, Section) and isinstance(default, Section):  # an optional one is whole
            if inner := _differing(mine, default, plain[name]):
                found[name] = inner
        elif mine != default:
            found[name] = plain[name]
    return found


def _check_names(namespace: Mapping[str, Any]) -> None:
    """A mistyped section would else be a global that nobody reads, and its defaults would run."""
    unknown = [
        name
        for name, value in namespace.items()
        if isinstance(value, LITERALS)
        and not name.startswith("_")
        and name not in IPYTHON
        and name not in KEYS
    ]
    if isinstance(namespace.get("run"), Run):
        # the cell runs a second time: variables of later cells are there too, and only a section
        # whose name is nearly a known one can be told from them
        unknown = [
            name
            for name in unknown
            if isinstance(namespace[name], dict) and get_close_matches(name, KEYS, 1, cutoff=0.8)
        ]
    refuse_tokens({name: namespace[name] for name in unknown})
    if unknown:
        name = unknown[0]
        raise SpkitError(
            f"unknown parameter {name} (value {namespace[name]!r}){nearest(name, KEYS)}"
        )


def without_loading_bars() -> None:
    """Transformers shows a bar each time it loads weights: twenty of them in one notebook.

    Downloads keep theirs.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()


def why_failed(executed: str | Path) -> str:
    """One sentence on why an executed notebook ended early, from what papermill left of it."""
    path = Path(executed)
    again = "the stages before it are kept, and the same command resumes here"
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        messages = path.with_suffix(".txt")
        lines = messages.read_text(errors="replace").split("\n") if messages.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return f"{path.stem} did not run: {last} (see {messages})"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                return f"{path.stem} failed: {output['ename']}: {output['evalue']} (see {path})"
    done = sum(cell["execution_count"] is not None for cell in code)
    if done == len(code):  # nothing failed, but the result is not the one that was asked for
        return (
            f"{path.stem} ran to its end, but spkit, the notebook or an input file was changed "
            f"meanwhile: run the same command again"
        )
    return (
        f"{path.stem} was cut off after {done} of {len(code)} code cells: its kernel was killed "
        f"(often too little memory) or interrupted, or the disk is full; {again}"
    )
