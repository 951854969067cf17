"""What each of several processes does: read the backbone, derive or score its share, and save.

All processes go through the same calls; the first one alone writes files. With one process the
results are those of notebooks 01 and 02.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch

from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.distributed import place
from spkit.errors import SpkitError
from spkit.method.derivation import NAMES, derive
from spkit.method.importance import Calibration, Scores, save_windows, score_windows
from spkit.method.patch import Factors
from spkit.method.training import Checkpoints, TrainingSet
from spkit.models.devices import ALL_GPUS
from spkit.models.loading import resolve_device
from spkit.system import processes
from spkit.system.determinism import make_deterministic
from spkit.system.files import save_csv
from spkit.system.tensors import save_tensors

CURVES = "loss_curves.csv"
WINDOW = "window-{}.safetensors"
WAITS = timedelta(hours=12)  # for another process; one that has died ends all at once


@dataclass(frozen=True)
class Work:
    """config: of the run. source: the backbone's folder or hub id. folder: of the results.

    sharded: whether the backbone is shared out (FSDP). device: of this process.
    """

    config: Config
    source: str
    folder: Path
    device: torch.device
    sharded: bool = False

    @classmethod
    def begin(cls, config: Config, source: str, folder: Path) -> "Work":
        """Join the processes that `accelerate launch` has started."""
        from accelerate import PartialState

        on_cpu = resolve_device(config.backbone.device) == "cpu"
        gpus = [] if on_cpu else place.own_gpus()  # an error here is clearer than NCCL's
        state = PartialState(cpu=on_cpu, timeout=WAITS)
        device = torch.device("cpu") if on_cpu else state.device
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        if config.backbone.device == ALL_GPUS and not sharded:
            device = torch.device("cuda", gpus[0])
            torch.cuda.set_device(device)
        group = processes.join(device)
        make_deterministic(config.seed, config.threads)
        return cls(config, source, folder, device, sharded and group.count > 1)

    def model(self):
        """(model, tokenizer), in the place that this process has for it."""
        return place.load(self.config, self.source, self.device, sharded=self.sharded)

    def pairs(self):
        """D_h."""
        return load_harmful_pairs(self.config.data, seed=self.config.seed)


def derive_patches(
    work: Work, checkpoints: Path | None = None, saved: Callable[[], object] = lambda: None
) -> None:
    """Write se.safetensors, osm.safetensors and their loss curves; all are there afterwards.

    checkpoints: a folder to resume from and to write to. saved: called after each checkpoint.
    """
    config = work.config
    model, tokenizer = work.model()
    data = TrainingSet.of(tokenizer, work.pairs(), config.data.max_tokens)
    curves = []
    for direction in NAMES:
        own = None if checkpoints is None else Checkpoints(checkpoints / direction, saved)
        patch, curve = derive(model, data, direction, config.derivation, config.seed, own)
        curves.append(curve)
        if processes.here().first:
            patch.save(work.folder / f"{patch.name}.safetensors")
    if processes.here().first:
        curves = [curve for curve in curves if len(curve)] or curves
        save_csv(work.folder / CURVES, pd.concat(curves, ignore_index=True))
    processes.here().meet()  # the others may read the patches next


def windows(work: Work) -> Iterator[Scores]:
    """As score_windows, of the patches in the folder; empty ones but in the first process."""
    config = work.config
    if work.sharded:
        raise SpkitError("Importance needs whole matrices: give a config file without FSDP.")
    model, tokenizer = work.model()
    patches = [Factors.load(work.folder / f"{name}.safetensors") for name in NAMES.values()]
    calibration = Calibration(work.pairs(), config.importance, config.seed, config.data.max_tokens)
    return score_windows(model, tokenizer, patches, calibration)


def score(work: Work) -> None:
    """Write what `importance.save` asks for into the folder of the patches."""
    config, found = work.config, windows(work)
    if processes.here().first:
        save_windows(found, config.importance.save, config.patching, work.folder)
    else:
        for _ in found:
            pass


def score_for_reader(work: Work, written: Callable[[int], None]) -> None:
    """Write window after window, each as soon as the one before the last has been taken away.

    Keys are "se|model.layers.0...", in the header in the model's order. written: called with the
    number of each window.
    """
    config = work.config
    for number, scores in enumerate(windows(work)):
        if processes.here().first:
            one = config.importance.scored_model == "backbone"  # whose scores are both patches'
            kept = list(scores)[:1] if one else list(scores)
            tensors = {f"{name}|{t}": s for name in kept for t, s in scores[name].items()}
            save_tensors(tensors, work.folder / WINDOW.format(number), list(tensors))
            written(number)
            wait_until_gone(work.folder / WINDOW.format(number - 1))


def wait_until_gone(file: Path) -> None:
    """Until another process has deleted it: no more than two windows are on the disk."""
    while file.exists():
        time.sleep(0.02)
