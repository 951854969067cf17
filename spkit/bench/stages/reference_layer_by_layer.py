"""SNIP as its authors' code for language models is described: one layer's gradients at a time.

Written from the description of alignment-attribution-code (facts: batch 1, labels of the prompt
masked, |W| times the sum of |gradient| over the samples, gradients enabled for one decoder layer at
a time), not copied. It is a reference to check and to time against, no part of the method.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spkit.models.chat import answer_loss, mean_per_sample
from spkit.models.weights import decoder_layers, target_weights


def scores_layer_by_layer(
    model, batches: Iterable[Mapping[str, Tensor]], targets
) -> dict[str, Tensor]:
    """{tensor name: mean of |W * dL/dW| over the samples, fp32}; batches of one sample each."""
    layers = target_weights(model, targets)
    for weight in model.parameters():
        weight.requires_grad_(False)
    found = {}
    for decoder in decoder_layers(model):
        inside = set(decoder.modules())
        own = {name: layer.weight for name, layer in layers.items() if layer in inside}
        found |= _scores_of(model, batches, own)
    return {name: found[name] for name in layers}


def _scores_of(model, batches, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        mean_per_sample(*answer_loss(logits, batch["labels"])).sum().backward()
        count += len(batch["input_ids"])
        for name, weight in weights.items():
            sums[name] += weight.grad.float().abs()
            weight.grad = None
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: weights[name].detach().float().abs() * s / count for name, s in sums.items()}
