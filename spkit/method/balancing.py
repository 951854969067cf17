"""Balanced strengths: beta is set, alpha is found on D_h, anew for every backbone.

    alpha = the smallest strength of SE at which nearly all calibration pairs are unlearnt:
            quantile_5%( -log p(first token of y | x) ) of theta + alpha * P_SE + beta * P_OSM
            is at least `balance` nats                                  docs/method.md, section 4

Why: the two kept patches are large and opposed. Which of them wins at a fixed alpha differs from
backbone to backbone. Harm can be measured on D_h itself, so no evaluation prompt is read. The first
token is enough, because it decides about refusing (Qi et al., arXiv 2406.05946).

Where D_h is unlearnt already, as in later continual stages, SE is close to 0 and no alpha makes up
for OSM. Then alpha is 1, and *beta* is lowered until D_h stays unlearnt.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spkit.method.importance import Calibration
from spkit.method.safepatching import SafePatching
from spkit.method.sets import Lazy
from spkit.models.chat import answer_loss, first_counted
from spkit.models.deltas import SparseDelta
from spkit.models.heads import answer_logits
from spkit.models.patched import Delta, patched

QUANTILE = 0.05
LOWEST, HIGHEST, HALVINGS = 0.02, 20.0, 8
AT_ONCE = 4096  # tokens of one batch; the logits of a vocabulary of 128,000 then take 2 GB

Losses = Callable[[Mapping[str, Delta]], Tensor]  # {tensor name: delta} -> nats, fp32 [pairs]


def first_token_losses(model, tokenizer, calibration: Calibration) -> Losses:
    """The loss of the first answer token of model + deltas on D_h, one value a pair, in nats.

    model: the bare backbone, in full precision or NF4; each call leaves it as it was. calibration:
    the pairs, in one batch where they fit into AT_ONCE tokens, so that the last bits of a loss do
    not depend on `importance.batch_size`.
    """
    batches = calibration.answers(tokenizer, AT_ONCE)
    for batch in batches:
        batch["labels"] = first_counted(batch["labels"])

    @torch.inference_mode()
    def losses(deltas: Mapping[str, Delta]) -> Tensor:
        found = []
        with patched(model, deltas):
            for batch in batches:
                by_token, _ = answer_loss(answer_logits(model, batch), batch["labels"])
                found.append(by_token.sum(dim=1).cpu())  # 0 but for the first token
        return torch.cat(found)

    return losses


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


def unlearnt(losses: Losses, se: Mapping[str, Tensor], osm: Mapping[str, Tensor]):
    """(alpha, beta) -> the 5 % quantile of the losses at alpha * se + beta * osm, in nats.

    Both are read once and held as positions and values: few weights are kept.
    """
    halves = {name: (SparseDelta.of(se[name]), SparseDelta.of(osm[name])) for name in se}

    def at(alpha: float, beta: float = 1.0) -> float:
        def both(name: str) -> Tensor:
            one, other = halves[name]
            return alpha * one.dense() + beta * other.dense()

        return torch.quantile(losses(Lazy(halves, both)), QUANTILE).item()

    return at


def parts(method: SafePatching) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """SafePatching's two halves: SE at alpha = 1, and OSM at the beta that is set."""
    return method.changed(alpha=1.0, beta=0.0).deltas(), method.changed(alpha=0.0).deltas()


def balanced_alpha(
    losses: Losses, se: Mapping[str, Tensor], osm: Mapping[str, Tensor], target: float
) -> float:
    """alpha for alpha * se + osm: se at alpha = 1 and osm at its beta, as `parts` gives them."""
    return balance(unlearnt(losses, se, osm), target)


def held_beta(at: Callable[[float, float], float], target: float) -> float:
    """The largest share of osm, from 0 to 1, with at(1, share) >= target, by 8 halvings.

    0 where no share that is tried reaches the target.
    """
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if at(1.0, middle) >= target:
            low = middle
        else:
            high = middle
    return low


def balanced(method: SafePatching, losses: Losses) -> SafePatching:
    """The same method with the alpha that `patching.balance` asks for; unchanged if it is null.

    The ablations then have the same alpha. Where no alpha reaches the balance, alpha is 1 and beta
    is lowered.
    """
    target = method.config.balance
    if target is None:
        return method
    at = unlearnt(losses, *parts(method))
    alpha = balance(at, target)
    if alpha == HIGHEST and at(HIGHEST) < target:
        return method.changed(alpha=1.0, beta=held_beta(at, target) * method.config.beta)
    return method.changed(alpha=alpha)
