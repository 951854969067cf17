"""How much a model can read."""

from torch import nn


def positions(model: nn.Module) -> int:
    """How many tokens the model has positions for.

    RoBERTa and Longformer count from behind their padding position, so not all of the table counts.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            lost = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - lost
    return getattr(model.config, "max_position_embeddings", None) or 2**30
