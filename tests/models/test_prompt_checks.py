"""Prompts that a model cannot read: not in what their ids say, or longer than its context."""

import json
from types import SimpleNamespace

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from spkit.config import Config
from spkit.data.selection import load_eval_prompts
from spkit.errors import SpkitError
from spkit.evaluation.answers import check_prompts, generate, respond
from spkit.evaluation.utility.likelihood import perplexity
from spkit.examples import EvalPrompt, HarmfulPair
from spkit.method.training import TrainingSet
from spkit.models.chat import encode_pair, encode_prompt
from spkit.models.lengths import CONTEXT, check_lengths, context_length, context_of
from spkit.models.loading import load, load_tokenizer
from spkit.models.prompt_checks import check_rendered, check_vocabulary
from spkit.sandbox.tokenizer import build_tokenizer

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<user>' + m['content'] + '<assistant>' }}"
    "{% endfor %}"
)
PROMPT = "mend a boat"


def prompt(name, text=PROMPT):
    return EvalPrompt(name, text, "harmful", "seen", "boats", "plain", "")


# ---- what the ids say


def test_honest_tokenizers_pass():
    texts = ["How, in 3 steps?", "Ünïcödé ﬁne — “so”\n\n  x", "日本語で", "", "🙂", "</s> a"]
    check_rendered(tiny.byte_tokenizer(TURNS), texts)
    trimming = TURNS.replace("m['content']", "m['content'] | trim")
    check_rendered(tiny.byte_tokenizer(trimming), [" a \n", ["a", "b", " c "]])
    check_rendered(tiny.tokenizer(), ["mend a submarine", "zeppelin"])  # the second is unknown
    village = load_eval_prompts(Config().data, Config().evaluation)
    check_rendered(build_tokenizer(), [p.prompt for p in village])


def test_a_tokenizer_may_change_case_and_accents():
    words = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "uber", "boat"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = TURNS.replace("'<user>' + ", "'<user> ' + ").replace("'<ass", "' <ass")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named)
    check_rendered(plain, ["ÜBER Boat"])


@pytest.mark.parametrize(
    "tokenizer, texts, sentence",
    [
        (tiny.tokenizer(), ["pick locks", "x y"], r"'x y' is not found .*'<s> <user> <unk> <unk>"),
        (tiny.byte_tokenizer(TURNS.replace("'] +", "'][:5] +")), [PROMPT], "not show the whole"),
        (tiny.byte_tokenizer("{{ messages[0].content[:30] }}"), ["x" * 31], "not show the whole"),
    ],
    ids=["all is unknown", "a template that cuts", "one that cuts long prompts"],
)
def test_what_is_lost_is_told(tokenizer, texts, sentence):
    with pytest.raises(SpkitError, match=sentence):
        check_rendered(tokenizer, texts)


