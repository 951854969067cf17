"""The weight matrices of a model: find them by name, and read what a layer multiplies with.

Everything in this kit names a weight matrix by its tensor name in the checkpoint, for instance
"model.layers.0.self_attn.q_proj.weight", whether the model in memory is bare, in 4-bit NF4, or
wrapped by PEFT. This file is where the two worlds meet.
"""

from collections.abc import Sequence

import torch
from torch import nn

from spkit.errors import SpkitError
from spkit.models.nf4 import decoded


def guard_nf4(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place. No effect on other models.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a layer's packed weight at its first
    forward in eval mode; after that dequantising gives other numbers, and training loses the
    gradient with a mere warning. Nothing may run the model before this.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def target_weights(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """{checkpoint tensor name: linear layer} of every layer whose last name is in `targets`.

    In the model's own order. On a PEFT model the value is the LoRA wrapper where there is one
    (its forward is the layer's forward), and the name is still the bare checkpoint's.
    SpkitError for a target that names no linear layer, or whose weight is tied to another.
    """
    found = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf == "base_layer" or ".lora_" in path or not isinstance(_base(module), nn.Linear):
            continue  # the inside of a LoRA wrapper, or not a linear layer
        found[path.removeprefix("base_model.model.") + ".weight"] = (leaf, module)
    known = list(dict.fromkeys(leaf for leaf, _ in found.values()))
    for target in targets:
        if target not in known:
            raise SpkitError(
                f"The target {target!r} is no linear layer of this model; it has "
                f"{', '.join(known)}."
            )
    chosen = {name: module for name, (leaf, module) in found.items() if leaf in set(targets)}
    embeddings = model.get_input_embeddings().weight
    for name, module in chosen.items():
        if _base(module).weight is embeddings:
            raise SpkitError(
                f"The weight {name!r} is tied to the input embeddings and cannot be a target."
            )
    return chosen


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder layers, bare or wrapped; SpkitError where there is none."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise SpkitError(
        f"{type(model).__name__} has no list of {depth} decoder layers; set "
        "importance.layers_per_pass to null"
    )


def effective_weight(module: nn.Module) -> torch.Tensor:
    """The matrix that the layer multiplies with, fp32 [out, in], without gradient.

    Dense: the weight. NF4: dequant(W4). LoRA wrapper: that plus B @ A * lora_alpha / r for every
    active adapter [docs/method.md, section 3]. SpkitError for variants that are no sum (DoRA).
    """
    base = _base(module)
    if getattr(base.weight, "quant_state", None) is None:
        total = base.weight.detach().float().clone()
    else:
        total = decoded(base.weight).float()
    if module is base or module.disable_adapters or module.merged:
        return total
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in getattr(module, "lora_variant", {}):
            raise SpkitError(
                f"The adapter {adapter!r} is a LoRA variant (DoRA, ...), not a plain LoRA."
            )
        a = module.lora_A[adapter].weight.detach().float()
        b = module.lora_B[adapter].weight.detach().float()
        total += (b @ a) * module.scaling[adapter]
    return total


def _base(module: nn.Module) -> nn.Module:
    """The wrapped linear layer of a PEFT layer, else the module itself (no PEFT import needed)."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
