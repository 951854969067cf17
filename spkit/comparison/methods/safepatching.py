"""SafePatching behind the interface of the baselines: the same code as the kit's own stages.

    theta + alpha' * P_SE  on retained and S_SE \\ S_OSM
          + beta' * P_OSM on retained and S_OSM \\ S_SE

Zhao et al., "Towards Comprehensive Post Safety Alignment of Large Language Models via Safety
Patching", arXiv 2405.13820.

Departures from the paper (docs/method.md states the choices that the paper leaves open):
* alpha and beta are norm-matched always, alpha' = alpha * |P_SE| / |kept P_SE|, whatever
  `patching.scale` says: otherwise a search could not tell how much is kept from how strong it is.
* LoRA on a 4-bit backbone, a clamp and a stop rule in the ascent, top rates per weight matrix.

A setting's keys are fields of PatchingConfig and are put over the bundle's.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.comparison.methods.method import STRENGTHS, Bundle, Method, check_setting
from spkit.config import PatchingConfig
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching
from spkit.validation import checked

SPACE = {
    "retention_rate": ("choice", 0.3, 0.6, 0.9),
    "top_rate_se": ("log", 0.02, 0.8),
    "top_rate_osm": ("log", 0.02, 0.8),
    **STRENGTHS,
}


def with_setting(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> SafePatching:
    """The bundle with the setting put over its parameters; SpkitError for a value out of range."""
    values = {**bundle.patching.model_dump(), **setting, "scale": "norm_matched"}
    return SafePatching(
        bundle.patch("se"),
        bundle.patch("osm"),
        (bundle.scores["se"], bundle.scores["osm"]),
        checked(PatchingConfig, values),
        mask_seed,
    )


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """The merged delta of every weight matrix, 0 outside of the kept sets."""
    check_setting(SAFEPATCHING, SPACE, setting)
    return with_setting(bundle, setting, mask_seed).deltas()


METHOD = Method(
    name=SAFEPATCHING,
    paper="Zhao et al. 2024, arXiv 2405.13820",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
    masks=True,
)
