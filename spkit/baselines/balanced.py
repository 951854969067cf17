"""Balanced strengths: beta is set, and alpha is found on D_h, separately for every backbone.

    alpha = the smallest strength of SE at which nearly all calibration pairs are unlearnt:
            quantile_5%( -log p(first token of y | x) ) of theta + alpha * P_SE + beta * P_OSM
            is at least `target` nats

An extension of ours, beyond SafePatching (Zhao et al., arXiv 2405.13820) and Task Arithmetic
(Ilharco et al., arXiv 2212.04089), and therefore rows of its own in every table. Why: the two
patches are large and opposed, and which of them wins at a fixed alpha differs from backbone to
backbone; but harm, unlike over-safety, can be measured on D_h itself. No evaluation prompt is read.
The first token stands for the answer because refusing is decided there (Qi et al., arXiv
2406.05946).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spkit.ablations import SAFEPATCHING
from spkit.baselines import safepatching, task_arithmetic
from spkit.baselines.method import STRENGTHS, Bundle, Method, check_setting
from spkit.errors import SpkitError

NAME, SUM_NAME = f"{SAFEPATCHING}, balanced", "Task Arithmetic, balanced"
TARGET = {"target": ("log", 0.3, 4.0)}  # nats; ln 2 is where the answer is as likely as not
SPACE = {key: value for key, value in safepatching.SPACE.items() if key != "alpha"} | TARGET
SUM_SPACE = {"beta": STRENGTHS["beta"], **TARGET}
QUANTILE, LOWEST, HIGHEST, HALVINGS = 0.05, 0.02, 20.0, 8


def balance(loss_at: Callable[[float], float], target: float) -> float:
    """The smallest strength with loss_at(strength) >= target, by bisection on a log scale.

    Within 3 % (8 halvings of [0.02, 20]); HIGHEST where even that does not reach the target.
    """
    low, high = LOWEST, HIGHEST
    if loss_at(high) < target:
        return high
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if loss_at(middle) >= target:
            high = middle
        else:
            low = middle
    return high


def balanced_deltas(
    bundle: Bundle, se: Mapping[str, Tensor], osm: Mapping[str, Tensor], target: float
) -> dict[str, Tensor]:
    """alpha * se + osm for every weight matrix, alpha found on the bundle's calibration pairs."""
    if bundle.first_token_losses is None:
        raise SpkitError("Balancing needs a bundle with `first_token_losses`; this one has none.")

    def at(alpha: float) -> dict[str, Tensor]:
        return {name: alpha * delta + osm[name] for name, delta in se.items()}

    def loss_at(alpha: float) -> float:
        return torch.quantile(bundle.first_token_losses(at(alpha)), QUANTILE).item()

    return at(balance(loss_at, target))


def deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """SafePatching's kept sets and its beta; alpha balanced."""
    check_setting(NAME, SPACE, setting)
    rates = {key: value for key, value in setting.items() if key != "target"}
    parts = []
    for alpha, beta in ((1.0, 0.0), (0.0, setting["beta"])):
        values = {**rates, "alpha": alpha, "beta": beta}
        parts.append(safepatching.deltas(bundle, values, mask_seed))
    return balanced_deltas(bundle, *parts, setting["target"])


def sum_deltas(bundle: Bundle, setting: Mapping[str, float], mask_seed: int) -> dict[str, Tensor]:
    """Both whole patches; mask_seed is not read."""
    check_setting(SUM_NAME, SUM_SPACE, setting)
    parts = []
    for alpha, beta in ((1.0, 0.0), (0.0, setting["beta"])):
        parts.append(task_arithmetic.deltas(bundle, {"alpha": alpha, "beta": beta}, mask_seed))
    return balanced_deltas(bundle, *parts, setting["target"])


METHOD = Method(
    NAME, "ours, on Zhao et al. 2024, arXiv 2405.13820", SPACE, deltas, ("se", "osm"), masks=True
)
SUM = Method(
    SUM_NAME, "ours, on Ilharco et al. 2022, arXiv 2212.04089", SUM_SPACE, sum_deltas, ("se", "osm")
)
