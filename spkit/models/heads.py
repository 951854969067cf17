"""The language head, computed only where a next token counts.

A pair's loss is on its answer, and the head of a small model with a large vocabulary is a fifth of
its weights. The hidden states of all other positions are left out right before the head, by a hook
on it, so that no model's forward needs to know. It works bare, in NF4, wrapped by PEFT, and in
several processes; what a model does to its logits afterwards (Gemma's soft cap) is done to each.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from spkit.models.chat import counted

SMALL = 4096  # words: a smaller head costs next to nothing and stays whole, like the sandbox's


def answer_logits(
    model: nn.Module, batch: Mapping[str, Tensor], but_for: Collection[nn.Module] = ()
) -> Tensor:
    """The logits that `chat.answer_loss` needs of a batch: [1, N, V] of the N tokens that count.

    batch: as chat.collate makes it, on any device. but_for: modules that a caller has hooks on; a
    head among them is computed whole. Where it is, and where a model has no head that is called,
    the logits are those of all positions, [B, T, V], which answer_loss takes as well.
    """
    device = model.get_input_embeddings().weight.device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = head is None or any(head is module for module in but_for)
    if whole or model.config.get_text_config().vocab_size < SMALL:
        return model(**inputs, use_cache=False).logits

    def keep(module, args):
        hidden, labels = args[0], batch["labels"]
        if hidden.shape[:2] != labels.shape:
            return None
        return (hidden[:, :-1][counted(labels).to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
