"""Apply a patch file to the checkpoint it was made for: a new folder, at the speed of the disk.

    weight' = round(float32(weight) + value)     at the kept positions; all other bits are copied

Before anything is written the whole patch is read and checked. While a tensor streams through, the
hash of what comes in must be the one that the patch was made for, and that of what goes out the one
that the patch promises; otherwise nothing appears under the target's name. A copy of the backbone
in another dtype is compared by its values (copies.py).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import headers, local_folder
from spkit.patchfile import copies, floats
from spkit.patchfile.encoding import TensorHash
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import wrong_tensor
from spkit.patchfile.stream import Edit, stream

NOT_THE_BACKBONE = (
    "the checkpoint's weights are not those that the patch was made for (another revision, another "
    "fine-tuning, or patched already)"
)


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    folder: the new checkpoint, None after a dry run. tensors, kept: patched matrices, and kept
    weights in them. lost: kept deltas that change nothing in `dtype`, the dtype of the patched
    matrices (several are joined by commas). bytes: of the new folder's files; of what was read
    where nothing is written. checked: how the backbone was compared with the patch's: "by hash", or
    "by values: ..." where it is a copy in another dtype.
    """

    folder: str | None
    patch: str
    tensors: int
    kept: int
    lost: int
    dtype: str
    bytes: int
    checked: str = "by hash"


def apply(
    patch: str | Path,
    backbone: str | Path,
    target: str | Path | None,
    *,
    revision: str | None = None,
    original: str | Path | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Applied:
    """Write backbone + patch to the new folder `target`; None is a dry run that writes nothing.

    backbone: a local checkpoint, or a hub id; revision: that on the hub, by default the patch's.
    original: the backbone in its own dtype, where `backbone` was rounded to another (copies.py).
    dtype: "bfloat16", "float16" or "float32" for all float tensors of the target; None: as they
    are. threads: None chooses. overwrite: replace a checkpoint that exists, whole and at the end.
    Equal bit for bit to composing in memory (patching.add_delta with the patch's values).
    SpkitError names the file and the tensor where patch and backbone do not fit, or are damaged.
    """
    out = None if dtype is None else short_dtype(dtype)
    with PatchFile(patch) as opened:
        folder = local_folder(backbone, revision or opened.manifest.backbone.revision)
        first = None if original is None else local_folder(original, revision)
        how = {"threads": threads, "progress": progress}
        found = compared(opened, folder, first, **how)
        done = stream(
            folder,
            {name: partial(edit, opened, name, way, out, first) for name, way in found.items()},
            target,
            identity={"command": "apply", "patch": opened.id, "checked": copies.told(found)},
            dtype=out,
            overwrite=overwrite,
            inputs=[patch] if first is None else [patch, first],
            **how,
        )
        return Applied(
            folder=None if target is None else str(target),
            patch=opened.id,
            tensors=len(found),
            kept=opened.manifest.kept,
            lost=done.count,
            dtype=out or ", ".join(sorted({way.dtype for way in found.values()})),
            bytes=done.bytes,
            checked=copies.told(found),
        )


def compared(patch: PatchFile, folder: Path, original: Path | None, **how) -> dict[str, copies.Way]:
    """{patched tensor: how the checkpoint's is compared}, behind all checks that need no weights.

    Reads the whole patch, and the tensors of a rounded copy. SpkitError where patch and checkpoint
    cannot fit. how: threads and progress.
    """
    dtypes = check_fit(patch, folder, copied=True)
    if original is not None:
        check_fit(patch, original, copied=True)
    patch.check()
    return copies.ways(patch, folder, dtypes, original, **how)


def edit(
    patch: PatchFile, name: str, way: copies.Way, out: str | None, original: Path | None
) -> Edit:
    """The edit that compares one tensor and patches it. out: the target's dtype, None: as it is."""
    if way.kind == copies.HASH:
        return Patching(patch, name, out)
    if way.kind == copies.KEPT:
        return copies.PatchingKept(patch, name, way.dtype, out or way.dtype)
    inner = Patching(patch, name, out or way.dtype)
    return copies.PatchingCopy(patch, name, way, inner, original)


class Patching:
    """The edit of one tensor: check what comes in, patch it, check what goes out.

    last: what the patch keeps in the block that was patched last.
    """

    def __init__(self, patch: PatchFile, name: str, out: str | None = None):
        self.patch, self.name = patch, name
        self.matrix = patch.manifest.tensors[name]
        self.out = out or self.matrix.dtype
        self.kept = patch.kept(name)
        self.before, self.after, self.lost = TensorHash(), TensorHash(), 0

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.before.update(bits)
        self.last = kept = next(self.kept)
        dtype = self.matrix.dtype
        try:
            patched, lost = kept.apply(bits[kept.positions], dtype, self.out)
        except ValueError as error:
            raise wrong_tensor(self.patch.path, self.name, error) from None
        if self.out != dtype:
            finite = np.isfinite(floats.to_float32(bits, dtype))
            bits = floats.convert(bits, dtype, self.out)
        bits[kept.positions] = patched
        if self.out != dtype and (finite & ~np.isfinite(floats.to_float32(bits, self.out))).any():
            what = f"the checkpoint has weights there that are too large for {self.out}"
            raise wrong_tensor(self.patch.path, self.name, what)
        self.lost += lost
        if self.out == dtype:
            self.after.update(bits)
        return bits

    def close(self) -> int:
        next(self.kept, None)  # behind the last block the patch's own digests are compared
        if self.before.hexdigest() != self.matrix.before:
            raise wrong_tensor(self.patch.path, self.name, NOT_THE_BACKBONE)
        if self.out == self.matrix.dtype and self.after.hexdigest() != self.matrix.after:
            what = "the result is not the one that the patch promises (a fault of the machine?)"
            raise wrong_tensor(self.patch.path, self.name, what)
        return self.lost


def check_fit(
    patch: PatchFile, folder: str | Path, made: str = "", *, copied: bool = False
) -> dict[str, str]:
    """{patched tensor: its dtype in the checkpoint}; SpkitError where one is missing or differs.

    Headers only are read. The weights are compared while they stream. made: what to say where a
    checkpoint that `apply` may have made has another dtype. copied: another float dtype is right.
    """
    found, dtypes = headers(folder), {}
    for name, matrix in patch.manifest.tensors.items():
        if name not in found:
            raise SpkitError(
                f"{patch.path} does not fit {folder}: that has no tensor {name!r}; the patch is "
                f"for {patch.manifest.backbone.name} ({patch.manifest.backbone.architecture})"
            )
        _, _, about = found[name]
        dtypes[name], shape = about["dtype"], about["shape"]
        right = dtypes[name] in floats.BITS if copied else dtypes[name] == matrix.dtype
        if not right or shape != matrix.shape:
            other = f". {made}" if made and shape == matrix.shape else ""
            raise SpkitError(
                f"{patch.path} does not fit {folder}: the tensor {name!r} is {dtypes[name]} "
                f"{shape} there, and the patch is for {matrix.dtype} {matrix.shape}{other}"
            )
    return dtypes


def short_dtype(name: str) -> str:
    """ "BF16" for "bfloat16"; SpkitError for what is no float dtype of a checkpoint."""
    if name not in floats.TORCH_NAMES:
        known = ", ".join(floats.TORCH_NAMES)
        raise SpkitError(f"unknown dtype {name!r}, allowed: {known}")
    return floats.TORCH_NAMES[name]
