"""NF4: the weights behind the 4-bit codes, and whether bitsandbytes computes with those weights.

    W[i] = code[q_i] * s[i // 64]      q_i: 4 bits a weight; i counts the matrix row by row
    s    = code2[a] * s2 + offset      double quantisation: the scales are codes themselves

On a CPU with AVX512 bitsandbytes 0.50.2 takes a wrong scale where a block of 64 weights crosses the
end of a row, that is, where in_features is a multiple of 16 and not of 64. The relative error of
such a layer is 0.25 instead of NF4's 0.09. So every layer is checked when it is loaded, and where
bitsandbytes is wrong, the layer computes with `decoded`.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from types import MethodType
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spkit.errors import SpkitError

AT_ONCE = 2**20  # weights decoded at once: little memory; a multiple of every block size
LAST_BITS = 1e-6  # of a layer's largest weight: how far the last bits of a scale may move a weight
NF4_ERROR = 0.15  # relative error of quantising normal weights; 0.09 measured
ROUNDINGS, LEAST = 8, 1e-4  # an output may be off by so many roundings, relative to |x| |w|
TOKENS = 6  # of the random input


# ---- decoding ------------------------------------------------------------------------------------


def decoded(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix behind a 4-bit weight, [out, in], in plain torch.

    weight: bitsandbytes' Params4bit with its quant_state. dtype: None is the one that it was
    quantised from. SpkitError for codes that bitsandbytes has repacked.
    """
    state = weight.quant_state
    out = torch.empty(state.shape, dtype=dtype or state.dtype, device=weight.device)
    flat = out.view(-1)
    for start, values in _chunks(weight.data, state):
        flat[start : start + len(values)] = values
    return out


