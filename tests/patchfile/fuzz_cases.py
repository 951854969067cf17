"""What the fuzzer tries: valid patches and backbones, and everything that can be wrong with them.

    valid_patches()             small ones, of every mode, dtype and encoding
    make_case(seed, number)     one of them, with something wrong in it

Bits, lengths and splices; fields of the manifest, with all sizes and digests made anew so that they
match; zstd frames that lie; values that are not finite; shards, indices and configurations of the
backbone. What this file does not do: run anything (fuzz_patchfile.py).
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import zstandard
from blake3 import blake3

from spkit.patchfile import encoding, file, floats, manifest
from spkit.patchfile.make import About, make_patch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PARTS = ("positions", "values", "replaced", "originals")
NOWHERE = "/spkit-fuzz-nowhere"  # an absolute path that no case may make

Files = dict[str, bytes | str]  # {name: content, or one of SPECIAL}
SPECIAL = ("folder", "dangling", "fifo", "outside", "sparse")


# ---- valid patches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valid:
    """An intact patch in its parts. frames: {tensor: {part: [of each block its frames]}}."""

    name: str
    backbone: Files
    tree: dict
    frames: dict[str, dict[str, list[list[bytes]]]]


def _bits(random: Random, count: int, dtype: str) -> np.ndarray:
    values = np.array([random.uniform(-1, 1) for _ in range(count)], dtype=np.float32)
    return floats.from_float32(values, dtype)


def shard(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    tree, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        tree[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    return join(json.dumps(tree).encode(), body)


def join(text: bytes, body: bytes) -> bytes:
    """A safetensors file of a header and what follows it."""
    return struct.pack("<Q", len(text)) + text + body


def split(data: bytes) -> tuple[bytes, bytes]:
    """The inverse."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def _valid(
    folder: Path, name: str, dtypes: str, share: float, values="exact", revertible=False, large=0
) -> Valid:
    """dtypes: of the three matrices; share: of their weights kept; large: weights of the first."""
    random = Random(name)
    shapes = {
        "layers.0.q.weight": [8, 48],
        "layers.0.v.weight": [16, 16],
        "layers.1.q.weight": [5, 7],
    }
    if large:
        shapes["layers.0.q.weight"] = [large // 1024, 1024]
    tensors, deltas = {}, {}
    for (tensor, shape), dtype in zip(shapes.items(), dtypes.split(), strict=True):
        count = shape[0] * shape[1]
        drawn = min(count, 4096)
        bits = np.resize(_bits(random, drawn, dtype), count)
        weights = floats.to_float32(bits, dtype)
        delta = np.zeros(count, dtype=np.float32)
        for position in random.sample(range(count), min(int(share * count), 20_000)):
            # some take nearly everything of a weight away: 16 bits cannot always say the difference
            near = random.random() < 0.3
            factor = -1.0 - 0.3 * random.random()
            delta[position] = factor * weights[position] if near else random.uniform(-0.1, 0.1)
        if name == "single" and shape[0] == 16:  # not patched, and too large for 16 bits
            bits[np.flatnonzero(delta == 0)[:4]] = floats.from_float32(np.float32([1e5]), dtype)
        tensors[tensor] = (dtype, shape, bits.tobytes())
        deltas[tensor] = delta.reshape(shape)
    deltas["layers.1.q.weight"] *= 0  # nothing kept
    other = _bits(random, 40, "F32").tobytes()
    rest = {"norm.weight": ("F32", [40], other), "steps": ("I64", [2], b"\1" * 16)}
    rest["empty"] = ("F32", [0, 3], b"")
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "torch_dtype": "float32"}
    backbone: Files = {"config.json": json.dumps(config).encode(), "LICENSE": b"as you like\n"}
    if revertible:
        backbone[SINGLE] = shard(tensors | rest)
    else:
        first, second = list(tensors)[:1], list(tensors)[1:]
        one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        backbone[one] = shard({n: tensors[n] for n in first})
        backbone[two] = shard({n: tensors[n] for n in second} | rest)
        where = dict.fromkeys(first, one) | dict.fromkeys([*second, *rest], two)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        backbone[INDEX] = json.dumps(index).encode()
    write(folder, backbone)
    about = About(
        backbone="example/llama",
        revision="main",
        method={"name": "safepatching", "overall_rate": 0.3, "seeds": [0, 1]},
        data={"sha256": "0" * 64, "rows": 32},
        evaluation=[{"metric": "asr", "rate": 0.25, "n": 4}],
    )
    path = folder.parent / f"{folder.name}.safetensors"
    make_patch(folder, deltas, path, about, values=values, revertible=revertible, progress=False)
    text, body = split(path.read_bytes())
    tree = json.loads(json.loads(text)["__metadata__"]["spkit_patch"])
    tree["versions"] = {"spkit": "0"}  # the same on every machine
    path.unlink()
    shutil.rmtree(folder)
    frames: dict[str, dict[str, list[list[bytes]]]] = {}
    end = 0
    for tensor, matrix in tree["tensors"].items():
        frames[tensor] = {}
        for part in (part for part in PARTS if part in matrix["sha256"]):
            frames[tensor][part] = []
            for block in matrix["blocks"]:
                sizes = block[part] if part != "positions" else [block[part]]
                found = []
                for size in sizes if isinstance(sizes, list) else []:
                    found.append(body[end : end + size])
                    end += size
                frames[tensor][part].append(found)
    assert end == len(body)
    return Valid(name, backbone, tree, frames)


