"""SafePatching and Task Arithmetic with balanced strengths: alpha is found on D_h (balancing.py).

An extension of ours, beyond SafePatching (Zhao et al., arXiv 2405.13820) and Task Arithmetic
(Ilharco et al., arXiv 2212.04089), and therefore rows of its own in every table. In place of alpha
its target is searched: the nats that the first answer token's loss must reach on nearly all pairs.
"""

from collections.abc import Mapping

from torch import Tensor

from spkit.comparison.methods import safepatching, task_arithmetic
from spkit.comparison.methods.method import STRENGTHS, Bundle, Method, check_setting
from spkit.errors import SpkitError
from spkit.evaluation.labels import BALANCED
from spkit.method.balancing import balanced_alpha, parts

NAME, SUM_NAME = BALANCED, "Task Arithmetic, balanced"
TARGET = {"target": ("log", 0.3, 4.0)}  # nats; ln 2 is where the answer is as likely as not
SPACE = {key: value for key, value in safepatching.SPACE.items() if key != "alpha"} | TARGET
SUM_SPACE = {"beta": STRENGTHS["beta"], **TARGET}


def balanced_deltas(
    bundle: Bundle, se: Mapping[str, Tensor], osm: Mapping[str, Tensor], target: float
) -> dict[str, Tensor]:
    """alpha * se + osm for every weight matrix, alpha found on the bundle's calibration pairs."""
    if bundle.first_token_losses is None:
        raise SpkitError("Balancing needs a bundle with `first_token_losses`; this one has none.")
    alpha = balanced_alpha(bundle.first_token_losses, se, osm, target)
    return {name: alpha * delta + osm[name] for name, delta in se.items()}


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """SafePatching's kept sets and its beta; alpha balanced."""
    check_setting(NAME, SPACE, setting)
    own = {key: value for key, value in setting.items() if key != "target"}
    halves = parts(safepatching.with_setting(bundle, own, mask_seed))
    return balanced_deltas(bundle, *halves, setting["target"])


def sum_deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """Both whole patches; mask_seed is not used."""
    check_setting(SUM_NAME, SUM_SPACE, setting)
    halves = (
        task_arithmetic.deltas(bundle, {"alpha": alpha, "beta": beta}, mask_seed)
        for alpha, beta in ((1.0, 0.0), (0.0, setting["beta"]))
    )
    return balanced_deltas(bundle, *halves, setting["target"])


METHOD = Method(
    NAME, "ours, on Zhao et al. 2024, arXiv 2405.13820", SPACE, deltas, ("se", "osm"), masks=True
)
SUM = Method(
    SUM_NAME, "ours, on Ilharco et al. 2022, arXiv 2212.04089", SUM_SPACE, sum_deltas, ("se", "osm")
)
