"""The same backbone in another dtype: what a copy's values prove, where its hash cannot agree.

    float32 of 16 bits      every value is cast back: the hash of these bits is the backbone's
    any other cast          it rounds, so the hash is of what is lost. Then one of these decides:
      --original BACKBONE     every value of the copy must be the cast of the backbone's
      a revertible patch      the same, but at the weights alone that the patch changes

The backbone's own bits are patched and rounded once to the copy's dtype: the result is, bit for
bit, what `apply --dtype` makes of the backbone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import headers
from spkit.patchfile import floats
from spkit.patchfile.encoding import TensorHash
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import wrong_tensor
from spkit.patchfile.stream import Convert, Edit, read_exactly, stream

NAMES = {short: name for name, short in floats.TORCH_NAMES.items()}
HASH, CAST, ORIGINAL, KEPT = "hash", "cast", "original", "kept"


@dataclass(frozen=True)
class Way:
    """How one matrix of a checkpoint is compared with the backbone's.

    dtype: the checkpoint's. kind: HASH (it has the backbone's dtype), CAST, ORIGINAL, or KEPT.
    """

    dtype: str
    kind: str


def ways(
    patch: PatchFile,
    folder: Path,
    dtypes: Mapping[str, str],
    original: Path | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Way]:
    """{tensor: how it is compared}. dtypes: of the patched tensors in the checkpoint `folder`.

    The tensors of a copy are read here where only its values tell which way is open. SpkitError
    where none is.
    """
    matrices, found = patch.manifest.tensors, {}
    for name, dtype in dtypes.items():
        kind = HASH if dtype == matrices[name].dtype else CAST if original is None else ORIGINAL
        found[name] = Way(dtype, kind)
    unsure = [name for name, way in found.items() if way.kind == CAST and way.dtype != "F32"]
    if unsure:
        tried = {name: CastBack(patch, name, dtypes[name]) for name in unsure}
        edits = {name: partial(tried.get, name) for name in unsure}
        how = {"threads": threads, "progress": progress, "label": "compare"}
        stream(folder, edits, None, identity={}, **how)
        for name in (name for name in unsure if not tried[name].possible):
            raise another(patch, name, dtypes[name])
        for name in (name for name in unsure if not tried[name].same):
            if not patch.manifest.revertible:
                raise SpkitError(_no_way(patch, folder, name, dtypes[name]))
            found[name] = Way(dtypes[name], KEPT)
    return found


def told(found: Mapping[str, Way], what: str = "backbone") -> str:
    """What was compared, in words: "by hash", or "by values: the backbone is a float32 copy"."""
    copied = [way for way in found.values() if way.kind != HASH]
    if not copied:
        return "by hash"
    names = " and ".join(sorted({NAMES[way.dtype] for way in copied}))
    said = f"by values: the {what} is a {names} copy"
    kinds = {way.kind for way in copied}
    if KEPT in kinds:
        return f"{said}, compared with the patch's originals at the weights that it changes alone"
    return f"{said}, every value the cast of the original's" if ORIGINAL in kinds else said


def _no_way(patch: PatchFile, folder: Path, name: str, dtype: str) -> str:
    own = NAMES[patch.manifest.tensors[name].dtype]
    return (
        f"{patch.path}, tensor {name!r}: {folder} is {NAMES[dtype]} and the patch is for {own}, "
        "and rounding lost what the hash is of, so whether it is the same backbone cannot be told: "
        f"give the {own} backbone ({patch.manifest.backbone.name}) with --original, or use a patch "
        "that was made --revertible"
    )


def another(patch: PatchFile, name: str, dtype: str) -> SpkitError:
    """The error where a checkpoint in another dtype is no copy of the backbone."""
    own = NAMES[patch.manifest.tensors[name].dtype]
    what = f"the checkpoint is {NAMES[dtype]} and no copy of the {own} backbone that the patch was "
    return wrong_tensor(patch.path, name, what + "made for: its values differ")


# ---- the backbone's own bits, of a copy's --------------------------------------------------------


class CastBack:
    """The edit that casts a copy back to the backbone's dtype, and changes nothing.

    exact: every value is one of that dtype. possible: every value is one that a value of that
    dtype rounds to. same: all are exact, and have the backbone's hash.
    """

    def __init__(self, patch: PatchFile, name: str, dtype: str):
        self.matrix, self.dtype, self.own = patch.manifest.tensors[name], dtype, TensorHash()
        self.exact, self.possible, self.same = True, True, False

    def back(self, bits: np.ndarray) -> np.ndarray:
        """The bits in the backbone's dtype."""
        own = floats.convert(bits, self.dtype, self.matrix.dtype)
        again = floats.convert(own, self.matrix.dtype, self.dtype)
        right = again == bits
        self.exact &= bool(right.all())
        right |= ~np.isfinite(floats.to_float32(again, self.dtype))  # of the largest, rounded up
        self.possible &= bool(right.all())
        self.own.update(own)
        return own

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.back(bits)
        return bits

    def close(self) -> int:
        self.same = self.exact and self.own.hexdigest() == self.matrix.before
        return 0


