"""Is this patch whole, does it fit this backbone, and was this checkpoint made from the two?

Every answer is a row: what was compared, whether it agrees, and where it first does not.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import About, brief, headers, local_folder, tensor_files
from spkit.patchfile import copies, floats
from spkit.patchfile.apply import NOT_THE_BACKBONE, check_fit, compared, edit
from spkit.patchfile.encoding import TensorHash
from spkit.patchfile.file import PatchFile
from spkit.patchfile.make import config_sha256, read_config
from spkit.patchfile.manifest import wrong_tensor
from spkit.patchfile.stream import CHUNK, read_exactly, stream

WHOLE = "the patch file is whole"
MADE = "the checkpoint's patched weights are what the patch makes"
LONGEST_DETAIL = 2_000  # characters; names of tensors are as long as a checkpoint likes


@dataclass(frozen=True)
class Finding:
    """One comparison. ok: None where it is only a remark, such as another config.json."""

    what: str
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Verified:
    """All findings; ok where none of them is wrong."""

    patch: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)


def verify(
    patch: str | Path,
    backbone: str | Path | None = None,
    checkpoint: str | Path | None = None,
    *,
    revision: str | None = None,
    original: str | Path | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Verified:
    """Compare, bit for bit, whatever is given; nothing is written and nothing is raised for a no.

    patch alone: every byte of the file against its digests. backbone: its touched tensors against
    the hashes in the patch. checkpoint: its touched tensors against what the patch makes; with the
    backbone also every untouched tensor, and then the checkpoint may have another dtype
    (apply --dtype). A backbone in another dtype than the patch's is compared by its values;
    original: as in `apply`. SpkitError only where a folder cannot be read at all.
    """
    findings: list[Finding] = []
    if not Path(patch).is_file():
        raise SpkitError(f"{patch} is no file.")
    try:
        opened = PatchFile(patch)
    except SpkitError as error:
        return Verified(None, (Finding(WHOLE, False, str(error)),))
    with opened:
        how = {"threads": threads, "progress": progress}
        findings.append(_tried(WHOLE, opened.check))
        if findings[-1].ok and backbone is not None:
            backbone = local_folder(backbone, revision or opened.manifest.backbone.revision)
            tensor_files(backbone)  # one that cannot be read is an error, not a no
            original = None if original is None else local_folder(original, revision)
            ways, found = _backbone(opened, backbone, original, how)
            findings += found
        if checkpoint is not None and all(finding.ok is not False for finding in findings):
            tensor_files(checkpoint)
            if backbone is None:
                findings += _checkpoint(opened, Path(checkpoint), how)
            else:
                edits = partial(Comparing, opened, ways, original)
                findings += _made_of(opened, backbone, Path(checkpoint), edits, how)
        return Verified(opened.id, tuple(findings))


def _tried(what: str, check, *args, **how) -> Finding:
    try:
        check(*args, **how)
        return Finding(what, True)
    except SpkitError as error:
        return Finding(what, False, brief(error, LONGEST_DETAIL))


def _backbone(patch: PatchFile, folder: Path, original: Path | None, how):
    """({tensor: how it is compared}, findings)."""
    fits, ways = "the patch fits the backbone's tensors", {}
    findings = [_tried(fits, check_fit, patch, folder, copied=True)]
    if findings[0].ok:
        what = "the backbone's weights are those the patch was made for"
        findings.append(_tried(what, _same_backbone, patch, folder, original, ways, how))
        if findings[-1].ok and any(way.kind != copies.HASH for way in ways.values()):
            findings[-1] = Finding(what, True, f"checked {copies.told(ways)}")
    if config_sha256(read_config(folder)) != patch.manifest.backbone.config_sha256:
        detail = "it differs in more than the library's version; the weights decide"
        findings.append(Finding("config.json is the one the patch was made with", None, detail))
    return ways, findings


def _same_backbone(patch: PatchFile, folder: Path, original: Path | None, ways, how) -> None:
    """SpkitError where a touched tensor is not the backbone's. ways: filled with what decided."""
    ways |= compared(patch, folder, original, **how)
    edits = {
        name: partial(Hashing, patch, name, "before")
        if way.kind == copies.HASH
        else partial(edit, patch, name, way, None, original)
        for name, way in ways.items()
    }
    stream(folder, edits, None, identity={}, label="backbone", **how)


