"""Linear layers in fp32 on a CPU by oneDNN: the same precision, on AMD in about half the time.

torch gives bf16 to oneDNN and fp32 to MKL, which runs code for any x86 on a CPU that is not
Intel's (MKL_VERBOSE=1 shows which). Sums are in another order: the last bits differ. No gradients.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class _OneDnn(TorchFunctionMode):
    """Every F.linear of fp32 tensors is oneDNN's, by the operator that torch.compile calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and all(map(_fp32, args)) and args[0].numel():
            given, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fp32(value) -> bool:
    return value is None or (value.dtype == torch.float32 and value.device.type == "cpu")


def fast_linear(model) -> AbstractContextManager:
    """For a model in fp32 on an x86 CPU, where no gradient is asked for; else nothing changes."""
    known = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    wanted = _fp32(model.get_input_embeddings().weight) and not torch.is_grad_enabled()
    return _OneDnn() if known and wanted else nullcontext()
