"""A patch as one file: open it, trust nothing in it, and read it block by block.

    <tensor>.positions .values [.replaced] [.originals]     U8, frames one behind the other
    __metadata__                                            the manifest and its SHA-256

An ordinary safetensors file. It is read strictly: its header must be, byte for byte, the one that
this kit writes for this manifest, so that no two readers can understand it differently and a
flipped bit anywhere is found. docs/patch_format.md is the format's page.
"""

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import load_json, read_header_text
from spkit.patchfile import encoding, floats
from spkit.patchfile.manifest import PARTS, Block, Manifest, Matrix, read_manifest, wrong_tensor
from spkit.system.pointers import refuse_pointer

LONGEST_HEADER = 64 * 2**20  # bytes: enough for a trillion weights
CHECKERS = 2  # threads that `check` decodes with; each holds one block
MANIFEST, SHA256 = "spkit_patch", "spkit_patch_sha256"


@dataclass(frozen=True)
class Kept:
    """What one block keeps, k weights of it.

    positions: uint32 [k], ascending, in the block. deltas: float32 [k], merged values. replaced:
    (indices among the k, their patched bits in the backbone's dtype). originals: the backbone's
    bits [k], or None.
    """

    positions: np.ndarray
    deltas: np.ndarray
    replaced: tuple[np.ndarray, np.ndarray]
    originals: np.ndarray | None

    def apply(self, weights: np.ndarray, dtype: str, out: str) -> tuple[np.ndarray, int]:
        """(the kept weights patched, bits of `out`; kept deltas that change nothing there).

        weights: bits [k] of `dtype`, at `positions`. ValueError where one is not finite.
        """
        after = floats.patched(weights, self.deltas, dtype, out)
        chosen, bits = self.replaced
        after[chosen] = floats.convert(bits, dtype, out)
        # one whose stored value was rounded to 0 is lost, too
        return after, int((after == floats.convert(weights, dtype, out)).sum())


