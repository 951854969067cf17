"""Named variants of a patch: SafePatching, and what is left when one of its parts is taken away.

Every variant is one delta per weight matrix,

    alpha * P_SE on keep_SE + beta * P_OSM on keep_OSM,

and differs from SafePatching in the kept sets, in the strengths, or in both:

    name                            keep_SE                         alpha
    SE only, OSM only, plain sum    every weight (or none)          1 (or 0)
    intersection                    retained and S_SE and S_OSM     by its own kept set
    without retention (same α)      S_SE \\ S_OSM                    SafePatching's
    without retention (α·p)         S_SE \\ S_OSM                    p times SafePatching's
    SafePatching                    retained and S_SE \\ S_OSM       by its own kept set

and the same for OSM, with S_SE and S_OSM exchanged. Two rows for "without retention", because
without the mask 1/p times as many weights move: at equal α that alone changes the result. Iterating
gives these seven; the comparison (spkit/experiment) asks for five more by name:

    no subtraction                  retained and S_SE               by its own kept set
    random sets                     as many weights, at random      by its own kept set
    rescaled by 1/p                 SafePatching's                  α/p, and not norm-matched
    global top rate                 S_SE over all matrices at once  by its own kept set
    ranked after retention          a % of the retained weights     by its own kept set

What this file does not do: derive, score, touch a model, or evaluate. The equations themselves are
in patching.py.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spkit import importance
from spkit.config import Config, PatchingConfig
from spkit.deltas import LowRankDelta
from spkit.derivation import Patch
from spkit.errors import SpkitError
from spkit.lazy import BitSets, Lazy
from spkit.patching import (
    intersection_set,
    kept_set,
    merged_delta,
    norm,
    norm_matched,
    rescaled,
    retention_mask,
    squared_norm,
    top_rate_sets,
)
from spkit.places import place

Sets = Mapping[str, Tensor]  # {tensor name: bool [out, in]}
WHOLE = {"SE only": (1.0, 0.0), "OSM only": (0.0, 1.0), "plain sum": (1.0, 1.0)}
NO_RETENTION = "without retention (same α)"
NO_RETENTION_SCALED = "without retention (α·p)"
SAFEPATCHING = "SafePatching"
VARIANTS = (*WHOLE, "intersection", NO_RETENTION, NO_RETENTION_SCALED, SAFEPATCHING)
NO_SUBTRACTION, RANDOM_SETS = "no subtraction", "random sets"
# SafePatching with another value of one parameter
CHANGED = {
    "rescaled by 1/p": {"scale": "plain", "rescale": True},
    "global top rate": {"scope": "global"},
    "ranked after retention": {"order": "rank_retained"},
}
# every name -> whether it depends on the mask seed
ABLATIONS = {
    **dict.fromkeys(WHOLE, False),
    **{"intersection": True, NO_RETENTION: True, NO_RETENTION_SCALED: True, SAFEPATCHING: True},
    **dict.fromkeys((NO_SUBTRACTION, RANDOM_SETS, *CHANGED), True),
}


class Deltas(Lazy):
    """{tensor name: merged delta fp32 [out, in]} of one variant, computed when asked for.

    Reading it through holds one matrix at a time. `factors` gives the low-rank form where the
    variant keeps whole patches, for backbones whose weights are not written to (backbone.patched).
    strengths: (alpha, beta), where the variant has them.
    """

    def __init__(self, names, compute, factors=None, strengths=None):
        super().__init__(names, compute)
        self._factors, self.strengths = factors, strengths

    def factors(self, name: str) -> LowRankDelta | None:
        """The delta as a sum of scale * B @ A, or None where only some positions are kept."""
        return self._factors(name) if self._factors else None


def whole_patches(*terms: tuple[Patch, float]) -> Deltas:
    """strength * P of every (patch, strength), added up: every weight of each, nothing thinned."""
    names = terms[0][0].factors

    def add(name: str) -> Tensor:
        return sum(strength * patch.delta(name) for patch, strength in terms)

    def factors(name: str) -> LowRankDelta:
        return LowRankDelta(tuple((*p.factors[name], p.scaling * x) for p, x in terms))

    return Deltas(names, add, factors)


@dataclass(frozen=True)
class Variants:
    """What all variants of one run share: two patches, their importances, parameters, seed.

    scores_se, scores_osm: importances, or None where `tops` holds the two top-rate sets (S_SE and
    S_OSM) that were made with config's rates; then no other rate, order or scope can be asked for.
    Iterating gives (name, {tensor name: delta fp32}) one variant at a time, computed matrix by
    matrix. SpkitError where patches and importances do not fit together.
    """

    se: Patch
    osm: Patch
    scores_se: Mapping[str, Tensor] | None
    scores_osm: Mapping[str, Tensor] | None
    config: PatchingConfig
    seed: int
    tops: tuple[BitSets, BitSets] | None = None

    def __post_init__(self):
        names = set(self.se.factors)
        scored = (self.scores_se, self.scores_osm) if self.tops is None else self.tops
        others = {
            "the OSM patch": self.osm.factors,
            "the SE importance": scored[0],
            "the OSM importance": scored[1],
        }
        for what, other in others.items():
            for name in sorted(names ^ set(other)):
                lacking, having = (
                    (what, "the SE patch") if name in names else ("the SE patch", what)
                )
                raise SpkitError(f"{lacking} lacks the tensor {name!r}, which {having} has")
        for name, own in self.se.factors.items():
            for what, other in others.items():
                if _shape(other, name) != _shape({name: own}, name):
                    raise SpkitError(
                        f"{name!r} is {_shape({name: own}, name)} in the SE patch, but "
                        f"{_shape(other, name)} in {what}"
                    )

    @property
    def weights(self) -> int:
        """How many weights the targeted matrices have."""
        return sum(b.shape[0] * a.shape[1] for a, b in self.se.factors.values())

    def __iter__(self) -> Iterator[tuple[str, Deltas]]:
        for name in VARIANTS:
            yield name, self.deltas(name)

    # ---- the sets --------------------------------------------------------------------------------

    @cached_property
    def retained(self) -> tuple[Sets, Sets]:
        """The random retention masks of SE and of OSM [paper]: one draw per patch.

        Each is drawn anew when it is asked for: it is a pure function of seed and name.
        """

        def masks(patch: Patch) -> Lazy:
            def draw(name: str) -> Tensor:
                shape = tuple(_shape(patch.factors, name))
                rate = self.config.retention_rate
                return retention_mask(shape, rate, seed=self.seed, patch=patch.name, tensor=name)

            return Lazy(patch.factors, draw)

        return masks(self.se), masks(self.osm)

    def important(self, masks: tuple[Sets, Sets] | None = None) -> tuple[Sets, Sets]:
        """S_SE and S_OSM: the top a % and the top b % of the importances [paper].

        masks: among which weights, where the order is "rank_retained"; the retained ones.
        """
        if self.tops is not None:
            return self.tops
        return tuple(
            self._top(scores, rate, masks)
            for scores, rate, masks in zip(
                (self.scores_se, self.scores_osm),
                (self.config.top_rate_se, self.config.top_rate_osm),
                masks or self.retained,
                strict=True,
            )
        )

    def _top(self, scores: Mapping[str, Tensor], rate: float, masks: Sets) -> Sets:
        how = {"order": self.config.order, "scope": self.config.scope}
        if self.config.scope == "global":  # all matrices are ranked against each other
            return top_rate_sets(scores, rate, masks, **how)

        def one(name: str) -> Tensor:
            return top_rate_sets({name: scores[name]}, rate, masks, **how)[name]

        return BitSets(Lazy(scores, one))

    def kept(self, variant: str) -> tuple[Sets, Sets]:
        """(keep_SE, keep_OSM) of one variant: the weights on which each patch keeps its delta."""
        if variant in WHOLE:
            return tuple(self._all(strength > 0) for strength in WHOLE[variant])
        _require_known(variant)
        if variant in CHANGED:
            return self._changed(variant).kept(SAFEPATCHING)
        if variant == RANDOM_SETS:
            return tuple(
                BitSets(
                    Lazy(
                        kept,
                        partial(_random_like, kept=kept, seed=self.seed, patch=patch.name),
                    )
                )
                for patch, kept in zip((self.se, self.osm), self.kept(SAFEPATCHING), strict=True)
            )
        masks = self.retained
        if variant in (NO_RETENTION, NO_RETENTION_SCALED):
            masks = (self._all(True), self._all(True))
        top_se, top_osm = tops = self.important(masks)

        def keep(mask: Sets, own: Sets, other: Sets, name: str) -> Tensor:
            if variant == NO_SUBTRACTION:
                return mask[name] & own[name]
            if variant == "intersection":
                return mask[name] & intersection_set(own[name], other[name])
            return kept_set(mask[name], own[name], other[name])

        return tuple(
            BitSets(Lazy(own, partial(keep, mask, own, other)))
            for mask, own, other in zip(masks, tops, (top_osm, top_se), strict=True)
        )

    def _changed(self, variant: str) -> "Variants":
        if self.tops is not None and not set(CHANGED[variant]) <= {"scale", "rescale"}:
            raise SpkitError(
                f"{variant!r} needs the importances, and only the top-rate sets were saved: set "
                "importance.save to 'scores'"
            )
        return replace(self, config=self.config.model_copy(update=CHANGED[variant]))

    def _all(self, value: bool) -> Sets:
        factors = self.se.factors
        return Lazy(factors, lambda name: torch.full(_shape(factors, name), value))

    # ---- the strengths ---------------------------------------------------------------------------

    def strengths(self, variant: str, kept: tuple[Sets, Sets] | None = None) -> tuple[float, float]:
        """(alpha, beta): the numbers that the deltas are multiplied with in the end.

        scale "plain": the parameters as they stand, divided by p with `rescale`. "norm_matched":
        alpha * |P| / |kept P|, norms over all matrices; there `rescale` would cancel out, because
        a longer kept delta gets a smaller factor. kept: the variant's sets, where they are at hand.
        """
        if variant in WHOLE:
            return WHOLE[variant]
        if variant in (NO_RETENTION, NO_RETENTION_SCALED):
            share = 1.0 if variant == NO_RETENTION else self.config.retention_rate
            alpha, beta = self.strengths(SAFEPATCHING)
            return alpha * share, beta * share
        _require_known(variant)
        if variant in CHANGED:
            return self._changed(variant).strengths(SAFEPATCHING, kept)
        values = (self.config.alpha, self.config.beta)
        if self.config.scale == "norm_matched":
            kept = kept or self.kept(variant)
            return tuple(
                norm_matched(value, patch.norm(), kept_norm(patch, keep))
                for value, patch, keep in zip(values, (self.se, self.osm), kept, strict=True)
            )
        if self.config.rescale:
            return tuple(rescaled(value, self.config.retention_rate) for value in values)
        return values

    # ---- the deltas ------------------------------------------------------------------------------

    def deltas(self, variant: str) -> Deltas:
        """The merged delta of every weight matrix, fp32, zero outside the kept sets."""
        keep_se, keep_osm = kept = self.kept(variant)
        alpha, beta = self.strengths(variant, kept)

        def merge(name: str) -> Tensor:
            return merged_delta(
                self.se.delta(name),
                keep_se[name],
                self.osm.delta(name),
                keep_osm[name],
                alpha,
                beta,
            )

        def factors(name: str) -> LowRankDelta:
            pairs = ((self.se, alpha), (self.osm, beta))
            return LowRankDelta(
                tuple((*patch.factors[name], patch.scaling * x) for patch, x in pairs if x)
            )

        whole = factors if variant in WHOLE else None
        return Deltas(self.se.factors, merge, whole, (alpha, beta))


def _random_like(name: str, *, kept: Sets, seed: int, patch: str) -> Tensor:
    return random_set(kept[name], seed=seed, patch=patch, tensor=name)


def load_variants(patches: Path, importances: Path, config: Config) -> Variants:
    """What notebooks 01 and 02 left in their folders: two patches, and scores or top-rate sets.

    SpkitError where a file is missing, or the sets were made with other top rates.
    """
    se, osm = (Patch.load(patches / f"{name}.safetensors") for name in ("se", "osm"))
    if config.importance.save == "scores":
        files = [importances / f"importance_{name}.safetensors" for name in ("se", "osm")]
        return Variants(se, osm, *map(importance.load, files), config.patching, config.seed)
    tops = tuple(BitSets.load(importances / f"top_{n}.safetensors") for n in ("se", "osm"))
    for sets, key in zip(tops, ("top_rate_se", "top_rate_osm"), strict=True):
        made, wanted = sets.about.get("top_rate"), getattr(config.patching, key)
        if made != wanted:
            raise SpkitError(
                f"The sets in {importances} were made with patching.{key} {made}, and now it is "
                f"{wanted}: run notebook 02 again, or with importance.save 'scores'"
            )
    return Variants(se, osm, None, None, config.patching, config.seed, tops)


def random_set(like: Tensor, *, seed: int, patch: str, tensor: str) -> Tensor:
    """As many positions of the matrix as `like` holds, drawn at random: bool of its shape.

    A pure function of its arguments, as the retention mask is.
    """
    key = hashlib.sha256(f"random set|{seed}|{patch}|{tensor}".encode()).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    chosen = torch.zeros(like.numel(), dtype=torch.bool)
    chosen[draws.permutation(like.numel())[: int(like.sum())]] = True
    return chosen.reshape(like.shape)


def kept_norm(patch: Patch, keep: Sets) -> float:
    """|kept P|, over all matrices."""
    return norm(squared_norm(patch.delta(name), mask) for name, mask in keep.items())


# ---- analysis ------------------------------------------------------------------------------------


def where(sets: Mapping[str, Sets]) -> pd.DataFrame:
    """How many weights of each matrix each set holds: set, tensor, layer, module, n, k, share.

    sets: {label: {tensor name: bool}}. n: all weights of the matrix, k: those in the set.
    """
    rows = [
        {"set": label, **place(name), "n": mask.numel(), "k": int(mask.sum())}
        for label, masks in sets.items()
        for name, mask in masks.items()
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(share=frame["k"] / frame["n"])


def overlap(own: Sets, other: Sets) -> pd.DataFrame:
    """How much of `own` lies in `other`, matrix by matrix.

    Columns tensor, layer, module, own, other, both (counts), share = both / own, jaccard =
    both / either. A row with the tensor "all" sums the counts over all matrices. Empty sets give
    shares of 0.
    """
    rows = [
        {
            **place(name),
            "own": int(mask.sum()),
            "other": int(other[name].sum()),
            "both": int(intersection_set(mask, other[name]).sum()),
        }
        for name, mask in own.items()
    ]
    frame = pd.DataFrame(rows)
    total = frame[["own", "other", "both"]].sum()
    frame.loc[len(frame)] = {"tensor": "all", "layer": -1, "module": "all", **total}
    return with_measures(frame)


def with_measures(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame of counts own, other, both with share and jaccard behind, 0 for empty sets."""
    either = frame["own"] + frame["other"] - frame["both"]
    measures = {"share": frame["both"] / frame["own"], "jaccard": frame["both"] / either}
    return frame.assign(**{name: values.fillna(0.0) for name, values in measures.items()})


def _shape(matrices: Mapping, name: str) -> list[int]:
    """[out, in] of a score, a set, or of the delta that the factors (A, B) make."""
    if isinstance(matrices, BitSets):
        return list(matrices.shape(name))
    matrix = matrices[name]
    if isinstance(matrix, Tensor):
        return list(matrix.shape)
    a, b = matrix
    return [b.shape[0], a.shape[1]]


def _require_known(variant: str) -> None:
    if variant not in ABLATIONS:
        raise SpkitError(f"unknown variant {variant!r}, allowed: {', '.join(ABLATIONS)}")
