"""Where each of several processes keeps the backbone.

    whole       on its own GPU, or in its own memory on a CPU: the processes share the pairs only
    balanced    over an equal part of the GPUs: `backbone.device: balanced`
    sharded     an equal part of every decoder layer (FSDP): a layer is gathered while it computes

Sharded is the frozen backbone alone. The LoRA factors, some thousandths of it, are whole in each
process, as are their gradients and moments: the training loop is the same with and without FSDP.
Accelerate starts the processes; the sharding is torch's fully_shard (FSDP2).
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.models import loading
from spkit.models.devices import ALL_GPUS
from spkit.models.weights import decoder_layers
from spkit.system import processes
from spkit.system.machine import free_memory

QUANTISED = ("blocksize", "bnb_quantized", "compress_statistics", "quant_storage", "quant_type")


def load(config: Config, source: str, device: torch.device, *, sharded: bool):
    """(model, tokenizer) of one process; device: its own, as Accelerate gives it.

    Bits of the weights and of the NF4 codes are those of `models/loading.load` in one process.
    """
    quantization = config.derivation.quantization
    options = {**config.backbone.loading, "quantization": quantization}
    options["dtype"] = loading.resolve_dtype(options["dtype"], str(device))
    if sharded:
        return _sharded(source, options, device)
    if config.backbone.device == ALL_GPUS:
        return loading.load(source, **options, gpus=own_gpus())
    return loading.load(source, **{**options, "device": str(device)})


def own_gpus() -> list[int]:
    """The numbers of the GPUs that this process may use: an equal part of the machine's."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    each = gpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if each == 0:
        raise SpkitError(f"There are more processes than the {gpus} GPUs of this machine.")
    return list(range(here * each, (here + 1) * each))


def _sharded(source: str, options: dict, device: torch.device):
    """The backbone in parts. One process after the other reads it into the host's memory, or as
    many at once as fit there; the first one's is the measure."""
    group, options = processes.here(), {**options, "device": "cpu"}
    start, stop, size, found = 0, 1, 0, None
    while start < group.count:
        if start <= group.rank < stop:
            model, tokenizer = loading.load(source, **options)
            size, found = model.get_memory_footprint(), (shard(model, device), tokenizer)
        size = -group.smallest(-size)
        fit = group.smallest(int(free_memory("cpu") // (2 * size)))  # and as much for the reading
        start, stop = stop, stop + max(1, fit)
    return found


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model, each process with a part of every weight; its weights are frozen.

    bitsandbytes knows a 4-bit weight by attributes that a sharded tensor has not; they are put
    back. The codes are stored as floats, the only type that all versions of FSDP can share out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    quantised = {}
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            weight, dtype = module.weight, model.dtype
            weight.data = weight.data.flatten().view(dtype).unsqueeze(1)
            weight.quant_storage = module.quant_storage = dtype
            quantised[module] = {name: getattr(weight, name) for name in QUANTISED}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module, attributes in quantised.items():
        for name, value in attributes.items():
            setattr(module.weight, name, value)
    return model
