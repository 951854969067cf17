"""The setting of a method -> deltas, over and over: importances are ranked once.

SafePatching's top-rate sets are then a comparison of ranks, and the norm of a whole patch is known.
Every other method is that of comparison/methods.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from spkit.comparison.methods import METHODS, Bundle
from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors
from spkit.method.patching import rate_count
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching, Sets
from spkit.method.sets import BitSets, Lazy
from spkit.validation import checked, nearest

NOT_THE_METHODS = ("scale", "stop")  # keys of a setting that no method of the comparison knows


class Known(Factors):
    """A patch whose norm is computed once."""

    _norm: float | None = None

    def norm(self) -> float:
        """The Frobenius norm of the whole patch."""
        if self._norm is None:
            self._norm = super().norm()
        return self._norm


class Ranked(SafePatching):
    """SafePatching whose `importance` holds ranks (int32 [out, in], 0: the largest score)."""

    def important(self) -> tuple[Sets, Sets]:
        """The same sets, by comparing ranks: scope "matrix" and order "rank_all" alone."""
        rates = (self.config.top_rate_se, self.config.top_rate_osm)

        def top(ranks: Mapping[str, Tensor], rate: float) -> BitSets:
            return BitSets(Lazy(ranks, lambda n: ranks[n] < rate_count(rate, ranks[n].numel())))

        return tuple(top(*part) for part in zip(self.importance, rates, strict=True))


def ranks_of(scores: Tensor) -> Tensor:
    """The rank of every weight by its score, int32 [out, in]; of equal ones the lower index wins.

    ValueError for a NaN score.
    """
    flat = scores.flatten().numpy()
    if np.isnan(flat).any():
        raise ValueError("the scores contain NaN")
    ranks = np.empty(flat.size, dtype=np.int32)
    ranks[np.argsort(-flat, kind="stable")] = np.arange(flat.size, dtype=np.int32)
    return torch.from_numpy(ranks).reshape(scores.shape)


class Candidates:
    """What a method can make of one backbone's patches.

    bundles: one for every stop of the ascent, in their order; they share all but SE. patching: what
    a setting of SafePatching is put over. seed: of the retention masks.
    """

    def __init__(self, method: str, bundles: Sequence[Bundle], patching: PatchingConfig, seed: int):
        if method not in METHODS:
            close = nearest(method, list(METHODS))
            raise SpkitError(f"tuning.method is {method!r}, no method of the comparison{close}")
        self.method, self.bundles = method, list(bundles)
        self.patching, self.seed = patching, seed
        self._ranked = patching.scope == "matrix" and patching.order == "rank_all"
        self._patches: dict[int, Factors] = {}
        self._ranks: dict[int, dict[str, Tensor]] = {}

    def safepatching(self, setting: Mapping[str, float], stop: int = -1) -> SafePatching:
        """SafePatching with these fields of PatchingConfig put over `patching`.

        SpkitError for a value out of its range.
        """
        bundle = self.bundles[stop]
        patching = checked(PatchingConfig, {**self.patching.model_dump(), **setting})
        patches = [self._known(bundle.patch(name)) for name in ("se", "osm")]
        scores = [bundle.scores[name] for name in ("se", "osm")]
        made = SafePatching
        if self._ranked:
            made, scores = Ranked, [self._ranks_of(found) for found in scores]
        return made(*patches, tuple(scores), patching, self.seed)

    def deltas(self, setting: Mapping) -> Mapping[str, Tensor]:
        """The deltas of a setting of the method, fp32 [out, in] for every weight matrix.

        setting: the keys of the method's space, and "stop" (number of the bundle) and, of
        SafePatching, "scale". SpkitError for a value out of its range.
        """
        stop = int(setting.get("stop", -1))
        own = {key: value for key, value in setting.items() if key not in NOT_THE_METHODS}
        if self.method == SAFEPATCHING:
            scale = {"scale": setting["scale"]} if "scale" in setting else {}
            return self.safepatching({**own, **scale, "balance": None}, stop).deltas()
        return METHODS[self.method].deltas(self.bundles[stop], own, self.seed)

    def _known(self, patch: Factors) -> Factors:
        if id(patch) not in self._patches:
            self._patches[id(patch)] = Known(
                patch.name, patch.factors, patch.scaling, patch.manifest
            )
        return self._patches[id(patch)]

    def _ranks_of(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if id(scores) not in self._ranks:
            self._ranks[id(scores)] = {name: ranks_of(score) for name, score in scores.items()}
        return self._ranks[id(scores)]
