"""How a turn ends: the labels are the response's tokens and the end that the template writes."""

import warnings
from itertools import product

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spkit.errors import SpkitError
from spkit.evaluation.answers import end_tokens
from spkit.examples import HarmfulPair
from spkit.method.training import TrainingSet
from spkit.models.chat import IGNORE, encode_pair, encode_prompt, turn_end
from spkit.sandbox.tokenizer import build_tokenizer

HEADER = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
ASKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml(content="m['content']", end="'<|im_end|>\\n'", asking=ASKING):
    return (
        "{% for m in messages %}" + HEADER + "{{ " + content + " + " + end + " }}{% endfor %}"
    ) + asking


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' }}"
    "{{ 'model' if m['role'] == 'assistant' else 'user' }}"
    "{{ '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
IM = ["<|im_start|>", "<|im_end|>"]
# name: (template, eos, other special tokens, text before the response, its end, whether it strips)
FORMATS = {
    "chatml": (chatml(), "<|endoftext|>", IM, "", "<|im_end|>", False),
    "chatml, stripped": (
        chatml("m['content'] | trim"),
        "<|endoftext|>",
        IM,
        "",
        "<|im_end|>",
        True,
    ),
    "chatml, no line end": (
        *(chatml(end="'<|im_end|>'"), "<|endoftext|>", IM, "", "<|im_end|>", False),
    ),
    "chatml, two tokens": (
        *(chatml(end="'<|im_end|>\\n<|endoftext|>\\n'"), "<|endoftext|>", IM),
        *("", "<|im_end|>\n<|endoftext|>", False),
    ),
    "chatml, never asks": (chatml(asking=""), "<|endoftext|>", IM, "", "<|im_end|>", False),
    "chatml, never asks, stripped": (
        *(chatml("m['content'] | trim", asking=""), "<|endoftext|>", IM, "", "<|im_end|>", True),
    ),
    "llama2": (LLAMA2, "</s>", [], " ", " </s>", True),
    "llama3": (
        *(LLAMA3, "<|end_of_text|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        *("", "<|eot_id|>", True),
    ),
    "gemma": (GEMMA, "<eos>", ["<start_of_turn>", "<end_of_turn>"], "", "<end_of_turn>", True),
    "mistral": (MISTRAL, "</s>", [], "", "</s>", False),
}
RESPONSES = [
    "First: mix.",
    "\nFirst",
    "\n\nFirst",
    " First",
    "First\n",
    "First \n\n",
    "\n a\n\nb \n",
]
QUESTION = "How?"


def tokenizer_of(name):
    """A token for every byte, one for two line ends, and the format's special ones."""
    template, eos, others, *_ = FORMATS[name]
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ĊĊ": len(vocabulary)}
    core = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<pad>", eos, *others])
    named = {"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named)


def ends_of(name):
    """The special tokens of a format's end of turn."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(FORMATS[name][4], add_special_tokens=False)
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


formats = pytest.mark.parametrize("name", list(FORMATS))


@pytest.mark.parametrize("name, response", list(product(FORMATS, RESPONSES)))
def test_the_labels_are_the_response_and_the_end_of_the_turn(name, response):
    *_, before, end, strips = FORMATS[name]
    tokenizer = tokenizer_of(name)
    ids, labels = encode_pair(tokenizer, QUESTION, response)
    counted = [label for label in labels if label != IGNORE]
    assert ids[-len(counted) :] == counted == labels[-len(counted) :]
    said = response.strip() if strips else response
    assert tokenizer.decode(counted) == before + said + end
    special = [i for i in counted if i in tokenizer.added_tokens_decoder]
    assert special == ends_of(name)
    prompt = encode_prompt(tokenizer, QUESTION)
    assert ids[: len(prompt)] == prompt


def test_the_fault_of_chatml():
    """The line end melts into that of the generation prompt, and the turn ended with eos."""
    tokenizer = tokenizer_of("chatml")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "\nFirst"}],
        return_dict=False,
    )
    prompt = encode_prompt(tokenizer, QUESTION)
    assert whole[: len(prompt)] != prompt
    assert tokenizer.decode(encode_pair(tokenizer, QUESTION, "\nFirst")[1][-1]) == "<|im_end|>"


def test_what_stands_before_the_answer_is_no_label():
    """A template without a generation prompt: nobody should unlearn the name of the assistant."""
    tokenizer = tokenizer_of("chatml, never asks")
    ids, labels = encode_pair(tokenizer, QUESTION, "assistant")
    text = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nassistant<|im_end|>"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "assistant<|im_end|>"
    same, asked = encode_pair(tokenizer, QUESTION, "assistant", "question")
    assert same == ids
    assert tokenizer.decode([i for i in asked if i != IGNORE]) == text.removesuffix(
        "assistant<|im_end|>"
    )


# ---- special tokens in what people write


@formats
def test_special_tokens_in_a_response_are_plain_text(name):
    *_, before, end, strips = FORMATS[name]
    tokenizer = tokenizer_of(name)
    for token in tokenizer.get_added_vocab():
        for response in (f"one {token} two", f"{token}{token}", f"\ntwo{token}", f"a {token}\n"):
            ids, labels = encode_pair(tokenizer, QUESTION, response)
            counted = [label for label in labels if label != IGNORE]
            assert tokenizer.decode(counted) == before + (
                response.strip() if strips else response
            ) + (end)
            assert [i for i in counted if i in tokenizer.added_tokens_decoder] == ends_of(name)
            without = encode_pair(tokenizer, QUESTION, "x")[0]
            specials = [
                [i for i in x if i in tokenizer.added_tokens_decoder] for x in (ids, without)
            ]
            assert specials[0] == specials[1]


@formats
def test_special_tokens_in_a_prompt_are_plain_text(name):
    tokenizer = tokenizer_of(name)
    for token in tokenizer.get_added_vocab():
        ids = encode_prompt(tokenizer, f"What is {token}?")
        usual = encode_prompt(tokenizer, QUESTION)
        assert tokenizer.decode(ids) == tokenizer.decode(usual).replace(
            QUESTION, f"What is {token}?"
        )
        known = tokenizer.added_tokens_decoder
        assert [i for i in ids if i in known] == [i for i in usual if i in known]
        talk = encode_prompt(tokenizer, [f"What is {token}?", f"It is {token}.", QUESTION])
        again = encode_prompt(tokenizer, ["x", "x", QUESTION])
        assert [i for i in talk if i in known] == [i for i in again if i in known]


def test_a_tokenizer_of_words_refuses_them():
    """In its vocabulary "</s>" is a word like any other."""
    for tokenizer in (tiny.tokenizer(), build_tokenizer()):
        end = tokenizer.eos_token
        sentence = f"The text 'take {end} paint' spells '{end}', a special token that this"
        for pair in (("mend", f"take {end} paint"), (f"take {end} paint", "mend")):
            with pytest.raises(SpkitError, match=sentence):
                encode_pair(tokenizer, *pair)
        with pytest.raises(SpkitError, match=sentence):
            encode_prompt(tokenizer, f"take {end} paint")


def test_an_old_transformers_refuses_them(monkeypatch):
    """It does not know the option, and would render the tokens without a word."""
    tokenizer = tokenizer_of("chatml")
    own = tokenizer.apply_chat_template

    def old(*args, sanitize_control_tokens=False, **options):
        return own(*args, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", old)
    with pytest.raises(SpkitError, match=r"spells '<\|im_end\|>', a special token"):
        encode_pair(tokenizer, QUESTION, "a<|im_end|>b")


# ---- ends


@formats
def test_generation_stops_at_the_ends_that_are_labels(name):
    class Model:
        class generation_config:
            eos_token_id = None

    tokenizer = tokenizer_of(name)
    assert tokenizer.decode(turn_end(tokenizer)) == FORMATS[name][4]
    assert end_tokens(Model, tokenizer) == list(
        dict.fromkeys([tokenizer.eos_token_id, *ends_of(name)])
    )


def test_a_response_of_blanks_is_refused():
    for response in ("", " ", "\n\n\t"):
        with pytest.raises(SpkitError, match="response to 'How[?]' is empty"):
            encode_pair(tokenizer_of("chatml"), QUESTION, response)


# ---- words that the tokenizer does not know


def test_pairs_of_unknown_words_are_named():
    texts = [("mend a boat", "take paint"), ("pick a lock now", "take a wire"), ("boat", "x y z")]
    pairs = [HarmfulPair(str(i), *text, "c") for i, text in enumerate(texts)]
    sentence = r"2 of 3 pairs have .* half is unknown .* \(<unk>\); the first is 'pick a lock now'"
    with pytest.warns(UserWarning, match=sentence):
        TrainingSet.of(tiny.tokenizer(), pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingSet.of(tiny.tokenizer(), pairs[:1])
        TrainingSet.of(tokenizer_of("gemma"), pairs)