def _chunks(packed: Tensor, state) -> Iterator[tuple[int, Tensor]]:
    """(number of its first weight, weights in fp32), at most AT_ONCE at a time."""
    scales, size, count = _scales(state), state.blocksize, state.shape.numel()
    packed = packed.reshape(-1).view(torch.uint8)  # two codes a byte, the first in the high half
    code = state.code.float()
    two = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # byte -> two weights
    for start in range(0, count, AT_ONCE):
        end = min(start + AT_ONCE, count)
        values = F.embedding(packed[start // 2 : (end + 1) // 2].int(), two).view(-1)
        values = F.pad(values, (0, -len(values) % size)).view(-1, size)  # the last block is shorter
        values *= scales[start // size : start // size + len(values), None]
        yield start, values.view(-1)[: end - start]


def _scales(state) -> Tensor:
    """The scale of every block, fp32."""
    if getattr(state, "packing_format_for_cpu", False):
        raise SpkitError(
            "A 4-bit weight was repacked by bitsandbytes; call guard_nf4 right after loading."
        )
    if not state.nested:
        return state.absmax.float().view(-1)
    inner, codes = state.state2, state.absmax.view(-1)
    coarse = inner.absmax.float().repeat_interleave(inner.blocksize)[: len(codes)]
    return inner.code.float()[codes.long()] * coarse + state.offset


# ---- checking ------------------------------------------------------------------------------------


def check_nf4(model: nn.Module) -> None:
    """Check every 4-bit layer; those that bitsandbytes gets wrong compute with `decoded` from now.

    All weights of every layer are compared with bitsandbytes' (`round_trip_error`). Which kernel
    runs depends on a layer's shape, so the first layer of each shape also answers random inputs
    (`product_error`), and a random matrix of its width is quantised. A warning names the first
    layer that is wrong. SpkitError where no decoding helps: scales that are not finite, or codes
    that do not stand for the weights.
    """
    layers = {name: layer for name, layer in model.named_modules() if is_4bit(layer)}
    products, wrong = {}, {}
    for name, layer in layers.items():
        state = layer.weight.quant_state
        refuse = partial(_refuse, name, state)
        kind = (tuple(state.shape), state.dtype, state.blocksize, state.quant_type, state.nested)
        if kind not in products:
            _check_codes(layer.weight, refuse)
            products[kind] = product_error(layer)
        error = round_trip_error(layer.weight, refuse) or products[kind]
        if error:
            wrong[name] = (list(state.shape), error)
            mend(layer)
            if still := product_error(layer):
                refuse(f"computes with a relative error of {still:.2g}")
    if wrong:
        name, (shape, error) = next(iter(wrong.items()))
        warnings.warn(
            f"bitsandbytes {version('bitsandbytes')} computes wrongly with {len(wrong)} of "
            f"{len(layers)} 4-bit layers on this machine, first {name!r} {shape} (relative error "
            f"{error:.2g}): spkit decodes these layers itself",
            stacklevel=2,
        )


def mend(layer: nn.Module) -> None:
    """Let a bitsandbytes Linear4bit compute with `decoded`, forward and backward."""
    layer.forward = MethodType(_forward, layer)


def round_trip_error(weight: Tensor, refuse) -> float:
    """|W' - W| / |W| of bitsandbytes' W' if one weight is beyond its bound, otherwise 0.

    The bound: one rounding of the weight's dtype, and LAST_BITS of the largest weight.
    """
    from bitsandbytes import functional

    state = weight.quant_state
    if not bool(torch.isfinite(_scales(state)).all()):
        refuse("has scales that are not finite")
    theirs = functional.dequantize_4bit(weight.data, state).reshape(-1)
    rounding, found = torch.finfo(state.dtype).eps, []
    for start, ours in _chunks(weight.data, state):
        differ, size = theirs[start : start + len(ours)].float() - ours, ours.abs()
        over = (differ.abs() - rounding * size).max()
        found.append(torch.stack((differ.norm(), ours.norm(), over, size.max())))
    found = torch.stack(found)
    off, whole = found[:, :2].norm(dim=0)
    over, largest = found[:, 2:].amax(dim=0)
    fine = bool(over <= LAST_BITS * largest)  # false for NaN
    return 0.0 if fine else float(off / whole)


def product_error(layer: nn.Module) -> float:
    """The largest relative error of an output or gradient if it is beyond the bound, otherwise 0.

    One token and several, in eval and in train mode, against the decoded weight. The bound:
    ROUNDINGS of the dtype that the layer computes in.
    """
    dtype = layer.compute_dtype or layer.weight.quant_state.dtype
    weight = decoded(layer.weight, dtype).float()
    x, g = (_random(TOKENS, width).to(weight.device, dtype) for width in reversed(weight.shape))
    bias = None if layer.bias is None else layer.bias.detach().float()
    right, right_grad = F.linear(x.float(), weight, bias), g.float() @ weight
    errors, was_training = [], layer.training
    for train in (False, True):
        layer.train(train)
        for count in (1, TOKENS):
            rows = x[None, :count].clone().requires_grad_(train)
            with torch.set_grad_enabled(train):
                y = layer(rows)
            errors.append(_off(y[0], right[:count], x[:count], weight, bias))
            if train:
                (grad,) = torch.autograd.grad(y, rows, g[None, :count])
                errors.append(_off(grad[0], right_grad[:count], g[:count], weight.T))
    layer.train(was_training)
    error = torch.stack(errors).amax()
    fine = bool(error <= max(LEAST, ROUNDINGS * torch.finfo(dtype).eps))
    return 0.0 if fine else float(error)


def _off(found: Tensor, right: Tensor, x: Tensor, weight: Tensor, bias=None) -> Tensor:
    """The largest error of a column of x W^T, relative to what random x and W give."""
    usual = x.float().norm() * weight.norm(dim=1) / weight.shape[1] ** 0.5
    if bias is not None:
        usual = usual + len(x) ** 0.5 * bias.abs()
    return ((found.float() - right).norm(dim=0) / usual.clamp_min(1e-30)).amax()


def _check_codes(weight: Tensor, refuse) -> None:
    """Whether bitsandbytes' codes stand for the weights that they were made of."""
    from bitsandbytes import functional

    state = weight.quant_state
    if state.quant_type != "nf4":
        return
    normal = _random(64, state.shape[-1]).to(weight.device, state.dtype)
    options = {"blocksize": state.blocksize, "compress_statistics": state.nested}
    packed, made = functional.quantize_4bit(normal, quant_type="nf4", **options)
    back = torch.cat([values for _, values in _chunks(packed, made)]).view(normal.shape)
    error = float((back - normal).norm() / normal.float().norm())
    if not error <= NF4_ERROR:
        refuse(f"has a width at which quantising has a relative error of {error:.2g}")


def is_4bit(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _random(rows: int, columns: int) -> Tensor:
    """Normal numbers from a generator of their own: the run's random numbers stay as they are."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _refuse(name: str, state, what: str) -> NoReturn:
    raise SpkitError(
        f"The 4-bit layer {name!r} {list(state.shape)} {what} with bitsandbytes "
        f"{version('bitsandbytes')} on this machine: set quantization to 'none', or install "
        "another version of bitsandbytes."
    )


# ---- a layer that decodes its own weight ---------------------------------------------------------


def _forward(self, x: Tensor) -> Tensor:
    """What Linear4bit.forward is to do: x W^T + b in the layer's compute_dtype."""
    given = x.dtype
    x = x.to(self.compute_dtype or given)
    y = _Product.apply(x, self.weight)
    return (y if self.bias is None else y + self.bias.to(y.dtype)).to(given)


class _Product(torch.autograd.Function):
    """x W^T; W is decoded again for the gradient, so that no layer keeps it in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, decoded(weight, x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ decoded(ctx.weight, gradient.dtype), None
