"""How large a patch file is for LLaMA-2-7B's shape, part by part, beside the entropy bound.

    .venv/bin/python benchmarks/patch_size.py                  about a minute, 2.3 GB of memory

One decoder layer of that shape is made with random weights; nothing is downloaded. Its 7 matrices
get a patch drawn as the method draws it: top 3 % and top 2 % of random scores, difference sets,
retention with p = 30 %, and on the kept sets the products of two random LoRA factors. The patch
files are real ones, written by make_patch. The whole model's patch has 32 such layers: positions
and values are multiplied by 32; the header is the real one of a manifest with all 224 matrices
(without an evaluation record, which adds a few kB). Positions of real scores lie in rows and
columns and are no harder to code than these.

overlap: the share of the smaller set, S_OSM, that lies in S_SE as well. 0 keeps the most.
bound: no code of the positions is on average shorter than n * H(k / n) bits, for k random ones
among n weights. For the values it is no bound, but what they take as they are, 2 bytes each.
The second table has other codes for the same positions and values, in the format's own blocks.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zstandard
from tabulate import tabulate

from spkit.bench import random_checkpoint
from spkit.method.patching import kept_set, merged_delta, retention_mask, top_rate_set
from spkit.method.sets import Lazy
from spkit.models.checkpoint_files import read_header, tensor_files
from spkit.patchfile import encoding, floats
from spkit.patchfile.file import header
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.manifest import PARTS, Manifest
from spkit.system.machine import hardware, versions

TOP_SE, TOP_OSM, RETAINED = 0.03, 0.02, 0.3
RANK, DEVIATION = 16, 5e-4  # of a LoRA delta: rank, standard deviation
GOAL = 2.5  # % of the bf16 checkpoint
OVERLAPS = (0.0, 0.4)
Sparse = dict[str, tuple[np.ndarray, np.ndarray]]  # {tensor: (flat positions, float32 values)}


# ---- the data ------------------------------------------------------------------------------------


def layer_shapes(folder: Path) -> dict[str, list[int]]:
    """{tensor: [out, in]} of the projections in a checkpoint."""
    shapes = {}
    for path in sorted(set(tensor_files(folder).values())):
        with path.open("rb") as file:
            tensors, _ = read_header(file, path)
        shapes |= {n: about["shape"] for n, about in tensors if n.endswith("proj.weight")}
    return shapes


def draw(shapes: dict[str, list[int]], overlap: float, seed: int) -> Sparse:
    """What the method keeps of two random LoRA patches, matrix by matrix."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    # where in [0, 1) each set lies: both are ranges of one uniform draw, so their overlap is exact
    first = {"se": 0.0, "osm": TOP_SE - overlap * TOP_OSM}
    for name, shape in shapes.items():
        uniform = torch.rand(shape, generator=generator)
        tops, retained, deltas = {}, {}, {}
        for patch, rate in (("se", TOP_SE), ("osm", TOP_OSM)):
            score = 1 - (uniform - first[patch]).remainder_(1.0)
            tops[patch] = top_rate_set(score, rate)
            retained[patch] = retention_mask(shape, RETAINED, seed=seed, patch=patch, tensor=name)
            a = torch.randn((RANK, shape[1]), generator=generator)
            b = torch.randn((shape[0], RANK), generator=generator)
            deltas[patch] = (b @ a).mul_(DEVIATION / RANK**0.5)
        keep_se = kept_set(retained["se"], tops["se"], tops["osm"])
        keep_osm = kept_set(retained["osm"], tops["osm"], tops["se"])
        merged = merged_delta(deltas["se"], keep_se, deltas["osm"], keep_osm, 1.0, 1.0)
        flat = merged.numpy().reshape(-1)
        positions = np.flatnonzero(flat)
        kept[name] = positions, flat[positions]
    return kept


def dense(shapes: dict[str, list[int]], kept: Sparse) -> Lazy:
    """The same as matrices, one at a time."""

    def matrix(name: str) -> np.ndarray:
        flat = np.zeros(np.prod(shapes[name]), dtype=np.float32)
        positions, flat[positions] = kept[name][0], kept[name][1]
        return flat.reshape(shapes[name])

    return Lazy(shapes, matrix)


# ---- the file's parts ----------------------------------------------------------------------------


def entropy_bound(n: int, k: int) -> float:
    """Bytes: n * H(k / n) / 8."""
    share = np.array([k / n, 1 - k / n])
    return float(-n * (share * np.log2(share)).sum() / 8)


def whole_header(manifest: Manifest, layers: int) -> int:
    """Bytes before the data in the patch of so many layers like the manifest's only one."""
    tensors = {
        name.replace(".layers.0.", f".layers.{layer}."): matrix
        for layer in range(layers)
        for name, matrix in manifest.tensors.items()
    }
    whole = manifest.model_copy(update={"tensors": tensors})
    tree = whole.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()  # as Writer.finish
    return 8 + len(header(text, whole))


