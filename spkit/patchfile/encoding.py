"""One block of a patched matrix as bytes: the kept positions and their merged values.

A block is 2^21 consecutive weights of one matrix (row-major; the last one is shorter), so that
whoever reads a patch holds 2 million weights at a time, whatever the matrix's size.

    positions   "gaps": between neighbouring positions, a byte each (255: add 255 and read on)
                "bitmap": one bit a weight
                both under zstd; the smaller one is taken (docs/patch_format.md has the sizes)
    values      by their bytes: all highest bytes together, then the next ones, each under zstd.
                Signs and exponents shrink, the low bits of a mantissa do not.

Everything read is checked against what the manifest says *before* memory is taken for it: a frame
that claims another size than expected is refused. Wrong bytes are a ValueError.

What this file does not do: know files, manifests or methods.
"""

from math import log2

import numpy as np
import zstandard
from blake3 import blake3

BLOCK = 1 << 21  # weights
GROUP = 64  # values that share one scale in 8 bits
LEVEL = 1  # higher levels look for repetitions, and there are none: measured, they are no smaller
ESCAPE = 255
MAX_WINDOW = 1 << 25  # bytes a decoder may be told to hold
EMPTY = bytes.fromhex("28b52ffd2000010000")  # the one frame that may hold nothing


def blocks(weights: int) -> list[tuple[int, int]]:
    """(first weight, number of weights) of every block of a matrix with so many weights."""
    return [(start, min(BLOCK, weights - start)) for start in range(0, weights, BLOCK)]


# ---- positions -----------------------------------------------------------------------------------


def pack_positions(positions: np.ndarray, length: int) -> tuple[str, bytes]:
    """(encoding, bytes): the smaller of both. positions: ascending, below `length`."""
    found = {"gaps": compress(_gaps(positions))}
    if len(positions) * 16 > length:  # sparser ones are never smaller as a bitmap
        bits = np.zeros(length, dtype=bool)
        bits[positions] = True
        found["bitmap"] = compress(np.packbits(bits))
    return min(found.items(), key=lambda item: len(item[1]))


def unpack_positions(data: bytes, encoding: str, kept: int, length: int) -> np.ndarray:
    """The `kept` positions, uint32, ascending and below `length`; ValueError for anything else."""
    if encoding == "bitmap":
        raw = np.frombuffer(decompress(data, -(-length // 8)), dtype=np.uint8)
        bits = np.unpackbits(raw).view(np.bool_)
        if bits[length:].any():
            raise ValueError("a position lies behind the end of the matrix")
        positions = np.flatnonzero(bits[:length]).astype(np.uint32)
        if len(positions) != kept:
            raise ValueError(f"{len(positions)} positions, {kept} expected")
        return positions
    raw = np.frombuffer(decompress(data, most=kept + length // ESCAPE), dtype=np.uint8)
    ends = np.flatnonzero(raw != ESCAPE)
    if len(ends) != kept or (len(raw) and raw[-1] == ESCAPE):
        raise ValueError(f"{len(ends)} positions, {kept} expected")
    # each gap counts the weights between two positions, and the positions themselves come on top
    positions = np.cumsum(raw, dtype=np.int64)[ends] + np.arange(kept)
    if kept and positions[-1] >= length:
        raise ValueError("a position lies behind the end of the matrix")
    return positions.astype(np.uint32)


def _gaps(positions: np.ndarray) -> np.ndarray:
    gaps = np.diff(positions.astype(np.int64), prepend=-1) - 1
    escapes = gaps // ESCAPE
    coded = np.full(len(gaps) + int(escapes.sum()), ESCAPE, dtype=np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = gaps % ESCAPE
    return coded


# ---- values --------------------------------------------------------------------------------------


def pack_values(values: np.ndarray) -> list[bytes]:
    """One frame for each byte of the values' dtype, the highest byte first."""
    columns = values.view(np.uint8).reshape(len(values), values.itemsize)
    return [compress(np.ascontiguousarray(column)) for column in columns.T[::-1]]


def unpack_values(frames: list[bytes], dtype: np.dtype, kept: int) -> np.ndarray:
    """The inverse: `kept` values of `dtype`."""
    if len(frames) != dtype.itemsize:
        raise ValueError(f"{len(frames)} bytes a value, {dtype.itemsize} expected")
    columns = np.empty((kept, dtype.itemsize), dtype=np.uint8)
    for i, frame in enumerate(reversed(frames)):
        columns[:, i] = np.frombuffer(decompress(frame, kept), dtype=np.uint8)
    return columns.reshape(-1).view(dtype)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 bits: (int8 [k], float32 scales, one for each 64 values): value = integer * scale."""
    padded = np.zeros(-(-len(values) // GROUP) * GROUP, dtype=np.float32)
    padded[: len(values)] = values
    groups = padded.reshape(-1, GROUP)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    steps = np.rint(groups / safe[:, None]).clip(-127, 127).astype(np.int8)
    return steps.reshape(-1)[: len(values)], scales


def dequantize(steps: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 values of what `quantize` made."""
    return steps.astype(np.float32) * np.repeat(scales, GROUP)[: len(steps)]


# ---- hash --------------------------------------------------------------------------------------


class TensorHash:
    """BLAKE3 of a tensor's bytes: as hard to forge as SHA-256, and five times as fast (measured).

    A checkpoint is hashed as it streams in and out, so that this speed is that of `apply`.
    """

    def __init__(self):
        self._hash = blake3()

    def update(self, bits: np.ndarray) -> None:
        """The next bytes of the tensor."""
        self._hash.update(bits.view(np.uint8).data)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()


# ---- zstd ----------------------------------------------------------------------------------------


def compress(data) -> bytes:
    """One zstd frame that states its size."""
    # a compressor holds state and threads apply patches at once: each call has its own
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(data)


def decompress(data: bytes, size: int | None = None, *, most: int | None = None) -> bytes:
    """The content of exactly one frame of `size` bytes, or of at most `most`.

    ValueError for damaged bytes, another size, a dictionary, a window of more than 32 MiB, or
    bytes behind the frame. The size is read from the frame's head, before memory is taken.
    """
    try:
        about = zstandard.get_frame_parameters(data)
        found = about.content_size
        right = found <= most if size is None else found == size
        if not right or found == zstandard.CONTENTSIZE_UNKNOWN:
            expected = f"at most {most}" if size is None else size
            raise ValueError(f"a frame of {found} bytes, {expected} expected")
        if about.dict_id:
            raise ValueError("a frame that needs a dictionary")
        # the library checks neither of these: not the window where the output is at hand as a
        # whole, and nothing behind the head of a frame that says it is empty
        if about.window_size > MAX_WINDOW:
            raise ValueError(f"a frame with a window of {about.window_size} bytes")
        if found == 0 and data != EMPTY:
            raise ValueError("an empty frame with bytes in or behind it")
        decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        content = decoder.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"no intact zstd frame: {error}") from None
    if len(content) != found:
        raise ValueError(f"a frame of {len(content)} bytes, {found} expected")
    return content


def entropy_bound(kept: int, weights: int) -> float:
    """Bytes that no code of the positions can beat on average: n H(k/n) / 8.

    H is the entropy of one weight being kept or not, in bits, for positions at random.
    """
    if kept in (0, weights):
        return 0.0
    share = kept / weights
    return -weights * (share * log2(share) + (1 - share) * log2(1 - share)) / 8
