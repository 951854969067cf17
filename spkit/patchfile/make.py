"""Make a patch file from merged deltas and the backbone they are for, matrix by matrix.

    kept positions   where the merged delta is not 0
    stored value     the delta, rounded so that backbone + value is, in the backbone's own dtype,
                     exactly the weight that float32 composition gives ("exact"), or shorter

No factors go in, only merged values: docs/method.md, section 8, says what they still reveal. In
memory is one matrix in full precision; what is finished goes to a temporary file.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import (
    is_hub_id,
    local_folder,
    read_header,
    read_small,
    tensor_files,
)
from spkit.models.stored_names import stored_names
from spkit.patchfile import encoding, floats
from spkit.patchfile.file import LONGEST_HEADER, Kept, header
from spkit.patchfile.manifest import (
    FORMAT,
    PARTS,
    VERSION,
    Backbone,
    Block,
    Error,
    Manifest,
    Matrix,
    Values,
)
from spkit.patchfile.stream import read_exactly
from spkit.system.files import atomic
from spkit.system.machine import versions
from spkit.system.pypi import is_pypi

# of config.json, what a library or a place puts there: no part of the backbone's identity
VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
LIBRARIES = ("python", "spkit", "torch", "transformers", "peft", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class About:
    """What the manifest says besides the tensors; see manifest.Manifest for the fields.

    backbone: a name to print, such as a hub id; of a local path only the last part is kept.
    """

    backbone: str
    revision: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Iterable[Mapping[str, Any]] = ()
    stack: Iterable[str] = ()


def make_patch(
    backbone: str | Path,
    deltas: Mapping[str, Any],
    path: str | Path,
    about: About,
    *,
    values: Values = "exact",
    revertible: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the patch file `path`, whole or not at all; returns its manifest.

    backbone: a local checkpoint. deltas: {tensor name: float32 [out, in]} (torch on the CPU or
    numpy), read one at a time, 0 where nothing is kept. The patch names each tensor as the
    checkpoint's files do (models/stored_names.py), the deltas may name it as the model does.
    values: "exact" (16 bits where the backbone has 16, else 32), "bfloat16" (rounded, for any
    backbone), or "int8" (64 values share a scale). revertible: store the kept weights' original
    bits, too.
    SpkitError for a tensor that the backbone does not have, another shape, a dtype that is no
    float, or a patched weight that is not finite.
    """
    with patch_writer(path, backbone, about, values, revertible) as writer:
        stored = stored_names(dict.fromkeys(deltas), writer.files, writer.folder)
        for name in tqdm(deltas, desc="patch", unit="matrix", disable=not progress, leave=False):
            _add_matrix(writer, name, stored[name], deltas)
    return writer.manifest


def _add_matrix(writer: "Writer", name: str, stored: str, deltas: Mapping[str, Any]) -> None:
    """One matrix, whose delta is gone at the end: two of them would be twice the memory."""
    delta = np.asarray(deltas[name], dtype=np.float32)
    shape, dtype, weights = writer.open(stored)
    if list(delta.shape) != shape:
        what = f"it has the shape {list(delta.shape)}, the backbone's is {shape}"
        raise SpkitError(f"The delta of {name!r} cannot be added: {what}.")
    flat = delta.reshape(-1)
    for (start, length), bits in zip(encoding.blocks(flat.size), weights, strict=True):
        part = flat[start : start + length]
        positions = np.flatnonzero(part).astype(np.uint32)
        kept = part[positions]
        try:
            after = floats.patched(bits[positions], kept, dtype)
            writer.add(bits, positions, kept, after)  # shortened values can be larger
        except ValueError as error:
            raise SpkitError(f"The delta of {name!r} cannot be added: {error}.") from None
    writer.close()


# ---- one value -----------------------------------------------------------------------------------


