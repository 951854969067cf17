"""Perplexity: how well a model predicts texts that have nothing to do with the patches.

    exp( sum over all tokens of -log p(token | what is before it) / number of tokens )

A mean over tokens, not over texts. Figures of models with different tokenizers cannot be compared.
The texts are the sandbox's questions with their answers, or plain texts of a file or data set.
"""

import math
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from spkit.config import Config
from spkit.data.readers.rows import text as text_of
from spkit.data.readers.source import load_rows, resolve
from spkit.errors import SpkitError
from spkit.examples import sample
from spkit.models.chat import answer_loss, collate, encode_pair
from spkit.models.lengths import context_of
from spkit.sandbox import world

MAX_TOKENS = 512  # a longer text is cut


@torch.inference_mode()
def perplexity(
    model,
    tokenizer,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int,
    label: str = "perplexity",
) -> dict[str, float | int]:
    """{"value": perplexity, "tokens": number of tokens scored, "texts": number of texts}.

    A text is scored from its first token on, after the tokenizer's bos token, which itself is not
    scored; without a bos token, from its second on. A pair (prompt, answer) is scored on the
    answer and the end of its turn alone, in the chat format. Cut at MAX_TOKENS tokens in all, a
    text also at the model's context. Losses are fp32, their sum is fp64; padding is on the right
    and masked, so that batches do not matter but for rounding. SpkitError if no token is left to
    score.
    """
    encoded = [encoded_text(tokenizer, text) for text in texts]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    device = model.get_input_embeddings().weight.device
    sums, tokens = [0.0] * len(encoded), 0
    for start in tqdm(range(0, len(by_length), batch_size), desc=label, unit="batch", leave=False):
        chosen = by_length[start : start + batch_size]
        batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        for row, i in enumerate(chosen):  # one at a time: [T, V] in fp32 is large
            losses, mask = answer_loss(logits[row : row + 1], batch["labels"][row : row + 1])
            sums[i] = float(losses.double().sum())
            tokens += int(mask.sum())
    if not tokens:
        raise SpkitError("There is no token to compute a perplexity on: no texts, or empty ones.")
    mean = math.fsum(sums) / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return {"value": value, "tokens": tokens, "texts": len(encoded)}


def encoded_text(tokenizer, text: str | tuple[str, str]) -> tuple[list[int], list[int]]:
    """(ids, labels), cut."""
    if not isinstance(text, str):
        ids, labels = encode_pair(tokenizer, *text)
        return ids[:MAX_TOKENS], labels[:MAX_TOKENS]
    bos = tokenizer.bos_token_id
    start = [] if bos is None else [bos]
    longest = min(MAX_TOKENS, context_of(tokenizer) or MAX_TOKENS)
    ids = (start + tokenizer.encode(text, add_special_tokens=False))[:longest]
    return ids, ids  # answer_loss predicts from the second on: bos is never scored


def perplexity_texts(config: Config) -> list[str] | list[tuple[str, str]]:
    """What `utility.perplexity` names, at most `utility.perplexity_texts` of it.

    "sandbox": pairs (prompt, answer) of the utility prompts of `evaluation.split`, chosen by a hash
    and the same for every seed. Else the first texts under the key "text" of a name in
    `data.sources` or of a file; empty ones (data sets of lines have them) do not count.
    SpkitError, naming file and row, for a row without a text, and where there is none at all.

    A source is read whole, also from the hub: name a small split (wikitext's test, not C4).
    """
    named, count = config.utility.perplexity, config.utility.perplexity_texts
    if named == "sandbox":
        prompts = world.eval_prompts(config.evaluation.split)
        asked = sample([p for p in prompts if p.objective == "utility"], count, seed=0)
        return [(prompt.prompt, prompt.reference) for prompt in asked]
    source = resolve(config.data, named, "utility.perplexity")
    texts = [
        text_of(row, "text", where, empty=True) for where, _, row in load_rows(source, ["text"])
    ]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise SpkitError(f"{source.path}: holds no text but empty ones (utility.perplexity)")
    return texts[:count]
