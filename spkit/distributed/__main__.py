"""One of several processes: `accelerate launch --config_file FILE -m spkit.distributed ...`.

    derive PARAMS FOLDER    se.safetensors, osm.safetensors and loss_curves.csv
    score PARAMS FOLDER     from the two patches in FOLDER what importance.save asks for

PARAMS: a params file, or the .json that a notebook wrote. --backbone: the checkpoint's folder,
where PARAMS names the sandbox's. --told: a notebook started it: news are lines of JSON, and the
process ends where its standard input does.
"""

import argparse
import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from spkit.config import Config, load_params
from spkit.errors import SpkitError, first_line
from spkit.system.collector import paused

FAILED = "failed.json"  # of the first process that failed


def main() -> int:
    """Returns 1 after a failure; its sentence is on stderr, and in failed.json for a notebook."""
    asked = _arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        if asked.told:
            threading.Thread(target=_end_with_input, daemon=True).start()
            _tell_warnings()
        _run(asked)
    except SpkitError as error:
        return _failed(asked, str(error))
    except Exception as error:
        traceback.print_exc()
        return _failed(asked, f"{type(error).__name__}: {first_line(error)}")
    return 0


def _run(asked) -> None:
    config = _config(asked.params)
    with paused():
        from spkit.distributed import work  # torch, only now
        from spkit.system import processes, progress

        _without_loading_bars()
    job = work.Work.begin(config, asked.backbone or _source(config), asked.folder)
    if asked.told and processes.here().first:
        progress.shown_by(_bar())
    elif not processes.here().first:
        progress.shown_by(_no_bar())
    if asked.what == "derive":
        saved = (lambda: tell({"saved": True})) if asked.told else (lambda: None)
        work.derive_patches(job, asked.checkpoints, saved)
    elif asked.told:
        work.score_for_reader(job, lambda number: tell({"window": number}))
    else:
        work.score(job)


def _arguments():
    parser = argparse.ArgumentParser(prog="spkit.distributed", description=__doc__)
    parser.add_argument("what", choices=("derive", "score"))
    parser.add_argument("params", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", help="the checkpoint's folder or hub id")
    parser.add_argument("--checkpoints", type=Path, help="folder to resume from and to write to")
    parser.add_argument("--told", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(params: Path) -> Config:
    if params.suffix == ".json":
        return Config.from_sources(json.loads(params.read_text(encoding="utf-8")))
    return load_params(params)


def _source(config: Config) -> str:
    from spkit.models.gguf import checkpoint_of

    if config.backbone.source == "sandbox":
        raise SpkitError("--backbone must be the folder that notebook 00 wrote the sandbox's to")
    return str(checkpoint_of(config.backbone))


# ---- what the others hear ------------------------------------------------------------------------


def tell(news: Mapping) -> None:
    """A line that the notebook reads (launch.py)."""
    print(json.dumps({"spkit": news}), flush=True)


def _bar():
    from tqdm.std import tqdm

    class Told(tqdm):
        """A bar that is shown by the notebook."""

        def display(self, msg=None, pos=None, *, ended=False):
            state = ("desc", "n", "total", "initial", "unit", "postfix")
            tell({"bar": {name: getattr(self, name) for name in state} | {"ended": ended}})

        def close(self):
            self.display(ended=True)
            super().close()

    return lambda **how: Told(**how, file=sys.stderr)


def _no_bar():
    from tqdm.std import tqdm

    return lambda **how: tqdm(**how, disable=True)


def _tell_warnings() -> None:
    """The package's own, of the first process."""
    usual = warnings.showwarning

    def show(message, category, filename, *rest, **more):
        if category is UserWarning and "spkit" in Path(filename).parts:
            if os.environ.get("RANK", "0") == "0":
                tell({"warning": str(message)})
        else:
            usual(message, category, filename, *rest, **more)

    warnings.showwarning = show


def _failed(asked, sentence: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if asked.told:
        with suppress(FileExistsError), (asked.folder / FAILED).open("x", encoding="utf-8") as file:
            file.write(json.dumps({"rank": rank, "sentence": sentence}))  # of the first one alone
    print(f"process {rank}: {sentence}", file=sys.stderr, flush=True)
    return 1


def _end_with_input() -> None:
    """The notebook holds the other end of it: when that is gone, nobody waits for the results."""
    while os.read(0, 1):  # not sys.stdin, which could not be closed while it is read
        pass
    os._exit(1)


def _without_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    if main():
        sys.stderr.flush()
        os._exit(1)  # at once: the exit handlers would wait for the other processes
