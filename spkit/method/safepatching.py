"""SafePatching: two patches and their importances in, one merged patch out [paper].

    1  retained       R_SE, R_OSM   each patch keeps a random share p of its entries
    2  important()    S_SE, S_OSM   the top share a of SE's importances, the top share b of OSM's
    3  keep, kept()   K_SE, K_OSM   R_SE and (S_SE \\ S_OSM), R_OSM and (S_OSM \\ S_SE)
    4  strengths()    alpha, beta   as they are set, or matched to the norm of the whole patch
    5  deltas()       alpha * P_SE on K_SE + beta * P_OSM on K_OSM

Each step is one member of the class (`keep` is step 3 for one matrix) and calls the functions of
patching.py that state its equation. An ablation is this class with one of them replaced
(comparison/ablations.py). Sets are held one bit a weight, deltas one matrix at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method import NAME as NAME  # for those who need the rest, too
from spkit.method.patch import Factors, MergedPatch
from spkit.method.patching import (
    kept_set,
    merged_delta,
    norm,
    norm_matched,
    rescaled,
    retention_mask,
    squared_norm,
    top_rate_sets,
)
from spkit.method.sets import BitSets, Lazy

Sets = Mapping[str, Tensor]  # {tensor name: bool [out, in]}


@dataclass(frozen=True)
class SafePatching:
    """The method, for one pair of patches, one setting and one seed. All tensors are on the CPU.

    se, osm: the patch factors of ascent and of descent. importance: of SE and of OSM, for every
    weight matrix: scores fp32 [out, in], or saved top-rate sets (importance.top_rate_bits), which
    hold for the top rates of `config` alone. `config.balance` is not used here: balancing.balanced
    finds alpha. SpkitError where patches and importances do not belong together.
    """

    se: Factors
    osm: Factors
    importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    config: PatchingConfig
    seed: int

    def __post_init__(self):
        rates = (self.config.top_rate_se, self.config.top_rate_osm)
        for found, rate, key in zip(self.importance, rates, ("se", "osm"), strict=True):
            if isinstance(found, BitSets):
                _check_saved(found, rate, key, self.config)
        others = {
            "the OSM patch": _shapes(self.osm.factors),
            "the SE importance": _shapes(self.importance[0]),
            "the OSM importance": _shapes(self.importance[1]),
        }
        own = _shapes(self.se.factors)
        for what, shapes in others.items():
            _check_same(own, what, shapes)

    @cached_property
    def retained(self) -> tuple[Sets, Sets]:
        """R_SE and R_OSM: random parameter retention at rate p, one draw per patch [paper].

        Each mask is drawn when it is asked for: it is a pure function of seed, patch and tensor.
        """

        def masks(patch: Factors) -> Lazy:
            rate = self.config.retention_rate

            def draw(name: str) -> Tensor:
                shape = patch.shape(name)
                return retention_mask(shape, rate, seed=self.seed, patch=patch.name, tensor=name)

            return Lazy(patch.factors, draw)

        return masks(self.se), masks(self.osm)

    def important(self) -> tuple[Sets, Sets]:
        """S_SE and S_OSM: the top a % and the top b % of the importances [paper].

        With the order "rank_retained" the rates count the retained weights only.
        """
        rates = (self.config.top_rate_se, self.config.top_rate_osm)
        parts = zip(self.importance, rates, self.retained, strict=True)
        return tuple(self._top(scores, rate, masks) for scores, rate, masks in parts)

    def _top(self, scores: Mapping[str, Tensor], rate: float, masks: Sets) -> Sets:
        if isinstance(scores, BitSets):
            return scores
        how = {"order": self.config.order, "scope": self.config.scope}
        if self.config.scope == "global":  # all matrices are ranked against each other
            return top_rate_sets(scores, rate, masks, **how)

        def one(name: str) -> Tensor:
            return top_rate_sets({name: scores[name]}, rate, masks, **how)[name]

        return BitSets(Lazy(scores, one))

    def keep(self, retained: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """K of one patch in one matrix: retained and (own \\ other) [paper]."""
        return kept_set(retained, own, other)

    def kept(self) -> tuple[Sets, Sets]:
        """K_SE and K_OSM, where each patch keeps its delta; disjoint unless `keep` is replaced."""
        (r_se, r_osm), (s_se, s_osm) = self.retained, self.important()
        return (
            BitSets(Lazy(s_se, lambda name: self.keep(r_se[name], s_se[name], s_osm[name]))),
            BitSets(Lazy(s_osm, lambda name: self.keep(r_osm[name], s_osm[name], s_se[name]))),
        )

    def strengths(self, kept: tuple[Sets, Sets] | None = None) -> tuple[float, float]:
        """(alpha, beta): the numbers that the kept deltas are multiplied with in the end.

        scale "plain": the parameters as they are, divided by p with `rescale`. "norm_matched":
        alpha * |P| / |kept P|, norms over all matrices; `rescale` would cancel out there. kept: the
        kept sets, where they are at hand.
        """
        alpha_beta = (self.config.alpha, self.config.beta)
        if self.config.scale == "norm_matched":
            parts = zip(alpha_beta, (self.se, self.osm), kept or self.kept(), strict=True)
            return tuple(
                norm_matched(value, patch.norm(), kept_norm(patch, keep))
                for value, patch, keep in parts
            )
        if self.config.rescale:
            return tuple(rescaled(value, self.config.retention_rate) for value in alpha_beta)
        return alpha_beta

    def deltas(self) -> MergedPatch:
        """alpha * P_SE on K_SE + beta * P_OSM on K_OSM, fp32, zero elsewhere [paper]."""
        k_se, k_osm = kept = self.kept()
        alpha, beta = self.strengths(kept)

        def merge(name: str) -> Tensor:
            p_se, p_osm = self.se.delta(name), self.osm.delta(name)
            return merged_delta(p_se, k_se[name], p_osm, k_osm[name], alpha, beta)

        return MergedPatch(self.se.factors, merge, strengths=(alpha, beta))

    def changed(self, **values) -> "SafePatching":
        """The same with other values of PatchingConfig's fields."""
        return replace(self, config=self.config.model_copy(update=values))

    @property
    def weights(self) -> int:
        """How many weights the targeted matrices have."""
        return sum(rows * columns for rows, columns in _shapes(self.se.factors).values())


