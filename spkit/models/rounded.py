"""A model that answers in bf16, of a checkpoint in fp32: the delta is added before the rounding.

    round(theta + delta)            what a loader makes of the patched checkpoint
    round(round(theta) + delta)     what adding to the loaded model would make: a delta of less
                                    than half the spacing at theta is lost

So the model gets the difference round(theta + delta) - round(theta), which a sum in fp32 turns into
exactly the first of the two.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from spkit.models.deltas import LowRankDelta, SparseDelta, add_delta
from spkit.models.stored_names import places_in


def before_rounding(deltas: Mapping, checkpoint: str | Path, model: nn.Module) -> Mapping:
    """The deltas as `model` is to get them, which was loaded from `checkpoint`.

    deltas: {checkpoint tensor name: dense, sparse or low-rank}. Unchanged where the weights of the
    checkpoint are in the model's own dtype, for a model in 4 bits, and for a hub id.
    """
    if not deltas or not Path(checkpoint).is_dir() or model.dtype == torch.float32:
        return deltas
    if getattr(model, "is_quantized", False):
        return deltas
    return _Rounded(deltas, places_in(checkpoint, deltas), model.dtype)


class _Rounded(Mapping):
    """Each delta is made from its weight when it is asked for, and not kept."""

    def __init__(self, deltas: Mapping, places: Mapping[str, tuple[Path, str]], dtype: torch.dtype):
        self._deltas, self._places, self._dtype = deltas, places, dtype

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(stored)
        delta = self._deltas[name]
        dense = delta.dense() if isinstance(delta, SparseDelta | LowRankDelta) else delta
        moved = add_delta(weight.float(), dense.cpu()).to(self._dtype)
        return moved.float() - weight.to(self._dtype).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)
