"""Deltas in the form in which a 4-bit backbone can carry them: sparse, or as low-rank factors.

A 4-bit weight cannot be changed in place: quantised again it would swallow a small delta. So the
layer stays as it is and the delta's own product is added to its output,

    y = W4 x + D x,        D = alpha * P_SE on keep_SE + beta * P_OSM on keep_OSM, never quantised

with D kept as positions and values (the difference sets leave few), or, where a whole patch is
kept, as its factors. Only one D is dense at a time, while its layer computes.

Full-precision weights are added to instead: `add_delta`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def add_delta(weight: Tensor, delta: Tensor) -> Tensor:
    """theta + delta [paper], in fp32, rounded to the weight's dtype; a new tensor.

    weight: any float dtype and shape; delta: float, the same shape.

    Where the delta is 0 the weight's bits are copied and not added to: -0.0 + 0.0 would be +0.0.
    ValueError if a sum is not finite in the weight's dtype.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"the shapes {list(weight.shape)} and {list(delta.shape)} differ")
    changed = delta != 0
    sums = (weight.detach().float() + delta.float()).to(weight.dtype)
    if not bool((torch.isfinite(sums) | ~changed).all()):
        raise ValueError(f"a patched weight is not finite in {weight.dtype}")
    return torch.where(changed, sums, weight.detach())


@dataclass(frozen=True)
class SparseDelta:
    """positions int32 [k], row-major and ascending; values [k]; shape (out, in)."""

    positions: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, dense: Tensor) -> "SparseDelta":
        """The non-zero entries of a dense delta."""
        flat = dense.reshape(-1)
        where = flat.nonzero().squeeze(1)
        # int32 reaches 2**31 - 1: more weights than any matrix of a 100 B model has
        return cls(where.int(), flat[where], tuple(dense.shape))

    def dense(self) -> Tensor:
        """[out, in] in the values' dtype and on their device, zero elsewhere."""
        flat = torch.zeros(
            self.shape[0] * self.shape[1], dtype=self.values.dtype, device=self.values.device
        )
        flat[self.positions.long()] = self.values
        return flat.reshape(self.shape)

    def to(self, device, dtype: torch.dtype | None = None) -> "SparseDelta":
        """The same on another device, its values in `dtype`."""
        values = self.values.to(device=device, dtype=dtype or self.values.dtype)
        return SparseDelta(self.positions.to(device), values, self.shape)

    def output(self, x: Tensor) -> Tensor:
        """D x for x [..., in]: [..., out] in x's dtype."""
        return F.linear(x, self.dense().to(x.dtype))


@dataclass(frozen=True)
class LowRankDelta:
    """A sum of scale * B @ A: terms of (A [r, in], B [out, r], scale)."""

    terms: tuple[tuple[Tensor, Tensor, float], ...]

    def to(self, device, dtype: torch.dtype | None = None) -> "LowRankDelta":
        """The same on another device, the factors in `dtype`."""
        return LowRankDelta(
            tuple(
                (a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype), scale)
                for a, b, scale in self.terms
            )
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        a, b, _ = self.terms[0]
        return (b.shape[0], a.shape[1])

    def dense(self) -> Tensor:
        """[out, in], fp32."""
        return sum(scale * (b.float() @ a.float()) for a, b, scale in self.terms)

    def output(self, x: Tensor) -> Tensor:
        """D x for x [..., in]: [..., out] in x's dtype."""
        return sum(scale * F.linear(F.linear(x, a), b) for a, b, scale in self.terms)