def kept_norm(patch: Factors, keep: Sets) -> float:
    """|kept P|, over all matrices."""
    return norm(squared_norm(patch.delta(name), mask) for name, mask in keep.items())


# ---- checks --------------------------------------------------------------------------------------


def _check_saved(sets: BitSets, rate: float, key: str, config: PatchingConfig) -> None:
    """Saved sets are final: another top rate, scope or order would be ignored without a word."""
    made = sets.about.get("top_rate")
    if made != rate:
        raise SpkitError(
            f"The saved top-rate sets were made with patching.top_rate_{key} {made}, and now it is "
            f"{rate}: run notebook 02 again, or with importance.save 'scores'"
        )
    for name, allowed in (("scope", "matrix"), ("order", "rank_all")):
        if getattr(config, name) != allowed:
            raise SpkitError(
                f"patching.{name} {getattr(config, name)!r} needs the importances, and only the "
                "top-rate sets were saved: set importance.save to 'scores'"
            )


def _shapes(matrices: Mapping) -> dict[str, tuple[int, int]]:
    """{tensor name: (out, in)} of scores, sets or factors (A, B)."""
    if isinstance(matrices, BitSets):
        return {name: matrices.shape(name) for name in matrices}
    return {
        name: tuple(m.shape) if isinstance(m, Tensor) else (m[1].shape[0], m[0].shape[1])
        for name, m in matrices.items()
    }


def _check_same(own: dict, what: str, other: dict) -> None:
    for name in sorted(set(own) ^ set(other)):
        lacking, having = (what, "the SE patch") if name in own else ("the SE patch", what)
        raise SpkitError(f"{lacking} lacks the tensor {name!r}, which {having} has")
    for name, shape in own.items():
        if shape != other[name]:
            raise SpkitError(
                f"{name!r} is {list(shape)} in the SE patch, but {list(other[name])} in {what}"
            )
