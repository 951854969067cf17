"""Importance (SNIP) against its limit, a plain forward and backward, and against its peer.

Limit: the same samples, with the gradients of the same weights, and no scores. Peer: one decoder
layer at a time, sample by sample (reference_layer_by_layer.py). Ours takes all layers in one pass.
"""

from spkit.bench.bench import LIMIT, PEER, Bench, check_equal
from spkit.bench.random_checkpoint import tokenizer
from spkit.bench.sizes import Size, pairs
from spkit.bench.stages.reference_layer_by_layer import scores_layer_by_layer
from spkit.config import ImportanceConfig
from spkit.method.importance import Calibration
from spkit.method.snip import snip
from spkit.models.chat import answer_loss, mean_per_sample
from spkit.models.weights import target_weights

TARGETS = "all-linear"
SAMPLES, FEW = 16, 2  # the peer passes over the samples once for each layer: it gets a few


def measure(bench: Bench) -> None:
    """Rows for all sizes."""
    for size in bench.of("10 M", "50 M", "135 M"):
        _measure(bench, size, size.model(bench.device))


def _measure(bench: Bench, size: Size, model) -> None:
    every, few = batches(SAMPLES, 8), batches(FEW, 1)
    ours = snip(model, few, TARGETS)
    check_equal(bench, "scores", ours, scores_layer_by_layer(model, few, TARGETS), 1e-4)
    limit = (LIMIT, lambda: plain(model, every), "<= 1.05")
    bench.compare(size, lambda: snip(model, every, TARGETS), {"forward + backward": limit})
    peer = (PEER, lambda: scores_layer_by_layer(model, few, TARGETS), goal(size))
    bench.compare(size, lambda: snip(model, few, TARGETS), {"layer by layer": peer})


def goal(size: Size) -> str:
    """Half as many times faster as there are layers."""
    return f"<= {2 / size.layers:.3f}"


def batches(samples: int, at_once: int) -> list:
    """Calibration batches of random words."""
    config = ImportanceConfig(samples=samples, batch_size=at_once)
    return Calibration(pairs(samples), config, seed=0).batches(tokenizer())


def plain(model, every) -> None:
    """What nothing that needs these gradients can do without."""
    weights = [layer.weight for layer in target_weights(model, TARGETS).values()]
    for weight in model.parameters():
        weight.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for batch in every:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).logits
        mean_per_sample(*answer_loss(logits, batch["labels"])).sum().backward()
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)
