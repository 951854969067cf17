"""Patch derivation: gradient ascent and descent on the same D_h, both as (Q)LoRA [paper, 3.1].

    P_SE  = theta_GA - theta    ascent on L over D_h: unlearn the harmful answers
    P_OSM = theta_GD - theta    descent on L over D_h: loosen the refusals

The backbone stays frozen (4-bit NF4, or full precision). Only the LoRA factors move, and the patch
of a weight matrix is B @ A * lora_alpha / r, applied later to the unquantised weight. The loop that
moves them is in training.py.
"""

from functools import partial

import pandas as pd
from torch import Tensor

from spkit.config import AscentConfig, DerivationConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors
from spkit.method.training import Checkpoints, Task, TrainingSet, train_lora
from spkit.models.chat import mean_per_sample

NAMES = {"ascent": "se", "descent": "osm"}


def ascent_loss(losses: Tensor, mask: Tensor, clamp: float) -> Tensor:
    """The loss that ascent minimises: -L, each token's loss clamped at `clamp` nats.

    A token that is unlearnt already (loss > clamp) has no gradient: it is left alone. losses, mask:
    [B, T] as chat.answer_loss gives them.
    """
    return -mean_per_sample(losses.clamp(max=clamp), mask).mean()


def descent_loss(losses: Tensor, mask: Tensor) -> Tensor:
    """The loss that descent minimises: L, the mean over samples of the mean over answer tokens."""
    return mean_per_sample(losses, mask).mean()


def ceiling_reached(means: list[float], settings: AscentConfig) -> bool:
    """Whether ascent stops: the mean loss of the last `stop_window` batches is at the ceiling.

    means: the unclamped mean loss of every batch so far, in nats; batches before the first count as
    0. One batch alone is too noisy to stop by.
    """
    recent = sum(means[-settings.stop_window :]) / settings.stop_window
    return recent >= settings.stop_mean_loss


def derive(
    model,
    data: TrainingSet,
    direction: str,
    config: DerivationConfig,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> tuple[Factors, pd.DataFrame]:
    """One patch and its loss curve.

    model: a bare backbone, dense or NF4; it is wrapped while we train and given back bare.
    direction: "ascent" or "descent". seed: of A, dropout and the batches. checkpoints: to resume.
    The curve's columns: patch, step, loss [nats, unclamped mean over the answer tokens], grad_norm,
    stop. SpkitError for another direction, an empty D_h, and a loss or gradient that is not finite.
    """
    if direction == "ascent":
        settings = config.ascent
        stop = partial(ceiling_reached, settings=settings)

        def objective(losses: Tensor, mask: Tensor, indices: list[int]) -> Tensor:
            return ascent_loss(losses, mask, settings.token_loss_clamp)

    elif direction == "descent":
        settings, stop = config.descent, None

        def objective(losses: Tensor, mask: Tensor, indices: list[int]) -> Tensor:
            return descent_loss(losses, mask)

    else:
        raise SpkitError(f"direction is {direction!r}; allowed are {', '.join(NAMES)}.")
    task = Task(NAMES[direction], direction, objective, settings, stop)
    return train_lora(model, data, task, config, seed, checkpoints)
