"""Joint top sets [ours, an ablation]: SafePatching without the subtraction of the two sets.

    theta + alpha' * P_SE on retained and S_SE + beta' * P_OSM on retained and S_OSM

Weights that matter to both patches get both deltas, where SafePatching (Zhao et al., arXiv
2405.13820) gives them neither. If this does as well, the difference sets were not what helped.

Departures from the paper: the missing subtraction, which is the point, and those of
safepatching.py; the search space is that file's. The strengths are norm-matched by the sets kept
here, which are larger, so that at equal alpha each patch moves the weights as far.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.ablations import kept_norm
from spkit.baselines.method import Bundle, Method, check_setting
from spkit.baselines.safepatching import SPACE, variants
from spkit.patching import intersection_set, merged_delta, norm_matched

NAME = "Joint top sets"


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """The merged delta of every weight matrix, 0 outside of both sets."""
    check_setting(NAME, SPACE, setting)
    own = variants(bundle, setting, mask_seed)
    keep_se, keep_osm = (
        {name: intersection_set(masks[name], top) for name, top in tops.items()}
        for masks, tops in zip(own.retained, own.important(), strict=True)
    )
    alpha = norm_matched(setting["alpha"], own.se.norm(), kept_norm(own.se, keep_se))
    beta = norm_matched(setting["beta"], own.osm.norm(), kept_norm(own.osm, keep_osm))
    return {
        name: merged_delta(
            own.se.delta(name), keep_se[name], own.osm.delta(name), keep_osm[name], alpha, beta
        )
        for name in keep_se
    }


METHOD = Method(
    name=NAME,
    paper="ours, after Zhao et al. 2024, arXiv 2405.13820",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
    masks=True,
)
