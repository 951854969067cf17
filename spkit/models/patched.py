"""A backbone with deltas in it, for as long as a `with` lasts: theta + delta, and then theta again.

Full-precision weights are changed in place; 4-bit weights cannot be, so there the delta's own
product is added to the layer's output (deltas.py). The deltas are read one matrix at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from spkit.errors import SpkitError
from spkit.models.deltas import LowRankDelta, SparseDelta, add_delta
from spkit.models.devices import check_in_memory

Delta = torch.Tensor | SparseDelta | LowRankDelta


@contextmanager
def patched(model: nn.Module, deltas: Mapping[str, Delta]) -> Iterator[nn.Module]:
    """Inside the `with` the model is W + delta; afterwards it is exactly as before.

    deltas: {checkpoint tensor name: [out, in]} for a bare model; read one matrix at a time, so a
    mapping that computes them will do. Restored also when the body raises.

    Full-precision weights: only positions where the delta is not 0 are written, in fp32 and then
    rounded to the weight's dtype (deltas.add_delta); all others keep their bits.
    4-bit weights stay as they are, and the unquantised delta's product is added to the layer's
    output (deltas.py); a mapping with `factors` may give whole patches by their factors.
    SpkitError, before the body runs, for an unknown name, another shape, or a non-finite result.
    """
    with ExitStack() as undo:
        for name in deltas:
            layer = _layer(model, name)
            factors = getattr(deltas, "factors", lambda name: None)(name)
            if getattr(layer.weight, "quant_state", None) is None:
                _write(layer.weight, name, deltas[name], undo)
            else:
                _add_output(layer, name, factors or deltas[name], undo)
        yield model


def _write(weight: nn.Parameter, name: str, delta: Delta, undo: ExitStack) -> None:
    """Add the delta to a full-precision weight in place; `undo` puts the old bits back."""
    if not weight.is_floating_point():
        raise SpkitError(f"{name!r} is neither a full-precision weight nor NF4.")
    _check_shape(name, delta, tuple(weight.shape))
    if isinstance(delta, LowRankDelta):
        delta = delta.dense()
    sparse = (SparseDelta.of(delta.detach()) if isinstance(delta, torch.Tensor) else delta).to(
        weight.device
    )
    where, flat = sparse.positions.long(), weight.data.view(-1)
    old = flat[where]
    try:
        flat[where] = add_delta(old, sparse.values)
    except ValueError:
        raise SpkitError(
            f"Adding the delta to {name!r} gives values that are not finite."
        ) from None

    def restore(where=sparse.positions, old=old):
        weight.data.view(-1)[where.long()] = old

    undo.callback(restore)


def _add_output(layer: nn.Module, name: str, delta: Delta, undo: ExitStack) -> None:
    """Let a 4-bit layer answer W4 x + D x; `undo` takes the hook off."""
    _check_shape(name, delta, (layer.out_features, layer.in_features))
    device = layer.weight.device
    if isinstance(delta, torch.Tensor):
        delta = SparseDelta.of(delta.detach())
    dtype = getattr(layer, "compute_dtype", None) or torch.float32
    held = delta.to(device, dtype)
    parts = [held.values] if isinstance(held, SparseDelta) else [x for t in held.terms for x in t]
    if not all(bool(torch.isfinite(torch.as_tensor(part)).all()) for part in parts):
        raise SpkitError(f"The delta of {name!r} has values that are not finite in {dtype}.")
    hook = layer.register_forward_hook(
        lambda module, inputs, output: (  # a dispatched layer moves its own input only
            output + held.output(inputs[0].to(device, dtype)).to(output.dtype)
        )
    )
    undo.callback(hook.remove)


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight  # noqa: B018
    except AttributeError:
        raise SpkitError(f"The model has no weight matrix {name!r}.") from None
    check_in_memory([(name, layer.weight)])
    return layer


def _check_shape(name: str, delta: Delta, shape: tuple[int, ...]) -> None:
    if tuple(delta.shape) != shape:
        raise SpkitError(
            f"The delta of {name!r} has shape {list(delta.shape)}, its weight {list(shape)}."
        )
