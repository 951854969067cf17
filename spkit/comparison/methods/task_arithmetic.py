"""Task Arithmetic: the weighted sum of the two patches, every weight of both.

    theta + alpha * P_SE + beta * P_OSM

Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.

Departures from the published method:
* One coefficient per task vector; the paper scales the sum of several by one, chosen on held-out
  data. At alpha = beta it is the paper's.
* The task vectors are LoRA deltas, and not differences of fully fine-tuned weights.
* P_SE comes from gradient ascent; the paper forgets a task by *subtracting* what descent on it
  gave (which would be alpha = 0 and beta below 0 here).
"""

from collections.abc import Mapping

from spkit.comparison.methods.method import STRENGTHS, Bundle, Method, check_setting
from spkit.method.patch import MergedPatch, whole_patches

NAME = "Task Arithmetic"


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> MergedPatch:
    """alpha * P_SE + beta * P_OSM of every weight matrix; mask_seed is not used."""
    check_setting(NAME, STRENGTHS, setting)
    se, osm = bundle.patch("se"), bundle.patch("osm")
    return whole_patches((se, setting["alpha"]), (osm, setting["beta"]))


METHOD = Method(
    name=NAME,
    paper="Ilharco et al. 2023, arXiv 2212.04089",
    space=STRENGTHS,
    deltas=deltas,
    needs=("se", "osm"),
)
