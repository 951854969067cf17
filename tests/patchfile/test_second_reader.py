"""A second reader of patch files, that follows docs/patch_format.md and uses no code of the kit.

Where it and `apply` disagree, the page or the kit is wrong.
"""

import hashlib
import json

import numpy as np
import plain
import pytest
import zstandard
from blake3 import blake3

from spkit.patchfile.apply import apply

UNSIGNED = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}


def split(path):
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    first = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:first]), raw[first:]


def tensor(folder, name):
    for path in folder.glob("*.safetensors"):
        header, data = split(path)
        if name in header:
            return data[slice(*header[name]["data_offsets"])]


def to_float(bits, dtype):
    if dtype == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4")


def rounded(values, dtype):
    """To the nearest, ties to even."""
    if dtype == "BF16":
        bits = values.view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).view(UNSIGNED[dtype])


def joined(planes, dtype):
    """Values of their bytes, the highest first."""
    return np.stack(planes[::-1], axis=1).reshape(-1).view(dtype)


def positions_of(raw, encoding):
    if encoding == "bitmap":
        return np.flatnonzero(np.unpackbits(raw))
    found, here = [], -1
    for byte in raw.tolist():
        here += byte
        if byte < 255:
            here += 1
            found.append(here)
    return np.array(found, dtype=np.int64)


def values_of(frames, dtype):
    if dtype == "I8":
        scales = joined(frames[1:], "<f4")
        return frames[0].view(np.int8).astype("<f4") * np.repeat(scales, 64)[: len(frames[0])]
    return to_float(joined(frames, UNSIGNED[dtype]), dtype)


def patched(path, backbone):
    """{tensor: its patched bytes}; digests are compared on the way."""
    header, data = split(path)
    text = header["__metadata__"]["spkit_patch"]
    assert hashlib.sha256(text.encode()).hexdigest() == header["__metadata__"]["spkit_patch_sha256"]
    made = {}
    for name, about in json.loads(text)["tensors"].items():
        before = tensor(backbone, name)
        assert blake3(before).hexdigest() == about["before"]
        weights = np.frombuffer(before, UNSIGNED[about["dtype"]]).copy()
        parts = {}
        for part, digest in about["sha256"].items():
            parts[part] = data[slice(*header[f"{name}.{part}"]["data_offsets"])]
            assert hashlib.sha256(parts[part]).hexdigest() == digest
        for number, block in enumerate(about["blocks"]):

            def frames(part, block=block, parts=parts):
                sizes = block.get(part, [])
                found = []
                for size in [sizes] if isinstance(sizes, int) else sizes:
                    raw, parts[part] = parts[part][:size], parts[part][size:]
                    content = zstandard.ZstdDecompressor().decompress(raw)
                    found.append(np.frombuffer(content, np.uint8))
                return found

            where = positions_of(*frames("positions"), block["encoding"]) + number * 2**21
            values = values_of(frames("values"), about["values"])
            assert len(where) == block["kept"]
            old = weights[where]
            if originals := frames("originals"):
                assert (joined(originals, UNSIGNED[about["dtype"]]) == old).all()
            new = rounded(to_float(old, about["dtype"]) + values, about["dtype"])
            new[values == 0] = old[values == 0]
            if replaced := frames("replaced"):
                new[replaced[0].view("<u4")] = replaced[1].view(new.dtype)
            weights[where] = new
        made[name] = weights.tobytes()
        assert blake3(made[name]).hexdigest() == about["after"]
    return made


def canonical(path):
    """The header that belongs to the manifest."""
    header, _ = split(path)
    text = header["__metadata__"]["spkit_patch"]
    digest = hashlib.sha256(text.encode()).hexdigest()
    tree, end = {"__metadata__": {"spkit_patch": text, "spkit_patch_sha256": digest}}, 0
    for name, about in json.loads(text)["tensors"].items():
        for part in ("positions", "values", "replaced", "originals"):
            sizes = [block.get(part, []) for block in about["blocks"]]
            size = sum(n if isinstance(n, int) else sum(n) for n in sizes)
            if part in about["sha256"]:
                place = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
                tree[f"{name}.{part}"], end = place, end + size
    text = json.dumps(tree, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@pytest.mark.parametrize("share", [0.002, 0.3], ids=["gaps", "bitmap"])
@pytest.mark.parametrize("values", ["exact", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_makes_the_same_bits_as_apply(dtype, values, share, tmp_path):
    shapes = {"a.weight": (1100, 2000), "b.weight": (90, 70), "c.weight": (1, 3 * 2**20)}
    weights = plain.weights(shapes, dtype)
    deltas = plain.deltas(weights, list(shapes), share)
    deltas["c.weight"][:, : 2**21] = 0  # a block that keeps nothing
    backbone = plain.save(tmp_path / "räuber", weights)
    options = {"values": values, "revertible": True}
    patch = plain.patch(tmp_path / "patch", backbone, deltas, plain.About("räuber"), **options)
    apply(patch, backbone, tmp_path / "made", progress=False)
    for name, data in patched(patch, backbone).items():
        assert data == tensor(tmp_path / "made", name), name
    raw = patch.read_bytes()
    assert canonical(patch) == raw[8 : 8 + int.from_bytes(raw[:8], "little")]