def _checkpoint(patch: PatchFile, folder: Path, how) -> list[Finding]:
    """Without a backbone."""
    made = "If it was applied with --dtype, it can be verified with the backbone"
    findings = [_tried("the checkpoint has the patched tensors", check_fit, patch, folder, made)]
    if findings[0].ok:
        edits = {n: partial(Hashing, patch, n, "after") for n in patch.manifest.tensors}
        same = partial(stream, folder, edits, None, identity={}, label="checkpoint", **how)
        findings.append(_tried(MADE, same))
        detail = "not compared: that needs the backbone"
        findings.append(Finding("all other weights are the backbone's", None, detail))
    return findings


def _made_of(patch: PatchFile, backbone: Path, folder: Path, comparing, how) -> list[Finding]:
    theirs = _tensors(folder)
    edits = {name: partial(comparing, name, folder, theirs) for name in patch.manifest.tensors}
    same = partial(stream, backbone, edits, None, identity={}, label="checkpoint", **how)
    others = partial(_compare_others, patch, backbone, folder, theirs)
    return [_tried(MADE, same), _tried("all other weights are the backbone's", others)]


class Hashing:
    """The edit that changes nothing and compares a tensor's hash with the patch's."""

    def __init__(self, patch: PatchFile, name: str, when: str):
        self.patch, self.name, self.when, self.digest = patch, name, when, TensorHash()

    def block(self, bits: np.ndarray) -> np.ndarray:
        self.digest.update(bits)
        return bits

    def close(self) -> int:
        if self.digest.hexdigest() != getattr(self.patch.manifest.tensors[self.name], self.when):
            changed = "the checkpoint's weights are not what this patch makes of its backbone"
            what = NOT_THE_BACKBONE if self.when == "before" else changed
            raise wrong_tensor(self.patch.path, self.name, what)
        return 0


class Comparing:
    """The edit that patches a tensor of the backbone and compares it with the checkpoint's."""

    def __init__(self, patch: PatchFile, ways, original: Path | None, name, folder, theirs):
        if name not in theirs:
            raise SpkitError(f"The checkpoint {folder} has no tensor {name!r}.")
        self.name, (path, place, about) = name, theirs[name]
        self.inner = edit(patch, name, ways[name], _float(about, path, name), original)
        have, want = about["shape"], patch.manifest.tensors[name].shape
        if have != want:
            raise SpkitError(f"{path}: {name!r} has the shape {have}, not {want}.")
        self.file = path.open("rb", buffering=0)
        self.file.seek(place)

    def block(self, bits: np.ndarray) -> np.ndarray:
        made = self.inner.block(bits)
        if read_exactly(self.file, made.nbytes) != made.tobytes():
            what = "the weights are not what this patch makes of its backbone"
            raise SpkitError(f"{self.file.name}: {self.name!r}: {what}")
        return made

    def close(self) -> int:
        self.file.close()
        return self.inner.close()


def _tensors(folder: Path) -> dict[str, tuple[Path, int, About]]:
    """{tensor name: (file, place in it, what its header says)}."""
    return {
        name: (path, start + about["data_offsets"][0], about)
        for name, (path, start, about) in headers(folder).items()
    }


def _compare_others(patch: PatchFile, backbone: Path, folder: Path, theirs) -> None:
    ours = _tensors(backbone)
    for name in sorted(set(ours) ^ set(theirs)):
        where = folder if name in theirs else backbone
        raise SpkitError(f"only {where} has a tensor {name!r}")
    for name in (n for n in ours if n not in patch.manifest.tensors):
        (path, place, about), (other, where, made) = ours[name], theirs[name]
        plain = about["dtype"] == made["dtype"]
        if about["shape"] != made["shape"]:
            raise SpkitError(
                f"{other}: {name!r} has the shape {made['shape']}, not {about['shape']}"
            )
        if not plain:
            before, after = (_float(a, p, name) for a, p in ((about, path), (made, other)))
            width = floats.BITS[before]
        with path.open("rb", buffering=0) as old, other.open("rb", buffering=0) as new:
            old.seek(place)
            new.seek(where)
            size = about["data_offsets"][1] - about["data_offsets"][0]
            for start in range(0, size, CHUNK):
                data = read_exactly(old, min(CHUNK, size - start))
                if not plain:
                    data = floats.convert(np.frombuffer(data, width), before, after).tobytes()
                if read_exactly(new, len(data)) != data:
                    raise SpkitError(f"{other}: {name!r} differs from the backbone's")


def _float(about: About, path: Path, name: str) -> str:
    if about["dtype"] not in floats.BITS:
        raise SpkitError(f"{path}: {name!r} is {about['dtype']}, which is no float of a patch")
    return about["dtype"]