@cache
def valid_patches() -> list[Valid]:
    """Every mode and dtype, gaps and bitmaps, replaced weights, one matrix of two blocks (last)."""
    with tempfile.TemporaryDirectory(prefix="spkit-fuzz-") as root:
        return [
            _valid(Path(root, "0"), "gaps", "BF16 BF16 BF16", 0.03),
            _valid(Path(root, "1"), "bitmap", "BF16 BF16 BF16", 0.5, revertible=True),
            _valid(Path(root, "2"), "half", "F16 F16 F16", 0.3, revertible=True),
            _valid(Path(root, "3"), "single", "F32 F32 F32", 0.2),
            _valid(Path(root, "4"), "rounded", "F32 BF16 F32", 0.3, "bfloat16"),
            _valid(Path(root, "5"), "bytes", "BF16 F16 F32", 0.4, "int8"),
            _valid(Path(root, "6"), "back", "F16 BF16 F32", 0.2, "int8", revertible=True),
            _valid(Path(root, "7"), "mixed", "BF16 F16 F32", 0.6, revertible=True),
            _valid(Path(root, "8"), "blocks", "BF16 BF16 F16", 0.005, large=encoding.BLOCK + 4096),
        ]


def write(folder: Path, files: Files) -> None:
    """A folder with these files, which may be no ordinary ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "dangling":
            path.symlink_to("nowhere")
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "outside":
            path.symlink_to(Path("..", "outside", "bait.safetensors"))
        else:  # more than any memory, and nothing on the disk
            path.touch()
            os.truncate(path, 1 << 42)


# ---- a patch from its parts ----------------------------------------------------------------------


def fit(tree: dict, frames: dict) -> None:
    """Sizes and digests of the frames as they are now, into the manifest."""
    for name, parts in frames.items():
        matrix = tree["tensors"][name]
        matrix["sha256"] = {}
        for part in PARTS:
            found = parts.get(part, [])
            if not any(found):
                continue
            data = b"".join(b"".join(block) for block in found)
            matrix["sha256"][part] = hashlib.sha256(data).hexdigest()
            for block, of in zip(matrix["blocks"], found, strict=True):
                sizes = [len(frame) for frame in of]
                if part == "positions":
                    block[part] = sizes[0]
                elif sizes or part == "values":
                    block[part] = sizes
        for block in matrix["blocks"]:
            block.pop("exceptions", None) if not block.get("replaced") else None


def heal(tree: dict, frames: dict, backbone: Files) -> None:
    """The digest `after` that belongs to changed values, where they can be applied at all."""
    weights = {}
    for content in backbone.values():
        if isinstance(content, bytes) and content[8:9] == b"{":
            text, body = split(content)
            for name, about in json.loads(text).items():
                if name in tree["tensors"]:
                    weights[name] = body[slice(*about["data_offsets"])]
    for name, record in tree["tensors"].items():
        try:
            matrix = manifest.Matrix.model_validate(record)
            bits = np.frombuffer(bytearray(weights[name]), dtype=floats.BITS[matrix.dtype])
            lost = 0
            for i, (block, place) in enumerate(
                zip(matrix.blocks, encoding.blocks(matrix.weights), strict=True)
            ):
                of = {
                    part: found[i]
                    for part, found in frames[name].items()
                    if part in record["sha256"]
                }
                kept = file._decode(of, block, matrix, place[1])
                part = bits[place[0] : sum(place)]
                part[kept.positions], n = kept.apply(
                    part[kept.positions], matrix.dtype, matrix.dtype
                )
                lost += n
            record["after"], record["lost"] = blake3(bits).hexdigest(), lost
        except Exception:  # whatever is wrong with it is for the run to find
            continue


def _sizes(block: dict, part: str) -> list[int]:
    sizes = block.get(part, [])
    return [sizes] if part == "positions" else sizes


def assemble(tree, body: bytes, raw: Iterable[str] = (), fill: bool = True) -> bytes:
    """A patch file around any manifest, with the header that belongs to it.

    raw: what stands instead of the placeholders "@0", "@1" in the manifest's JSON. fill: cut or
    lengthen the data to what the manifest says, if that is not more than 1 MiB.
    """
    text = tree if isinstance(tree, str) else json.dumps(tree, separators=(",", ":"))
    for i, part in enumerate(raw):
        text = text.replace(f'"@{i}"', part)
    header = {"__metadata__": {"spkit_patch": text, "spkit_patch_sha256": _sha256(text)}}
    end = 0
    try:
        for name, matrix in tree["tensors"].items():
            for part in (part for part in PARTS if part in matrix["sha256"]):
                size = sum(sum(_sizes(block, part)) for block in matrix["blocks"])
                about = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
                header[f"{name}.{part}"] = about
                end += size
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        pass  # no such header belongs to it
    if fill and isinstance(end, int) and 0 <= end <= 2**20 + len(body):
        body = body[:end].ljust(end, b"\0")
    head = json.dumps(header, separators=(",", ":")).encode()
    return join(head + b" " * (-len(head) % 8), body)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def body_of(tree: dict, frames: dict) -> bytes:
    """The frames in the file's order."""
    return b"".join(
        b"".join(block)
        for name in tree["tensors"]
        for part in PARTS
        for block in frames[name].get(part, [])
    )


