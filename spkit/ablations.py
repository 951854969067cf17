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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spkit.config import PatchingConfig
from spkit.derivation import Patch
from spkit.errors import SpkitError
from spkit.patching import (
    intersection_set,
    kept_sets,
    merged_delta,
    norm,
    norm_matched,
    rescaled,
    retention_mask,
    squared_norm,
    top_rate_sets,
)

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


@dataclass(frozen=True)
class Variants:
    """What all variants of one run share: two patches, their importances, parameters, seed.

    Iterating gives (name, {tensor name: delta fp32}) one variant at a time, so that only one
    variant's deltas are in memory. SpkitError where patches and importances do not fit together.
    """

    se: Patch
    osm: Patch
    scores_se: Mapping[str, Tensor]
    scores_osm: Mapping[str, Tensor]
    config: PatchingConfig
    seed: int

    def __post_init__(self):
        names = set(self.se.factors)
        others = {
            "the OSM patch": self.osm.factors,
            "the SE importance": self.scores_se,
            "the OSM importance": self.scores_osm,
        }
        for what, other in others.items():
            for name in sorted(names ^ set(other)):
                lacking, having = (
                    (what, "the SE patch") if name in names else ("the SE patch", what)
                )
                raise SpkitError(f"{lacking} lacks the tensor {name!r}, which {having} has")
        for name, own in self.se.factors.items():
            for what, other in others.items():
                if _shape(other[name]) != _shape(own):
                    raise SpkitError(
                        f"{name!r} is {_shape(own)} in the SE patch, but {_shape(other[name])} in "
                        f"{what}"
                    )

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name in VARIANTS:
            yield name, self.deltas(name)

    # ---- the sets --------------------------------------------------------------------------------

    @cached_property
    def retained(self) -> tuple[Sets, Sets]:
        """The random retention masks of SE and of OSM [paper]: one draw per patch."""
        rate = self.config.retention_rate
        return tuple(
            {
                name: retention_mask(
                    score.shape, rate, seed=self.seed, patch=patch.name, tensor=name
                )
                for name, score in self.scores_se.items()
            }
            for patch in (self.se, self.osm)
        )

    def important(self) -> tuple[Sets, Sets]:
        """S_SE and S_OSM: the top a % and the top b % of the importances [paper]."""
        return tuple(
            top_rate_sets(scores, rate, masks, order=self.config.order, scope=self.config.scope)
            for scores, rate, masks in zip(
                (self.scores_se, self.scores_osm),
                (self.config.top_rate_se, self.config.top_rate_osm),
                self.retained,
                strict=True,
            )
        )

    def kept(self, variant: str) -> tuple[Sets, Sets]:
        """(keep_SE, keep_OSM) of one variant: the weights on which each patch keeps its delta."""
        if variant in WHOLE:
            return tuple(self._all(strength > 0) for strength in WHOLE[variant])
        _require_known(variant)
        if variant in CHANGED:
            return self._changed(variant).kept(SAFEPATCHING)
        if variant == RANDOM_SETS:
            kept = self.kept(SAFEPATCHING)
            return tuple(
                {n: random_set(k, seed=self.seed, patch=patch.name, tensor=n) for n, k in s.items()}
                for patch, s in zip((self.se, self.osm), kept, strict=True)
            )
        if variant == NO_SUBTRACTION:
            return tuple(
                {name: mask & top[name] for name, mask in masks.items()}
                for masks, top in zip(self.retained, self.important(), strict=True)
            )
        if variant == "intersection":
            top_se, top_osm = self.important()
            both = {name: intersection_set(top_se[name], top_osm[name]) for name in top_se}
            return tuple(
                {n: mask & both[n] for n, mask in masks.items()} for masks in self.retained
            )
        everything = (self._all(True), self._all(True))
        return kept_sets(
            self.scores_se,
            self.scores_osm,
            *(self.retained if variant == SAFEPATCHING else everything),
            self.config.top_rate_se,
            self.config.top_rate_osm,
            order=self.config.order,
            scope=self.config.scope,
        )

    def _changed(self, variant: str) -> "Variants":
        return replace(self, config=self.config.model_copy(update=CHANGED[variant]))

    def _all(self, value: bool) -> Sets:
        return {
            name: torch.full(score.shape, value, dtype=torch.bool)
            for name, score in self.scores_se.items()
        }

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

    def deltas(self, variant: str) -> dict[str, Tensor]:
        """The merged delta of every weight matrix, fp32, zero outside the kept sets."""
        keep_se, keep_osm = kept = self.kept(variant)
        alpha, beta = self.strengths(variant, kept)
        return {
            name: merged_delta(
                self.se.delta(name),
                keep_se[name],
                self.osm.delta(name),
                keep_osm[name],
                alpha,
                beta,
            )
            for name in keep_se
        }


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
        {"set": label, **_place(name), "n": mask.numel(), "k": int(mask.sum())}
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
            **_place(name),
            "own": int(mask.sum()),
            "other": int(other[name].sum()),
            "both": int(intersection_set(mask, other[name]).sum()),
        }
        for name, mask in own.items()
    ]
    frame = pd.DataFrame(rows)
    total = frame[["own", "other", "both"]].sum()
    frame.loc[len(frame)] = {"tensor": "all", "layer": -1, "module": "all", **total}
    either = frame["own"] + frame["other"] - frame["both"]
    frame["share"] = (frame["both"] / frame["own"]).fillna(0.0)
    frame["jaccard"] = (frame["both"] / either).fillna(0.0)
    return frame


def _place(tensor: str) -> dict[str, str | int]:
    """Layer number (-1 outside of the layers) and module of "model.layers.3.mlp.up_proj.weight"."""
    layer = re.search(r"\.(\d+)\.", tensor)
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    return {"tensor": tensor, "layer": int(layer[1]) if layer else -1, "module": module}


def _shape(matrix: Tensor | tuple[Tensor, Tensor]) -> list[int]:
    """[out, in] of a score, or of the delta that the factors (A, B) make."""
    if isinstance(matrix, Tensor):
        return list(matrix.shape)
    a, b = matrix
    return [b.shape[0], a.shape[1]]


def _require_known(variant: str) -> None:
    if variant not in ABLATIONS:
        raise SpkitError(f"unknown variant {variant!r}, allowed: {', '.join(ABLATIONS)}")
