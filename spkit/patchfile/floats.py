"""bfloat16, float16 and float32 as bits, in numpy: a patch is applied without loading torch.

    weight' = round(float32(weight) + delta)        patched

Rounding is to the nearest, ties to even, as torch does it; a test compares all 65,536 values and
the halves between them. numpy has no bfloat16, so arrays here hold *bits*:
uint16 for BF16 and F16, uint32 for F32. Names of dtypes are those of safetensors' headers.
"""

import numpy as np

BITS = {"BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<u4")}
TORCH_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values as float32, exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of float32 values rounded to `dtype`; too large ones become infinite."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    # half of the last kept bit, less one where that bit is even: a tie then stays below the carry
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # the carry could turn a NaN into an infinity
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return rounded


def convert(bits: np.ndarray, dtype: str, out: str) -> np.ndarray:
    """The bits in another dtype, rounded."""
    return bits if dtype == out else from_float32(to_float32(bits, dtype), out)


def patched(weights: np.ndarray, deltas: np.ndarray, dtype: str, out: str | None = None):
    """round(weight + delta), as bits of `out` (default: the weights' dtype).

    weights: bits of `dtype`; deltas: float32. The sum is float32. Where a delta is 0 the weight is
    converted, not added to: -0.0 + 0.0 would be +0.0. ValueError where a sum is not finite.
    """
    out = out or dtype
    before = to_float32(weights, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        after = np.where(deltas == 0, before, before + deltas)
    bits = from_float32(after, out)
    if not np.isfinite(to_float32(bits, out)[deltas != 0]).all():
        raise ValueError(f"a patched weight is not finite in {out}")
    return bits


def neighbours(bits: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The bits of the next larger and next smaller magnitudes (of 0: 0 and the smallest)."""
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    sign, one = bits ^ magnitude, bits.dtype.type(1)
    return sign | (magnitude + one), sign | np.where(magnitude > 0, magnitude - one, magnitude)
