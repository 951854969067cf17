"""A tiny random-weight Llama as a GGUF file: for tests of what reads such files.

The file has what llama.cpp's own converter writes: its names of tensors, its order of the rows of
q_proj and k_proj, and a byte-level BPE tokenizer with a chat template.
"""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
LAYERS, HEADS, KV_HEADS = 2, 4, 2


def model(seed: int = 0) -> LlamaForCausalLM:
    """fp32, hidden 64, tied embeddings, 262 tokens, in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write(
    path: Path,
    written: LlamaForCausalLM,
    *,
    packed: str = "F32",
    template: str | None = TEMPLATE,
    architecture: str = "llama",
) -> Path:
    """The model as a GGUF file. packed: the type of its matrices, such as "Q4_1"."""
    writer = GGUFWriter(path, architecture)
    config = written.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    _tokenizer(writer, template)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    for name, value in written.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = _rows(name, value).numpy()
        kind = GGMLQuantizationType[packed if array.ndim == 2 else "F32"]
        data = quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer(writer: GGUFWriter, template: str | None) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _rows(name: str, value: torch.Tensor) -> torch.Tensor:
    """llama.cpp pairs neighbouring rows of q_proj and k_proj, transformers those of two halves."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return value
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
    return halves.swapaxes(1, 2).reshape(value.shape).contiguous()
