"""What quantising leaves of a patch: each patched matrix, packed with the patch and without it.

    .venv/bin/python benchmarks/quantised_patch.py BACKBONE PATCHED      two checkpoint folders

Q(W) is a matrix packed into a GGUF type and unpacked again, by the package gguf. The patch is P =
W' - W; what is left of it is Q(W') - Q(W).

    erased    of the weights that the patch changes: those that are the same packed, %
    error     |(Q(W') - Q(W)) - P| / |P|, Frobenius, all matrices: 0 nothing is lost
    other     of the weights that the patch does not change: those that changed by packing, %

Weights are packed in blocks of 32 that share a scale, so a patched weight moves its neighbours,
too. The K types (Q4_K_M and the like) are packed by llama.cpp alone and are not here.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants
from tabulate import tabulate

from spkit.models.checkpoint_files import headers
from spkit.patchfile import floats

KINDS = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [out, in] as it comes out of a GGUF file that holds it as `kind`."""
    kind = GGMLQuantizationType[kind]
    return quants.dequantize(quants.quantize(values, kind), kind)


def matrix(found, name: str) -> np.ndarray:
    """A tensor as float32, read from its file."""
    path, start, about = found[name]
    first, last = about["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + first)
        bits = np.frombuffer(file.read(last - first), dtype=floats.BITS[about["dtype"]])
    return floats.to_float32(bits, about["dtype"]).reshape(about["shape"])


def left(backbone: Path, patched: Path, kinds=KINDS) -> list[dict]:
    """A row a kind: kind, erased, error, other (see above)."""
    old, new = headers(backbone), headers(patched)
    sums = {kind: np.zeros(6) for kind in kinds}
    for name in (n for n in old if len(old[n][2]["shape"]) == 2):
        before, after = matrix(old, name), matrix(new, name)
        changed = before != after
        if not changed.any():
            continue
        patch = after.astype(np.float64) - before
        for kind, total in sums.items():
            moved = packed(after, kind).astype(np.float64) - packed(before, kind)
            same = moved == 0
            total += (
                *((same & changed).sum(), changed.sum(), np.square(moved - patch).sum()),
                *(np.square(patch).sum(), (~same & ~changed).sum(), (~changed).sum()),
            )
    return [
        {
            "kind": kind,
            "erased": 100 * erased / all_changed,
            "error": float(np.sqrt(squared / norm)),
            "other": 100 * others / max(rest, 1),
        }
        for kind, (erased, all_changed, squared, norm, others, rest) in sums.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backbone", type=Path)
    parser.add_argument("patched", type=Path)
    given = parser.parse_args()
    rows = left(given.backbone, given.patched)
    print(tabulate(rows, headers="keys", floatfmt=("", ".2f", ".4f", ".2f"), tablefmt="github"))


if __name__ == "__main__":
    main()
