"""DARE: drop most of each patch at random, rescale what is left, add up.

    theta + alpha * (m_SE o P_SE) / p + beta * (m_OSM o P_OSM) / p,      m ~ Bernoulli(p)

p is the rate of *keeping* here; the paper's p is that of dropping.
Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", arXiv 2311.03099 (drop and rescale, then task arithmetic).

Departures from the published method:
* The masks are our own draw (patching.retention_mask), a function of mask_seed, patch and tensor,
  and not a framework's random state: reproducible, and at the same rate and seed the very masks
  with which SafePatching retains.
* One coefficient per task vector, as in our Task Arithmetic.
* Keep rates of 0.1 to 0.9; the paper drops up to 99 % on large models.
* The task vectors are LoRA deltas, and not differences of fully fine-tuned weights.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.comparison.methods.method import STRENGTHS, Bundle, Method, check_setting
from spkit.method.patch import Factors
from spkit.method.patching import merged_delta, rescaled, retention_mask

NAME = "DARE"
SPACE = {"keep_rate": ("choice", 0.1, 0.3, 0.6, 0.9), **STRENGTHS}


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """The merged delta of every weight matrix, 0 where both patches were dropped."""
    check_setting(NAME, SPACE, setting)
    se, osm, rate = bundle.patch("se"), bundle.patch("osm"), setting["keep_rate"]

    def thinned(patch: Factors, tensor: str) -> tuple[Tensor, Tensor]:
        delta = patch.delta(tensor)
        return delta, retention_mask(
            delta.shape, rate, seed=mask_seed, patch=patch.name, tensor=tensor
        )

    alpha, beta = (rescaled(setting[key], rate) for key in ("alpha", "beta"))
    return {
        name: merged_delta(*thinned(se, name), *thinned(osm, name), alpha, beta)
        for name in se.factors
    }


METHOD = Method(
    name=NAME,
    paper="Yu et al. 2024, arXiv 2311.03099",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
    masks=True,
)
