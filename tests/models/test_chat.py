"""Ids, label masks, batches and the loss, on a tokenizer small enough to read."""

import math

import hypothesis.strategies as st
import pytest
import tiny
import torch
from hypothesis import given
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spkit.errors import SpkitError
from spkit.models.chat import (
    IGNORE,
    answer_loss,
    collate,
    encode_pair,
    encode_prompt,
    has_system_role,
    length_bucketed_batches,
    mean_per_sample,
    messages,
)

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


# ---- the longest pair


@pytest.mark.parametrize(
    "limit, answer",
    [(6, None), (7, "take"), (8, "take paint"), (9, "take paint </s>"), (10, "take paint </s>")],
)
def test_a_long_pair_loses_the_end_of_its_answer(limit, answer):
    """The prompt takes 6 tokens, the answer 3 with its end."""
    if answer is None:
        with pytest.raises(SpkitError, match="'mend a boat'... takes 6 tokens.*is 6: no room"):
            encode_pair(TOKENIZER, PROMPT, RESPONSE, max_tokens=limit)
        return
    ids, labels = encode_pair(TOKENIZER, PROMPT, RESPONSE, max_tokens=limit)
    assert words(ids) == f"<s> <user> mend a boat <assistant> {answer}"
    assert counted(ids, labels) == answer
    ids, labels = encode_pair(TOKENIZER, PROMPT, RESPONSE, "question", limit)
    assert words(ids) == f"<s> <user> mend a boat <assistant> {answer}"
    assert counted(ids, labels) == "<s> <user> mend a boat <assistant>"


def test_the_system_prompt_counts_as_well():
    tokenizer = with_system("sorry no", SYSTEM_TEMPLATE)
    ids, _ = encode_pair(tokenizer, PROMPT, RESPONSE, max_tokens=10)
    assert words(ids) == "<s> <unk> sorry no <user> mend a boat <assistant> take"
    with pytest.raises(SpkitError, match="takes 9 tokens.*no room for an answer"):
        encode_pair(tokenizer, PROMPT, RESPONSE, max_tokens=9)


# ---- the system prompt, in words


# a system turn is shown behind a word of its own, which the tokenizer does not know
SYSTEM_TEMPLATE = tiny.TEMPLATE.replace(
    "{% if m['role'] == 'user' %}",
    "{% if m['role'] == 'system' %}{{ '[system] ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}",
)
REFUSING_TEMPLATE = tiny.TEMPLATE.replace(
    "{% if m['role'] == 'user' %}",
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}",
)
DROPPING_TEMPLATE = tiny.TEMPLATE.replace(
    "{% if m['role'] == 'user' %}", "{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}"
)


def with_system(prompt, template):
    tokenizer = tiny.tokenizer(template)
    tokenizer.system_prompt = prompt
    return tokenizer


@pytest.mark.parametrize(
    "template, has, expected",
    [
        (SYSTEM_TEMPLATE, True, "<s> <unk> sorry no <user> mend a boat <assistant>"),
        (REFUSING_TEMPLATE, False, "<s> <user> sorry no mend a boat <assistant>"),
        (DROPPING_TEMPLATE, False, "<s> <user> sorry no mend a boat <assistant>"),
    ],
    ids=["has a role", "refuses", "drops"],
)
def test_where_the_system_prompt_stands(template, has, expected):
    tokenizer = with_system("sorry no", template)
    assert has_system_role(tokenizer) is has
    assert words(encode_prompt(tokenizer, PROMPT)) == expected
    ids, labels = encode_pair(tokenizer, PROMPT, RESPONSE)
    assert words(ids) == expected + " take paint </s>"
    assert counted(ids, labels) == "take paint </s>"
    for nothing in (None, ""):
        tokenizer.system_prompt = nothing
        assert encode_prompt(tokenizer, PROMPT) == encode_prompt(TOKENIZER, PROMPT)
        assert encode_pair(tokenizer, PROMPT, RESPONSE) == encode_pair(TOKENIZER, PROMPT, RESPONSE)


def test_an_error_of_the_template_for_other_reasons_is_seen():
    tokenizer = with_system("sorry no", tiny.TEMPLATE.replace("bos_token }}", "bos_token + 1 }}"))
    with pytest.raises(TypeError):
        encode_prompt(tokenizer, PROMPT)


def test_turns_of_a_conversation():
    talk = ["one", "two", "three"]
    turns = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), talk, strict=True)
    ]
    assert messages(tiny.tokenizer(), talk) == turns
    assert messages(tiny.tokenizer(), "one") == messages(tiny.tokenizer(), ["one"]) == turns[:1]
    own = {"role": "system", "content": "S"}
    assert messages(with_system("S", SYSTEM_TEMPLATE), talk) == [own, *turns]
    first = {"role": "user", "content": "S\n\none"}  # in the first turn, and nowhere else
    assert messages(with_system("S", REFUSING_TEMPLATE), talk) == [first, *turns[1:]]
    assert talk == ["one", "two", "three"]