class PatchFile:
    """An open patch file. `with PatchFile(path) as patch:`; may be read from several threads.

    SpkitError where the file is no patch of this format, damaged in its header, or no regular file.
    What the header promises about the data is checked by `check`, or block by block as it is read.
    """

    def __init__(self, path: str | Path):
        self.path, self._lock = Path(path), Lock()
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe would be waited for for ever
                raise ValueError("it is no regular file")
            self._file = self.path.open("rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SpkitError(f"{self.path} cannot be read as a patch: {reason}") from None
        try:
            self.manifest, self.id, self._start = self._open()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            refuse_pointer(self.path)
            what = f"its header lacks {error}" if isinstance(error, KeyError) else error
            raise SpkitError(f"{self.path} cannot be read as a patch: {what}") from None
        self._offsets = layout(self.manifest.tensors)

    def _open(self) -> tuple[Manifest, str, int]:
        text, size = read_header_text(self._file, self.path, LONGEST_HEADER)
        manifest_text = load_json(text)["__metadata__"][MANIFEST].encode()
        manifest = read_manifest(manifest_text)
        if header(manifest_text, manifest) != text:
            raise ValueError("its header is not the one that belongs to its manifest (damaged?)")
        ends = [last for parts in layout(manifest.tensors).values() for _, last in parts.values()]
        if 8 + len(text) + max(ends) != size:
            have = size - 8 - len(text)
            raise ValueError(f"it has {have} bytes of data, {max(ends)} expected")
        return manifest, hashlib.sha256(manifest_text).hexdigest(), 8 + len(text)

    def __enter__(self) -> "PatchFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.path.stat().st_size

    def kept(self, name: str) -> Iterator[Kept]:
        """What is kept of one matrix, block after block; SpkitError names the tensor.

        Behind the last block the bytes read are compared with the manifest's SHA-256.
        """
        matrix = self.manifest.tensors[name]
        ends = {part: first for part, (first, _) in self._offsets[name].items()}
        digests = {part: hashlib.sha256() for part in ends}
        for block, (_, length) in zip(matrix.blocks, encoding.blocks(matrix.weights), strict=True):
            frames = {}
            for part in ends:
                frames[part] = [self._read(name, ends, part, n) for n in block.frames(part)]
                for frame in frames[part]:
                    digests[part].update(frame)
            try:
                yield _decode(frames, block, matrix, length)
            except (ValueError, MemoryError) as error:
                raise wrong_tensor(self.path, name, error) from None
        for part, digest in digests.items():
            if digest.hexdigest() != matrix.sha256[part]:
                raise wrong_tensor(self.path, name, f"the bytes of its {part} are damaged")

    def delta(self, name: str) -> np.ndarray:
        """The merged delta of one matrix, float32 [out, in], zero where nothing is kept.

        Without the few weights that are stored as patched bits instead (`Kept.replaced`).
        """
        matrix = self.manifest.tensors[name]
        flat = np.zeros(matrix.weights, dtype=np.float32)
        starts = (start for start, _ in encoding.blocks(matrix.weights))
        for start, kept in zip(starts, self.kept(name), strict=True):
            flat[start + kept.positions.astype(np.int64)] = kept.deltas
        return flat.reshape(matrix.shape)

    def _read(self, name: str, ends: dict[str, int], part: str, count: int) -> bytes:
        with self._lock:
            self._file.seek(self._start + ends[part])
            data = self._file.read(count)
        if len(data) != count:
            raise wrong_tensor(self.path, name, "the file has become shorter")
        ends[part] += count
        return data

    def check(self) -> None:
        """Read everything once: every frame, count, position and value; SpkitError if not right."""
        with ThreadPoolExecutor(CHECKERS) as pool:
            for _ in pool.map(self._check, self.manifest.tensors):
                pass

    def _check(self, name: str) -> None:
        for _ in self.kept(name):
            pass


def layout(tensors: Mapping[str, Matrix]) -> dict[str, dict[str, tuple[int, int]]]:
    """{tensor: {part: (first, last) byte of the data}}, in the order of the file."""
    found, end = {}, 0
    for name, matrix in tensors.items():
        found[name] = {}
        for part in (part for part in PARTS if part in matrix.sha256):
            first, end = end, end + matrix.size(part)
            found[name][part] = (first, end)
    return found


def header(manifest_text: bytes, manifest: Manifest) -> bytes:
    """The JSON header of the file with this manifest, padded to 8 bytes."""
    metadata = {MANIFEST: manifest_text.decode(), SHA256: hashlib.sha256(manifest_text).hexdigest()}
    tree = {"__metadata__": metadata}
    for name, parts in layout(manifest.tensors).items():
        for part, (first, last) in parts.items():
            about = {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}
            tree[f"{name}.{part}"] = about
    text = json.dumps(tree, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _decode(frames: Mapping[str, list[bytes]], block: Block, matrix: Matrix, length: int) -> Kept:
    """ValueError for whatever is not as the manifest says."""
    kept, own = block.kept, floats.BITS[matrix.dtype]
    if not kept:
        return _nothing(frames, block, own)
    (packed,) = frames["positions"]
    positions = encoding.unpack_positions(packed, block.encoding, kept, length)
    if matrix.values == "I8":
        steps = encoding.unpack_values(frames["values"][:1], np.dtype(np.int8), kept)
        groups = matrix.groups(kept)
        scales = encoding.unpack_values(frames["values"][1:], np.dtype("<f4"), groups)
        _require_finite(scales, "scale")
        with np.errstate(over="ignore"):  # found below
            deltas = encoding.dequantize(steps, scales)
    else:
        stored = encoding.unpack_values(frames["values"], floats.BITS[matrix.values], kept)
        deltas = floats.to_float32(stored, matrix.values)
    _require_finite(deltas, "value")

    chosen, bits = np.empty(0, dtype=np.uint32), np.empty(0, dtype=own)
    if block.exceptions:
        count, (where, what) = block.exceptions, frames["replaced"]
        chosen = np.frombuffer(encoding.decompress(where, 4 * count), dtype="<u4")
        bits = np.frombuffer(encoding.decompress(what, own.itemsize * count), dtype=own)
        if chosen[-1] >= kept or (np.diff(chosen.astype(np.int64)) <= 0).any():
            raise ValueError("indices of replaced weights that do not ascend")
        _require_finite(floats.to_float32(bits, matrix.dtype), "replaced weight")
    originals = None
    if "originals" in frames:
        originals = encoding.unpack_values(frames["originals"], own, kept)
    return Kept(positions, deltas, (chosen, bits), originals)


def _nothing(frames: Mapping[str, list[bytes]], block: Block, own: np.dtype) -> Kept:
    """The block that keeps nothing. At once: a hostile file may have hundreds of thousands."""
    if block.encoding != "gaps" or {b for part in frames.values() for b in part} != {
        encoding.EMPTY
    }:
        raise ValueError("another frame than the empty one, where nothing is kept")
    where, bits = np.empty(0, dtype=np.uint32), np.empty(0, dtype=own)
    originals = bits if frames.get("originals") else None
    return Kept(where, np.empty(0, dtype=np.float32), (where, bits), originals)


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"a {what} that is not finite")
