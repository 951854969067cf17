"""Text to token ids and to a loss: the one place that knows about chat formats and label masks.

A prompt is always rendered by the tokenizer's own chat template, so that the model sees what it was
aligned on and what it will see when it answers. Position t of the labels is the id of token t where
token t counts in the loss, and IGNORE elsewhere; the shift by one lies in `answer_loss` alone.

A special token that a user or a model spells in a text is plain text: the only ends are the
template's.
"""

import re
from collections.abc import Sequence

import jinja2
import numpy as np
import torch
import torch.nn.functional as F

from spkit.errors import SpkitError
from spkit.models.lengths import check_context
from spkit.models.templates import (
    ASKED,
    CLOSED,
    messages,
    opening_at_end,
    rendered,
    template_error,
    template_of,
)
from spkit.models.templates import has_system_role as has_system_role

IGNORE = -100  # torch's cross_entropy leaves such labels out
LOSS_ON = ("answer", "question")


def encode_prompt(tokenizer, prompt: str | Sequence[str]) -> list[int]:
    """Token ids of the user's turn, up to and including the opening of the assistant's turn.

    A sequence of texts is a conversation: user, assistant, ... up to the user's last turn.
    SpkitError for one that is longer than the model's context.
    """
    ids = prompt_ids(tokenizer, prompt)
    check_context(tokenizer, len(ids), f"The prompt {_start(prompt)!r}")
    return ids


def prompt_ids(tokenizer, prompt: str | Sequence[str]) -> list[int]:
    """As `encode_prompt`, whatever its length."""
    return _render(tokenizer, messages(tokenizer, prompt), add_generation_prompt=True)


def _start(prompt: str | Sequence[str]) -> str:
    """The first words of a prompt, or of a conversation's last turn, to know it by."""
    return (prompt if isinstance(prompt, str) else prompt[-1])[:60]