def parts(manifest: Manifest, layers: int, checkpoint: int) -> list[dict]:
    """Rows: bytes of every part of the whole model's patch, the sum, and the originals apart."""
    kept = manifest.kept * layers
    sizes = {part: manifest.size(part) * layers for part in PARTS}
    originals = sizes.pop("originals")
    # of a patch that is not revertible; the other one's is longer by the originals' digests
    bare = {
        name: matrix.model_copy(
            update={
                "sha256": {p: d for p, d in matrix.sha256.items() if p != "originals"},
                "blocks": [b.model_copy(update={"originals": []}) for b in matrix.blocks],
            }
        )
        for name, matrix in manifest.tensors.items()
    }
    plain = manifest.model_copy(update={"tensors": bare, "revertible": False})
    sizes["manifest"] = whole_header(plain, layers)
    sizes["whole file"] = sum(sizes.values())
    more = whole_header(manifest, layers) - sizes["manifest"]
    sizes["originals, if revertible"] = originals + more
    positions = sum(entropy_bound(m.weights, m.kept) for m in manifest.tensors.values())
    bounds = {"positions": layers * positions, "values": 2.0 * kept}
    rows = []
    for part, size in sizes.items():
        row = {"part": part, "bytes": size, "% of checkpoint": 100 * size / checkpoint}
        row["bits a kept weight"] = 8 * size / kept
        if part in bounds:
            row |= {"bound": round(bounds[part]), "ratio": size / bounds[part]}
        rows.append(row)
    return rows


# ---- other codes for the same data ---------------------------------------------------------------


def zstd(level: int) -> Callable[[bytes | np.ndarray], int]:
    """Length of the data under zstd."""
    return lambda data: len(zstandard.ZstdCompressor(level=level).compress(data))


def gaps(positions: np.ndarray, length: int) -> bytes:
    """The format's own gaps, before zstd."""
    how, packed = encoding.pack_positions(positions, length)
    assert how == "gaps", "at these rates a bitmap is never smaller"
    return encoding.decompress(packed, most=length)


def varints(positions: np.ndarray, _: int) -> int:
    """Bytes of gaps in 7 bits a byte."""
    distances = np.diff(positions.astype(np.int64), prepend=-1) - 1
    return int(sum((distances >= 1 << (7 * i)).sum() for i in range(1, 5))) + len(distances)


def bitmap(positions: np.ndarray, length: int) -> np.ndarray:
    """One bit a weight."""
    bits = np.zeros(length, dtype=bool)
    bits[positions] = True
    return np.packbits(bits)


def split(bits: np.ndarray, level: int) -> int:
    """High bytes and low bytes apart, each under zstd: what pack_values does at level 1."""
    columns = bits.view(np.uint8).reshape(-1, 2).T
    return sum(zstd(level)(np.ascontiguousarray(column)) for column in columns)


def bytes_entropy(bits: np.ndarray) -> float:
    """Bytes: the entropy of the high bytes plus that of the low bytes, each on its own."""
    total = 0.0
    for column in bits.view(np.uint8).reshape(-1, 2).T:
        count = np.bincount(column, minlength=256)
        share = count[count > 0] / len(column)
        total -= len(column) * (share * np.log2(share)).sum() / 8
    return total


def int8(values: np.ndarray) -> int:
    """The format's 8 bits: steps and scales."""
    steps, scales = encoding.quantize(values)
    return sum(map(len, [*encoding.pack_values(steps), *encoding.pack_values(scales)]))


def alternatives(shapes: dict[str, list[int]], kept: Sparse, layers: int, checkpoint: int):
    """Rows: bytes of each code for the whole model's positions or values, and its speed."""
    blocks = []  # (positions in the block, its length, values as float32)
    for name, (positions, values) in kept.items():
        for start, length in encoding.blocks(int(np.prod(shapes[name]))):
            first, last = np.searchsorted(positions, (start, start + length))
            here = (positions[first:last] - start).astype(np.uint32)
            blocks.append((here, length, values[first:last]))
    rows = []

    total = sum(len(positions) for positions, _, _ in blocks)

    def measure(part: str, code: str, size: Callable, inputs: list) -> None:
        begin = time.perf_counter()
        found = sum(size(*one) for one in inputs)
        row = {"part": part, "code": code, "bytes": round(layers * found)}
        row["% of checkpoint"] = 100 * layers * found / checkpoint
        row["bits a kept weight"] = 8 * found / total
        rows.append(row | {"ms a layer": 1000 * (time.perf_counter() - begin)})

    where = [(positions, length) for positions, length, _ in blocks]
    measure("positions", "entropy bound", lambda p, n: entropy_bound(n, len(p)), where)
    coded = [(gaps(positions, length),) for positions, length in where]
    measure("positions", "gaps in bytes, raw", len, coded)
    for level in (1, 3, 9, 19):
        measure("positions", f"gaps in bytes, zstd {level}", zstd(level), coded)
    measure("positions", "gaps as varints, raw", varints, where)
    maps = [(bitmap(positions, length),) for positions, length in where]
    measure("positions", "bitmap, raw", len, maps)
    for level in (1, 19):
        measure("positions", f"bitmap, zstd {level}", zstd(level), maps)
    measure("positions", "uint32, raw", lambda p, _: 4 * len(p), where)

    bits = [(floats.from_float32(values, "BF16"),) for _, _, values in blocks]
    measure("values", "bf16, raw", lambda b: b.nbytes, bits)
    measure("values", "bf16, entropy of its two bytes", bytes_entropy, bits)
    for level in (1, 19):
        measure("values", f"bf16, zstd {level}", lambda b, le=level: zstd(le)(b.tobytes()), bits)
    for level in (1, 3, 19):
        measure("values", f"bf16 by bytes, zstd {level}", lambda b, le=level: split(b, le), bits)
    measure("values", "int8 in groups, zstd 1", int8, [(values,) for _, _, values in blocks])
    return pd.DataFrame(rows)


