"""A patch as a LoRA adapter of rank N: the best that so few directions can do, with its error.

    P = what the patch adds to one matrix      [out, in], 0 where nothing is kept
    P ~ B A                                    B [out, N], A [N, in]: truncated SVD
    error = |P - B A| / |P|                    Frobenius, measured on the factors as they are stored

The merged patch alone goes in, never one of its two parts. A masked patch is not low-rank, so the
error is large at the usual ranks, and the adapter is another model than the patched checkpoint. One
matrix is in memory at a time; the core is enough (numpy, safetensors).
"""

import json
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import local_folder
from spkit.models.stored_names import CORE
from spkit.patchfile import copies, floats
from spkit.patchfile.apply import check_fit
from spkit.patchfile.encoding import blocks
from spkit.patchfile.file import Kept, PatchFile
from spkit.patchfile.manifest import Matrix, wrong_tensor
from spkit.system.files import atomic

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "spkit_lora.json"
README = """\
---
base_model: {base}
library_name: peft
---
# A rank-{rank} LoRA of a safety patch

Made by `spkit lora --rank {rank}` from the patch `{patch}` for {base}: the truncated SVD of what
the patch adds to each matrix. **Its relative error is {error:.3f}** (Frobenius norm, all matrices;
0 would be the patch itself, 1 no patch at all). {record} has that of each matrix.

A masked patch is not low-rank. This adapter was not evaluated: the results of the patch are not
its results. Where the patch itself can be applied, apply it.
"""


@dataclass(frozen=True)
class Exported:
    """What `lora` made. error: relative Frobenius error over all matrices; worst: of one matrix.

    rows: {tensor, shape, kept, norm, error} of each matrix; norm: of what the patch adds to it.
    """

    folder: str
    patch: str
    rank: int
    tensors: int
    parameters: int
    error: float
    worst: float
    rows: list[dict]


def lora(
    patch: str | Path,
    folder: str | Path,
    rank: int,
    *,
    prefix: str | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Write the adapter folder `folder` for PEFT, whole or not at all: float32 factors of `rank`.

    prefix: what stands before "layers.0" in the names of the model in memory, such as "model"; None
    where it is the same in the backbone's files. backbone: where the patch stores some weights as
    patched (inspect: "exceptions") and does not carry their originals, what it adds there is read
    from it, in any dtype that holds its values.
    A matrix of a lower rank than `rank` gets factors with zeros. SpkitError where the folder
    exists, the patch is damaged, or the backbone is needed or is another one.
    """
    folder = Path(folder)
    if rank < 1:
        raise SpkitError(f"The rank is {rank}, must be at least 1.")
    if folder.exists() and not (overwrite and (folder / CONFIG).is_file()):
        raise SpkitError(
            f"{folder} exists already: choose another name, or --overwrite an adapter."
        )
    with PatchFile(patch) as opened:
        names = opened.manifest.tensors
        modules = {name: _module(opened, name, prefix) for name in names}
        own = _backbone(opened, backbone, revision)
        opened.check()
        tensors, rows = {}, []
        for name in tqdm(names, desc="lora", unit="matrix", disable=not progress, leave=False):
            added = _added(opened, name, own)
            b, a = factors(added, rank)
            rows.append(_row(name, names[name], added, b, a))
            place = f"base_model.model.{modules[name]}"
            tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        done = _exported(folder, opened.id, rank, tensors, rows)
        with atomic(folder) as temporary:
            temporary.mkdir()
            _write(temporary, tensors, done, opened.manifest.backbone.name, list(modules.values()))
    return done


def factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(B [out, rank], A [rank, in]), float32, of the truncated SVD of a float32 [out, in].

    Of all matrices of this rank, B A is the nearest in the Frobenius norm. Both factors share the
    singular values. The singular vectors are the eigenvectors of the smaller of M M^T and M^T M,
    which are found several times as fast as an SVD of M; float64 keeps what squaring would lose.
    """
    if matrix.shape[0] > matrix.shape[1]:
        a, b = factors(matrix.T, rank)
        return np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    wide = matrix.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)  # ascending
    left = vectors[:, ::-1][:, :rank]
    roots = np.sqrt(np.sqrt(np.maximum(values[::-1][:rank], 0.0)))  # of the singular values
    right = left.T @ wide
    b, a = np.zeros((matrix.shape[0], rank)), np.zeros((rank, matrix.shape[1]))
    b[:, : len(roots)] = left * roots
    a[: len(roots)] = right / np.where(roots > 0, roots, 1.0)[:, None]
    return b.astype(np.float32), a.astype(np.float32)


