"""Text to token ids and to a loss: the one place that knows about chat formats and label masks.

A prompt is always rendered by the tokenizer's own chat template, so that the model sees what it was
aligned on and what it will see when it answers. Position t of the labels is the id of token t where
token t counts in the loss, and IGNORE elsewhere; the shift by one lies in `answer_loss` alone.

What this file does not do: load tokenizers (backbone.py), read data (data.py), generate
(evaluation.py), or choose the sign of the loss (derivation.py).
"""

from collections.abc import Sequence

import jinja2
import numpy as np
import torch
import torch.nn.functional as F

from spkit.errors import SpkitError

IGNORE = -100  # torch's cross_entropy leaves such labels out
LOSS_ON = ("answer", "question")


def encode_prompt(tokenizer, prompt: str | Sequence[str]) -> list[int]:
    """Token ids of the user's turn, up to and including the opening of the assistant's turn.

    A sequence of texts is a conversation: user, assistant, ... up to the user's last turn.
    """
    return _render(tokenizer, messages(tokenizer, prompt), add_generation_prompt=True)


def messages(tokenizer, prompt: str | Sequence[str]) -> list[dict[str, str]]:
    """The turns up to the user's last, with `tokenizer.system_prompt` where one is set.

    The rule: a system turn where the chat format has a system role; else (Gemma, Mistral v0.1) the
    system prompt stands at the beginning of the user's first turn, with an empty line after it.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    system = getattr(tokenizer, "system_prompt", None)
    if not system:
        return turns
    if has_system_role(tokenizer):
        return [{"role": "system", "content": system}, *turns]
    return [{"role": "user", "content": f"{system}\n\n{texts[0]}"}, *turns[1:]]


def has_system_role(tokenizer) -> bool:
    """Whether the chat template takes a system turn *and* shows what it says.

    Templates differ: some refuse one with an error, some drop it without a word.
    """
    mark = "spkit asks whether this is shown"
    turns = [{"role": "system", "content": mark}, {"role": "user", "content": "x"}]
    try:
        shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, ValueError):  # the template's own raise_exception
        return False
    return mark in shown


def encode_pair(
    tokenizer,
    prompt: str,
    response: str,
    loss_on: str = "answer",
    max_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """One (x, y) as (input ids, labels), two lists of the same length.

    loss_on="answer" [paper, for the derivation]: the loss is on the response and on the token that
    ends the turn; the prompt, with all that the template adds to it, is masked.
    loss_on="question": the other way round (the paper's text on SNIP says "questions").
    max_tokens: a longer pair loses the end of its answer, and with it the end of the turn.
    Raises SpkitError for an empty response, an unknown `loss_on`, or a prompt that leaves no room.
    """
    if loss_on not in LOSS_ON:
        raise SpkitError(f"loss_on is {loss_on!r}; allowed are {', '.join(LOSS_ON)}.")
    if not response.strip():
        raise SpkitError(f"The response to {prompt[:60]!r} is empty; a pair needs both texts.")
    question = encode_prompt(tokenizer, prompt)
    answer = _encode_answer(tokenizer, prompt, response, question)
    if max_tokens is not None and len(question) + len(answer) > max_tokens:
        if len(question) >= max_tokens:
            raise SpkitError(
                f"The prompt {prompt[:40]!r}... takes {len(question)} tokens, and data.max_tokens "
                f"is {max_tokens}: no room for an answer; raise it or leave the pair out."
            )
        answer = answer[: max_tokens - len(question)]
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


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(y_t | x, y_<t) of each token that counts.

    logits [B, T, V] and labels [B, T] give (losses fp32 [B, T-1], mask bool [B, T-1]): entry t is
    about token t+1, and is 0 where the mask is False.
    """
    target = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), target, ignore_index=IGNORE, reduction="none"
    )
    return losses, target != IGNORE


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
    if getattr(tokenizer, "chat_template", None) is None:
        raise SpkitError(
            f"The tokenizer of {getattr(tokenizer, 'name_or_path', '?')!r} has no chat template; "
            "use an instruction-tuned model's tokenizer or set tokenizer.chat_template."
        )
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    )


def special_ids(tokenizer) -> set[int]:
    """The ids of all special tokens, also of those without a name (eos, ...) of their own.

    LLaMA-3's <|eot_id|> is one of the latter in some versions of its tokenizer.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _encode_answer(tokenizer, prompt: str, response: str, question: list[int]) -> list[int]:
    """The ids that the assistant should say: the response and the end of its turn."""
    turns = [*messages(tokenizer, prompt), {"role": "assistant", "content": response}]
    whole = _render(tokenizer, turns, add_generation_prompt=False)
    special = special_ids(tokenizer)
    if whole[: len(question)] == question and len(whole) > len(question):
        answer = whole[len(question) :]
        # some templates write a line break after the end of the turn: nobody ever generates it
        while (
            len(answer) > 1
            and answer[-1] not in special
            and not tokenizer.decode(answer[-1:]).strip()
        ):
            answer.pop()
        if answer[-1] in special:
            return answer
    # the template does not continue its own generation prompt, or does not close the turn
    return tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id]
