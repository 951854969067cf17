"""The format of a patch file from the number up: floats against torch, blocks, values, manifest."""

import json
from math import ceil

import hypothesis.strategies as st
import numpy as np
import plain
import pytest
import torch
import zstandard
from hypothesis import given, settings

from spkit.errors import SpkitError
from spkit.models.deltas import add_delta
from spkit.patchfile import encoding, floats
from spkit.patchfile.encoding import BLOCK, compress, decompress
from spkit.patchfile.file import Kept, PatchFile, header
from spkit.patchfile.make import exact_values
from spkit.patchfile.manifest import LONGEST_TEXT, Manifest, read_manifest

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHORT = ("BF16", "F16")
every_dtype = pytest.mark.parametrize("dtype", list(TORCH))
short_dtype = pytest.mark.parametrize("dtype", SHORT)


def as_torch(bits, dtype):
    return torch.from_numpy(bits.copy()).view(TORCH[dtype])


def as_bits(tensor, dtype):
    kind = torch.int32 if dtype == "F32" else torch.int16
    return tensor.contiguous().view(kind).numpy().view(floats.BITS[dtype])


def random_bits(count, dtype, seed=0):
    """Every pattern is as likely as any other: subnormals, infinities and NaN are among them."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 2 ** (8 * floats.BITS[dtype].itemsize), count, floats.BITS[dtype])


def finite(bits, dtype):
    return bits[np.isfinite(floats.to_float32(bits, dtype))]


# ---- floats --------------------------------------------------------------------------------------


@short_dtype
def test_all_patterns_as_float32(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    ours, theirs = floats.to_float32(bits, dtype), as_torch(bits, dtype).float().numpy()
    assert np.array_equal(np.isnan(ours), np.isnan(theirs)) and np.isnan(ours).any()
    numbers = ~np.isnan(ours)
    assert np.array_equal(ours[numbers].view(np.uint32), theirs[numbers].view(np.uint32))
    assert np.array_equal(floats.from_float32(ours[numbers], dtype), bits[numbers])
    assert np.isnan(floats.to_float32(floats.from_float32(ours[~numbers], dtype), dtype)).all()


def halves(dtype):
    """All numbers of a dtype, the middles between neighbours, and what lies next to a middle."""
    found = np.unique(floats.to_float32(finite(np.arange(2**16, dtype=np.uint16), dtype), dtype))
    middles = ((found[1:].astype(np.float64) + found[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(sign) * np.float32(np.inf)) for sign in (1, -1)]
    return np.concatenate([found, middles, *beside])


SPECIAL = [0.0, -0.0, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 65504.0]
SPECIAL += [65519.996, 65520.0, -65520.0, 3.3895314e38, 3.3961775e38, 1.1754942e-38, 2.0**-25]


@short_dtype
@pytest.mark.parametrize("kind", ["any bits", "halves", "special"])
def test_rounding_is_that_of_torch(dtype, kind):
    values = {
        "any bits": random_bits(1_000_000, "F32").view(np.float32),
        "halves": halves(dtype),
        "special": np.array(SPECIAL, dtype=np.float32),
    }[kind]
    ours = floats.from_float32(values, dtype)
    theirs = as_bits(torch.from_numpy(values.copy()).to(TORCH[dtype]), dtype)
    nan = np.isnan(values)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(floats.to_float32(ours[nan], dtype)).all() and nan.any() == (kind == "any bits")


@short_dtype
def test_a_nan_stays_one_and_never_becomes_an_infinity(dtype):
    """The smallest and the largest payload, of both signs."""
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], dtype=np.uint32)
    made = floats.from_float32(bits.view(np.float32), dtype)
    assert np.isnan(floats.to_float32(made, dtype)).all()


def test_float32_is_left_as_it_is():
    bits = random_bits(1000, "F32")
    assert np.array_equal(floats.from_float32(floats.to_float32(bits, "F32"), "F32"), bits)
    assert floats.convert(bits, "F32", "F32") is bits


@pytest.mark.parametrize("out", list(TORCH))
@every_dtype
def test_conversion_is_that_of_torch(dtype, out):
    bits = finite(random_bits(100_000, dtype), dtype)
    made = as_bits(as_torch(bits, dtype).to(TORCH[out]), out)
    assert np.array_equal(floats.convert(bits, dtype, out), made)


@every_dtype
def test_patched_is_add_delta(dtype):
    """Bit for bit, with weights of all magnitudes, and deltas of all that stay finite."""
    weights = finite(random_bits(200_000, dtype), dtype)
    weights[:2] = as_bits(torch.tensor([-0.0, 0.0], dtype=TORCH[dtype]), dtype)
    draw = np.random.default_rng(1)
    deltas = (floats.to_float32(weights, dtype) * draw.normal(0, 0.1, len(weights))).astype("<f4")
    deltas[draw.random(len(deltas)) < 0.3] = 0.0
    deltas[:2] = -0.0
    with np.errstate(over="ignore"):
        sums = floats.from_float32(floats.to_float32(weights, dtype) + deltas, dtype)
    stays = np.isfinite(floats.to_float32(sums, dtype))
    weights, deltas = weights[stays], deltas[stays]
    expected = add_delta(as_torch(weights, dtype), torch.from_numpy(deltas))
    made = floats.patched(weights, deltas, dtype)
    assert np.array_equal(made, as_bits(expected, dtype))
    assert list(made[:2]) == list(weights[:2])
    assert (made != weights).mean() > 0.5


@every_dtype
def test_minus_zero_is_kept(dtype):
    bits = as_bits(torch.tensor([-0.0, -0.0, 1.0], dtype=TORCH[dtype]), dtype)
    made = floats.patched(bits, np.array([0.0, -0.0, 1.0], dtype=np.float32), dtype)
    assert list(made) == list(as_bits(torch.tensor([-0.0, -0.0, 2.0], dtype=TORCH[dtype]), dtype))


@pytest.mark.parametrize(
    "dtype, weight, delta",
    [
        ("F16", 65504.0, 16.0),
        ("F16", -65504.0, -16.0),
        ("BF16", 3.3895314e38, 1e36),
        ("F32", 3.4028235e38, 3.4028235e38),
        ("F32", 1.0, np.nan),
        ("BF16", 1.0, np.inf),
        ("F16", np.nan, 1.0),
    ],
)
def test_what_is_not_finite_is_refused(dtype, weight, delta):
    bits = as_bits(torch.tensor([1.0, weight], dtype=TORCH[dtype]), dtype)
    deltas = np.array([0.5, delta], dtype=np.float32)
    with pytest.raises(ValueError, match=f"a patched weight is not finite in {dtype}"):
        floats.patched(bits, deltas, dtype)
    with pytest.raises(ValueError, match="not finite"):
        add_delta(as_torch(bits, dtype), torch.from_numpy(deltas))


def test_too_large_for_the_other_dtype_only():
    bits = as_bits(torch.tensor([60000.0], dtype=torch.bfloat16), "BF16")
    delta = np.array([10000.0], dtype=np.float32)
    made = floats.patched(bits, delta, "BF16", "F32")
    assert floats.to_float32(made, "F32") == as_torch(bits, "BF16").float().item() + 10000
    with pytest.raises(ValueError, match="not finite in F16"):
        floats.patched(bits, delta, "BF16", "F16")


@every_dtype
def test_neighbours_by_hand(dtype):
    one = as_bits(torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=TORCH[dtype]), dtype)
    larger, smaller = floats.neighbours(one, dtype)
    about, step = torch.finfo(TORCH[dtype]), torch.finfo(TORCH[dtype]).eps
    tiny = about.tiny * step  # the smallest subnormal
    expected = torch.tensor([1 + step, -1 - step, tiny, -tiny], dtype=TORCH[dtype])
    assert list(larger) == list(as_bits(expected, dtype))
    expected = torch.tensor([1 - step / 2, step / 2 - 1, 0.0, -0.0], dtype=TORCH[dtype])
    assert list(smaller) == list(as_bits(expected, dtype))


# ---- positions -----------------------------------------------------------------------------------


def positions(*found):
    return np.array(found, dtype=np.uint32)


def round_trip(where, length):
    how, data = encoding.pack_positions(where, length)
    made = encoding.unpack_positions(data, how, len(where), length)
    assert made.dtype == np.uint32 and np.array_equal(made, where)
    return how, data


@pytest.mark.parametrize(
    "where, coded",
    [
        ([0], [0]),
        ([0, 1, 2], [0, 0, 0]),
        ([3, 5], [3, 1]),
        ([254], [254]),
        ([255], [255, 0]),
        ([256], [255, 1]),
        ([510], [255, 255, 0]),
        ([509], [255, 254]),
        ([10, 266], [10, 255, 0]),
        ([10, 265, 521, 1032], [10, 254, 255, 0, 255, 255, 0]),
        ([BLOCK - 1], [255] * ((BLOCK - 1) // 255) + [(BLOCK - 1) % 255]),
    ],
)
def test_gaps_by_hand(where, coded):
    how, data = encoding.pack_positions(positions(*where), BLOCK)
    assert how == "gaps"
    assert decompress(data, len(coded)) == bytes(coded)
    round_trip(positions(*where), BLOCK)


def test_a_bitmap_by_hand():
    """The first weight is the highest bit."""
    data = compress(bytes([0b10100000, 0b00000011, 0b10000000]))
    made = encoding.unpack_positions(data, "bitmap", 5, 17)
    assert list(made) == [0, 2, 14, 15, 16]
    keep = np.random.default_rng(0).random(4001) < 0.5
    how, data = encoding.pack_positions(np.flatnonzero(keep), 4001)
    assert how == "bitmap" and decompress(data, 501) == np.packbits(keep).tobytes()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 255, 256, 4096, BLOCK])
def test_nothing_kept_and_all_kept(length):
    how, _ = round_trip(positions(), length)
    assert how == "gaps"
    _, data = round_trip(np.arange(length, dtype=np.uint32), length)
    assert len(data) <= 20 + length // 8
    for part in (positions(0), positions(length - 1)):
        round_trip(part, length)


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_positions_round_trip(length, seed, share):
    keep = np.random.default_rng(seed).random(length) < share
    round_trip(np.flatnonzero(keep).astype(np.uint32), length)


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_gaps_of_any_size_round_trip(gaps):
    where = np.cumsum(np.array(gaps, dtype=np.int64) + 1) - 1
    length = int(where[-1]) + 1 if gaps else 1
    round_trip(where.astype(np.uint32), length)


@given(st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_both_encodings_say_the_same(length, seed):
    """Whichever is smaller is a matter of size only."""
    keep = np.random.default_rng(seed).random(length) < 0.3
    where = np.flatnonzero(keep)
    gaps = np.diff(where, prepend=-1) - 1
    coded = b"".join(b"\xff" * (gap // 255) + bytes([gap % 255]) for gap in gaps)
    by_gaps = encoding.unpack_positions(compress(coded), "gaps", len(where), length)
    packed = compress(np.packbits(keep))
    by_bits = encoding.unpack_positions(packed, "bitmap", len(where), length)
    assert list(by_gaps) == list(by_bits) == list(where)


@pytest.mark.parametrize(
    "share, how, more",
    [(0.005, "gaps", 0.03), (0.015, "gaps", 0.03), (0.06, "gaps", 0.03), (0.5, "bitmap", 0.001)],
)
def test_size_is_close_to_the_entropy(share, how, more):
    where = np.flatnonzero(np.random.default_rng(0).random(BLOCK) < share).astype(np.uint32)
    found, data = round_trip(where, BLOCK)
    assert found == how
    bound = encoding.entropy_bound(len(where), BLOCK)
    assert bound <= len(data) <= (1 + more) * bound


def test_the_entropy_bound_by_hand():
    assert encoding.entropy_bound(4, 8) == 1.0  # a bit a weight
    assert encoding.entropy_bound(1, 4) == pytest.approx(4 * 0.8112781 / 8)
    assert encoding.entropy_bound(0, 8) == encoding.entropy_bound(8, 8) == 0.0


@pytest.mark.parametrize(
    "raw, how, kept, length, sentence",
    [
        ([8], "gaps", 1, 8, "behind the end"),
        ([0, 7], "gaps", 2, 8, "behind the end"),
        ([255, 45], "gaps", 1, 300, "behind the end"),
        ([1], "gaps", 2, 8, "1 positions, 2 expected"),
        ([1, 1], "gaps", 1, 300, "2 positions, 1 expected"),
        ([1, 255], "gaps", 1, 300, "1 positions, 1 expected"),
        ([255], "gaps", 0, 300, "0 positions, 0 expected"),
        ([255, 255, 0], "gaps", 1, 300, "at most 2 expected"),
        ([0, 0, 0], "gaps", 2, 254, "at most 2 expected"),
        ([0b11100000], "bitmap", 2, 8, "3 positions, 2 expected"),
        ([0b11000000], "bitmap", 3, 8, "2 positions, 3 expected"),
        ([0b11000001], "bitmap", 2, 7, "behind the end"),
        ([0b11000000, 0], "bitmap", 2, 8, "2 bytes, 1 expected"),
        ([0b11000000], "bitmap", 2, 9, "1 bytes, 2 expected"),
    ],
)
def test_wrong_positions_are_refused(raw, how, kept, length, sentence):
    with pytest.raises(ValueError, match=sentence):
        encoding.unpack_positions(compress(bytes(raw)), how, kept, length)


# ---- blocks and values ---------------------------------------------------------------------------


def test_blocks_by_hand():
    assert encoding.blocks(1) == [(0, 1)]
    assert encoding.blocks(BLOCK) == [(0, BLOCK)]
    assert encoding.blocks(2 * BLOCK + 5) == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 5)]


@pytest.mark.parametrize("kind", ["<u2", "<u4", "i1", "<f4"])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_values_round_trip(kind, count):
    kind = np.dtype(kind)
    raw = np.random.default_rng(0).bytes(count * kind.itemsize)
    values = np.frombuffer(raw, dtype=kind)
    frames = encoding.pack_values(values)
    assert len(frames) == kind.itemsize
    made = encoding.unpack_values(frames, kind, count)
    assert made.dtype == kind and made.tobytes() == raw


def test_the_highest_byte_comes_first():
    frames = encoding.pack_values(np.array([0x0102, 0x0304], dtype="<u2"))
    assert [decompress(frame, 2) for frame in frames] == [b"\1\3", b"\2\4"]


def test_values_of_another_number_are_refused():
    frames = encoding.pack_values(np.arange(5, dtype="<u2"))
    for kept in (4, 6):
        with pytest.raises(ValueError, match=f"5 bytes, {kept} expected"):
            encoding.unpack_values(frames, np.dtype("<u2"), kept)
    with pytest.raises(ValueError, match="1 bytes a value, 2 expected"):
        encoding.unpack_values(frames[:1], np.dtype("<u2"), 5)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=200))
def test_eight_bits_are_wrong_by_half_a_step_at_most(values):
    values = np.array(values, dtype=np.float32)
    steps, scales = encoding.quantize(values)
    assert steps.dtype == np.int8 and len(steps) == len(values)
    assert scales.dtype == np.float32 and len(scales) == ceil(len(values) / 64)
    made = encoding.dequantize(steps, scales).astype(np.float64)
    # a float32 division and product come on top; below float32's normal numbers there is no step
    step = np.repeat(scales, 64)[: len(values)].astype(np.float64)
    error = np.abs(made - values)
    assert (error <= step * (0.5 + 1e-4) + 127 * 2.0**-149).all()


def test_eight_bits_by_hand():
    values = np.zeros(65, dtype=np.float32)
    values[:4], values[64] = [127.0, -1.0, 0.4, 0.6], -254.0
    steps, scales = encoding.quantize(values)
    assert list(scales) == [1.0, 2.0]
    assert list(steps[:5]) == [127, -1, 0, 1, 0] and steps[64] == -127
    assert list(encoding.dequantize(steps, scales)[[0, 1, 64]]) == [127.0, -1.0, -254.0]


# ---- zstd ----------------------------------------------------------------------------------------


def raw_frame(content, *, claimed=None, window=20, dictionary=0):
    """A zstd frame by hand, with one block that is not compressed."""
    flags = 0x80 | (1 if dictionary else 0)
    head = b"\x28\xb5\x2f\xfd" + bytes([flags, (window - 10) << 3])
    head += bytes([dictionary]) if dictionary else b""
    head += (len(content) if claimed is None else claimed).to_bytes(4, "little")
    return head + (len(content) << 3 | 1).to_bytes(3, "little") + content


def test_a_frame_by_hand():
    assert decompress(raw_frame(b"abc"), 3) == decompress(raw_frame(b"abc"), most=3) == b"abc"


UNKNOWN = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 10)
FRAMES = {
    "another size": (compress(b"abcd"), "4 bytes, 3 expected"),
    "an unknown size": (UNKNOWN, "3 expected"),
    "four gigabytes": (raw_frame(b"abc", claimed=2**32 - 1), "4294967295 bytes, 3 expected"),
    "a claim that is not kept": (raw_frame(b"abcd", claimed=3), "no intact zstd frame"),
    "a claim of too much": (raw_frame(b"ab", claimed=3), "frame"),
    "a dictionary": (raw_frame(b"abc", dictionary=7), "dictionary"),
    "a window of 64 MiB": (raw_frame(b"abc", window=26), "window"),
    "a window of 2 GiB": (raw_frame(b"abc", window=31), "window"),
    "bytes behind it": (compress(b"abc") + b"\0", "frame"),
    "two frames": (compress(b"abc") + compress(b"abc"), "frame"),
    "truncated": (compress(b"abc")[:-1], "frame"),
    "nothing": (b"", "frame"),
    "no zstd": (b"abc", "frame"),
    "a skippable frame": (b"\x50\x2a\x4d\x18\x03\0\0\0abc", "frame"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_wrong_frames_are_refused(kind):
    data, sentence = FRAMES[kind]
    with pytest.raises(ValueError, match=sentence):
        decompress(data, 3)
    if kind != "another size":
        with pytest.raises(ValueError):
            decompress(data, most=3 if kind != "an unknown size" else 2**63)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000, compress(b""), b"\x50\x2a\x4d\x18\0\0\0\0"])
def test_an_empty_frame_has_nothing_behind_it_either(extra):
    assert decompress(compress(b""), 0) == b""
    with pytest.raises(ValueError, match="frame"):
        decompress(compress(b"") + extra, 0)
    with pytest.raises(ValueError, match="frame"):
        decompress(compress(b"")[:-1], most=0)


def test_a_bomb_takes_no_memory():
    """30 kB that stand for a gigabyte: the sizes are compared first."""
    import tracemalloc

    chunk = zstandard.ZstdCompressor().compressobj(size=2**30)
    data = b"".join(chunk.compress(bytes(2**20)) for _ in range(16))  # 16 MiB of them are enough
    tracemalloc.start()
    with pytest.raises(ValueError, match="1073741824 bytes, at most 2097152 expected"):
        decompress(data, most=BLOCK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# ---- one value -----------------------------------------------------------------------------------


def bit_lists(dtype):
    top = 2 ** (8 * floats.BITS[dtype].itemsize) - 1
    return st.lists(st.tuples(st.integers(0, top), st.integers(0, 2**32 - 1)), max_size=50)


def check_exact(before, deltas, dtype):
    """before + value rounds to what float32 composition gives, or the weight is replaced by it."""
    weights = floats.to_float32(before, dtype)
    with np.errstate(all="ignore"):
        after = floats.from_float32(weights + deltas, dtype)
    fine = np.isfinite(floats.to_float32(after, dtype)) & np.isfinite(deltas) & (deltas != 0)
    before, deltas, after = before[fine], deltas[fine], after[fine]
    values, replaced = exact_values(before, after, deltas, dtype)
    numbers = floats.to_float32(values, dtype)
    assert np.isfinite(numbers).all()
    chosen = np.flatnonzero(replaced)
    kept = Kept(np.arange(len(before)), numbers, (chosen, after[chosen]), None)
    made, _ = kept.apply(before, dtype, dtype)
    assert np.array_equal(made, after)
    expected = add_delta(as_torch(before, dtype), torch.from_numpy(deltas))
    assert np.array_equal(made, as_bits(expected, dtype))
    return replaced


@every_dtype
@given(data=st.data())
@settings(max_examples=200)
def test_exact_values_give_the_weight_bit_for_bit(dtype, data):
    pairs = data.draw(bit_lists(dtype))
    before = np.array([pair[0] for pair in pairs], dtype=floats.BITS[dtype])
    deltas = np.array([pair[1] for pair in pairs], dtype=np.uint32).view(np.float32)
    check_exact(before, deltas, dtype)


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_exact_values_of_many_weights(dtype, scale):
    """Deltas of the weights' own size are where a rounded delta alone would not do."""
    draw = np.random.default_rng(0)
    before = floats.from_float32(draw.normal(0, 1, 100_000).astype(np.float32), dtype)
    deltas = (scale * draw.normal(0, 1, 100_000)).astype(np.float32)
    replaced = check_exact(before, deltas, dtype)
    assert replaced.mean() < 0.2 and (dtype != "F32" or not replaced.any())


