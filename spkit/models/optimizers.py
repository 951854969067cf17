"""The optimisers of LoRA factors."""

from collections.abc import Iterable

import torch
from torch import Tensor


def adamw(kind: str, weights: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """`derivation.optimizer`: AdamW without weight decay, its moments in fp32 or in 8 bits."""
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    made = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[kind]
    return made(weights, lr=rate, weight_decay=0.0)
