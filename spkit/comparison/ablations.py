"""Ablations: SafePatching with one thing taken away, or one thing changed.

    name                            differs from SafePatching in
    SE only, OSM only, plain sum    whole patches at strength 1: nothing is thinned
    intersection                    keeps R and S_SE and S_OSM
    without retention (same α)      retains every weight, at SafePatching's strengths
    without retention (α·p)         retains every weight, at p times these strengths
    no subtraction                  keeps R and S of each patch
    random sets                     keeps as many weights, at random
    rescaled by 1/p                 strengths α/p, and not norm-matched
    global top rate                 S over all matrices at once
    ranked after retention          S counts the retained weights only

Two rows for "without retention", because without the mask 1/p times as many weights move: at equal
α that alone changes the result. The first six and SafePatching are in notebook 03, all of them in
the comparison.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spkit.errors import SpkitError
from spkit.method.patch import MergedPatch, whole_patches
from spkit.method.patching import intersection_set
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching, Sets
from spkit.method.sets import BitSets, Lazy


class SeOnly(SafePatching):
    """The whole SE patch."""

    def strengths(self, kept=None):
        return 1.0, 0.0

    def kept(self):
        return tuple(_all(self, strength > 0) for strength in self.strengths())

    def deltas(self) -> MergedPatch:
        """Whole patches, so the low-rank form is there, too."""
        parts = zip((self.se, self.osm), self.strengths(), strict=True)
        whole = whole_patches(*((patch, strength) for patch, strength in parts if strength))
        whole.strengths = self.strengths()
        return whole


class OsmOnly(SeOnly):
    """The whole OSM patch: alone it is a jailbreak."""

    def strengths(self, kept=None):
        return 0.0, 1.0


class PlainSum(SeOnly):
    """Both whole patches: Task Arithmetic at strengths of 1."""

    def strengths(self, kept=None):
        return 1.0, 1.0


class Intersection(SafePatching):
    """Both deltas where both patches find a weight important [paper's ablation]."""

    def keep(self, retained: Tensor, own: Tensor, other: Tensor) -> Tensor:
        return retained & intersection_set(own, other)


class NoSubtraction(SafePatching):
    """S_SE and S_OSM themselves, instead of their differences."""

    def keep(self, retained: Tensor, own: Tensor, other: Tensor) -> Tensor:
        return retained & own


class WithoutRetention(SafePatching):
    """Every weight is retained; the strengths are those that SafePatching has with its mask."""

    @property
    def retained(self) -> tuple[Sets, Sets]:
        return _all(self, True), _all(self, True)

    def strengths(self, kept=None):
        return SafePatching(**_fields(self)).strengths()


class WithoutRetentionScaled(WithoutRetention):
    """The same at p times the strengths."""

    def strengths(self, kept=None):
        alpha, beta = super().strengths()
        return alpha * self.config.retention_rate, beta * self.config.retention_rate


class RandomSets(SafePatching):
    """As many weights of each matrix as SafePatching keeps, at random."""

    def kept(self):
        def drawn(patch: str, kept: Sets) -> BitSets:
            def draw(name: str) -> Tensor:
                return random_set(kept[name], seed=self.seed, patch=patch, tensor=name)

            return BitSets(Lazy(kept, draw))

        k_se, k_osm = super().kept()
        return drawn(self.se.name, k_se), drawn(self.osm.name, k_osm)


@dataclass(frozen=True)
class Ablation:
    """method: SafePatching, or it with one step replaced. changes: of its parameters.

    masked: whether the result depends on the seed of the retention masks.
    """

    method: type[SafePatching]
    changes: dict
    masked: bool = True


ABLATIONS = {
    "SE only": Ablation(SeOnly, {}, masked=False),
    "OSM only": Ablation(OsmOnly, {}, masked=False),
    "plain sum": Ablation(PlainSum, {}, masked=False),
    "intersection": Ablation(Intersection, {}),
    "without retention (same α)": Ablation(WithoutRetention, {}),
    "without retention (α·p)": Ablation(WithoutRetentionScaled, {}),
    SAFEPATCHING: Ablation(SafePatching, {}),
    "no subtraction": Ablation(NoSubtraction, {}),
    "random sets": Ablation(RandomSets, {}),
    "rescaled by 1/p": Ablation(SafePatching, {"scale": "plain", "rescale": True}),
    "global top rate": Ablation(SafePatching, {"scope": "global"}),
    "ranked after retention": Ablation(SafePatching, {"order": "rank_retained"}),
}
IN_NOTEBOOK_03 = tuple(ABLATIONS)[:7]  # SafePatching comes last


def ablated(method: SafePatching, name: str) -> SafePatching:
    """The method with one thing taken away or changed; SpkitError for an unknown name."""
    if name not in ABLATIONS:
        raise SpkitError(f"unknown variant {name!r}, allowed: {', '.join(ABLATIONS)}")
    found = ABLATIONS[name]
    fields = _fields(method)
    return found.method(**fields | {"config": method.config.model_copy(update=found.changes)})


def ablations(method: SafePatching) -> Iterator[tuple[str, MergedPatch]]:
    """(name, deltas) of notebook 03's seven, one after the other."""
    for name in IN_NOTEBOOK_03:
        yield name, ablated(method, name).deltas()


def random_set(like: Tensor, *, seed: int, patch: str, tensor: str) -> Tensor:
    """As many positions of the matrix as `like` holds, drawn at random: bool of its shape.

    A pure function of its arguments, as the retention mask is.
    """
    key = hashlib.sha256(f"random set|{seed}|{patch}|{tensor}".encode()).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    chosen = torch.zeros(like.numel(), dtype=torch.bool)
    chosen[draws.permutation(like.numel())[: int(like.sum())]] = True
    return chosen.reshape(like.shape)


def _all(method: SafePatching, value: bool) -> Sets:
    return Lazy(method.se.factors, lambda name: torch.full(method.se.shape(name), value))


def _fields(method: SafePatching) -> dict:
    return {name: getattr(method, name) for name in SafePatching.__dataclass_fields__}
