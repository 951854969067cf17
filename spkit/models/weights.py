"""The weight matrices of a model: find them by name, and read what a layer multiplies with.

Everything in this kit names a weight matrix by its tensor name in the checkpoint, for instance
"model.layers.0.self_attn.q_proj.weight", whether the model in memory is bare, in 4-bit NF4, or
wrapped by PEFT. This file is where the two worlds meet.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

from spkit.errors import SpkitError
from spkit.models.nf4 import decoded
from spkit.models.targets import ALL, AUTO, chosen

EXPERT = re.compile(r"\.experts\.\d+(\.|$)")  # a linear layer in one of them


def guard_nf4(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place. No effect on other models.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a layer's packed weight at its first
    forward in eval mode; after that dequantising gives other numbers, and training loses the
    gradient with a mere warning. Nothing may run the model before this.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def target_weights(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """{checkpoint tensor name: linear layer} of every layer that `targets` names (targets.py).

    In the model's own order. On a PEFT model the value is the LoRA wrapper where there is one
    (its forward is the layer's forward), and the name is still the bare checkpoint's. Only layers
    of the language model count; `left_out` says what that leaves. Works on "meta".
    SpkitError for a target that names no linear layer, or whose weight is tied to another.
    """
    linear, others = linear_layers(model)
    stack = decoder_path(model) if targets in (AUTO, ALL) else ""
    chosen_paths = chosen(list(linear), targets, stack, others)
    embeddings = model.get_input_embeddings().weight
    for path in chosen_paths:
        if _base(linear[path]).weight is embeddings:
            raise SpkitError(
                f"The weight '{path}.weight' is tied to the input embeddings and cannot be a "
                "target."
            )
    return {path + ".weight": linear[path] for path in chosen_paths}


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({path: linear layer}, {path: class of any other module with weights}) of the language model.

    That is the decoder and the head. Experts are "other": they get only some of the
    tokens, and importance needs a gradient of every sample.
    """
    inside = {id(module) for part in _language(model) for module in part.modules()}
    linear: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "base_layer" or ".lora_" in path:
            continue  # the inside of a LoRA wrapper
        path, base = path.removeprefix("base_model.model."), _base(module)
        if isinstance(base, nn.Linear) and id(module) in inside and not EXPERT.search(path):
            linear[path] = module
        elif id(module) in inside and next(base.parameters(recurse=False), None) is not None:
            others[path] = type(base).__name__
    return linear, others


def left_out(model: nn.Module) -> list[str]:
    """A line for each part of the model that no targets reach: experts, a vision tower."""
    said = []
    inside = {id(parameter) for part in _language(model) for parameter in part.parameters()}
    for path, parameter in model.named_parameters():
        stacked = parameter.ndim == 3 and "experts" in path
        if id(parameter) in inside and (stacked or EXPERT.search(path)):
            what = "stacked tensors, not linear layers" if stacked else "used for some tokens only"
            said.append(f"The experts ({path}, ...) get no patch: they are {what}.")
            break
    towers = {
        ".".join(path.removeprefix("base_model.model.").split(".")[:2])
        for path, parameter in model.named_parameters()
        if id(parameter) not in inside and ".lora_" not in path
    }
    if towers:
        said.append(f"Only the language model is patched; left out: {', '.join(sorted(towers))}.")
    return said


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's decoder layers, bare or wrapped; SpkitError where there are none."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in _language(model)[0].modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise SpkitError(
        f"{type(model).__name__} has no list of {depth} decoder layers; set "
        "importance.layers_per_pass to null"
    )


def decoder_path(model: nn.Module) -> str:
    """ "model.layers" for LLaMA: the path of the list of decoder layers, in the bare model."""
    decoder = decoder_layers(model)
    path = next(path for path, module in model.named_modules() if module is decoder)
    return path.removeprefix("base_model.model.")


def _language(model: nn.Module) -> list[nn.Module]:
    """The decoder and the head; all of a model that transformers did not make."""
    if not hasattr(model, "get_decoder"):
        return [model]
    parts = [model.get_decoder(), model.get_output_embeddings()]
    return [part for part in parts if part is not None]


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