@short_dtype
def test_exact_values_at_the_edges(dtype):
    """All sums of two numbers at the edge of the range, and around 0."""
    edge = [0x7F7F, 0x7F7E, 0xFF7F, 0xFF7E, 0x7F00, 0xFF00]
    edge = edge if dtype == "BF16" else [0x7BFF, 0x7BFE, 0xFBFF, 0xFBFE, 0x7800, 0xF800]
    bits = np.array([*edge, 0, 1, 2, 0x8000, 0x8001, 0x8002], dtype=np.uint16)
    one, two = (part.reshape(-1) for part in np.meshgrid(bits, bits))
    deltas = floats.to_float32(two, dtype)
    for factor in (1.0, 0.999, 1.001, 0.5, 2.0, 1e-3):
        with np.errstate(over="ignore"):
            check_exact(one, deltas * np.float32(factor), dtype)


def test_a_cancellation_by_hand():
    """1.0 - 0.998046875 is 2**-9 and needs the delta's ninth bit, which bfloat16 does not have.

    Rounded to 8 bits the delta is -1.0 or -0.99609375, which give 0 and 2**-8; the patched weight
    2**-9 + ... is reached from neither side, unless the difference itself is a bfloat16.
    """
    before = as_bits(torch.tensor([1.0, 1.0], dtype=torch.bfloat16), "BF16")
    deltas = np.array([-(1 - 2.0**-9), -(1 - 2.0**-8)], dtype=np.float32)
    after = floats.patched(before, deltas, "BF16")
    assert list(floats.to_float32(after, "BF16")) == [2.0**-9, 2.0**-8]
    values, replaced = exact_values(before, after, deltas, "BF16")
    assert list(replaced) == [True, False]
    assert floats.to_float32(values, "BF16")[1] == -(1 - 2.0**-8)


