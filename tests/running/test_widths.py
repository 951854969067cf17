"""Sizes from a handful of widths: the same as transformers', and the sums that makers publish."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, OPTConfig

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.shape import shape_of, shape_of_model
from spkit.running.widths import PUBLIC, SANDBOX_WORDS, SOURCES, planned_shape, widths_of
from spkit.sandbox.tokenizer import build_tokenizer

WEIGHTS = {  # as the model pages and papers say them, all weights
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "gemma-7b": 8_537_680_896,
    "smollm2-135m": 134_515_008,
}
CLASSES = {"mistral-7b": MistralConfig, "gemma-7b": GemmaConfig}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_sums_are_those_that_are_published(name):
    assert PUBLIC[name].shape().weights == WEIGHTS[name]


@pytest.mark.parametrize("name", ["llama2-70b", "mistral-7b", "gemma-7b"])
def test_the_sizes_are_those_that_transformers_builds(name):
    w = PUBLIC[name]
    config = CLASSES.get(name, LlamaConfig)(
        hidden_size=w.hidden,
        num_hidden_layers=w.layers,
        intermediate_size=w.intermediate,
        num_attention_heads=w.heads,
        num_key_value_heads=w.kv_heads,
        head_dim=w.head_dim,
        vocab_size=w.vocabulary,
        tie_word_embeddings=w.tied,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert w.shape() == shape_of_model(model)


def test_the_sandbox_is_counted_as_it_is_built():
    config = Config()
    assert len(build_tokenizer()) == SANDBOX_WORDS
    assert planned_shape(config) == shape_of(config)


def test_a_folder_is_read_by_its_config_json(tmp_path):
    written = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    written |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(written))
    found = planned_shape(Config.from_sources({"backbone": {"source": str(tmp_path)}}))
    # a layer: q, o 64 x 64; k, v 32 x 64; three of 128 x 64; two norms. Two embeddings, a norm.
    assert found.linear == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert found.outside == 2 * 100 * 64 + 5 * 64
    assert (found.query, found.kv, found.checkpoint_bytes) == (64, 32, 2)
    file.write_text(json.dumps({k: v for k, v in written.items() if k != "vocab_size"}))
    with pytest.raises(SpkitError, match="has no 'vocab_size'"):
        widths_of(file)
    file.write_text("{")
    with pytest.raises(SpkitError, match="cannot be read as JSON"):
        widths_of(file)


def test_another_architecture_is_built_without_weights(tmp_path):
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "vocab_size": 100}
    sizes |= {"num_attention_heads": 4, "word_embed_proj_dim": 64}
    OPTConfig(**sizes).save_pretrained(tmp_path)
    own = {"backbone.source": str(tmp_path), "derivation.lora.targets": "auto"}
    config = Config.from_sources({}, own)
    assert widths_of(tmp_path / "config.json") is None
    assert planned_shape(config) == shape_of(config)


def test_a_name_that_nobody_knows_is_told():
    with pytest.raises(SpkitError, match=r"'who/knows', whose sizes .* llama2-70b"):
        planned_shape(Config.from_sources({"backbone": {"source": "who/knows"}}))


def test_the_names_of_the_params_files_are_known():
    assert set(SOURCES.values()) <= set(PUBLIC)


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys, spkit.running.forecast, spkit.running.widths as w;"
    code += "w.PUBLIC['llama2-7b'].shape(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