def lossy():
    """A vocabulary of four letters, without a token for what it does not know."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("mend")}, []))
    core.add_special_tokens(["<s>", "</s>", "<user>", "<assistant>"])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TURNS, **named)


def test_no_run_begins_on_a_wrong_tokenizer():
    pair = HarmfulPair("1", PROMPT, "take paint", "c")
    lost = "'mend a boat' is not found in what its token ids decode to"
    for begin in (
        lambda: generate(None, lossy(), [PROMPT], max_new_tokens=2, batch_size=1),
        lambda: respond(
            None, lossy(), [prompt("one")], name="base", max_new_tokens=2, batch_size=1
        ),
        lambda: TrainingSet.of(lossy(), [pair]),
    ):
        with pytest.raises(SpkitError, match=lost):
            begin()


def test_a_folder_without_tokenizer_files(tmp_path):
    """transformers makes a tokenizer of five special tokens of it."""
    Gemma2Config().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tiny.TEMPLATE)
    with pytest.raises(SpkitError, match="knows 5 special tokens and no word: the folder lacks"):
        load_tokenizer(tmp_path)


def test_an_end_that_is_no_token():
    tokenizer = tiny.tokenizer()
    check_vocabulary(tokenizer)
    broken = SimpleNamespace(
        **{"eos_token_id": 1, "unk_token_id": 1, "eos_token": "<end>", "unk_token": "<unk>"},
        **{"get_vocab": tokenizer.get_vocab, "name_or_path": "x"},
        **{"all_special_ids": [], "added_tokens_decoder": {0: AddedToken("<pad>", special=True)}},
    )
    with pytest.raises(SpkitError, match="'<end>' as its eos token, which is not in its vocab"):
        check_vocabulary(broken)


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ({"vocab_size": 24}, "ids up to 24, but the model has 24 embeddings"),
        ({"vocab_size": 64, "eos_token_id": 40}, "eos_token_id is 40 .* has ids up to 24 only"),
        ({"vocab_size": 64, "eos_token_id": [3, 40]}, "eos_token_id is 40"),
        ({"vocab_size": 64, "bos_token_id": 63}, "bos_token_id is 63"),
        ({"vocab_size": 32, "bos_token_id": 50256}, None),  # a default that no row is for
        ({"vocab_size": 25, "eos_token_id": 3}, None),
    ],
)
def test_the_tokenizer_of_another_model(shape, sentence, tmp_path):
    """Told by config.json alone, without weights."""
    LlamaConfig(**shape).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    if sentence is None:
        load_tokenizer(tmp_path)
        return
    with pytest.raises(SpkitError, match=sentence):
        load_tokenizer(tmp_path)


# ---- what fits


@pytest.mark.parametrize(
    "config, tokenizer, length",
    [
        (LlamaConfig(max_position_embeddings=64), None, 64),
        (OPTConfig(max_position_embeddings=32), None, 32),
        (SimpleNamespace(max_seq_len=77), None, 77),
        (SimpleNamespace(n=1), SimpleNamespace(model_max_length=99), 99),
        (SimpleNamespace(n=1), SimpleNamespace(model_max_length=10**30), None),
        (LlamaConfig(max_position_embeddings=64), SimpleNamespace(model_max_length=9), 64),
        (
            SimpleNamespace(
                max_position_embeddings=64, rope_parameters={"rope_type": "yarn", "factor": 4.0}
            ),
            None,
            256,
        ),
        (
            SimpleNamespace(
                max_position_embeddings=128,
                rope_scaling={"type": "linear", "factor": 2.0},
            ),
            None,
            256,
        ),
        (
            SimpleNamespace(
                max_position_embeddings=131072,
                rope_parameters={"rope_type": "llama3", "factor": 8.0},
            ),
            None,
            131072,
        ),
    ],
)
def test_how_much_a_model_reads(config, tokenizer, length):
    if isinstance(config, SimpleNamespace):
        config.get_text_config = lambda: config
    assert context_length(config, tokenizer) == length


def test_lengths_name_the_prompt():
    encoded = [[1] * 5, [1] * 9]
    check_lengths(encoded, None, 100)
    check_lengths(encoded, 12, 3)
    with pytest.raises(SpkitError, match="prompt number 2 takes 9 tokens, and the model reads 12"):
        check_lengths(encoded, 12, 4)
    with pytest.raises(SpkitError, match="The prompt 'b' takes 9 tokens.*an answer of 4: shorten"):
        check_lengths(encoded, 12, 4, ["a", "b"])


def limited(context, template=tiny.TEMPLATE):
    tokenizer = tiny.tokenizer(template)
    setattr(tokenizer, CONTEXT, context)
    return tokenizer


def test_a_prompt_or_a_pair_over_the_context():
    with pytest.raises(SpkitError, match="'mend a boat' takes 6 tokens, and the model reads 5"):
        encode_prompt(limited(5), PROMPT)
    with pytest.raises(SpkitError, match="'mend a boat' takes 9 tokens.*8: set data.max_tokens"):
        encode_pair(limited(8), PROMPT, "take paint")
    assert len(encode_pair(limited(8), PROMPT, "take paint", max_tokens=8)[0]) == 8
    with pytest.raises(SpkitError, match="The prompt 'long' takes 6 tokens"):
        check_prompts(limited(8), ["boat", PROMPT], 4, ["short", "long"])
    assert check_prompts(limited(10), ["boat", PROMPT], 4) == [
        encode_prompt(tiny.tokenizer(), text) for text in ("boat", PROMPT)
    ]


def test_a_model_with_learned_positions(tmp_path):
    """It ended in an IndexError; now a prompt is refused, an answer is cut, and a text too."""
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = OPTConfig(
        vocab_size=32, max_position_embeddings=16, word_embed_proj_dim=16, eos_token_id=3, **sizes
    )
    OPTForCausalLM(shape).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, device="cpu")
    assert context_of(tokenizer) == 16
    options = {"max_new_tokens": 50, "batch_size": 2}
    answer = generate(model, tokenizer, [PROMPT], **options)[0]
    assert len(answer.split()) <= 10
    with pytest.raises(SpkitError, match="number 2 takes 23 tokens, and the model reads 16"):
        generate(model, tokenizer, [PROMPT, "boat " * 20], **options)
    with pytest.raises(SpkitError, match="The prompt 'one' takes 6 tokens.* an answer of 50"):
        respond(model, tokenizer, [prompt("one")], name="base", **options)
    assert perplexity(model, tokenizer, ["boat " * 40], batch_size=1)["tokens"] == 15
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 16