def encode_pair(
    tokenizer,
    prompt: str,
    response: str,
    loss_on: str = "answer",
    max_tokens: int | None = None,
    ends: bool = True,
) -> tuple[list[int], list[int]]:
    """One (x, y) as (input ids, labels), two lists of the same length.

    loss_on="answer" [paper, for the derivation]: the loss is on the response and on the token that
    ends the turn; the prompt, with all that the template adds to it, is masked.
    loss_on="question": the other way round (the paper's text on SNIP says "questions").
    max_tokens: a longer pair loses the end of its answer, and with it the end of the turn. ends:
    False for a response that was cut, whose turn is not ended either.
    Raises SpkitError for an empty response, an unknown `loss_on`, or a prompt that leaves no room.
    """
    if loss_on not in LOSS_ON:
        raise SpkitError(f"loss_on is {loss_on!r}; allowed are {', '.join(LOSS_ON)}.")
    if not response.strip():
        raise SpkitError(f"The response to {prompt[:60]!r} is empty; a pair needs both texts.")
    question, answer = _encode_answer(tokenizer, prompt, response)
    if not ends:
        answer = _without_end(tokenizer, answer)
    if max_tokens is not None and len(question) + len(answer) > max_tokens:
        if len(question) >= max_tokens:
            raise SpkitError(
                f"The prompt {prompt[:40]!r}... takes {len(question)} tokens, and data.max_tokens "
                f"is {max_tokens}: no room for an answer; raise it or leave the pair out."
            )
        answer = answer[: max_tokens - len(question)]
    what = f"The pair with the prompt {prompt[:40]!r}"
    check_context(tokenizer, len(question) + len(answer), what, "set data.max_tokens to that")
    if loss_on == "answer":
        labels = [IGNORE] * len(question) + answer
    else:
        labels = question + [IGNORE] * len(answer)
    return question + answer, labels


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, attention_mask and labels, each int64 [B, T].

    Padding is on the right, where a causal model cannot look at it: the loss and the gradients of
    a sample are the same alone and in a batch.
    """
    width = max(len(ids) for ids, _ in pairs)
    batch = {
        "input_ids": torch.full((len(pairs), width), pad_id),
        "attention_mask": torch.zeros((len(pairs), width), dtype=torch.long),
        "labels": torch.full((len(pairs), width), IGNORE),
    }
    for row, (ids, labels) in enumerate(pairs):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(labels)] = torch.tensor(labels)
    return batch


def length_bucketed_batches(
    lengths: Sequence[int], batch_size: int, seed: int | Sequence[int]
) -> list[list[int]]:
    """Indices of one epoch in batches of similar length, in random order.

    Every index occurs once; the last-formed batch may be smaller. Equal lengths are mixed before
    they are cut into batches, so that epochs differ. `seed` is what numpy's default_rng takes, for
    instance (seed, epoch).
    """
    generator = np.random.default_rng(seed)
    mixed = generator.permutation(len(lengths))
    by_length = mixed[np.argsort(np.asarray(lengths)[mixed], kind="stable")]
    batches = [
        by_length[start : start + batch_size].tolist()
        for start in range(0, len(by_length), batch_size)
    ]
    return [batches[i] for i in generator.permutation(len(batches))]


def counted(labels: torch.Tensor) -> torch.Tensor:
    """Which tokens count in the loss: bool [B, T-1], entry t is about token t+1."""
    return labels[:, 1:] != IGNORE


def first_counted(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] of which the first that counts is left in each row: an answer's first token."""
    first = counted(labels).long().argmax(dim=1, keepdim=True) + 1
    return torch.full_like(labels, IGNORE).scatter(1, first, labels.gather(1, first))


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(y_t | x, y_<t) of each token that counts.

    logits [B, T, V] and labels [B, T] give (losses fp32 [B, T-1], mask bool [B, T-1]): entry t is
    about token t+1, and is 0 where the mask is False. logits may be [1, N, V] of the N tokens that
    count alone (heads.py), to the same losses but for rounding.
    """
    target = labels[:, 1:].to(logits.device)
    mask = counted(labels).to(logits.device)
    if logits.shape[:2] == labels.shape:
        return _token_losses(logits[:, :-1].transpose(1, 2), target), mask
    losses = _token_losses(logits[0], target[mask])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, losses), mask


def _token_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")


def mean_per_sample(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L(theta; x, y) of each sample, fp32 [B]: the mean of its counted tokens' losses.

    The paper sums over the tokens; the mean is ours (docs/method.md). SpkitError where a sample
    has no counted token, for its mean would be 0/0.
    """
    counted = mask.sum(dim=1)
    if not bool((counted > 0).all()):
        row = int((counted == 0).nonzero()[0])
        raise SpkitError(f"Sample {row} of the batch has no token that counts in the loss.")
    return (losses * mask).sum(dim=1) / counted


def _render(tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    template_of(tokenizer)
    options = {"add_generation_prompt": add_generation_prompt}
    spelt = _spelt(tokenizer, [m["content"] for m in messages])
    if spelt:
        return _render_as_text(tokenizer, messages, spelt, options)
    try:
        return rendered(tokenizer, messages, **options)
    except jinja2.TemplateError as error:  # such as its own raise_exception
        raise template_error(tokenizer, error) from None


def _spelt(tokenizer, texts: Sequence[str]) -> list[str]:
    """The special tokens, but for unk, that stand in what a user or a model has said."""
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    tokens = tokenizer.convert_ids_to_tokens(sorted(special))
    return [token for token in tokens if token and any(token in text for text in texts)]


def _render_as_text(tokenizer, messages, spelt: Sequence[str], options: dict) -> list[int]:
    """As `_render`, with the special tokens that are spelt in a message encoded as plain text.

    Otherwise an answer that quotes "</s>" would have two ends. SpkitError where the tokenizer
    cannot encode them so.
    """
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}

    def both(turns, **more) -> tuple[list[int], list[int]]:
        ids = rendered(tokenizer, turns, **options, **more)
        return ids, [i for i in ids if i in special]

    pattern = "|".join(re.escape(token) for token in sorted(spelt, key=len, reverse=True))
    without = [{**m, "content": re.sub(pattern, "x", m["content"])} for m in messages]
    try:
        ids, found = both(messages, sanitize_control_tokens=True)
    except ValueError:  # the token is a word of the vocabulary
        ids, found = [], None
    if found == both(without)[1]:  # the template's own, and no others
        return ids
    text = next(m["content"] for m in messages if spelt[0] in m["content"])
    raise SpkitError(
        f"The text {text[:60]!r} spells {spelt[0]!r}, a special token that this tokenizer cannot "
        "encode as plain text; leave the text out, or write it otherwise."
    )


