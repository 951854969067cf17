"""What a patch is, how much it changes, and where: two tables and a map of layers and modules.

The whole file is read and checked; no backbone is needed.
"""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd

from spkit.models.weights import place
from spkit.patchfile.encoding import entropy_bound
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import PARTS, Manifest


@dataclass(frozen=True)
class Inspected:
    """manifest: all that the file says. size: bytes of the file. where: a row a matrix.

    where: tensor, layer, module, n (weights), k (kept), share = k/n, lost, norm (of the merged
    values; a weight stored as such counts by its rounded delta), bytes.
    """

    path: str
    patch: str
    manifest: Manifest
    size: int
    where: pd.DataFrame

    def summary(self) -> dict[str, object]:
        """What one wants to know first, {label: value}."""
        manifest = self.manifest
        positions, bound = manifest.size("positions"), self.entropy_bound
        exceptions = sum(b.exceptions for m in manifest.tensors.values() for b in m.blocks)
        backbone, error = manifest.backbone, manifest.error
        return {
            "patch": self.patch,
            "method": manifest.method.get("name", ""),
            "backbone": backbone.name,
            "revision": backbone.revision or "",
            "architecture": backbone.architecture,
            "backbone dtype": ", ".join(sorted({m.dtype for m in manifest.tensors.values()})),
            "D_h fingerprint": manifest.data.get("fingerprint", ""),
            "matrices": len(manifest.tensors),
            "weights in them": manifest.weights,
            "kept weights": manifest.kept,
            "kept %": round(100 * manifest.kept / manifest.weights, 4),
            "lost to rounding": manifest.lost,
            "values": manifest.values,
            "of them stored as patched weights": exceptions,
            "relative error of the values (rms)": error.relative_rms,
            "largest error of a value": error.largest,
            "weights that differ from float32 composition": error.changed,
            "bytes": self.size,
            "bytes of positions": positions,
            "their entropy bound": round(bound),
            "bytes of values": manifest.size("values") + manifest.size("replaced"),
            "revertible": manifest.revertible,
            "bytes of originals": manifest.size("originals"),
            "patches in it": len(manifest.stack) or 1,
        }

    @property
    def entropy_bound(self) -> float:
        """Bytes below which random positions of this density cannot be coded."""
        return sum(entropy_bound(m.kept, m.weights) for m in self.manifest.tensors.values())

    def by_module(self) -> pd.DataFrame:
        """The same by module, over all layers: n, k, share, lost, norm, bytes."""
        table = self.where.assign(norm=self.where["norm"] ** 2)
        columns = ["n", "k", "lost", "norm", "bytes"]
        sums = table.groupby("module", sort=False)[columns].sum()
        sums.insert(2, "share", sums["k"] / sums["n"])
        return sums.assign(norm=np.sqrt(sums["norm"])).reset_index()

    def layers(self) -> pd.DataFrame:
        """Kept share, a row a layer and a column a module; matrices outside of layers left out."""
        inside = self.where[self.where["layer"] >= 0]
        modules = list(dict.fromkeys(inside["module"]))
        return inside.pivot(index="layer", columns="module", values="share")[modules]

    def figure(self):
        """The map of layers and modules as a matplotlib figure."""
        from spkit.figures import layer_module_maps

        return layer_module_maps({"share of the matrix kept": self.where})


def inspect(patch: str | Path) -> Inspected:
    """Read and check a patch file; SpkitError where anything in it is not right."""
    with PatchFile(patch) as opened:
        rows = []
        for name, matrix in opened.manifest.tensors.items():
            squared = 0.0
            for kept in opened.kept(name):
                squared += float(np.square(kept.deltas, dtype=np.float64).sum())
            sizes = {"bytes": sum(matrix.size(part) for part in PARTS)}
            counts = {"n": matrix.weights, "k": matrix.kept, "share": matrix.kept / matrix.weights}
            rows.append(
                {**place(name), **counts, "lost": matrix.lost, "norm": sqrt(squared), **sizes}
            )
        return Inspected(str(patch), opened.id, opened.manifest, opened.size, pd.DataFrame(rows))