# ---- what can be wrong: bytes --------------------------------------------------------------------


def mutate_bytes(random: Random, data: bytes, other: bytes) -> bytes:
    """One or a few changes that know nothing of the format."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        at = random.randrange(len(data) + 1)
        near = min(len(data), at + random.choice([1, 2, 8, 100, 1000]))
        match random.randrange(9):
            case 0:
                for _ in range(random.choice([1, 1, 2, 8, 64])):
                    if data:
                        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = random.randbytes(random.choice([1, 2, 8, 100, 4096]))
            case 3:
                del data[at:near]
            case 4:
                data[at:near] = bytes([random.choice([0, 255, 34, 123, 32])]) * (near - at)
            case 5:
                data[at:near] = data[random.randrange(len(data) + 1) :][: near - at]
            case 6:
                data[at:] = other[random.randrange(len(other)) :]
            case 7:
                length = int.from_bytes(data[:8], "little")
                data[:8] = struct.pack("<Q", random.choice(_lengths(length)))
            case 8:
                data += random.choice([b"\0", b"\0" * 8, bytes(data), other])
    return bytes(data)


def _lengths(length: int) -> list[int]:
    around = [length + n for n in (-8, -1, 1, 8) if 0 <= length + n < 2**64]
    return [0, 1, 2, 7, 8, *around, 2**20, 2**31, 2**32, 2**63 - 8, 2**63, 2**64 - 8, 2**64 - 1]


def mutate_header(random: Random, data: bytes, other: bytes) -> bytes:
    """The header as text or tree, its length right."""
    text, body = split(data)
    tree = json.loads(text)
    match random.randrange(8):
        case 0:
            return join(nonsense(random).encode(errors="surrogatepass"), body)
        case 1:
            at = random.randrange(len(text))
            return join(text[:at] + nonsense(random).encode(errors="replace") + text[at:], body)
        case 2:
            code = random.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])
            return join(text.decode().encode(code), body)
        case 3:  # white space is JSON, too
            return join(json.dumps(tree, indent=random.choice([0, 1, 4])).encode(), body)
        case 4:
            padding = b" " * random.choice([1, 8, 100_000])
            return join(random.choice([padding + text, text + padding]), body)
        case 5:  # a second entry of the same name
            key = random.choice(list(tree))
            again = f",{json.dumps(key)}:{json.dumps(tree[key])}}}"
            return join(text.rstrip()[:-1] + again.encode(), body)
        case 6:
            names = random.sample(list(tree), len(tree))
            return join(json.dumps({name: tree[name] for name in names}).encode(), body)
        case _:
            raw: list[str] = []
            mutate_tree(random, tree, raw)
            text = json.dumps(tree)
            for i, part in enumerate(raw):
                text = text.replace(f'"@{i}"', part)
            return join(text.encode(errors="replace"), body)


def nonsense(random: Random) -> str:
    """JSON that a careless reader would choke on, or no JSON."""
    depth = random.choice([3, 100, 300, 480, 700, random.randrange(900, 1000), 1500, 100_000])
    return random.choice(
        [
            "[" * depth + "]" * depth,
            '{"a":' * depth + "1" + "}" * depth,
            '[{"a":' * (depth // 2) + "1" + "}]" * (depth // 2),
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "1" + "0" * random.choice([18, 19, 300, 4200, 5000]),
            "-" + "9" * 40,
            "0." + "1" * 10_000,
            "1" * 300 + "e-300",
            '"\\u0000"',
            '"\\ud800"',
            '"\\u001b[31m\\u202e"',
            '"\ud800"',
            "true",
            "null",
            "-0",
            "01",
            "tru",
            '"',
            "{}",
            "[]",
            '1,"kept":1',
            '{"a":1,"a":2}',
            "[" + "[]," * 20_000 + "[]]",
            "[" + ("1" + "0" * 4000 + ",") * 20 + "1]",
            "[" + "4611686018427387904," * 1000 + "0]",
        ]
    )


# ---- what can be wrong: the manifest -------------------------------------------------------------

STRANGE_NAMES = ["../../x", "../outside/bait", f"{NOWHERE}/x", "..", ".", "", "a" * 200, "a" * 300]
STRANGE_NAMES += [
    "a" * 5000,
    "x\0y",
    "x\ny",
    "\x1b[2Jx",
    "\u202ex",
    "x\\..\\y",
    "__metadata__",
    "ä",
]
STRANGE_NAMES += ["layers.0.q.weight", "layers.0.q.weight.positions", "norm.weight", "x\n", "C:\\x"]
NUMBERS = [-1, 0, 1, 2, 255, 256, 65536, 2**21, 2**21 + 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**53]
NUMBERS += [2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -(2**64)]
OTHERS = [True, False, None, 0.5, -0.5, 1.0, 1e308, -0.0, "BF16", "F16", "F32", "I8", "F64", "U8"]
OTHERS += ["exact", "int8", "gaps", "bitmap", "0" * 64, "f" * 64, "A" * 64, "0" * 64 + "\n"]
OTHERS += [[], {}, [[]], [0], [1, 2], {"a": 1}, {"": {}}, {"\x1b[31m": 1}, [None], "x" * 3000]


def places(tree) -> Iterator[tuple[dict | list, str | int]]:
    """(container, key) of everything in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def strange(random: Random, value, raw: list[str]):
    """Another value for one in a JSON tree."""
    if type(value) is int and random.random() < 0.5:
        n = random.choice([1, -1, 1, -1, 7, 8, 64])
        return random.choice([value + n, value * 2, value // 2, -value, float(value), str(value)])
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return copy.deepcopy(random.choice(OTHERS))
    if kind < 8:
        return random.choice(STRANGE_NAMES)
    raw.append(nonsense(random))
    return f"@{len(raw) - 1}"


def mutate_tree(random: Random, tree, raw: list[str]) -> None:
    """Change one or a few places of a JSON tree."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        all_places = list(places(tree))
        if not all_places:
            return
        where, key = random.choice(all_places)
        match random.randrange(10):
            case 0:
                where.pop(key)
            case 1 if isinstance(where, dict):
                where[random.choice([*STRANGE_NAMES, "kept", "unknown"])] = where.pop(key)
            case 2 if isinstance(where, dict):
                where[random.choice([*STRANGE_NAMES, "unknown"])] = strange(random, 1, raw)
            case 3:
                other, name = random.choice(all_places)
                where[key] = copy.deepcopy(other[name])
            case 4 if isinstance(where, list):
                where.insert(key, copy.deepcopy(where[key]))
            case 5 if isinstance(where, list):
                where += copy.deepcopy(where) * random.choice([1, 1, 10])
            case _:
                where[key] = strange(random, where[key], raw)


def mutate_manifest(random: Random, tree: dict, frames: dict, raw: list[str]) -> None:
    """Change some fields so that they still fit together, as far as that goes."""
    name = random.choice(list(tree["tensors"]))
    matrix = tree["tensors"][name]
    block = random.choice(matrix["blocks"])
    match random.randrange(12):
        case 0:  # a shape with as many blocks as it needs
            rows, columns = random.choice(
                [(1, 1), (2**21, 1), (1, 2**21 + 1), (2**11, 2**12), (3, 2**21), (2**40, 1)]
                + [(2**20, 2**20), (2**40, 2**40), (1, 2**40 + 1), (48, 8), (384, 1), (0, 5)]
            )
            matrix["shape"] = [rows, columns]
            count = min(-(-rows * columns // encoding.BLOCK), random.choice([8, 8, 300]))
            resize(matrix, frames[name], count, random.choice(["copy", "empty"]))
        case 1:
            n = random.choice([1, -1, 100, -100, 2**21])
            block["kept"] += n
            matrix["kept"] += n
        case 2:
            matrix["lost"] = random.choice([0, matrix["kept"], matrix["kept"] + 1])
        case 3:
            matrix["dtype"] = random.choice(["BF16", "F16", "F32"])
        case 4:
            matrix["values"] = random.choice(["BF16", "F16", "F32", "I8"])
        case 5:
            block["encoding"] = "gaps" if block["encoding"] == "bitmap" else "bitmap"
        case 6:
            block["exceptions"] = random.choice([0, 1, block["kept"], block["kept"] + 1, 2**21])
            if not block.get("replaced"):
                block["replaced"] = [0, 0]
        case 7:
            tree["revertible"] = not tree["revertible"]
            for part in tree["tensors"].values() if random.random() < 0.5 else []:
                part["sha256"].pop("originals", None)
                for one in part["blocks"]:
                    one.pop("originals", None)
        case 8:  # under another name, in the same place
            new = random.choice(STRANGE_NAMES)
            tree["tensors"] = {new if n == name else n: m for n, m in tree["tensors"].items()}
        case 9:
            tree["tensors"] = dict(random.sample(list(tree["tensors"].items()), 3))
        case 10:
            matrix[random.choice(["before", "after"])] = random.choice(["0" * 64, "g" * 64, "0"])
        case 11:
            raw.append(f'{json.dumps(matrix)},"{name}":{json.dumps(matrix)}')
            tree["tensors"][name] = f"@{len(raw) - 1}"


def resize(matrix: dict, frames: dict, count: int, how: str) -> None:
    """Another number of blocks: copies of the first, or ones in which nothing is kept."""
    block = matrix["blocks"][0]
    if how == "empty":
        nothing = encoding.compress(b"")
        block = {"kept": 0, "encoding": "gaps"}
        for part, found in frames.items():
            frames[part] = [[nothing] * len(found[0]) if part != "replaced" else []] * count
    else:
        for part, found in frames.items():
            frames[part] = [found[0]] * count
    matrix["blocks"] = [copy.deepcopy(block) for _ in range(count)]
    matrix["kept"] = block["kept"] * count
    matrix["lost"] = 0


def many_blocks(tree: dict, frames: dict) -> None:
    """The longest header that is read: hundreds of thousands of blocks."""
    name = next(iter(tree["tensors"]))
    matrix = tree["tensors"][name]
    matrix["shape"] = [120_000, encoding.BLOCK]
    frames[name].pop("replaced", None)
    resize(matrix, frames[name], 120_000, "empty")


def content_of(frame: bytes) -> bytes:
    """What an intact frame holds; nothing for another one."""
    try:
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=2**24)
    except zstandard.ZstdError:
        return b""


# ---- what can be wrong: frames -------------------------------------------------------------------


def zstd_frame(
    blocks: Iterable[tuple[int, int, bytes]],
    size: int | None,
    *,
    window: int | None = None,
    dictionary: int = 0,
    checksum: bool = False,
) -> bytes:
    """A zstd frame by hand. blocks: (0 raw, 1 repeat, 2 packed; size; data); size: what it claims.

    window: the exponent, None: as large as the content (then the size is always written).
    """
    code = 0 if size is None else 3
    about = code << 6 | (window is None) << 5 | checksum << 2 | (3 if dictionary else 0)
    data = b"\x28\xb5\x2f\xfd" + bytes([about])
    if window is not None:
        data += bytes([(window - 10) << 3])
    if dictionary:
        data += struct.pack("<I", dictionary)
    if size is not None:
        data += struct.pack("<Q", size)
    elif window is None:
        data += b"\0"
    blocks = list(blocks)
    for i, (kind, count, content) in enumerate(blocks):
        head = (i == len(blocks) - 1) | kind << 1 | count << 3
        data += head.to_bytes(3, "little") + content
    return data + (b"\0" * 4 if checksum else b"")


def bomb(size: int, claim: int | None, window: int | None = 17) -> bytes:
    """`size` zeros in a frame of a 32,000th of that, which claims to hold `claim` bytes."""
    block = 1 << 17
    count = max(1, size // block)
    return zstd_frame([(1, min(size, block), b"\0")] * count, claim, window=window)


def strange_frame(random: Random, content: bytes, frame: bytes) -> bytes:
    """A frame that lies about itself, or holds something else."""
    size, raw = len(content), [(0, len(content), content)]
    gigabyte = 2**30
    packed = zstandard.ZstdCompressor
    claims = [None, 0, size, size + 1, 2**21, 2**32, 2**62, 2**64 - 1, 2**64 - 2]
    return random.choice(
        [
            lambda: bomb(gigabyte, random.choice([*claims, gigabyte])),
            lambda: bomb(gigabyte, random.choice([*claims, gigabyte]), None),
            lambda: zstd_frame([(1, 2**17, b"\0")], random.choice(claims), window=17),
            lambda: zstd_frame(raw, random.choice(claims), window=random.randrange(10, 42)),
            lambda: zstd_frame(raw, size, window=random.randrange(10, 42)),
            lambda: zstd_frame(raw, size, dictionary=random.choice([1, 2**32 - 1])),
            lambda: zstd_frame(raw, size, checksum=True),
            lambda: zstd_frame([(random.choice([2, 3]), size, content)], size),
            lambda: zstd_frame([(0, 0, b"")] * 1000 + raw, size),
            lambda: zstd_frame([(1, size, b"\xff")], size),
            lambda: zstd_frame([(1, size, b"\0")], size),
            lambda: packed(write_content_size=False).compress(content),
            lambda: packed(write_checksum=True).compress(content),
            lambda: packed(level=19).compress(content),
            lambda: frame + frame,
            lambda: frame + encoding.compress(b""),
            lambda: frame + random.randbytes(random.choice([1, 3, 100])),
            lambda: frame[: random.randrange(len(frame))],
            lambda: struct.pack("<II", 0x184D2A50 + random.randrange(16), 4) + b"skip",
            lambda: struct.pack("<II", 0x184D2A50, 4) + b"skip" + frame,
            lambda: b"",
            lambda: content,
            lambda: random.randbytes(random.choice([1, 4, 9, 100])),
            lambda: mutate_bytes(random, frame, frame),
            lambda: encoding.compress(mutate_bytes(random, content or b"\0", b"\xff" * 8)),
            lambda: encoding.compress(content + b"\0" * random.choice([1, 255, 2**20])),
            lambda: encoding.compress(content[:-1]),
            lambda: encoding.compress(bytes(len(content))),
            lambda: encoding.compress(b"\xff" * len(content)),
            lambda: encoding.compress(random.randbytes(len(content))),
        ]
    )()


WORST = {  # bits that are no ordinary numbers: infinite, NaN, signalling, largest, smallest, -0
    2: [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0x7F7F, 0x7BFF, 1, 0x8000],
    4: [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000000]
    + [0x477FF000, 0x47800000, 0x7F000000],
}


def mutate_frames(random: Random, tree: dict, frames: dict) -> None:
    """Change what one frame, or one block, holds."""
    name = random.choice(
        [n for n in frames for _ in range(1 + 5 * (tree["tensors"][n]["kept"] > 0))]
    )
    matrix, parts = tree["tensors"][name], frames[name]
    number = random.randrange(len(matrix["blocks"]))
    block = matrix["blocks"][number]
    part = random.choice([part for part in parts if parts[part][number]])
    found = parts[part][number] = list(parts[part][number])
    contents = [content_of(frame) for frame in found]
    if random.random() < 0.4:
        i = random.randrange(len(found))
        found[i] = strange_frame(random, contents[i], found[i])
    elif part == "positions":
        found[0] = _strange_positions(random, matrix, block, found[0])
    elif part == "replaced":
        order = np.frombuffer(contents[0], dtype="<u4").copy()
        bits = np.frombuffer(contents[1], dtype=f"<u{len(contents[1]) // len(order)}").copy()
        at = random.randrange(len(order))
        match random.randrange(4):
            case 0:
                order[at] = random.choice([0, block["kept"], 2**31, 2**32 - 1, order[0]])
            case 1:
                order = order[::-1].copy()
            case 2:
                order = np.repeat(order[:1], len(order))
            case _:
                bits[at] = random.choice(WORST[bits.itemsize])
        found[:] = [encoding.compress(order.tobytes()), encoding.compress(bits.tobytes())]
    else:
        begin = 1 if part == "values" and matrix["values"] == "I8" else 0  # behind the integers
        columns = [np.frombuffer(content, dtype=np.uint8) for content in contents[begin:]]
        numbers = np.stack(columns[::-1], axis=1).copy().view(f"<u{len(columns)}").reshape(-1)
        for _ in range(random.choice([1, 1, 3])):
            if len(numbers):
                worst = random.choice(WORST[numbers.itemsize])
                numbers[random.randrange(len(numbers))] = worst
        found[begin:] = encoding.pack_values(numbers)


def _strange_positions(random: Random, matrix: dict, block: dict, frame: bytes) -> bytes:
    """Out of order, out of range, too many, too few."""
    rows, columns = matrix["shape"]
    length = min(rows * columns, encoding.BLOCK)
    if block["encoding"] == "bitmap":
        bits = np.frombuffer(content_of(frame), dtype=np.uint8).copy()
        if random.random() < 0.5:
            bits[-1] |= random.choice([1, 3, 7, 255])
        else:
            bits[random.randrange(len(bits))] = random.choice([0, 255])
        return encoding.compress(bits)
    gaps = bytearray(content_of(frame))
    at = random.randrange(len(gaps) + 1)
    match random.randrange(5):
        case 0:
            gaps[at:at] = b"\xff" * random.choice([1, 2, 10, length // 255, 2**21])
        case 1:
            gaps[at : at + 1] = b"\xfe"
        case 2:
            gaps += b"\xff"
        case 3:
            gaps[at:at] = b"\0"
        case 4:
            gaps = bytearray(b"\xfe" * len(gaps))
    return encoding.compress(gaps)


# ---- what can be wrong: the backbone -------------------------------------------------------------

STRANGE_FILES = ["../outside/bait.safetensors", f"{NOWHERE}.safetensors", "x.safetensors", "..", ""]
STRANGE_FILES += [
    "a/../b.safetensors",
    "x\0.safetensors",
    "x\\y.safetensors",
    "config.json",
    "LICENSE",
]
STRANGE_FILES += ["a" * 300 + ".safetensors", "\ud800.safetensors", ".safetensors", "~.safetensors"]
STRANGE_FILES += [
    "x\n.safetensors",
    "./model.safetensors",
    "model.bin",
    ".",
    "/",
    "\x1b[2J.safetensors",
]


def mutate_backbone(random: Random, files: Files, other: Files) -> None:
    """One file of the checkpoint is wrong, or not there."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    shard = random.choice(shards)
    data = files[shard]
    if not isinstance(data, bytes):
        return
    theirs = next(content for name, content in other.items() if name.endswith(".safetensors"))
    match random.randrange(13):
        case 0 | 1:
            files[shard] = mutate_bytes(random, data, theirs)
        case 2:
            files[shard] = mutate_header(random, data, theirs)
        case 3 | 4:
            files[shard] = _strange_shard(random, data)
        case 5:
            files.pop(shard)
            if random.random() < 0.7:
                files[shard] = random.choice(SPECIAL)
        case 6:
            files["config.json"] = _strange_json(random, files["config.json"])
        case 7:
            name = random.choice(["config.json", INDEX, "LICENSE"])
            files.pop(name, None)
            if random.random() < 0.8:
                files[name] = random.choice(
                    [s for s in SPECIAL if s != "sparse" or name != "LICENSE"]
                )
        case 8 | 9 if INDEX in files:
            index = json.loads(files[INDEX]) if isinstance(files[INDEX], bytes) else {}
            names = list(index.get("weight_map", {}))
            for _ in range(random.choice([1, 1, 2])):
                if names:
                    wrong = random.choice([*STRANGE_FILES, *shards, *OTHERS])
                    index["weight_map"][random.choice(names)] = wrong
            if random.random() < 0.3:
                index["weight_map"][random.choice(STRANGE_NAMES)] = random.choice(shards)
            files[INDEX] = json.dumps(index).encode(errors="replace")
        case 10:
            content = files.get(INDEX, b'{"metadata":{"total_size":1},"weight_map":{}}')
            files[INDEX] = _strange_json(random, content)
        case 11:  # the same tensor in two shards, not the same in both
            if len(shards) > 1:
                _repeat(random, files, shards)
        case _:
            name = random.choice(
                ["..x", "x\ny", "\x1b[2J", "a" * 250, "pytorch_model.bin", "x.pkl"]
            )
            name = random.choice([name, ".tmp-target", "spkit-journal.jsonl", "tokenizer.json"])
            files[name] = random.choice([b"", b"x" * 100, *SPECIAL[:4]])


def _strange_json(random: Random, content) -> bytes:
    if not isinstance(content, bytes):
        content = b"{}"
    raw: list[str] = []
    tree = json.loads(content) if content.startswith(b"{") else {}
    match random.randrange(3):
        case 0:
            return nonsense(random).encode(errors="surrogatepass")
        case 1:
            return mutate_bytes(random, content, content)
        case _:
            mutate_tree(random, tree, raw)
    text = json.dumps(tree)
    for i, part in enumerate(raw):
        text = text.replace(f'"@{i}"', part)
    return text.encode(errors="surrogatepass")


def _strange_shard(random: Random, data: bytes) -> bytes:
    """Another shape or dtype, with the bytes for it; other weights; names that were never meant."""
    text, body = split(data)
    tree = json.loads(text)
    names = [name for name in tree if name != "__metadata__"]
    name = random.choice(names)
    match random.randrange(6):
        case 0:
            shape = tree[name]["shape"]
            tree[name]["shape"] = random.choice([shape[::-1], [*shape, 1], [1, *shape], [0], []])
        case 1:
            width = {"BF16": ["F16", "I16"], "F16": ["BF16"], "F32": ["I32", "F64"]}
            tree[name]["dtype"] = random.choice(width.get(tree[name]["dtype"], ["U8", "F4", "x"]))
        case 2 if body:
            at = random.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << random.randrange(8)]) + body[at + 1 :]
        case 3:  # numbers that are not finite
            body = body[: len(body) // 2] + b"\xff" * (len(body) - len(body) // 2)
        case 4:
            tree = {random.choice(STRANGE_NAMES) if n == name else n: a for n, a in tree.items()}
        case _:
            tree = {n: a for n, a in tree.items() if n != "__metadata__"}
            wrong = [None, [], "x", {"x": 1}, {"format": "pt", "x": "\x1b"}, "@0"]
            tree["__metadata__"] = random.choice(wrong)
    made = json.dumps(tree).replace('"@0"', nonsense(random))
    return join(made.encode(errors="replace"), body)


def _repeat(random: Random, files: Files, shards: list[str]) -> None:
    first, second = (split(files[name]) for name in random.sample(shards, 2))
    tree, new = json.loads(first[0]), json.loads(second[0])
    name = random.choice([name for name in new if name != "__metadata__"])
    size = len(first[1])
    count = random.choice([1, 2, 3, 1000])
    kinds = [("F32", [count, 1], 4 * count), ("BF16", [2, count], 4 * count)]
    about = new[name]
    begin, end = about["data_offsets"]
    kinds += [(about["dtype"], about["shape"], end - begin)] * 2
    dtype, shape, width = random.choice(kinds)
    data = (second[1][begin:end] * (1 + width // max(1, end - begin)))[:width].ljust(width, b"\0")
    tree[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + width]}
    whose = next(n for n in shards if files[n] == join(*first))
    files[whose] = join(json.dumps(tree).encode(), first[1] + data)


# ---- a case --------------------------------------------------------------------------------------


@dataclass
class Case:
    """One file to try. checkpoint: for verify, "patched", "backbone", "result" or None.

    patience: how many times longer than others it may take. leftover: what lies where the
    temporary folder will be.
    """

    what: str
    patch: bytes | str
    backbone: Files
    intact: bool = False
    changed: bool = False  # the backbone
    valid: int = 0
    dtype: str | None = None
    write: bool = False
    overwrite: bool = False
    checkpoint: str | None = None
    patience: int = 1
    leftover: str = ""
    findings: list[str] = field(default_factory=list)


def make_case(seed: int, number: int) -> Case:
    """The case of this number."""
    random = Random(f"{seed}/{number}")
    patches = valid_patches()
    common = len(patches) - 1
    which = common if random.random() < 1 / 80 else random.randrange(common)
    valid, other = patches[which], patches[random.randrange(common)]
    case = Case(
        what="",
        patch=b"",
        backbone=valid.backbone,
        valid=which,
        dtype=random.choice([None, None, None, "float16", "float32", "bfloat16"]),
        write=random.random() < 0.3,
        overwrite=random.random() < 0.5,
        checkpoint=random.choice([None, "patched", "backbone", "result"]),
    )
    if random.random() < 0.02:
        case.leftover = random.choice(["folder", "link", "file", "inside", "old"])
    tree, frames, raw = copy.deepcopy(valid.tree), copy.deepcopy(valid.frames), []
    kind = random.choices(
        ["intact", "bytes", "header", "tree", "manifest", "frames", "backbone", "both", "long"],
        [1, 15, 8, 20, 14, 26, 16, 3, 0.005],
    )[0]
    case.what, case.intact = f"{kind} of {valid.name}", kind == "intact"
    after = kind in ("frames", "both") or (kind == "manifest" and random.random() < 0.3)
    if kind == "manifest":
        mutate_manifest(random, tree, frames, raw)
    if after:
        for _ in range(random.choice([1, 1, 1, 2])):
            with contextlib.suppress(Exception):  # what is wrong already may not take more
                mutate_frames(random, tree, frames)
    if kind == "long":
        case.patience = 12
        many_blocks(tree, frames)
    if kind in ("manifest", "frames", "both", "long"):
        body = _fitted(random, tree, frames, valid, kind)
    else:
        body = body_of(tree, frames)
    if kind == "tree":
        mutate_tree(random, tree, raw)
    case.patch = assemble(tree, body, raw, fill=random.random() < 0.8)
    whole = assemble(other.tree, body_of(other.tree, other.frames))
    if kind == "bytes":
        case.patch = mutate_bytes(random, case.patch, whole)
        if random.random() < 0.01:
            case.patch = random.choice(SPECIAL)
    if kind == "header":
        case.patch = mutate_header(random, case.patch, whole)
    if kind in ("backbone", "both"):
        case.backbone, case.changed = dict(valid.backbone), True
        mutate_backbone(random, case.backbone, other.backbone)
        if random.random() < 0.3:
            with contextlib.suppress(Exception):
                mutate_backbone(random, case.backbone, other.backbone)
    return case


def _fitted(random: Random, tree: dict, frames: dict, valid: Valid, kind: str) -> bytes:
    """The data, with sizes and digests that belong to it."""
    named = list(tree["tensors"]) == list(frames) and all(
        isinstance(matrix, dict) for matrix in tree["tensors"].values()
    )
    if not named:
        return body_of(valid.tree, frames)
    with_originals = tree["revertible"]
    blocks = {n: copy.deepcopy(m["blocks"]) for n, m in tree["tensors"].items()}
    had = {n: dict(m["sha256"]) for n, m in tree["tensors"].items()}
    if kind == "manifest" and not with_originals and valid.tree["revertible"]:
        for parts in frames.values():
            parts.pop("originals", None)
    fit(tree, frames)
    if kind == "manifest":  # what was changed on purpose stays
        for name, matrix in tree["tensors"].items():
            for block, old in zip(matrix["blocks"], blocks[name], strict=True):
                for key in ("exceptions", "replaced"):
                    if key in old:
                        block[key] = old[key]
            if any(block.get("replaced") for block in matrix["blocks"]):
                matrix["sha256"].setdefault("replaced", had[name].get("replaced", "0" * 64))
    if random.random() < 0.7:
        heal(tree, frames, valid.backbone)
    return body_of(tree, frames)