class Original:
    """One tensor of the backbone, read beside that of a checkpoint in another dtype.

    It may be an exact copy itself.
    """

    def __init__(self, patch: PatchFile, name: str, folder: Path):
        path, start, about = headers(folder)[name]
        self.patch, self.name = patch, name
        self.cast = CastBack(patch, name, about["dtype"])
        self.file = path.open("rb", buffering=0)
        self.file.seek(start + about["data_offsets"][0])

    def read(self, count: int) -> np.ndarray:
        """The next `count` weights as bits of the backbone's dtype."""
        width = floats.BITS[self.cast.dtype]
        data = read_exactly(self.file, count * width.itemsize)
        return self.cast.back(np.frombuffer(data, dtype=width))

    def close(self) -> None:
        """SpkitError where it was not the backbone that the patch was made for."""
        self.file.close()
        self.cast.close()
        if not self.cast.same:
            what = "the original's weights are not those that the patch was made for"
            raise wrong_tensor(self.patch.path, self.name, what)


# ---- patching a copy -----------------------------------------------------------------------------


class PatchingCopy:
    """The edit of one tensor of a copy: compare it, then patch the backbone's own bits.

    inner: the edit of the backbone's bits, which writes those of the target's dtype.
    """

    def __init__(self, patch: PatchFile, name: str, way: Way, inner: Edit, original: Path | None):
        self.patch, self.name, self.way, self.inner = patch, name, way, inner
        self.cast = CastBack(patch, name, way.dtype)
        self.original = Original(patch, name, original) if way.kind == ORIGINAL else None

    def block(self, bits: np.ndarray) -> np.ndarray:
        if self.original is None:
            own = self.cast.back(bits)
            right = self.cast.exact
        else:
            own = self.original.read(len(bits))
            cast = floats.convert(own, self.cast.matrix.dtype, self.way.dtype)
            right = np.array_equal(cast, bits)
        if not right:
            raise another(self.patch, self.name, self.way.dtype)
        return self.inner.block(own)

    def close(self) -> int:
        if self.original is not None:
            self.original.close()
        else:
            self.cast.close()
            if not self.cast.same:
                raise another(self.patch, self.name, self.way.dtype)
        return self.inner.close()


class PatchingKept:
    """The edit of one tensor of a rounded copy, compared at the kept weights alone.

    Of all other values `ways` has seen that the backbone's dtype can have been rounded to them.
    """

    def __init__(self, patch: PatchFile, name: str, dtype: str, out: str):
        self.patch, self.name, self.dtype, self.out = patch, name, dtype, out
        self.own = patch.manifest.tensors[name].dtype
        self.kept, self.lost = patch.kept(name), 0
        self.convert = Convert(dtype, out, patch.path, name)

    def block(self, bits: np.ndarray) -> np.ndarray:
        kept = next(self.kept)
        expected = floats.convert(kept.originals, self.own, self.dtype)
        if not np.array_equal(bits[kept.positions], expected):
            raise another(self.patch, self.name, self.dtype)
        try:
            patched, lost = kept.apply(kept.originals, self.own, self.out)
        except ValueError as error:
            raise wrong_tensor(self.patch.path, self.name, error) from None
        made = self.convert.block(bits)
        made[kept.positions] = patched
        self.lost += lost
        return made

    def close(self) -> int:
        next(self.kept, None)  # the patch's own digests
        return self.lost


# ---- taking a patch back from a copy -------------------------------------------------------------


class RestoringCopy:
    """The edit of one tensor of a patched copy: the backbone's own bits, cast to its dtype.

    They come from the backbone, or from the patch's originals and the rest, cast back. Patched
    again they must be what the copy holds. inner: patches them, and compares their hash.
    """

    def __init__(self, patch: PatchFile, name: str, dtype: str, inner: Edit, backbone: Path | None):
        self.patch, self.name, self.dtype, self.inner = patch, name, dtype, inner
        self.own, self.kept = patch.manifest.tensors[name].dtype, patch.kept(name)
        self.original = None if backbone is None else Original(patch, name, backbone)

    def block(self, bits: np.ndarray) -> np.ndarray:
        if self.original is not None:
            own = self.original.read(len(bits))
        else:
            own, kept = floats.convert(bits, self.dtype, self.own), next(self.kept)
            own[kept.positions] = kept.originals
        restored = floats.convert(own, self.own, self.dtype)
        if not np.array_equal(self.inner.block(own), bits):
            raise self._other()
        return restored

    def _other(self) -> SpkitError:
        what = "the checkpoint's weights are not what this patch makes of its backbone"
        return wrong_tensor(self.patch.path, self.name, what)

    def close(self) -> int:
        if self.original is not None:
            self.original.close()
        try:
            self.inner.close()
        except SpkitError:  # there it is the backbone that is wrong
            raise self._other() from None
        return 0
