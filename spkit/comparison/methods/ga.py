"""GA: gradient ascent on the harmful answers, and nothing else.

    theta_GA = theta + strength * P_SE

Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv
2210.04675, as the SafePatching paper (arXiv 2405.13820) uses it on D_h.

Departures from the published method:
* strength: the published model is the one after training, strength 1. Here the patch is scaled
  afterwards, so that GA gets the same chance to trade harm against over-safety as the others.
* LoRA factors on a frozen, as a rule 4-bit, backbone move, not all the weights.
* The loss is on the answer's tokens given the question, as the mean over tokens; Jang et al. negate
  the likelihood of a whole sequence.
* A clamp on every token's loss and a stop at a mean loss hold the ascent (derivation.py); the
  published one is ended by measuring what is still remembered.
* The derivation is the SE patch's, shared with SafePatching, and not tuned for GA.
"""

from collections.abc import Mapping

from spkit.comparison.methods.method import STRENGTH, Bundle, Method, check_setting
from spkit.method.patch import MergedPatch, whole_patches

NAME = "GA"


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> MergedPatch:
    """strength * P_SE of every weight matrix; mask_seed is not used."""
    check_setting(NAME, STRENGTH, setting)
    se = bundle.patch("se")
    return whole_patches((se, setting["strength"]))


METHOD = Method(
    name=NAME,
    paper="Jang et al. 2022, arXiv 2210.04675",
    space=STRENGTH,
    deltas=deltas,
    needs=("se",),
)
