"""Take a patch back: the backbone's exact bytes, or a refusal that says why not.

    from the patch itself, where it was made --revertible: it carries the kept weights' originals
    from the backbone, where that is at hand

Subtracting the values would not do: a sum that was rounded cannot be undone. Whatever the way, the
hash of every restored tensor must be the backbone's.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import local_folder, read_header, tensor_files
from spkit.patchfile import floats
from spkit.patchfile.apply import check_fit
from spkit.patchfile.encoding import TensorHash
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import wrong_tensor
from spkit.patchfile.stream import read_exactly, stream


@dataclass(frozen=True)
class Reverted:
    """What `revert` did. source: "patch" or "backbone", where the originals came from."""

    folder: str | None
    patch: str
    tensors: int
    kept: int
    source: str
    bytes: int


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
    SpkitError where neither is there, where the checkpoint is not what this patch made (in the
    backbone's dtype), and where what comes out is not the backbone, naming file and tensor.
    """
    with PatchFile(patch) as opened:
        if not opened.manifest.revertible and backbone is None:
            raise SpkitError(
                f"{patch} cannot be taken back by itself: it was not made revertible, so it does "
                "not hold the original weights, and a rounded sum cannot be undone. Give the "
                f"backbone ({opened.manifest.backbone.name}) with --backbone"
            )
        made = "If it was applied with --dtype, its rounding cannot be undone: use the backbone"
        check_fit(opened, checkpoint, made)
        opened.check()
        names = opened.manifest.tensors
        if backbone is None:
            edits = {name: partial(Restoring, opened, name) for name in names}
        else:
            folder = local_folder(backbone, revision or opened.manifest.backbone.revision)
            check_fit(opened, folder)
            edits = {name: partial(Replacing, opened, name, folder) for name in names}
        done = stream(
            checkpoint,
            edits,
            target,
            identity={"command": "revert", "patch": opened.id},
            threads=threads,
            overwrite=overwrite,
            inputs=[patch] if backbone is None else [patch, folder],
            progress=progress,
            label="revert",
        )
        return Reverted(
            folder=None if target is None else str(target),
            patch=opened.id,
            tensors=len(names),
            kept=opened.manifest.kept,
            source="patch" if backbone is None else "backbone",
            bytes=done.bytes,
        )


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
    """The edit of one tensor: the backbone's own bytes."""

    def __init__(self, patch: PatchFile, name: str, backbone: Path):
        super().__init__(patch, name)
        path = tensor_files(backbone)[name]
        self.file = path.open("rb", buffering=0)
        tensors, start = read_header(self.file, path)
        self.file.seek(start + dict(tensors)[name]["data_offsets"][0])

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.now.update(bits)
        width = floats.BITS[self.matrix.dtype]
        original = np.frombuffer(read_exactly(self.file, bits.nbytes), dtype=width)
        self.restored.update(original)
        return original

    def close(self) -> int:
        self.file.close()
        self.compare("the backbone's weights are not those that the patch was made for")
        return 0
