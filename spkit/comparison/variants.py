"""What is compared: the methods with their tuned settings, and SafePatching with a part changed.

A variant is a label and a function of a bundle and a mask seed that gives deltas. The methods come
from methods/, most ablations from ablations.py; those that need another bundle (importance on the
backbone, or on the question's tokens) say which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spkit.comparison.ablations import ABLATIONS, ablated
from spkit.comparison.methods import METHODS, Bundle
from spkit.comparison.methods.safepatching import with_setting
from spkit.method.safepatching import NAME as SAFEPATCHING

BASE = "base"
USUAL = "usual"  # the bundle (and the size of the backbone) of the main comparison
# label -> the bundle that it needs instead of the usual one (sweeps.RESCORED)
OTHER_IMPORTANCE = {
    "SNIP on the backbone": "snip-backbone",
    "loss on the question": "snip-question",
}


@dataclass(frozen=True)
class Variant:
    """label: as in tables. masks: whether it depends on the mask seed. bundle: which one it reads.

    deltas(bundle, mask_seed) gives {tensor name: fp32 [out, in]}; none for the base.
    """

    label: str
    masks: bool
    bundle: str
    deltas: Callable[[Bundle, int], Mapping[str, torch.Tensor]]


def base() -> Variant:
    """The backbone as it is."""
    return Variant(BASE, False, USUAL, lambda bundle, seed: {})


def of_method(name: str, setting: Mapping[str, float], label: str | None = None) -> Variant:
    """One method with one setting."""
    method = METHODS[name]
    return Variant(
        label or name,
        method.masks,
        USUAL,
        lambda bundle, seed: method.deltas(bundle, setting, seed),
    )


def ablations(setting: Mapping[str, float]) -> list[Variant]:
    """SafePatching with `setting`, and every change of one of its parts at the same setting."""

    def named(name: str) -> Variant:
        masks = ABLATIONS[name].masked
        return Variant(
            name,
            masks,
            USUAL,
            lambda bundle, seed: ablated(with_setting(bundle, setting, seed), name).deltas(),
        )

    found = [named(name) for name in ABLATIONS]
    for label, bundle in OTHER_IMPORTANCE.items():
        whole = of_method(SAFEPATCHING, setting)
        found.append(Variant(label, True, bundle, whole.deltas))
    return found
