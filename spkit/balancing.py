"""Balanced strengths: beta is set, alpha is found on D_h, anew for every backbone [ours].

    alpha = the smallest strength of SE at which nearly all calibration pairs are unlearnt:
            quantile_5%( -log p(first token of y | x) ) of theta + alpha * P_SE + beta * P_OSM
            is at least `balance` nats                                  docs/method.md, section 4

Why: the two kept patches are large and opposed, and which of them wins at a fixed alpha differs
from backbone to backbone. Harm, unlike over-safety, can be measured on D_h itself. No evaluation
prompt is read. The first token stands for the answer, because refusing is decided there (Qi et
al., arXiv 2406.05946).

Where D_h is unlearnt already, as in later continual stages, ascent has nothing left to do, SE is
next to nothing, and no alpha can hold OSM. Then alpha is 1, and *beta* is lowered until D_h stays
unlearnt: a stage must not undo the safety that it found.

What this file does not do: choose beta or the top rates, or evaluate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spkit.ablations import SAFEPATCHING, Variants
from spkit.backbone import patched
from spkit.chat import answer_loss, collate, encode_pair
from spkit.data import sample
from spkit.examples import HarmfulPair

QUANTILE = 0.05
LOWEST, HIGHEST, HALVINGS = 0.02, 20.0, 8

Losses = Callable[[Mapping[str, Tensor]], Tensor]  # {tensor name: delta} -> nats, fp32 [pairs]


def first_token_losses(
    model, tokenizer, pairs: Sequence[HarmfulPair], *, samples: int, seed: int
) -> Losses:
    """The loss of the first answer token of model + deltas on D_h, one value a pair, in nats.

    model: the bare backbone in full precision; it gets its bits back after each call.
    samples, seed: the calibration pairs are those of the importances (scoring.score_patch).
    """
    chosen = sample(list(pairs), samples, seed)
    encoded = [encode_pair(tokenizer, p.prompt, p.response) for p in chosen]
    batch = collate(encoded, tokenizer.pad_token_id)
    device = model.get_input_embeddings().weight.device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    labels = batch["labels"].to(device)

    @torch.inference_mode()
    def losses(deltas: Mapping[str, Tensor]) -> Tensor:
        with patched(model, deltas):
            by_token, mask = answer_loss(model(**inputs).logits, labels)
        first = mask.long().argmax(dim=1, keepdim=True)
        return by_token.gather(1, first).squeeze(1).float().cpu()

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
    """(alpha, beta) -> the 5 % quantile of the losses at alpha * se + beta * osm, in nats."""

    def at(alpha: float, beta: float = 1.0) -> float:
        deltas = {name: alpha * delta + beta * osm[name] for name, delta in se.items()}
        return torch.quantile(losses(deltas), QUANTILE).item()

    return at


def parts(variants: Variants) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SafePatching's two halves: SE at alpha = 1, and OSM at the beta that is set."""
    return tuple(
        replace(variants, config=variants.config.model_copy(update=strengths)).deltas(SAFEPATCHING)
        for strengths in ({"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0})
    )


def balanced_alpha(
    losses: Losses, se: Mapping[str, Tensor], osm: Mapping[str, Tensor], target: float
) -> float:
    """alpha for alpha * se + osm: both already thinned and, but for alpha, scaled."""
    return balance(unlearnt(losses, se, osm), target)


def held_beta(at: Callable[[float, float], float], target: float) -> float:
    """The largest share of osm, from 0 to 1, with at(1, share) >= target, by 8 halvings.

    0 where not even that much is unlearnt without any osm.
    """
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if at(1.0, middle) >= target:
            low = middle
        else:
            high = middle
    return low


def balanced(variants: Variants, losses: Losses) -> Variants:
    """The same variants with the alpha that `patching.balance` asks for; unchanged if it is null.

    alpha is found for SafePatching; the ablations have the same one. Where no alpha reaches the
    balance, alpha is 1 and beta is lowered.
    """
    config = variants.config
    if config.balance is None:
        return variants
    at = unlearnt(losses, *parts(variants))
    found = {"alpha": balance(at, config.balance)}
    if found["alpha"] == HIGHEST:
        share = held_beta(at, config.balance)
        found = {"alpha": 1.0, "beta": share * config.beta}
    return replace(variants, config=config.model_copy(update=found))