def exact_values(
    before: np.ndarray, after: np.ndarray, deltas: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """(values as bits of `dtype`, bool: where no value does): before + value rounds to after.

    before, after: bits of `dtype`; deltas: float32, what was added. The value is the rounded delta,
    or one of its neighbours, or the rounded difference, or one of that one's.
    """
    values = floats.from_float32(deltas, dtype)
    with np.errstate(over="ignore"):
        difference = floats.to_float32(after, dtype) - floats.to_float32(before, dtype)
    first = floats.from_float32(difference, dtype)
    wrong = np.flatnonzero(~_gives(before, values, after, dtype))
    for bits in (*floats.neighbours(values, dtype), first, *floats.neighbours(first, dtype)):
        candidate = bits[wrong].copy()
        right = _gives(before[wrong], candidate, after[wrong], dtype)
        values[wrong[right]] = candidate[right]
        wrong = wrong[~right]
    replaced = np.zeros(len(values), dtype=bool)
    replaced[wrong] = True
    # their value is for reading only (inspect.py): the patched weight itself is stored beside it
    values[wrong] = np.where(np.isfinite(floats.to_float32(first[wrong], dtype)), first[wrong], 0)
    return values, replaced


def _gives(before, values, after, dtype: str) -> np.ndarray:
    """Whether before + value is after, bit for bit, as floats.patched computes it."""
    numbers = floats.to_float32(values, dtype)
    weights = floats.to_float32(before, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.where(numbers == 0, weights, weights + numbers)
    return (floats.from_float32(sums, dtype) == after) & np.isfinite(numbers)


# ---- the file ------------------------------------------------------------------------------------


@contextmanager
def patch_writer(
    path, backbone, about: About, values: Values, revertible: bool
) -> Iterator["Writer"]:
    """A Writer whose file becomes `path` when everything is in it."""
    folder = local_folder(backbone, about.revision)
    with atomic(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as body:
        writer = Writer(folder, body, about, values, revertible)
        yield writer
        text = writer.finish()
        writer.id = hashlib.sha256(text).hexdigest()
        head = header(text, writer.manifest)
        if len(head) > LONGEST_HEADER:
            raise SpkitError(
                f"{path}: the patch's header would take {len(head):,} bytes, and at most "
                f"{LONGEST_HEADER:,} are read: make a patch of fewer matrices"
            )
        with temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            body.seek(0)
            while chunk := body.read(1 << 22):
                file.write(chunk)


class Writer:
    """Collects matrix after matrix: `open` one, `add` its blocks, `close` it; then `finish`."""

    def __init__(self, folder: Path, body, about: About, values: Values, revertible: bool):
        self.folder, self.body, self.about = folder, body, about
        self.values, self.revertible = values, revertible
        self.files = tensor_files(folder)
        self.matrices: dict[str, Matrix] = {}
        self.squared = self.squared_error = self.largest = 0.0
        self.changed = 0
        self.manifest: Manifest | None = None
        self.id = ""

    def open(self, name: str) -> tuple[list[int], str, Iterator[np.ndarray]]:
        """(shape, dtype, the backbone's bits block by block); SpkitError for no such matrix."""
        if name not in self.files:
            raise SpkitError(f"The checkpoint {self.folder} has no tensor {name!r}.")
        path = self.files[name]
        with path.open("rb") as file:
            tensors, start = read_header(file, path)
        place = dict(tensors).get(name)
        if place is None:
            raise SpkitError(f"{path} has no tensor {name!r}, which the index puts there.")
        self.name, self.shape, self.dtype = name, place["shape"], place["dtype"]
        if self.dtype not in floats.BITS or len(self.shape) != 2:
            what = (
                f"is {self.dtype} {self.shape}; a patch needs a matrix of {', '.join(floats.BITS)}"
            )
            raise SpkitError(f"{path}: {name!r} {what}.")
        self.blocks: list[Block] = []
        self.parts = {part: [] for part in PARTS}
        self.before, self.after = encoding.TensorHash(), encoding.TensorHash()
        self.lost = 0
        return self.shape, self.dtype, self._weights(path, start + place["data_offsets"][0])

    def _weights(self, path: Path, first: int) -> Iterator[np.ndarray]:
        width = floats.BITS[self.dtype]
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            for _, length in encoding.blocks(self.shape[0] * self.shape[1]):
                yield np.frombuffer(read_exactly(file, length * width.itemsize), dtype=width)

    def add(
        self, bits: np.ndarray, positions: np.ndarray, deltas: np.ndarray, after: np.ndarray
    ) -> None:
        """The next block. bits: the backbone's; deltas float32 [k] and patched bits [k]."""
        before, own = bits[positions], floats.BITS[self.dtype]
        chosen = np.empty(0, dtype=np.uint32)
        if self.values == "exact":
            stored, replaced = exact_values(before, after, deltas, self.dtype)
            chosen = np.flatnonzero(replaced).astype(np.uint32)
            frames, read = encoding.pack_values(stored), floats.to_float32(stored, self.dtype)
        elif self.values == "bfloat16":
            stored = floats.from_float32(deltas, "BF16")
            frames, read = encoding.pack_values(stored), floats.to_float32(stored, "BF16")
        else:
            steps, scales = encoding.quantize(deltas)
            frames = [*encoding.pack_values(steps), *encoding.pack_values(scales)]
            read = encoding.dequantize(steps, scales)
        kept = Kept(positions, read, (chosen, after[chosen]), None)
        made, lost = kept.apply(before, self.dtype, self.dtype)

        how, packed = encoding.pack_positions(positions, len(bits))
        extra = [encoding.compress(part.tobytes()) for part in kept.replaced] if len(chosen) else []
        originals = encoding.pack_values(before.astype(own)) if self.revertible else []
        parts = dict(zip(PARTS, ([packed], frames, extra, originals), strict=True))
        for part, found in parts.items():
            self.parts[part] += found
        sizes = {part: [len(frame) for frame in found] for part, found in parts.items()}
        count = {"kept": len(positions), "encoding": how, "exceptions": len(chosen)}
        self.blocks.append(Block(**count, **(sizes | {"positions": len(packed)})))

        self.before.update(bits)
        bits[positions] = made
        self.after.update(bits)
        self.lost += lost
        self.changed += int((made != after).sum())
        error = read.astype(np.float64) - deltas
        error[chosen] = 0.0  # nothing is lost there
        self.squared += float(np.square(deltas, dtype=np.float64).sum())
        self.squared_error += float(np.square(error).sum())
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))

    def close(self) -> None:
        """The matrix is complete."""
        digests = {}
        for part, frames in self.parts.items():
            if any(frames):
                digests[part] = hashlib.sha256(b"".join(frames)).hexdigest()
                self.body.writelines(frames)
        values = {"exact": self.dtype, "bfloat16": "BF16", "int8": "I8"}[self.values]
        self.matrices[self.name] = Matrix(
            shape=self.shape,
            dtype=self.dtype,
            before=self.before.hexdigest(),
            after=self.after.hexdigest(),
            kept=sum(block.kept for block in self.blocks),
            lost=self.lost,
            values=values,
            sha256=digests,
            blocks=self.blocks,
        )

    def finish(self) -> bytes:
        """The manifest as canonical JSON."""
        if not self.matrices:
            raise SpkitError("A patch needs at least one weight matrix; there are no deltas.")
        about, found = self.about, versions()
        config = read_config(self.folder)
        try:
            self.manifest = Manifest(
                format=FORMAT,
                version=VERSION,
                method=dict(about.method),
                data=dict(about.data),
                backbone=Backbone(
                    name=printable_name(about.backbone),
                    revision=about.revision,
                    architecture=(config.get("architectures") or ["unknown"])[0],
                    config_sha256=config_sha256(config),
                ),
                versions={key: found[key] for key in LIBRARIES if key in found},
                evaluation=[dict(row) for row in about.evaluation],
                values=self.values,
                error=Error(
                    relative_rms=sqrt(self.squared_error / self.squared) if self.squared else 0.0,
                    largest=self.largest,
                    changed=self.changed,
                ),
                revertible=self.revertible,
                stack=list(about.stack),
                tensors=self.matrices,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise SpkitError(f"This cannot stand in a patch ({where}): {first['msg']}.") from None
        tree = self.manifest.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()


# ---- the backbone's identity ---------------------------------------------------------------------


def printable_name(backbone: str) -> str:
    """A hub id or pypi: source as it is; of anything else, such as a local path, the last part."""
    if is_pypi(backbone) or (is_hub_id(backbone) and not Path(backbone).exists()):
        return backbone
    return re.split(r"[/\\]", backbone.rstrip("/\\"))[-1]


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint; SpkitError where it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(read_small(path))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise SpkitError(f"{path} cannot be read: {error}") from None


def config_sha256(config: Mapping[str, Any]) -> str:
    """The hash of a configuration, whatever its order of keys and the library that saved it."""
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()
