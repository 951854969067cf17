"""Joint top sets (an ablation): SafePatching without the subtraction of the two sets.

    theta + alpha' * P_SE on retained and S_SE + beta' * P_OSM on retained and S_OSM

Weights that matter to both patches get both deltas, where SafePatching (Zhao et al., arXiv
2405.13820) gives them neither. If this does as well, the difference sets were not what helped.

Departures from the paper: the missing subtraction, which is the point, and those of
safepatching.py; the search space is that file's. The strengths are norm-matched by the sets kept
here, which are larger, so that at equal alpha each patch moves the weights as far.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.comparison.ablations import ablated
from spkit.comparison.methods.method import Bundle, Method, check_setting
from spkit.comparison.methods.safepatching import SPACE, with_setting

NAME = "Joint top sets"


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """The merged delta of every weight matrix, 0 outside of both sets."""
    check_setting(NAME, SPACE, setting)
    return ablated(with_setting(bundle, setting, mask_seed), "no subtraction").deltas()


METHOD = Method(
    name=NAME,
    paper="ours, after Zhao et al. 2024, arXiv 2405.13820",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
    masks=True,
)
