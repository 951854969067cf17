"""The language head, computed only where a next token counts.

A pair's loss is on its answer, and the head of a small model with a large vocabulary is a fifth of
its weights. The hidden states of all other positions are left out right before the head, by a hook
on it, so that no model's forward needs to know. It works bare, in NF4, wrapped by PEFT, and in
several processes; what a model does to its logits afterwards (Gemma's soft cap) is done to each.
"""

from collections.abc import Collection, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from spkit.models.chat import counted
from spkit.models.onednn import fast_linear
from spkit.models.prefix import shared_past

SMALL = 4096  # words: a smaller head costs next to nothing and stays whole, like the sandbox's


def is_small(model: nn.Module) -> bool:
    """Whether nothing is to be won: such models, the sandbox's among them, keep their last bits."""
    return model.config.get_text_config().vocab_size < SMALL


def answer_logits(
    model: nn.Module, batch: Mapping[str, Tensor], watched: Collection[nn.Module] = ()
) -> Tensor:
    """The logits that `chat.answer_loss` needs of a batch: [1, N, V] of the N tokens that count.

    batch: as chat.collate makes it, on any device. What all rows begin with may be computed once
    (prefix.py). watched: modules that a caller's hooks are on; where there are any, each row is
    computed whole, and a head among them at all positions. Then, and where a model has no head that
    is called, the logits are those of all positions, [B, T, V], which answer_loss takes as well.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = head is None or any(head is module for module in watched)
    if whole or is_small(model):
        return model(**_inputs(model, batch), use_cache=False).logits
    with fast_linear(model):
        return _needed(model, head, batch, None if watched else shared_past(model, batch))


def _inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = model.get_input_embeddings().weight.device
    return {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}


def _needed(model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor], cache) -> Tensor:
    """As answer_logits. cache: of the tokens that all rows begin with, or None."""
    inputs, labels, start = _inputs(model, batch), batch["labels"], 0
    if cache is not None:
        start = cache.get_seq_length()
        inputs |= {"input_ids": inputs["input_ids"][:, start:], "past_key_values": cache}
        labels = labels[:, start:]

    def keep(module, args):
        hidden = args[0]
        if hidden.shape[:2] != labels.shape:
            return None
        return (hidden[:, :-1][counted(labels).to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits = model(**inputs, use_cache=start > 0).logits
    finally:
        handle.remove()
    return F.pad(logits, (0, 0, start, 0)) if logits.shape[:2] == labels.shape else logits
