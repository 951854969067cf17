"""The importance of a patch: calibration pairs from D_h, the right model, one pass of SNIP.

This is the glue between derivation.py and importance.py: which pairs are used, and whether a patch
is scored on its own model (theta + P) or on the backbone. What it does not do: compute a score.
"""

from collections.abc import Sequence

from torch import Tensor

from spkit.chat import collate, encode_pair
from spkit.config import ImportanceConfig
from spkit.data import sample
from spkit.derivation import Patch, attach
from spkit.examples import HarmfulPair
from spkit.importance import snip


def score_patch(
    model,
    tokenizer,
    patch: Patch,
    pairs: Sequence[HarmfulPair],
    config: ImportanceConfig,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """{tensor name: importance fp32 [out, in]} of one patch, on the CPU.

    model: the bare backbone, dense or NF4; it comes back bare. With scored_model "patched" [ours]
    I_SE is measured on theta_GA and I_OSM on theta_GD, where the LoRA factors make the difference;
    with "backbone" both are measured on theta, and are then the same.
    pairs: D_h, of which `config.samples` are the calibration set, the same ones for both patches.
    """
    chosen = sample(list(pairs), config.samples, seed)
    encoded = [encode_pair(tokenizer, p.prompt, p.response, config.loss_on) for p in chosen]
    batches = (
        collate(encoded[i : i + config.batch_size], tokenizer.pad_token_id)
        for i in range(0, len(encoded), config.batch_size)
    )
    targets = patch.manifest["lora"]["targets"]
    if config.scored_model == "backbone":
        scores = snip(model, batches, targets)
    else:
        wrapped = attach(model, patch)
        try:
            scores = snip(wrapped, batches, targets)
        finally:
            wrapped.unload()
    return {name: score.cpu() for name, score in scores.items()}