# ---- the formats of the paper's backbones, on a tokenizer that knows every byte


ALTERNATING = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set before = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set before = '' %}{% endif %}"
    "{% for m in turns %}" + ALTERNATING + "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (before if loop.first else '') + m['content'].strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATING + "{{ '<start_of_turn>' }}"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}"
    "{{ '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATING + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
# name: (template, bos, eos, other special tokens, whether it has a system role)
FORMATS = {
    "llama2": (LLAMA2, "<s>", "</s>", [], True),
    "llama3": (
        *(LLAMA3, "<|begin_of_text|>", "<|end_of_text|>"),
        ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        True,
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], False),
    "mistral": (MISTRAL, "<s>", "</s>", [], False),
}
# (prompt, answer) with a system prompt and without one
RENDERED = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHow, in 3 steps? [/INST]",
        "<s>[INST] How, in 3 steps? [/INST]",
        " First:\n1. é! </s>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow, in 3 steps?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow, in 3 steps?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "First:\n1. é!<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind.\n\nHow, in 3 steps?<end_of_turn>\n"
        "<start_of_turn>model\n",
        "<bos><start_of_turn>user\nHow, in 3 steps?<end_of_turn>\n<start_of_turn>model\n",
        "First:\n1. é!<end_of_turn>",
    ),
    "mistral": (
        "<s>[INST] Be kind.\n\nHow, in 3 steps? [/INST]",
        "<s>[INST] How, in 3 steps? [/INST]",
        "First:\n1. é!</s>",
    ),
}
ENDS = {"llama2": "</s>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
QUESTION, ANSWER = "How, in 3 steps?", "First:\n1. é!"
formats = pytest.mark.parametrize("name", list(FORMATS))


def byte_tokenizer(name, system=None, named=True):
    """A token for every byte, and the format's special ones; `named`: listed by the tokenizer."""
    template, bos, eos, others, _ = FORMATS[name]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([bos, eos, *others])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        extra_special_tokens=others if named else [],
    )
    made.system_prompt = system
    return made


@formats
@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
def test_the_formats_of_the_backbones(name, system):
    tokenizer = byte_tokenizer(name, "Be kind." if system else None)
    with_one, without, answer = RENDERED[name]
    expected = with_one if system else without
    prompt = encode_prompt(tokenizer, QUESTION)
    assert tokenizer.decode(prompt) == expected
    ids, labels = encode_pair(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(ids) == expected + answer
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert ids.count(tokenizer.bos_token_id) == 1  # neither none nor two
    assert tokenizer.convert_ids_to_tokens(labels[-1]) == ENDS[name]


@formats
def test_which_formats_have_a_system_role(name):
    assert has_system_role(byte_tokenizer(name)) is FORMATS[name][-1]


@formats
def test_the_end_of_a_turn_need_not_be_among_the_named_tokens(name):
    """LLaMA-3's <|eot_id|> is special, but neither eos nor one of the extra ones."""
    tokenizer = byte_tokenizer(name, named=False)
    if name in ("llama3", "gemma"):
        assert tokenizer.convert_tokens_to_ids(ENDS[name]) not in tokenizer.all_special_ids
    assert encode_pair(tokenizer, QUESTION, ANSWER) == encode_pair(
        byte_tokenizer(name), QUESTION, ANSWER
    )


@formats
def test_the_formats_cut_and_the_question(name):
    tokenizer = byte_tokenizer(name)
    prompt = encode_prompt(tokenizer, QUESTION)
    ids, labels = encode_pair(tokenizer, QUESTION, ANSWER)
    cut, fewer = encode_pair(tokenizer, QUESTION, ANSWER, max_tokens=len(ids) - 1)
    assert (cut, fewer) == (ids[:-1], labels[:-1])
    assert tokenizer.convert_ids_to_tokens(cut[-1]) != ENDS[name]
    same, asked = encode_pair(tokenizer, QUESTION, ANSWER, "question")
    assert same == ids and asked == prompt + [IGNORE] * (len(ids) - len(prompt))


@formats
def test_a_conversation_in_the_formats(name):
    """The earlier turns are rendered as the answer was; the system prompt stands there once."""
    tokenizer = byte_tokenizer(name, "Be kind.")
    ids = encode_prompt(tokenizer, [QUESTION, ANSWER, "And then?"])
    text = tokenizer.decode(ids)
    with_one, _, answer = RENDERED[name]
    assert text.startswith(with_one + answer)
    assert text.count("Be kind.") == 1 and text.count("And then?") == 1
    ending = with_one[with_one.index(QUESTION) + len(QUESTION) :]
    assert text.endswith("And then?" + ending)


def test_a_response_that_was_cut_has_no_end():
    tokens = tiny.tokenizer()
    question, answer = tiny.PAIRS[0]
    whole, labels = encode_pair(tokens, question, answer)
    ids, cut = encode_pair(tokens, question, answer, ends=False)
    assert whole[: len(ids)] == ids and labels[: len(cut)] == cut
    assert whole[len(ids) :] == [tokens.eos_token_id]
