"""Patch derivation: gradient ascent and descent on the same D_h, both as (Q)LoRA [paper, 3.1].

    P_SE  = theta_GA - theta    ascent on L over D_h: unlearn the harmful answers
    P_OSM = theta_GD - theta    descent on L over D_h: loosen the refusals

The backbone stays frozen (4-bit NF4, or full precision); only the LoRA factors move (training.py).
One's own PEFT adapter may take the place of either patch (models/adapters.py).
"""

from dataclasses import replace
from functools import partial

import pandas as pd
from torch import Tensor

from spkit.config import AscentConfig, DerivationConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors
from spkit.method.training import Checkpoints, Task, TrainingSet, train_lora
from spkit.models.adapters import completed, covered, linear_shapes, read_adapter
from spkit.models.chat import mean_per_sample
from spkit.models.devices import check_in_memory

NAMES = {"ascent": "se", "descent": "osm"}
COLUMNS = ["patch", "step", "loss", "grad_norm", "stop"]


def ascent_loss(losses: Tensor, mask: Tensor, clamp: float) -> Tensor:
    """The loss that ascent minimises: -L, each token's loss clamped at `clamp` nats.

    A token that is unlearnt already (loss > clamp) has no gradient. losses, mask: [B, T] as
    chat.answer_loss gives them.
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
    return sum(means[-settings.stop_window :]) / settings.stop_window >= settings.stop_mean_loss


def derive(
    model,
    data: TrainingSet,
    direction: str,
    config: DerivationConfig,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> tuple[Factors, pd.DataFrame]:
    """One patch and its loss curve; with `config.se` or `config.osm` that adapter, and no curve.

    model: a bare backbone, dense or NF4; it is wrapped while we train and given back bare.
    direction: "ascent" or "descent". seed: of A, dropout and the batches. checkpoints: to resume.
    The curve has COLUMNS; its loss in nats, unclamped, is a mean over the answer tokens. SpkitError
    for another direction, a loss that is not finite, and an adapter that is no LoRA of this model.
    """
    if direction not in NAMES:
        raise SpkitError(f"direction is {direction!r}; allowed are {', '.join(NAMES)}.")
    check_in_memory(model.named_parameters())
    shapes = covered(model, (config.se, config.osm), config.lora.targets)  # before hours of work
    name = NAMES[direction]
    if folder := getattr(config, name):
        factors, manifest = read_adapter(folder, linear_shapes(model))
        manifest |= {"pairs": len(data.encoded), "data_fingerprint": data.fingerprint}
        patch, curve = Factors(name, factors, 1.0, manifest), pd.DataFrame(columns=COLUMNS)
    else:
        settings, loss, stop = config.descent, descent_loss, None
        if direction == "ascent":
            settings = config.ascent
            loss = partial(ascent_loss, clamp=settings.token_loss_clamp)
            stop = partial(ceiling_reached, settings=settings)
        task = Task(name, direction, lambda losses, mask, _: loss(losses, mask), settings, stop)
        patch, curve = train_lora(model, data, task, config, seed, checkpoints)
    if shapes:
        patch = replace(patch, **completed(patch.factors, patch.manifest, shapes))
    return patch, curve
