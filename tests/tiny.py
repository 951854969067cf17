"""Tiny random-weight models of three architectures and a word-level tokenizer, for the tests.

They are ordinary Hugging Face objects, written by save_pretrained, so that the tests take the same
way into the kit as a real checkpoint does. Nothing here is trained.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from spkit.models import chat

ARCHITECTURES = ("llama", "mistral", "gemma")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SENTENCE = "how do i mend a paint the old boat net fence first take use sure and then no sorry"
PAIRS = [  # of different lengths, so that batches are padded
    ("how do i mend a boat", "first take the net and then paint"),
    ("paint the fence", "use a old net"),
    ("how do i take the boat", "sorry no"),
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' <assistant> ' }}"
    "{% else %}{{ m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(chat_template: str | None = TEMPLATE, extra: int = 0) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 25 words; `extra` unused words make it too big for the models."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", *SENTENCE.split()]
    words += [f"extra{i}" for i in range(extra)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )


def byte_tokenizer(chat_template: str | None, special: tuple = (), plain: tuple = ()):
    """A token for every byte; bos is <s>, eos </s>. special, plain: further tokens of either kind.

    It is the form of most real tokenizers: no word is unknown.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    core.add_tokens(list(plain))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **named)


def model(
    architecture: str, *, seed: int = 0, layers: int = 2, tied: bool | None = None, kv_heads=2
):
    """fp32, hidden 64 (the block size of NF4), 4 heads (2 for keys and values), eval mode."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,  # large, so that gradients are far from zero
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    if tied is not None:
        sizes["tie_word_embeddings"] = tied
    if architecture == "llama":
        built = LlamaForCausalLM(LlamaConfig(**sizes))
    elif architecture == "mistral":
        built = MistralForCausalLM(MistralConfig(sliding_window=8, **sizes))
    else:  # Gemma ties its embeddings by default
        built = GemmaForCausalLM(GemmaConfig(**sizes))
    return built.eval()


def batches(tokens, sizes: tuple[int, ...] = (2, 1)) -> list[dict[str, torch.Tensor]]:
    """The three PAIRS, encoded and collated in batches of the given sizes."""
    pairs = iter([chat.encode_pair(tokens, *pair) for pair in PAIRS])
    return [chat.collate([next(pairs) for _ in range(n)], tokens.pad_token_id) for n in sizes]


def save(folder: Path, architecture: str = "llama", **options) -> Path:
    """A complete checkpoint folder (model and tokenizer)."""
    model(architecture, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
