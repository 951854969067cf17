"""TIES: trim each patch, elect a sign for every weight, average the patches that agree with it.

    trim     each patch keeps its `density` largest values by magnitude, the others become 0
    elect    sign of the sum of the trimmed patches
    merge    mean of the trimmed, non-zero values with that sign

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708. The
tensor function is PEFT's (`peft.utils.merge_utils.ties`), on the dense delta of one matrix at a
time: PEFT's own adapter merging treats A and B apart, which is not the published method.

Departures from the published method:
* Trimming is per weight matrix; the paper trims over the whole task vector. `density` is searched;
  the paper keeps 20 %.
* Task weights alpha and beta, multiplied in after the election and before the mean; the paper
  scales the merged vector by one number, which is alpha = beta.
* Where the trimmed patches cancel out exactly, the sign is +; the authors' code takes the
  majority's.
* The task vectors are LoRA deltas, and not differences of fully fine-tuned weights.
"""

from collections.abc import Mapping

import torch
from peft.utils import merge_utils
from torch import Tensor

from spkit.comparison.methods.method import STRENGTHS, Bundle, Method, check_setting

NAME = "TIES"
SPACE = {"density": ("log", 0.02, 1.0), **STRENGTHS}


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """The merged delta of every weight matrix; mask_seed is not used."""
    check_setting(NAME, SPACE, setting)
    se, osm = bundle.patch("se"), bundle.patch("osm")
    weights = torch.tensor([setting["alpha"], setting["beta"]])
    return {
        name: merge_utils.ties([se.delta(name), osm.delta(name)], weights, setting["density"])
        for name in se.factors
    }


METHOD = Method(
    name=NAME,
    paper="Yadav et al. 2023, arXiv 2306.01708",
    space=SPACE,
    deltas=deltas,
    needs=("se", "osm"),
)
