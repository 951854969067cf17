"""Weight averaging: a point on the line between the SE model and the OSM model.

    weight * theta_GA + (1 - weight) * theta_GD = theta + weight * P_SE + (1 - weight) * P_OSM

Wortsman et al., "Model soups", arXiv 2203.05482 (the mean of fine-tuned models: weight 0.5), and
Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv 2109.01903 (the line
between two models).

Departures from the published methods:
* The soup is the plain mean; other weights are WiSE-FT's line. That one ends in the zero-shot
  model, ours in two models that were trained in opposite directions.
* A soup's models learn one task with different hyper-parameters; these two learn opposite tasks.
* The models differ from the backbone by LoRA deltas, not by a full fine-tuning.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.comparison.methods.method import Bundle, Method, check_setting

NAME = "Weight averaging"
SPACE = {"weight": ("uniform", 0.0, 1.0)}


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """weight * P_SE + (1 - weight) * P_OSM of every weight matrix; mask_seed is not used."""
    check_setting(NAME, SPACE, setting)
    se, osm, weight = bundle.patch("se"), bundle.patch("osm"), setting["weight"]
    return {name: weight * se.delta(name) + (1 - weight) * osm.delta(name) for name in se.factors}


METHOD = Method(
    name=NAME,
    paper="Wortsman et al. 2022, arXiv 2203.05482",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
)
