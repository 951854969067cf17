"""What keeps a checkpoint from being a backbone is told from its files, without a weight read."""

import json
import re
import shutil

import families
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from spkit.errors import SpkitError
from spkit.models.checkpoint_check import check_checkpoint, checkpoint_problems
from spkit.models.checkpoint_files import INDEX

USUAL = tiny.TARGETS
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16\n"


@pytest.fixture
def folder(tmp_path, checkpoints):
    """A copy of a whole checkpoint of one file."""
    return shutil.copytree(checkpoints["llama"], tmp_path / "model")


def problems(folder, targets=USUAL, **how):
    return checkpoint_problems(folder, targets, **how).problems


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder):
    families.model("llama").save_pretrained(folder, max_shard_size="30KB")
    return sorted(folder.glob("*.safetensors"))


def test_a_whole_checkpoint_has_no_problem(folder):
    assert check_checkpoint(folder, None, "auto") == []
    edit(folder / "config.json", architectures=None)
    (said,) = check_checkpoint(folder, None, USUAL)
    assert said.endswith("names no architecture: read as LlamaForCausalLM")


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    folder = tmp_path / "model"
    first, second, *_ = shards(folder)
    first.write_text(POINTER)
    second.write_bytes(second.read_bytes()[:-8])
    (folder / "tokenizer.json").write_text("<!DOCTYPE html><html></html>")
    (folder / "tokenizer.model").write_text(POINTER)
    (folder / "config.json").write_text(POINTER)
    found = problems(folder)
    for name, what in {
        first.name: "git-lfs pointer",
        second.name: "bytes of data",
        "tokenizer.json": "web page",
        "tokenizer.model": "git-lfs pointer",
        "config.json": "git-lfs pointer",
    }.items():
        assert [said for said in found if name in said and what in said], (name, found)
    assert len(found) == 5


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", INDEX])
def test_a_damaged_json_file_is_named(name, folder):
    (folder / name).write_text('{"eos_token_id": 2, "pad')
    (said,) = problems(folder)
    assert f"{name} is no JSON: " in said and "\n" not in said


def test_weights_without_a_prefix_are_remarked(tmp_path):
    families.save("qwen3", tmp_path)
    (said,) = check_checkpoint(tmp_path, None, USUAL)
    assert "'model.layers.0.self_attn.q_proj.weight' 'layers.0.self_attn.q_proj.weight'" in said


def test_shards_that_are_not_there(tmp_path):
    first, second, *others = shards(tmp_path)
    first.unlink()
    second.unlink()
    (said,) = problems(tmp_path)
    assert f"2 of {2 + len(others)} files that the index names are not there" in said
    assert first.name in said and second.name in said
    found = checkpoint_problems(tmp_path, USUAL, whole=False)  # the hub's cache: not fetched yet
    assert found.problems == [] and "not on this machine" in found.remarks[0]


@pytest.mark.parametrize("whole", [True, False])
def test_two_sets_of_weights(whole, folder, tmp_path):
    for path in (first := shards(tmp_path / "other")):
        shutil.copy(path, folder)
    shutil.copy(first[0].parent / INDEX, folder)
    (said,) = problems(folder, whole=whole)
    assert "two sets of weights" in said


def test_a_header_longer_than_its_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (said,) = problems(folder)
    assert "the header is longer than the file" in said


def test_a_tensor_that_is_missing_or_of_another_size(folder):
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: torch.zeros(3, 64)}, file)
    (said,) = problems(folder)
    assert name in said and "[3, 64]" in said and "[128, 64]" in said
    del tensors[name]
    save_file(tensors, file)
    (said,) = problems(folder)
    assert f"lacks the tensor {name!r}; is it complete?" in said


def test_an_index_that_names_what_no_file_has(tmp_path):
    shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.more.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    (said,) = problems(tmp_path)
    assert "has no tensor 'model.more.weight', which the index puts there" in said


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_dtype_that_cannot_be_patched(folder, dtype):
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(dtype)}, file)
    (said,) = problems(folder)
    assert name in said and "take the original in full precision" in said
    assert problems(folder, ["q_proj"]) == []


