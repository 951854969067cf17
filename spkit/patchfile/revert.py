"""Take a patch back: the backbone's exact bytes, or a refusal that says why not.

    from the patch itself, where it was made --revertible: it carries the kept weights' originals
    from the backbone, where that is at hand

Subtracting the values would not do: a sum that was rounded cannot be undone. Whatever the way, the
hash of every restored tensor must be the backbone's. In a checkpoint of another dtype (apply
--dtype, or a copy that was patched) it is that of the bits that are cast to this dtype.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import local_folder
from spkit.patchfile import copies
from spkit.patchfile.apply import Patching, check_fit
from spkit.patchfile.encoding import TensorHash
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import wrong_tensor
from spkit.patchfile.stream import Edit, stream


@dataclass(frozen=True)
class Reverted:
    """What `revert` did. source: "patch" or "backbone", where the originals came from.

    checked: as in `Applied`, of the checkpoint that was taken back.
    """

    folder: str | None
    patch: str
    tensors: int
    kept: int
    source: str
    bytes: int
    checked: str = "by hash"


def revert(
    patch: str | Path,
    checkpoint: str | Path,
    target: str | Path | None,
    *,
    backbone: str | Path | None = None,
    revision: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Reverted:
    """Write the patched `checkpoint` without its patch to the new folder `target`; None: try only.

    backbone: where the patch carries no originals; its tensors are read and compared.
    A checkpoint in another dtype becomes the backbone in that one; where that is not float32, it
    needs the backbone. SpkitError where neither is there, where the checkpoint is not what this
    patch made, and where what comes out is not the backbone, naming file and tensor.
    """
    with PatchFile(patch) as opened:
        if backbone is None:
            _require_originals(opened, checkpoint)
        dtypes = check_fit(opened, checkpoint, copied=True)
        opened.check()
        folder = None
        if backbone is not None:
            folder = local_folder(backbone, revision or opened.manifest.backbone.revision)
            check_fit(opened, folder, copied=True)
        ways = {name: _way(opened, name, dtype) for name, dtype in dtypes.items()}
        edits = {name: partial(_undoing, opened, name, way, folder) for name, way in ways.items()}
        done = stream(
            checkpoint,
            edits,
            target,
            identity={"command": "revert", "patch": opened.id},
            threads=threads,
            overwrite=overwrite,
            inputs=[patch] if folder is None else [patch, folder],
            progress=progress,
            label="revert",
        )
        return Reverted(
            folder=None if target is None else str(target),
            patch=opened.id,
            tensors=len(edits),
            kept=opened.manifest.kept,
            source="patch" if backbone is None else "backbone",
            bytes=done.bytes,
            checked=copies.told(ways, "checkpoint"),
        )


def _require_originals(patch: PatchFile, checkpoint: str | Path) -> None:
    """SpkitError where the patch cannot be taken back without the backbone."""
    if not patch.manifest.revertible:
        raise SpkitError(
            f"{patch.path} cannot be taken back by itself: it was not made revertible, so it does "
            "not hold the original weights, and a rounded sum cannot be undone. Give the "
            f"backbone ({patch.manifest.backbone.name}) with --backbone"
        )
    if set(check_fit(patch, checkpoint, copied=True).values()) - {"F32"}:  # not cast, or rounded
        made = "If it was applied with --dtype, its rounding cannot be undone: use the backbone"
        check_fit(patch, checkpoint, made)


def _way(patch: PatchFile, name: str, dtype: str) -> copies.Way:
    own = patch.manifest.tensors[name].dtype
    return copies.Way(dtype, copies.HASH if dtype == own else copies.CAST)


def _undoing(patch: PatchFile, name: str, way: copies.Way, backbone: Path | None) -> Edit:
    if way.kind == copies.CAST:
        inner = Patching(patch, name, way.dtype)
        return copies.RestoringCopy(patch, name, way.dtype, inner, backbone)
    return Restoring(patch, name) if backbone is None else Replacing(patch, name, backbone)


class _Undoing:
    """What both edits compare: the tensor as it is with `after`, the restored one with `before`."""

    def __init__(self, patch: PatchFile, name: str):
        self.patch, self.name, self.matrix = patch, name, patch.manifest.tensors[name]
        self.now, self.restored = TensorHash(), TensorHash()

    def compare(self, wrong: str) -> None:
        """SpkitError; `wrong` says what is wrong where the restored tensor is."""
        if self.now.hexdigest() != self.matrix.after:
            what = "the checkpoint's weights are not what this patch makes of its backbone"
            raise wrong_tensor(self.patch.path, self.name, what)
        if self.restored.hexdigest() != self.matrix.before:
            raise wrong_tensor(self.patch.path, self.name, wrong)


class Restoring(_Undoing):
    """The edit of one tensor: put the originals that the patch carries back to their positions."""

    def __init__(self, patch: PatchFile, name: str):
        super().__init__(patch, name)
        self.kept = patch.kept(name)

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.now.update(bits)
        kept = next(self.kept)
        bits[kept.positions] = kept.originals
        self.restored.update(bits)
        return bits

    def close(self) -> int:
        next(self.kept, None)  # the patch's own digests
        self.compare("its originals do not give the backbone's weights")
        return 0


class Replacing(_Undoing):
    """The edit of one tensor: the backbone's own bits."""

    def __init__(self, patch: PatchFile, name: str, backbone: Path):
        super().__init__(patch, name)
        self.original = copies.Original(patch, name, backbone)

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.now.update(bits)
        own = self.original.read(len(bits))
        self.restored.update(own)
        return own

    def close(self) -> int:
        self.original.file.close()
        self.compare("the backbone's weights are not those that the patch was made for")
        return 0
