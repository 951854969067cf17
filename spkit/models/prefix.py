"""The tokens that all pairs of a batch begin with, computed once.

A chat template begins every prompt alike: with its system prompt, as a rule. For SmolLM2 these are
24 of a short pair's 60 tokens. They go through the model as one row; its keys and values then serve
all rows, and gradients flow back through them. The numbers are those of whole rows but for
rounding. (Dropout, where there is any, drops the same of these tokens in all rows.)
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spkit.models.chat import counted
from spkit.models.onednn import recomputes
from spkit.system import processes

SAVED = 0.2  # of a batch's tokens: with fewer, a second pass costs as much as it saves
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def shared_past(model: nn.Module, batch: Mapping[str, Tensor]) -> DynamicCache | None:
    """The keys and values of what all rows of a batch begin with, for each row; None without gain.

    batch: as chat.collate makes it. None also where it cannot be: on a GPU, with weights in 4 bits,
    which would be decoded twice, and in several processes, of which each must make as many passes;
    with gradient checkpointing, which keeps no keys and values; and for a model that has a state in
    their place (Mamba, ...).
    """
    device = model.get_input_embeddings().weight.device
    if device.type != "cpu" or processes.here().count > 1 or getattr(model, "is_quantized", False):
        return None
    rows, first = len(batch["input_ids"]), shared_tokens(batch)
    if (rows - 1) * first < SAVED * batch["input_ids"].numel() or recomputes(model):
        return None
    tokens = batch["input_ids"][:1, :first].to(device)
    cache = getattr(model.get_decoder()(input_ids=tokens, use_cache=True), "past_key_values", None)
    if not all(isinstance(layer, KEYS_AND_VALUES) for layer in getattr(cache, "layers", [None])):
        return None
    cache.batch_repeat_interleave(rows)
    return cache


def shared_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many first tokens all rows have, of which none predicts a token that counts."""
    ids = batch["input_ids"]
    same = (ids == ids[:1]).all(dim=0) & batch["attention_mask"].bool().all(dim=0)
    same[:-1] &= ~counted(batch["labels"]).any(dim=0)
    return int(same.long().cumprod(dim=0).sum())
