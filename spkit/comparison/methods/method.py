"""The interface that all methods share: what they are given, and what they say about themselves.

A method turns a bundle (patches, importances, parameters of one backbone and one derivation) and a
setting (a value for each key of its search space) into one delta per weight matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors

# shared, so that no method is given a wider search than another; where two patches are opposed, the
# ratio of their strengths decides more than either
STRENGTHS = {"beta": ("log", 0.05, 4.0), "alpha": ("ratio", "beta", 0.25, 8.0)}
STRENGTH = {"strength": ("log", 0.02, 2.0)}


@dataclass(frozen=True)
class Bundle:
    """What one backbone and one derivation give every method to work with.

    patches: by name, "se", "osm", and "npo" where a method asks for it.
    scores: SNIP importances {"se": {tensor name: fp32 [out, in]}, "osm": ...}.
    patching: order, scope, rescale ... of SafePatching; a setting is put over it.
    first_token_losses: where the backbone itself is at hand, {tensor name: delta} -> nats, fp32
        [calibration pairs], the loss of the first answer token of backbone + delta on D_h.
    The patches include OSM, which alone is a jailbreak: in memory or in the run folder only.
    """

    patches: Mapping[str, Factors]
    scores: Mapping[str, Mapping[str, Tensor]]
    patching: PatchingConfig
    first_token_losses: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def patch(self, name: str) -> Factors:
        """The patch of that name; SpkitError where the bundle was made without it."""
        if name not in self.patches:
            having = ", ".join(self.patches) or "none"
            raise SpkitError(f"The bundle has no patch {name!r}; it has {having}.")
        return self.patches[name]


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    name: as in every table. paper: a short citation with the arXiv id.
    space: what a search may choose, by key: ("log", low, high), ("uniform", low, high),
        ("choice", v1, v2, ...) or ("ratio", key before it, low, high): that key's value times a
        number from a log scale. A setting is {key: value} with exactly these keys.
    deltas: (bundle, setting, mask_seed) -> {tensor name: merged delta fp32 [out, in]}, on the CPU;
        SpkitError for a wrong setting or a patch that is not there.
    needs: which patches of the bundle it reads. masks: whether the result depends on mask_seed.
    """

    name: str
    paper: str
    space: Mapping[str, tuple]
    deltas: Callable[[Bundle, Mapping[str, float], int], Mapping[str, Tensor]]
    needs: tuple[str, ...]
    masks: bool = False


def check_setting(method: str, space: Mapping[str, tuple], setting: Mapping[str, float]) -> None:
    """SpkitError, naming the key, unless `setting` has exactly the keys of `space`.

    Values are not compared with the space: it bounds a search, not what may be tried by hand.
    """
    for key in setting:
        if key not in space:
            raise SpkitError(f"{method} has no setting {key!r}; it has {', '.join(space)}.")
    for key in space:
        if key not in setting:
            raise SpkitError(f"{method} lacks the setting {key!r}; it has {', '.join(space)}.")
