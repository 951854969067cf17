"""What a patch is, how much it changes, and where: facts, a row a matrix, a map of the layers.

The whole file is read and checked; no backbone is needed. The rows are plain dicts; `where`,
`by_module` and `layers` give them as pandas frames, and only these and `figure` need pandas.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from spkit.errors import needs
from spkit.models.checkpoint_files import place
from spkit.patchfile import encoding
from spkit.patchfile.file import PatchFile
from spkit.patchfile.manifest import PARTS, Manifest

Row = dict[str, Any]
# key of `facts` -> what a reader is shown
LABELS = {
    "patch": "patch",
    "method": "method",
    "top_rate_se": "a, top rate of SE",
    "top_rate_osm": "b, top rate of OSM",
    "retention_rate": "p, retention rate",
    "alpha": "alpha, as used",
    "beta": "beta, as used",
    "backbone": "backbone",
    "revision": "revision",
    "architecture": "architecture",
    "backbone_dtype": "backbone dtype",
    "fingerprint": "D_h fingerprint",
    "matrices": "matrices",
    "weights": "weights in them",
    "kept": "kept weights",
    "kept_percent": "kept %",
    "lost": "lost to rounding",
    "values": "values",
    "exceptions": "of them stored as patched weights",
    "relative_rms": "relative error of the values (rms)",
    "largest_error": "largest error of a value",
    "changed": "weights that differ from float32 composition",
    "bytes": "bytes",
    "bytes_positions": "bytes of positions",
    "bytes_entropy_bound": "their entropy bound",
    "bytes_values": "bytes of values",
    "revertible": "revertible",
    "bytes_originals": "bytes of originals",
    "patches": "patches in it",
}


@dataclass(frozen=True)
class Inspected:
    """manifest: all that the file says. size: bytes of the file. rows: one a matrix.

    A row: tensor, layer, module, n (weights), k (kept), share = k/n, lost, norm (of the merged
    values; a weight stored as such counts by its rounded delta), bytes.
    """

    path: str
    patch: str
    manifest: Manifest
    size: int
    rows: list[Row]

    def facts(self) -> dict[str, Any]:
        """What one wants to know first; the keys are those of LABELS. Unknown ones are ""."""
        manifest = self.manifest
        exceptions = sum(b.exceptions for m in manifest.tensors.values() for b in m.blocks)
        backbone, error, method = manifest.backbone, manifest.error, manifest.method
        return {
            "patch": self.patch,
            "method": method.get("name", ""),
            **_rates(method),
            "backbone": backbone.name,
            "revision": backbone.revision or "",
            "architecture": backbone.architecture,
            "backbone_dtype": ", ".join(sorted({m.dtype for m in manifest.tensors.values()})),
            "fingerprint": manifest.data.get("fingerprint", ""),
            "matrices": len(manifest.tensors),
            "weights": manifest.weights,
            "kept": manifest.kept,
            "kept_percent": round(100 * manifest.kept / manifest.weights, 4),
            "lost": manifest.lost,
            "values": manifest.values,
            "exceptions": exceptions,
            "relative_rms": error.relative_rms,
            "largest_error": error.largest,
            "changed": error.changed,
            "bytes": self.size,
            "bytes_positions": manifest.size("positions"),
            "bytes_entropy_bound": round(self.entropy_bound),
            "bytes_values": manifest.size("values") + manifest.size("replaced"),
            "revertible": manifest.revertible,
            "bytes_originals": manifest.size("originals"),
            "patches": len(manifest.stack) or 1,
        }

    def summary(self) -> dict[str, Any]:
        """The facts by their labels, for a reader."""
        return {LABELS[key]: value for key, value in self.facts().items()}

    def results(self) -> list[Row]:
        """The rates of the manifest's evaluation record: a row a group and metric.

        A row: group, metric, and the rate (0 to 1) of each model by its name.
        """
        rows: dict[tuple[Any, Any], Row] = {}
        for cell in self.manifest.evaluation:
            if cell.get("category", "all") == "all" and "rate" in cell and "model" in cell:
                key = cell.get("group"), cell.get("metric")
                row = rows.setdefault(key, {"group": key[0], "metric": key[1]})
                row[str(cell["model"])] = cell["rate"]
        return list(rows.values())

    @property
    def entropy_bound(self) -> float:
        """Bytes below which random positions of this density cannot be coded."""
        matrices = self.manifest.tensors.values()
        return sum(encoding.entropy_bound(m.kept, m.weights) for m in matrices)

    def modules(self) -> list[Row]:
        """The rows summed by module, over all layers: module, n, k, share, lost, norm, bytes."""
        sums: dict[str, Row] = {}
        for row in self.rows:
            new = {"module": row["module"], "n": 0, "k": 0, "share": 0.0, "lost": 0, "norm": 0.0}
            own = sums.setdefault(row["module"], {**new, "bytes": 0})
            for key in ("n", "k", "lost", "bytes"):
                own[key] += row[key]
            own["norm"] += row["norm"] ** 2
        for own in sums.values():
            own.update(share=own["k"] / own["n"], norm=sqrt(own["norm"]))
        return list(sums.values())

    def shares(self) -> dict[int, dict[str, float]]:
        """{layer: {module: kept share}}, ascending; matrices outside of the layers left out."""
        found: dict[int, dict[str, float]] = {}
        for row in sorted(self.rows, key=lambda row: row["layer"]):
            if row["layer"] >= 0:
                found.setdefault(row["layer"], {})[row["module"]] = row["share"]
        return found

    @property
    def where(self):
        """The rows as a pandas frame."""
        return _frame(self.rows)

    def by_module(self):
        """`modules` as a pandas frame."""
        return _frame(self.modules())

    def layers(self):
        """Kept share as a pandas frame: a row a layer and a column a module."""
        inside = [row for row in self.rows if row["layer"] >= 0]
        modules = list(dict.fromkeys(row["module"] for row in inside))
        columns = ["layer", "module", "share"]
        return _frame(inside, columns).pivot(index="layer", columns="module", values="share")[
            modules
        ]

    def figure(self):
        """The map of layers and modules as a matplotlib figure."""
        with needs("A figure of a patch", "notebooks"):
            from spkit.figures import layer_module_maps

        return layer_module_maps({"share of the matrix kept": self.where})


def inspect(patch: str | Path) -> Inspected:
    """Read and check a patch file; SpkitError where anything in it is not right."""
    with PatchFile(patch) as opened:
        return Inspected(str(patch), opened.id, opened.manifest, opened.size, list(_rows(opened)))


def _rows(opened: PatchFile) -> Iterator[Row]:
    for name, matrix in opened.manifest.tensors.items():
        squared = 0.0
        for kept in opened.kept(name):
            squared += float(np.square(kept.deltas, dtype=np.float64).sum())
        yield {
            **place(name),
            "n": matrix.weights,
            "k": matrix.kept,
            "share": matrix.kept / matrix.weights,
            "lost": matrix.lost,
            "norm": sqrt(squared),
            "bytes": sum(matrix.size(part) for part in PARTS),
        }


def _rates(method: dict[str, Any]) -> Row:
    """a, b, p, alpha and beta, "" where the manifest does not tell them (a stack's are many)."""
    patching = method.get("patching")
    patching = patching if isinstance(patching, dict) else {}
    rates = ("top_rate_se", "top_rate_osm", "retention_rate")
    found = {key: patching.get(key, "") for key in rates}
    return found | {key: method.get(key, "") for key in ("alpha", "beta")}


def _frame(rows: list[Row], columns: list[str] | None = None):
    with needs("A table as a pandas frame", "notebooks"):
        import pandas as pd

    return pd.DataFrame(rows, columns=columns)