def test_a_rounded_delta_that_needs_its_neighbour():
    """3 + 2**-6 + 2**-12 rounds up in float32 composition; the rounded delta alone is a tie."""
    before = as_bits(torch.tensor([3.0], dtype=torch.bfloat16), "BF16")  # steps of 2**-6 there
    deltas = np.array([2.0**-7 + 2.0**-20], dtype=np.float32)
    after = floats.patched(before, deltas, "BF16")
    assert floats.to_float32(after, "BF16")[0] == 3 + 2.0**-6
    assert floats.to_float32(floats.patched(before, np.float32([2.0**-7]), "BF16"), "BF16") == 3.0
    values, replaced = exact_values(before, after, deltas, "BF16")
    assert not replaced.any()
    assert floats.to_float32(values, "BF16")[0] == 2.0**-7 * (1 + 2.0**-7)


# ---- the manifest --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small patch file."""
    root = tmp_path_factory.mktemp("format")
    return plain.patch(root / "patch.safetensors", plain.save(root / "backbone"))


@pytest.fixture(scope="module")
def text(made):
    """Its manifest, as JSON text."""
    raw = made.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["spkit_patch"]


def read(tree):
    return read_manifest(tree if isinstance(tree, bytes) else json.dumps(tree).encode())


def test_a_manifest_reads_back(text):
    manifest = read(text.encode())
    assert isinstance(manifest, Manifest) and list(manifest.tensors) == list(plain.TOUCHED)
    assert read(json.loads(text)) == manifest
    assert manifest.kept == sum(int((d != 0).sum()) for d in plain.deltas().values())
    assert manifest.weights == sum(d.numel() for d in plain.deltas().values())


