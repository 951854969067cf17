"""Tiny random-weight models of the families that `targets: auto` is tried on.

families.model("phi3", vocabulary)      each with its own names, biases, norms and fused layers
"""

import torch
import transformers

WIDTH, INNER, LAYERS = 32, 64, 2
SIZES = {
    **{"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
OPT = {key: SIZES[key] for key in SIZES if key not in ("intermediate_size", "initializer_range")}
OPT |= {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "init_std": 0.2}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
}
# name -> (the class, its configuration's class, what goes into that)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", HEADS),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**HEADS, "sliding_window": 16}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**HEADS, "sliding_window": 16}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**HEADS, "sliding_window": 16}),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3Config", {**HEADS, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),  # 2.5 has the same class; biases
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**HEADS, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),  # qkv_proj, gate_up_proj
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),  # query_key_value, dense_h_to_4h
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),  # fc1, fc2, learned positions
    "mixtral": (
        *("MixtralForCausalLM", "MixtralConfig"),
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
LANGUAGE = {  # the last names that auto takes, where they are not LLaMA's
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def model(family, vocabulary=64):
    """fp32, in eval mode; on "meta" inside `with torch.device("meta")`."""
    name, config, sizes = FAMILIES[family]
    sizes = {**sizes, "vocab_size": vocabulary}
    if family == "gemma3":
        tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
        sizes = {"text_config": sizes, "vision_config": VISION, "mm_tokens_per_image": 4, **tokens}
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def save(family, folder, vocabulary=64):
    """Its checkpoint in shards; Qwen 3 as a base model: `layers.0...`, not `model.layers.0...`."""
    whole = model(family, vocabulary)
    (whole.model if family == "qwen3" else whole).save_pretrained(folder, max_shard_size="60KB")
