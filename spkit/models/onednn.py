"""Linear layers in fp32 on a CPU by oneDNN: the same precision, on AMD in about half the time.

torch gives bf16 to oneDNN and fp32 to MKL, which runs code for any x86 on a CPU that is not
Intel's (MKL_VERBOSE=1 shows which). Sums are in another order: the last bits differ. Gradients go
through frozen layers; those that are trained (LoRA factors) are torch's.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def _linear(given, weight, bias=None):
    """By the operator that torch.compile calls; it has no gradients."""
    return torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")


class _Frozen(torch.autograd.Function):
    """The same with a gradient for what is given, and none for the layer."""

    @staticmethod
    def forward(ctx, given, weight, bias):
        ctx.save_for_backward(weight)
        return _linear(given, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        return _linear(gradient, ctx.saved_tensors[0].t()), None, None


class _OneDnn(TorchFunctionMode):
    """Every F.linear of fp32 tensors is oneDNN's, but for layers that are trained."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and all(map(_fp32, args)) and args[0].numel():
            given, weight, bias = (*args, None)[:3]
            if not torch.is_grad_enabled():
                return _linear(given, weight, bias)
            if not weight.requires_grad and (bias is None or not bias.requires_grad):
                return _Frozen.apply(given, weight, bias)
        return func(*args, **(kwargs or {}))


def _fp32(value) -> bool:
    return value is None or (value.dtype == torch.float32 and value.device.type == "cpu")


def recomputes(model) -> bool:
    """Whether gradient checkpointing is switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def fast_linear(model) -> AbstractContextManager:
    """For a model in fp32 on an x86 CPU; else nothing changes. Not with gradient checkpointing,
    which computes layers again when this has ended."""
    known = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    wanted = _fp32(model.get_input_embeddings().weight) and not recomputes(model)
    return _OneDnn() if known and wanted else nullcontext()
