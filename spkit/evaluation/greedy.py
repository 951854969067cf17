"""Greedy decoding of a batch: what a model adds to each row of token ids.

transformers' own `generate` decodes. What all rows begin with, such as the system block of a chat
format, is read once, and its keys and values are copied for every row. Rows that have ended are
taken out. Both need a cache of all positions: a batch that is longer than a sliding window, or a
model whose rotary positions depend on the length, is decoded whole, from its first token on.
"""

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from spkit.models.onednn import fast_linear

# Greedy decoding, spelt out: an argument overrules what a checkpoint brings in its
# generation_config, and so no sampling, beam, penalty or ban of its own changes an answer.
GREEDY = {
    **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_stopping": False},
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"), None),
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0},
    **dict.fromkeys(("min_new_tokens", "bad_words_ids", "sequence_bias", "guidance_scale"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"), None),
    **dict.fromkeys(("begin_suppress_tokens", "exponential_decay_length_penalty"), None),
    **dict.fromkeys(("penalty_alpha", "watermarking_config", "stop_strings", "max_time"), None),
}
ALONE = 32  # reading the beginning by itself costs about as much as this many positions in a batch
LEAVE = 8  # rows are taken out when one in so many has ended: each time costs a copy of the cache


@torch.inference_mode()
def continued(
    model, rows: Sequence[Sequence[int]], *, pad: int, ends: Sequence[int], max_new_tokens: int
) -> Tensor:
    """What the model adds to each row of token ids, greedily: int64 [B, at most max_new_tokens].

    Rows are padded on the left of what they do not share; rows that end early are padded.
    """
    device = model.get_input_embeddings().weight.device
    plain = _plain_cache(model, max(len(row) for row in rows) + max_new_tokens)
    shared = _shared(rows) if plain else 0
    ids, mask = (x.to(device) for x in _padded(rows, shared, pad))
    options = {"pad_token_id": pad, "eos_token_id": list(ends) or None}
    cache = _read(model, ids[:1, :shared], len(rows), options) if shared else None
    said = torch.full((len(rows), max_new_tokens), pad, device=device)
    going, done = torch.arange(len(rows), device=device), 0
    ends = torch.tensor(list(ends), dtype=torch.long, device=device)
    while len(going) and done < max_new_tokens:
        stop = _some_ended(ends, *ids.shape) if plain else None
        options |= {"past_key_values": cache, "stopping_criteria": stop}
        found = _generated(model, ids, mask, max_new_tokens - done, options)
        new, cache = found.sequences[:, ids.shape[1] :], found.past_key_values
        said[going, done : done + new.shape[1]] = new
        done += new.shape[1]
        (kept,) = torch.where(~torch.isin(new, ends).any(dim=1))
        if len(kept) and done < max_new_tokens:
            cache.batch_select_indices(kept.cpu())  # its layers may be on several GPUs
        ids, going = found.sequences[kept], going[kept]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[kept]
    return said[:, :done]


def _plain_cache(model, positions: int) -> bool:
    """Whether keys and values of so many positions are all kept, and depend on no later one."""
    from transformers.cache_utils import DynamicCache

    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    asked = model.generation_config
    own = asked.cache_implementation in (None, "dynamic") and asked.use_cache is not False
    sizes = map(_size, DynamicCache(config=config).layers)
    return own and not kinds & {"dynamic", "longrope"} and positions < min(sizes, default=inf)


def _size(layer) -> float:
    """How many positions a layer of a cache keeps and sees; 0 for one of another kind."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    return inf if type(layer) is DynamicLayer else 0


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with, and 0 where it does not pay to read them by themselves.

    Each row keeps one id at least, because its last one says what comes next.
    """
    first, last = min(rows), max(rows)  # what these two share, all between them share
    most = min(len(row) for row in rows) - 1
    differ = (i for i in range(most) if first[i] != last[i])
    shared = next(differ, most)
    return shared if shared * (len(rows) - 1) > ALONE else 0


def _padded(rows: Sequence[Sequence[int]], shared: int, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each int64 [B, T]: padding stands between what is shared and the rest."""
    width = max(len(row) for row in rows)
    ids = [[*row[:shared], *[pad] * (width - len(row)), *row[shared:]] for row in rows]
    mask = [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _read(model, ids: Tensor, rows: int, options: dict):
    """Keys and values of `ids` [1, T], copied for so many rows."""
    cache = _generated(model, ids, torch.ones_like(ids), 1, options).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def _generated(model, ids: Tensor, mask: Tensor, most: int, options: dict):
    """What `generate` gives: sequences [B, T + at most `most`], past_key_values."""
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": most, **options}
    with fast_linear(model):
        return model.generate(**given, **GREEDY, return_dict_in_generate=True)


def _some_ended(ends: Tensor, rows: int, start: int) -> list[Callable]:
    """A stop of the whole batch where enough of its rows have ended. start: what was given."""

    def enough(ids: Tensor, scores: object, **options: object) -> Tensor:
        ended = torch.isin(ids[:, start:], ends).any(dim=1).sum()
        return (ended * LEAVE >= rows).expand(len(ids))

    return [enough]
