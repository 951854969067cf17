"""Ids, label masks, batches and the loss, on a tokenizer small enough to read."""

import math

import hypothesis.strategies as st
import pytest
import tiny
import torch
from hypothesis import given

from spkit.chat import (
    IGNORE,
    answer_loss,
    collate,
    encode_pair,
    encode_prompt,
    length_bucketed_batches,
    mean_per_sample,
)
from spkit.errors import SpkitError

TOKENIZER = tiny.tokenizer()
PROMPT, RESPONSE = "mend a boat", "take paint"


def words(ids):
    return " ".join(TOKENIZER.convert_ids_to_tokens(ids))


def counted(ids, labels):
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return words([label for label in labels if label != IGNORE])


def test_a_prompt_ends_where_the_assistant_begins():
    assert words(encode_prompt(TOKENIZER, PROMPT)) == "<s> <user> mend a boat <assistant>"


def test_the_loss_is_on_the_answer_and_its_end():
    ids, labels = encode_pair(TOKENIZER, PROMPT, RESPONSE)
    assert words(ids) == "<s> <user> mend a boat <assistant> take paint </s>"
    assert counted(ids, labels) == "take paint </s>"
    assert ids[: len(encode_prompt(TOKENIZER, PROMPT))] == encode_prompt(TOKENIZER, PROMPT)


def test_the_loss_on_the_question_is_the_rest():
    ids, labels = encode_pair(TOKENIZER, PROMPT, RESPONSE, loss_on="question")
    assert words(ids) == "<s> <user> mend a boat <assistant> take paint </s>"
    assert counted(ids, labels) == "<s> <user> mend a boat <assistant>"


@pytest.mark.parametrize(
    "ending",
    [
        "{{ m['content'] + ' </s> then' }}",  # a word after the end of the turn: not an answer
        "{{ m['content'] }}",  # the template does not close the turn
        "{{ '<user> ' + m['content'] }}",  # it does not continue its own generation prompt
    ],
)
def test_templates_that_do_not_end_an_answer_fall_back_on_eos(ending):
    start = tiny.TEMPLATE.partition("{% else %}")[0]
    odd = start.replace("<assistant> ", "") + "{% else %}" + ending + "{% endif %}{% endfor %}"
    odd += "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
    ids, labels = encode_pair(tiny.tokenizer(odd), PROMPT, RESPONSE)
    assert counted(ids, labels) == "take paint </s>"


def test_a_line_break_after_the_turn_is_not_part_of_the_answer():
    """Gemma's template ends a turn so; the tokenizer here knows the line break as a word."""
    tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("eos_token }}", "eos_token + ' ' + nl }}"))
    whole = tokenizer.apply_chat_template
    tokenizer.add_tokens(["\n"])
    tokenizer.apply_chat_template = lambda *a, **options: whole(*a, nl="\n", **options)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert tokenizer.decode(rendered[-1:]) == "\n"
    ids, labels = encode_pair(tokenizer, PROMPT, RESPONSE)
    assert counted(ids, labels) == "take paint </s>"


def test_bad_pairs_and_tokenizers():
    with pytest.raises(SpkitError, match="has no chat template"):
        encode_prompt(tiny.tokenizer(chat_template=None), PROMPT)
    with pytest.raises(SpkitError, match="response to 'mend a boat' is empty"):
        encode_pair(TOKENIZER, PROMPT, "  ")
    with pytest.raises(SpkitError, match="loss_on is 'both'; allowed are answer, question"):
        encode_pair(TOKENIZER, PROMPT, RESPONSE, loss_on="both")


def test_collate_pads_on_the_right():
    batch = collate([([5, 6, 7], [IGNORE, 6, 7]), ([8], [8])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
    assert all(value.dtype == torch.int64 for value in batch.values())


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_buckets_hold_every_index_once_and_neighbouring_lengths(lengths, size, seed):
    batches = length_bucketed_batches(lengths, size, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in batches) <= 1
    ranges = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert batches == length_bucketed_batches(lengths, size, seed)


def test_epochs_differ():
    epochs = [length_bucketed_batches([3] * 20, 4, (0, epoch)) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_answer_loss_by_hand():
    """Position t predicts token t + 1: chances 1/2 of token 1, then 1/4 of token 0."""
    logits = torch.log(torch.tensor([[[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [1.0, 1.0, 1.0]]]))
    losses, mask = answer_loss(logits, torch.tensor([[2, 1, 0]]))
    assert losses.tolist() == [[pytest.approx(math.log(2)), pytest.approx(math.log(4))]]
    assert mask.all()
    losses, mask = answer_loss(logits.bfloat16(), torch.tensor([[2, IGNORE, 0]]))
    assert losses.dtype == torch.float32
    assert losses.tolist() == [[0.0, pytest.approx(math.log(4), rel=1e-2)]]
    assert mask.tolist() == [[False, True]]


def test_mean_per_sample_is_over_the_counted_tokens():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_per_sample(losses, mask).tolist() == [1.5, 4.0]
    with pytest.raises(SpkitError, match="Sample 1 of the batch has no token"):
        mean_per_sample(losses, mask & torch.tensor([[True], [False]]))