def put(tree, path, value):
    *parents, last = path
    for key in parents:
        tree = tree[key]
    if value is DELETE:
        del tree[last]
    else:
        tree[last] = value


DELETE = object()
MATRIX = ("tensors", "a.weight")
BLOCK_0 = (*MATRIX, "blocks", 0)
INFINITE = "1e999 goes here"  # JSON that is written by hand
WRONG = {
    "an unknown key": (("more",), 1, r"\(more\)"),
    "an unknown key of a matrix": ((*MATRIX, "more"), 1, r"a\.weight\.more"),
    "an unknown key of a block": ((*BLOCK_0, "more"), 1, "more"),
    "a missing key": (("backbone",), DELETE, "backbone"),
    "a missing key of a matrix": ((*MATRIX, "lost"), DELETE, "lost"),
    "a missing key of a block": ((*BLOCK_0, "kept"), DELETE, "kept"),
    "another format": (("format",), "other", "it is no patch of spkit"),
    "no format": (("format",), DELETE, "it is no patch of spkit"),
    "a later version": (("version",), 2, "format version 2, this kit reads 1"),
    "a version that is a text": (("version",), "1", "format version '1', this kit reads 1"),
    "a version that is no whole number": (("version",), 1.5, "format version 1.5"),
    "no version": (("version",), DELETE, "format version None"),
    "a count that is a text": ((*MATRIX, "kept"), "12", "kept"),
    "a count that is a float": ((*MATRIX, "kept"), 12.5, "kept"),
    "a count that is a bool": ((*MATRIX, "lost"), True, "lost"),
    "a negative count": ((*MATRIX, "lost"), -1, "lost"),
    "a size below 0": ((*BLOCK_0, "positions"), -8, "positions"),
    "a size above all bounds": ((*BLOCK_0, "positions"), 2**40, "positions"),
    "a list for a matrix": (MATRIX, [], r"a\.weight"),
    "no tensors": (("tensors",), {}, "tensors"),
    "a shape of one number": ((*MATRIX, "shape"), [3072], "shape"),
    "a shape of 0": ((*MATRIX, "shape"), [0, 48], "shape"),
    "a shape of billions": ((*MATRIX, "shape"), [2**40, 2**40], "blocks for the shape"),
    "another shape": ((*MATRIX, "shape"), [10, 10], "counts do not fit together"),
    "another dtype": ((*MATRIX, "dtype"), "F64", "dtype"),
    "values of another width": ((*MATRIX, "values"), "F32", "counts do not fit together"),
    "a short digest": ((*MATRIX, "before"), "ab", "before"),
    "a digest in capitals": ((*MATRIX, "after"), "A" * 64, "after"),
    "a digest with a line end": ((*MATRIX, "after"), "a" * 64 + "\n", "after"),
    "a part without digest": ((*MATRIX, "sha256", "values"), DELETE, "digests of"),
    "a part that is unknown": ((*MATRIX, "sha256", "more"), "a" * 64, "more"),
    "revertible without originals": (("revertible",), True, "does not say the same"),
    "originals without being so": ((*MATRIX, "sha256", "originals"), "a" * 64, "fit together"),
    "kept weights that do not add up": ((*MATRIX, "kept"), 5, "do not add up"),
    "more kept than there are": ((*BLOCK_0, "kept"), 2**20, "do not add up"),
    "more lost than kept": ((*MATRIX, "lost"), 3000, "do not add up"),
    "more exceptions than kept": ((*BLOCK_0, "exceptions"), 2000, "counts do not fit together"),
    "a block too many": ((*MATRIX, "blocks"), [], "0 blocks for the shape"),
    "another encoding": ((*BLOCK_0, "encoding"), "raw", "encoding"),
    "not finite": (("error", "largest"), INFINITE, "error.largest"),
    "not finite in the method": (("method", "alpha"), INFINITE, "a finite number"),
    "not finite, deeper": (("method", "list"), [1.0, {"x": INFINITE}], "a finite number"),
    "not finite in the evaluation": (("evaluation",), [{"rate": INFINITE}], "evaluation"),
    "a tensor's name with a line end": (("tensors", "a\nb"), {}, "tensors"),
    "a tensor's name that is a path": (("tensors", "../a"), {}, "tensors"),
    "a tensor's name without letters": (("tensors", ""), {}, "tensors"),
    "a control character": (("backbone", "name"), "a\x1b[2J", "control characters"),
    "a direction mark": (("backbone", "name"), "a\u202e", "control characters"),
    "a control character in a key": (("method", "a\x07"), 1, "control characters"),
    "one in a text below": (("data", "x"), [{"y": "a\tb"}], "control characters"),
    "one in a key below": (("data", "x"), [{"y\r": 1}], "control characters"),
    "a text too long": (("backbone", "architecture"), "a" * (LONGEST_TEXT + 1), "architecture"),
    "a text too long below": (("method", "x"), ["a" * (LONGEST_TEXT + 1)], "too long"),
    "a stack of no digests": (("stack",), ["abc"], "stack"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_manifests_are_refused(kind, text):
    path, value, sentence = WRONG[kind]
    tree = json.loads(text)
    put(tree, path, value)
    raw = json.dumps(tree).replace(f'"{INFINITE}"', "1e999").encode()
    with pytest.raises(ValueError, match=sentence) as caught:
        read(raw)
    message = str(caught.value)
    assert len(message) < 2 * LONGEST_TEXT and message.isprintable()


@pytest.mark.parametrize(
    "raw, sentence",
    [
        (b"", "Expecting value"),
        (b"[1]", "it is no patch of spkit"),
        (b"null", "it is no patch of spkit"),
        (b'{"format": "spkit-patch", "format": "spkit-patch"}', "a key stands in it twice"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b'{"format": -Infinity}', "-Infinity is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff", "decode"),
    ],
)
def test_what_is_no_json_of_ours(raw, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(raw)


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_deep_nesting_is_read_or_refused_but_never_a_crash(depth, text):
    deep = "[" * depth + "]" * depth
    raw = text.replace('"method":{}', f'"method":{{"deep":{deep}}}')
    assert raw != text
    if depth == 100:
        assert read(raw.encode()).method["deep"] != []
    else:
        with pytest.raises(ValueError, match="nested too deeply|recursion|manifest is wrong"):
            read(raw.encode())


def test_the_longest_text_and_other_alphabets_are_fine(text):
    tree = json.loads(text)
    tree["method"] = {"note": "ü" * LONGEST_TEXT, "日本": [None, True, 1, 0.5, {}]}
    assert read(tree).method == tree["method"]


# ---- the header ----------------------------------------------------------------------------------


def with_header(made, change):
    """The file's bytes with a changed header text; what follows is as it was."""
    raw = made.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


HEADERS = {
    "padding": lambda text: text + b" " * 8,
    "blanks": lambda text: text.replace(b'{"__metadata__":', b'{"__metadata__": ', 1).rstrip(),
    "another dtype": lambda text: text.replace(b'"dtype":"U8"', b'"dtype":"I8"', 1),
    "a key twice": lambda text: text.replace(b'"__metadata__"', b'"x":{},"x":{},"__metadata__"', 1),
    "no metadata": lambda text: b"{}",
    "a list": lambda text: b"[]",
    "metadata without manifest": lambda text: b'{"__metadata__":{}}',
    "a manifest that is no text": lambda text: b'{"__metadata__":{"spkit_patch":{}}}',
    "nothing": lambda text: b"",
    "half a character": lambda text: b'{"__metadata__":{"spkit_patch":"\\ud800"}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_only_the_canonical_header_is_read(kind, made, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(with_header(made, HEADERS[kind]))
    with pytest.raises(SpkitError, match="other.safetensors cannot be read as a patch: "):
        PatchFile(path)


def test_the_file_is_an_ordinary_safetensors_file(made):
    from safetensors import safe_open

    with safe_open(made, framework="np") as file, PatchFile(made) as patch:
        parts = {f"{n}.{p}" for n, m in patch.manifest.tensors.items() for p in m.sha256}
        assert set(file.keys()) == parts
        assert {"a.weight.positions", "a.weight.values"} <= parts
        for name, matrix in patch.manifest.tensors.items():
            for part in matrix.sha256:
                assert len(file.get_tensor(f"{name}.{part}")) == matrix.size(part)
        assert (8 + len(header(file.metadata()["spkit_patch"].encode(), patch.manifest))) % 8 == 0


def test_lengths_that_lie(made, tmp_path):
    path = tmp_path / "other.safetensors"
    raw = made.read_bytes()
    for length in (0, 1, len(raw), 2**26 + 1, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
        with pytest.raises(SpkitError, match="other.safetensors cannot be read as a patch"):
            PatchFile(path)
    with path.open("wb") as file:  # with a hole, so that it takes no room
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**30 + 8)
    with pytest.raises(SpkitError, match="a header of 1073741824 bytes, at most 67108864"):
        PatchFile(path)


def test_what_is_no_regular_file(made, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing", "/dev/zero"):
        with pytest.raises(SpkitError, match="cannot be read as a patch"):
            PatchFile(path)
    (tmp_path / "link").symlink_to(made)
    with PatchFile(tmp_path / "link") as patch:
        patch.check()


def test_a_delta_that_only_shortening_makes_too_large_is_named(tmp_path):
    """65504 + 15.97 rounds to 65504 in float16; bfloat16 has no 15.97 but 16, which overflows."""
    weights = {"w": torch.full((2, 2), 65504.0, dtype=torch.float16)}
    folder = plain.save(tmp_path / "backbone", weights)
    delta = torch.tensor([[15.97, -64.0], [0.0, 0.0]])
    plain.patch(tmp_path / "exact", folder, {"w": delta})
    with pytest.raises(SpkitError, match="The delta of 'w' cannot be added: .*not finite in F16"):
        plain.patch(tmp_path / "short", folder, {"w": delta}, values="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "exact"]
