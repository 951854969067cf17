"""A checkpoint of any size with random weights, written tensor by tensor: nothing is downloaded.

    write("folder", sizes, architecture="llama")

The folder is as save_pretrained writes it: config, sharded safetensors in bf16, an index, and a
word-level tokenizer with a chat template. In memory is a part of one tensor at a time, so that a
model larger than the machine can be written. What it would answer is noise.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma": GemmaConfig}
SHARD = 2 * 2**30  # bytes
AT_ONCE = 2**22  # weights drawn at once
WORDS = [f"w{i}" for i in range(94)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' <assistant> ' }}"
    "{% else %}{{ m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# what is public of four models, under the names of transformers' configurations
SHAPES = {
    "llama2-7b": ("llama", [4096, 32, 11008, 32, 32, 128, 32000, False]),
    "llama3-8b": ("llama", [4096, 32, 14336, 32, 8, 128, 128256, False]),
    "mistral-7b": ("mistral", [4096, 32, 14336, 32, 8, 128, 32000, False]),
    "gemma-7b": ("gemma", [3072, 28, 24576, 16, 16, 256, 256000, True]),
}
SIZES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)


def configuration(architecture: str, sizes: Mapping):
    """transformers' configuration; sizes: the keys of SIZES."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return CONFIGS[architecture](**sizes, **ids, max_position_embeddings=4096, dtype="bfloat16")


def write(
    folder: str | Path,
    sizes: Mapping,
    architecture: str = "llama",
    seed: int = 0,
    shard: int = SHARD,
    device: str = "cpu",
) -> Path:
    """The whole checkpoint in `folder`, in files of at most `shard` bytes; returns it.

    device: where the numbers are drawn. A GPU is faster, and draws others from the same seed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = configuration(architecture, sizes)
    config.architectures = [type(meta_model(config)).__name__]
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shapes = _tensors(meta_model(config))
    shards = _shards(shapes, shard)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(folder / file, {name: shapes[name] for name in names}, generator)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def meta_model(config):
    """The architecture without any weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """A hundred words; models have more embeddings than that."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **names)


def _tensors(model) -> dict[str, torch.Size]:
    """Name and shape of what a checkpoint holds: a tied lm_head is not written."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if not model.config.tie_word_embeddings:
        tied = set()
    return {name: p.shape for name, p in model.state_dict().items() if name not in tied}


def _shards(shapes: Mapping[str, torch.Size], most: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * shape.numel() > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    return shards


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], generator) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        first, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for values in _random(shape, generator):
                file.write(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())


def _random(shape: torch.Size, generator) -> Iterator[torch.Tensor]:
    """Parts of one tensor: norms are 1, matrices normal with standard deviation 0.02."""
    for start in range(0, shape.numel(), AT_ONCE):
        count = min(AT_ONCE, shape.numel() - start)
        if len(shape) == 1:
            yield torch.ones(count)
        else:
            yield 0.02 * torch.randn(count, generator=generator, device=generator.device)
