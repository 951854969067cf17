"""Where a model's weights are: on one device, or dispatched over several GPUs by accelerate.

Inputs go to the device of the embeddings; a dispatched model moves them on by itself, layer by
layer. Weights that accelerate has offloaded to the host or the disk are not in memory between two
passes: such a model can answer, but it can neither be scored nor patched.
"""

import gc
from collections.abc import Iterable

import torch
from torch import nn

from spkit.errors import SpkitError

ALL_GPUS = "balanced"  # accelerate's name for layers in equal parts on every GPU


def is_gpu(device: str) -> bool:
    """Whether a resolved device is one with memory of its own: "cuda", "cuda:1", "balanced"."""
    return device == ALL_GPUS or torch.device(device).type == "cuda"


def one_device(device: str) -> str:
    """The resolved device for a model that stays whole: the first GPU instead of all of them."""
    return "cuda" if device == ALL_GPUS else device


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device that holds a weight of the model, each once; "meta" is none."""
    found = dict.fromkeys(parameter.device for parameter in model.parameters())
    return [device for device in found if device.type != "meta"]


def check_in_memory(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SpkitError for the first (name, tensor) that is offloaded, or was never loaded."""
    for name, weight in weights:
        if weight.device.type == "meta":
            raise SpkitError(
                f"The weight {name!r} is not in memory but offloaded to the host or the disk, "
                "where it can be neither scored nor patched: take a smaller backbone, NF4, or "
                "backbone.device: cpu."
            )


def release(model: nn.Module) -> None:
    """Give back the memory of a model that is needed no more, whoever still refers to it.

    It is empty afterwards, and cannot compute.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