# ---- what the patch adds -------------------------------------------------------------------------


def _backbone(patch: PatchFile, backbone, revision: str | None) -> Path | None:
    """Where the originals of replaced weights are; None where they are in the patch."""
    replaced = any(b.exceptions for m in patch.manifest.tensors.values() for b in m.blocks)
    if not replaced or patch.manifest.revertible:
        return None
    if backbone is None:
        raise SpkitError(
            f"{patch.path} stores some weights as patched, so what it adds to them needs the "
            f"backbone: give {patch.manifest.backbone.name} with --backbone"
        )
    folder = local_folder(backbone, revision or patch.manifest.backbone.revision)
    check_fit(patch, folder, copied=True)
    return folder


def _added(patch: PatchFile, name: str, backbone: Path | None) -> np.ndarray:
    """float32 [out, in]: the stored values, and patched minus original where it is replaced."""
    matrix = patch.manifest.tensors[name]
    flat = np.zeros(matrix.weights, dtype=np.float32)
    original = None if backbone is None else copies.Original(patch, name, backbone)
    for (start, length), kept in zip(blocks(matrix.weights), patch.kept(name), strict=True):
        before = kept.originals
        if original is not None:
            before = original.read(length)[kept.positions]
        flat[start + kept.positions.astype(np.int64)] = _values(kept, before, matrix)
    if original is not None:
        original.close()
    if not np.isfinite(flat).all():
        raise wrong_tensor(patch.path, name, "what it adds is not finite in float32")
    return flat.reshape(matrix.shape)


def _values(kept: Kept, before: np.ndarray | None, matrix: Matrix) -> np.ndarray:
    chosen, bits = kept.replaced
    values = kept.deltas.copy()
    if len(chosen):
        after, old = (floats.to_float32(b, matrix.dtype) for b in (bits, before[chosen]))
        values[chosen] = after - old
    return values


def _exported(folder: Path, patch: str, rank: int, tensors, rows: list[dict]) -> Exported:
    total = sqrt(sum(row["norm"] ** 2 for row in rows)) or 1.0
    return Exported(
        folder=str(folder),
        patch=patch,
        rank=rank,
        tensors=len(rows),
        parameters=sum(factor.size for factor in tensors.values()),
        error=sqrt(sum((row["error"] * row["norm"]) ** 2 for row in rows)) / total,
        worst=max(row["error"] for row in rows),
        rows=rows,
    )


# ---- the folder ----------------------------------------------------------------------------------


def _row(name: str, matrix: Matrix, added: np.ndarray, b: np.ndarray, a: np.ndarray) -> dict:
    norm, left = (float(np.linalg.norm(m.astype(np.float64))) for m in (added, added - b @ a))
    facts = {"tensor": name, "shape": matrix.shape, "kept": matrix.kept, "norm": norm}
    return {**facts, "error": left / norm if norm else 0.0}


def _module(patch: PatchFile, name: str, prefix: str | None) -> str:
    """The path of a matrix in the model. PEFT passes over factors whose path it does not find."""
    core = CORE.search(name)
    if core and prefix is not None:
        name = ".".join([*filter(None, [prefix.strip(".")]), core[1]])
    elif core and (core[1] == name or "language_model" in name):
        raise SpkitError(
            f"{patch.path} has the names of its backbone's files ({name!r}), and transformers "
            "renames these while it loads: say with --prefix what stands before "
            f"{'.'.join(core[1].split('.')[:2])!r} in the model (mostly: {_usual(name)})"
        )
    return name.removesuffix(".weight")


def _usual(name: str) -> str:
    """The prefix of most models: of a package with a vision tower (Gemma 3), and of others."""
    return "model.language_model" if "language_model" in name else "model"


def _write(folder: Path, tensors, done: Exported, base: str, modules: list[str]) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": done.rank,
        "lora_alpha": done.rank,  # a scale of 1: the factors are the patch's own size
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    record = {key: value for key, value in asdict(done).items() if key != "folder"}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, tree in ((CONFIG, config), (RECORD, record)):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    about = {"base": base, "rank": done.rank, "patch": done.patch, "error": done.error}
    text = README.format(**about, record=RECORD)
    (folder / "README.md").write_text(text, encoding="utf-8")