# ---- the report ----------------------------------------------------------------------------------


def show(table: pd.DataFrame) -> None:
    """Print one table."""
    cells = table.copy()
    for column in cells.select_dtypes("number"):
        form = "{:,.0f}".format if column in ("bytes", "bound") else "{:,.3f}".format
        cells[column] = [form(x) if pd.notna(x) else "" for x in table[column]]
    sides = ["right" if column in table.select_dtypes("number") else "left" for column in table]
    print(tabulate(cells, "keys", "pipe", showindex=False, disable_numparse=True, colalign=sides))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(random_checkpoint.SHAPES), default="llama2-7b")
    parser.add_argument("--overlaps", nargs="+", type=float, default=list(OVERLAPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="folder for the layer and its patches; else a temporary")
    parser.add_argument("--out", help="both tables as one .csv")
    given = parser.parse_args()

    architecture, values = random_checkpoint.SHAPES[given.shape]
    sizes = dict(zip(random_checkpoint.SIZES, values, strict=True))
    layers = sizes["num_hidden_layers"]
    model = random_checkpoint.meta_model(random_checkpoint.configuration(architecture, sizes))
    checkpoint = 2 * sum(weights.numel() for weights in model.parameters())
    del model

    tables = []
    with contextlib.ExitStack() as stack:
        folder = Path(given.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        # the embeddings are not patched, so that few of them do
        one = sizes | {"num_hidden_layers": 1, "vocab_size": 128}
        backbone = random_checkpoint.write(folder / "layer", one, architecture, given.seed)
        shapes = layer_shapes(backbone)
        weights = layers * sum(int(np.prod(shape)) for shape in shapes.values())
        print(f"{given.shape}: {weights:,} weights in {layers * len(shapes)} matrices; ", end="")
        print(f"bf16 checkpoint {checkpoint:,} bytes")
        method = {"top_rate_se": TOP_SE, "top_rate_osm": TOP_OSM, "retention_rate": RETAINED}
        about = About(given.shape, method=method | {"seed": given.seed})
        for overlap in given.overlaps:
            kept = draw(shapes, overlap, given.seed)
            for stored in ("exact", "int8"):
                file = folder / f"{stored}-{overlap}.safetensors"
                manifest = make_patch(
                    *(backbone, dense(shapes, kept), file, about),
                    values=stored,
                    revertible=stored == "exact",
                    progress=False,
                )
                table = pd.DataFrame(parts(manifest, layers, checkpoint))
                if stored == "int8":  # the rest is the same
                    table = table[table["part"].isin(["values", "replaced", "whole file"])]
                assert file.stat().st_size == whole_header(manifest, 1) + sum(
                    manifest.size(part) for part in PARTS
                )
                error, of_kept = manifest.error, manifest.error.changed / manifest.kept
                print(
                    f"\noverlap {overlap:.0%}, values {stored}: "
                    f"{manifest.kept / manifest.weights:.3%} of the weights are kept; "
                    f"{of_kept:.2%} of them are not as composed in float32 "
                    f"(relative error of the deltas {error.relative_rms:.2%})"
                )
                show(table)
                tables.append(table.assign(overlap=overlap, values=stored))
                if stored == "exact":
                    found = tables[-1].set_index("part").loc["whole file", "% of checkpoint"]
                    print(f"goal: at most {GOAL} % of the bf16 checkpoint; found: {found:.3f} %")
            if overlap == given.overlaps[0]:
                others = alternatives(shapes, kept, layers, checkpoint)
                codes = others.assign(overlap=overlap)
        print(f"\nother codes for the same data, overlap {given.overlaps[0]:.0%}")
        show(others)
    machine, found = hardware(), versions() | {"zstandard": zstandard.__version__}
    libraries = ", ".join(f"{n} {found[n]}" for n in ("python", "torch", "numpy", "zstandard"))
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    print(f"\n{where}; {libraries}; seed {given.seed}")
    if given.out:
        pd.concat([*tables, codes]).to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