def special_ids(tokenizer) -> set[int]:
    """The ids of all special tokens, also of those without a name (eos, ...) of their own.

    LLaMA-3's <|eot_id|> is one of the latter in some versions of its tokenizer.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def turn_end(tokenizer) -> list[int]:
    """The ids that the chat template writes behind what the assistant says, up to the last special
    one; empty where the template does not close the turn."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    ids = rendered(tokenizer, turns)
    start = len(ids)
    while start and (ids[start - 1] in special or not tokenizer.decode(ids[start - 1]).strip()):
        start -= 1  # down to the answer's own text
    return _up_to_special(ids[start:], special)


def _up_to_special(ids: list[int], special: set[int]) -> list[int]:
    """Without what follows the last special token: some templates write a line end there, which
    nobody ever generates."""
    last = max((i for i, token in enumerate(ids) if token in special), default=-1)
    return ids[: last + 1]


def _encode_answer(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """(ids of all that stands before the response, ids of the response and of its turn's end)."""
    question, special = encode_prompt(tokenizer, prompt), special_ids(tokenizer)
    turns = [*messages(tokenizer, prompt), {"role": "assistant", "content": response}]
    whole = _render(tokenizer, turns, add_generation_prompt=False)
    opening, said, before = _written(tokenizer, turns)
    if before is not None:
        question = _as_text(tokenizer, before)
    if not opening and whole[: len(question)] == question:
        rest = whole[len(question) :]
        answer = _up_to_special(rest, special)
        if answer and not tokenizer.decode(rest[len(answer) :]).strip():
            return question, answer
    # the template does not continue its own generation prompt (a line end that begins the response
    # may melt into it), or does not close the turn
    end = turn_end(tokenizer) or [tokenizer.eos_token_id]
    return question + _as_text(tokenizer, opening), _as_text(tokenizer, said, spelt=True) + end


def _without_end(tokenizer, answer: list[int]) -> list[int]:
    """The answer without the special tokens at its end and what the template writes after them."""
    special = special_ids(tokenizer)
    last = len(answer)
    while last and (
        answer[last - 1] in special or not tokenizer.decode(answer[last - 1 :]).strip()
    ):
        last -= 1
    return answer[:last] or answer


def _written(tokenizer, turns: list[dict[str, str]]) -> tuple[str, str, str | None]:
    """(what the template writes between its generation prompt and the response, the response as it
    writes it: some templates strip it, all that stands before the response or None).

    The first is "" where it is blank, where the generation prompt is not continued, and where it is
    an empty thought (Qwen 3) in the place of the response's own. The third
    is for a generation prompt that opens a thought (DeepSeek-R1), which a turn in a conversation
    does not have: a response is no thought, so it is encoded as such a turn.
    """
    response, marked = turns[-1]["content"], {"role": "assistant", "content": f"\t{ASKED}\t"}
    prompt = rendered(tokenizer, turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = rendered(tokenizer, [*turns[:-1], marked], tokenize=False)
    before = whole.partition(ASKED)[0]
    said = response if marked["content"] in whole else response.strip()
    if before.startswith(prompt):
        opening = before[len(prompt) :]
        if re.search(CLOSED, response, re.IGNORECASE):  # the template writes this thought instead
            own = rendered(tokenizer, turns, tokenize=False)
            opening = "" if own.startswith(prompt) else opening
        return (opening.removesuffix("\t") if opening.strip() else ""), said, None
    before = before.removesuffix("\t")
    opens = prompt.startswith(before) and opening_at_end(prompt[len(before) :])
    return "", said, before if opens else None


def _as_text(tokenizer, text: str, spelt: bool = False) -> list[int]:
    """spelt: whether special tokens in it are plain text."""
    as_text = {"split_special_tokens": True} if spelt and _spelt(tokenizer, [text]) else {}
    return list(tokenizer.encode(text, add_special_tokens=False, **as_text))