@pytest.mark.parametrize(
    "how, said",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_weights_that_are_stored_quantised(folder, how, said):
    edit(folder / "config.json", quantization_config=how, _name_or_path="owner/original")
    (found,) = problems(folder)
    assert f"stored quantised ({said})" in found and "(perhaps owner/original)" in found
    assert ("dequantize" in found) == said.startswith("bitsandbytes")


def test_the_advice_for_a_four_bit_checkpoint_leads_to_one_that_can_be_patched(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.save(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    four = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=how)
    four.save_pretrained(tmp_path / "four")
    (said,) = problems(tmp_path / "four")
    begin, end = said.index("AutoModel"), said.index(", with the tokenizer")
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch}
    eval(said[begin:end], {**names, "FOLDER": str(tmp_path / "again")})
    assert problems(tmp_path / "again") == []


def test_what_is_no_causal_language_model(folder, tmp_path):
    for names, what in {
        ("BertForMaskedLM",): "BertForMaskedLM",
        ("BertModel",): "an encoder",
    }.items():
        edit(folder / "config.json", architectures=names, model_type="bert")
        (said,) = problems(folder)
        assert f"is of {what}" in said and "which writes no text" in said
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    (said,) = problems(adapter)
    assert "the base (owner/base)" in said and "merge_and_unload" in said
    shutil.copy(adapter / "adapter_config.json", folder)
    (said,) = problems(folder)
    assert "a PEFT adapter beside the model's weights, and transformers adds it" in said
    (folder / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").unlink()
    (said,) = problems(adapter)
    assert "has no config.json" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dtype": "float7"}, "config.json cannot be read: AttributeError: .*float7"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "do not make a LlamaForCausalLM.*'spiral'"),
        ({"hidden_act": "swoosh"}, "do not make a LlamaForCausalLM.*swoosh"),
        (
            {"model_type": "far", "auto_map": {"AutoConfig": "far.Far"}},
            r"needs Python code of the checkpoint's own \(auto_map\), and none is run",
        ),
    ],
)
def test_a_value_that_transformers_does_not_expect_is_one_sentence(folder, values, said):
    edit(folder / "config.json", **values)
    (found,) = problems(folder)
    assert re.search(said, found) and "\n" not in found


EXPERTS = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
}


def test_layers_that_peft_puts_no_factors_on(tmp_path):
    """Both ended notebook 01 in a traceback, behind all answers of notebook 00."""
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)
    transformers.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    (said,) = problems(tmp_path / "mamba", "auto")
    assert "derivation.lora.targets is 'auto': PEFT refuses it: " in said and "out_proj" in said
    deep = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**EXPERTS))
    deep.save_pretrained(tmp_path / "deep")
    (said,) = problems(tmp_path / "deep", "auto")
    names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert said.endswith(f"puts no factors on it; set it to [{', '.join(names)}].")
    assert problems(tmp_path / "deep", names) == []


def test_weights_in_pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (said,) = problems(folder)
    assert str(folder) in said


def test_a_target_that_is_tied(tmp_path):
    tiny.save(tmp_path, "gemma")
    (said,) = problems(tmp_path, ["lm_head"])
    assert "'lm_head.weight' is tied to the input embeddings" in said


@pytest.mark.parametrize("family", families.LANGUAGE)
def test_the_usual_targets_are_not_every_family_s(family, tmp_path):
    families.save(family, tmp_path)
    (said,) = problems(tmp_path)
    assert "of this model; it has " in said and "auto takes those" in said
    for name in families.LANGUAGE[family]:
        assert name in said
    assert problems(tmp_path, "auto") == []


def test_a_hub_id_is_looked_for_on_this_machine_only(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (said,) = check_checkpoint("owner/name", None, "auto")
    assert said == "owner/name: not checked: not on this machine"
    with pytest.raises(SpkitError, match="no config.json"):
        check_checkpoint(tmp_path, None, "auto")
