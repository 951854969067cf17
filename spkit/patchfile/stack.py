"""Several patches of one backbone, one after another, as one: continual stages in their order.

    weight_k = round(weight_{k-1} + value_k)        k = 1 ... K, each on what the last one left

The stacked patch gives, bit for bit, what applying them in order gives. Each must fit on what the
ones before it made: its hashes say so. Overlaps, weights that more than one stage moves, are
counted.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from spkit.errors import SpkitError, needs
from spkit.models.checkpoint_files import local_folder
from spkit.patchfile.apply import Patching, check_fit
from spkit.patchfile.file import PatchFile
from spkit.patchfile.make import About, Writer, patch_writer


@dataclass(frozen=True)
class Stacked:
    """What `stack` made. path, patch: the new file and its id. kept: weights that it moves.

    pairs: a row for each pair of stages (Overlaps.rows); `overlaps` is its pandas frame.
    """

    path: str
    patch: str
    patches: int
    tensors: int
    kept: int
    pairs: list[dict[str, Any]]

    @property
    def overlaps(self):
        """The pairs as a pandas frame, which needs pandas."""
        with needs("A table as a pandas frame", "notebooks"):
            import pandas as pd

        return pd.DataFrame(self.pairs)


def stack(
    patches: Sequence[str | Path],
    backbone: str | Path,
    path: str | Path,
    *,
    revision: str | None = None,
    revertible: bool = False,
    progress: bool = True,
) -> Stacked:
    """Write `path`, the patch that does what `patches` do one after another to `backbone`.

    revertible: the new patch carries the backbone's originals. Its evaluation is that of the last
    patch. SpkitError where a patch does not fit on what the ones before it left.
    """
    if len(patches) < 2:
        raise SpkitError(f"A stack needs at least two patches; there are {len(patches)}.")
    folder = local_folder(backbone, revision)
    with ExitStack() as open_files:
        stages = [open_files.enter_context(PatchFile(one)) for one in patches]
        for stage in stages:
            check_fit(stage, folder)
            stage.check()
        names = list(dict.fromkeys(name for stage in stages for name in stage.manifest.tensors))
        overlaps = Overlaps(len(stages))
        with patch_writer(path, folder, _about(stages), "exact", revertible) as writer:
            for name in tqdm(names, desc="stack", unit="matrix", disable=not progress, leave=False):
                _stack_matrix(writer, name, stages, overlaps)
        return Stacked(
            path=str(path),
            patch=writer.id,
            patches=len(stages),
            tensors=len(names),
            kept=writer.manifest.kept,
            pairs=overlaps.rows(),
        )


def _stack_matrix(writer: Writer, name: str, stages: list[PatchFile], overlaps: "Overlaps") -> None:
    *_, weights = writer.open(name)
    edits = {k: Patching(p, name) for k, p in enumerate(stages) if name in p.manifest.tensors}
    for before in weights:
        after = before.copy()
        total, moved = np.zeros(len(before), dtype=np.float32), np.zeros(len(before), dtype=bool)
        found = {}
        for k, edit in edits.items():
            after = edit.block(after)
            found[k] = edit.last.positions
            moved[found[k]] = True
            total[found[k]] += edit.last.deltas
        overlaps.add(found)
        positions = np.flatnonzero(moved).astype(np.uint32)
        writer.add(before, positions, total[positions], after[positions])
    for k, edit in edits.items():
        try:
            edit.close()
        except SpkitError as error:
            place = f"patch {k + 1} of {len(stages)} does not fit on what comes before it"
            raise SpkitError(f"{place} (is the order right, is one missing?): {error}") from None
    writer.close()


class Overlaps:
    """Counts, for each pair of stages, of the weights that both move."""

    def __init__(self, stages: int):
        self.kept = [0] * stages
        self.both = dict.fromkeys(combinations(range(stages), 2), 0)

    def add(self, found: dict[int, np.ndarray]) -> None:
        """The positions of one block, {stage: ascending positions}."""
        for k, positions in found.items():
            self.kept[k] += len(positions)
        for i, j in combinations(found, 2):
            self.both[i, j] += len(np.intersect1d(found[i], found[j], assume_unique=True))

    def rows(self) -> list[dict[str, Any]]:
        """Stages count from 1. share: of the smaller stage's weights."""
        return [
            {
                **{"first": i + 1, "second": j + 1, "kept_first": self.kept[i]},
                **{"kept_second": self.kept[j], "both": both},
                "share": both / (min(self.kept[i], self.kept[j]) or 1),
            }
            for (i, j), both in self.both.items()
        ]


def _about(stages: list[PatchFile]) -> About:
    first, last = stages[0].manifest, stages[-1].manifest
    return About(
        backbone=first.backbone.name,
        revision=first.backbone.revision,
        method={"name": "stack", "stages": [dict(stage.manifest.method) for stage in stages]},
        data={"stages": [dict(stage.manifest.data) for stage in stages]},
        evaluation=last.evaluation,
        stack=[stage.id for stage in stages],
    )
