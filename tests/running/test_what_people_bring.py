"""What people bring and what cannot work is told in the first cell: one sentence, nothing begun.

Each case breaks one thing of a tiny LLaMA with its data; notebook 00's first call refuses it.
"""

import json
import shutil
from pathlib import Path

import families
import one_kernel
import pytest
import torch
import whole_runs
from safetensors.torch import load_file, save_file

from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.running import checks
from spkit.running.notebook import start
from spkit.system import hub

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format(
    "0" * 64
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A backbone and data that are as they should be."""
    root = tmp_path_factory.mktemp("brought")
    whole_runs.write_data(root / "data")
    tokens = whole_runs.tokenizer(whole_runs.LLAMA2)
    families.model("llama", len(tokens)).save_pretrained(root / "backbone")
    tokens.save_pretrained(root / "backbone")
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.chdir(one_kernel.ROOT)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.delenv(checks.CHECKED, raising=False)


@pytest.fixture
def brought(whole, tmp_path):
    shutil.copytree(whole / "backbone", tmp_path / "backbone")
    shutil.copytree(whole / "data", tmp_path / "data")
    return tmp_path


def parameters(root, **changes):
    own = {
        **{"backbone.source": str(root / "backbone"), "backbone.compute_dtype": "float32"},
        **{"derivation.quantization": "none", "evaluation.quantization": "none"},
        **{"data.sources": whole_runs.sources(root / "data"), "utility.tasks": []},
        **{"data.evaluation": ["advbench", "xstest"], "judges.harmful": ["keywords"]},
        **{"evaluation.prompts_per_cell": 2, "outputs": str(root / "outputs")},
        **{"derivation.lora.targets": "auto"},
    }
    own |= {key.replace("__", "."): value for key, value in changes.items()}
    params = one_kernel.ROOT / "params" / "llama2-7b-chat.yaml"
    return load_params(params, {**whole_runs.SIZES, **own})


def refused(config, root):
    """What notebook 00's first cell says; nothing is begun."""
    with pytest.raises(SpkitError) as error:
        start("00_backbone", config.model_dump(mode="json"))
    assert not (root / "outputs").exists()
    return str(error.value)


def edit(path, **changes):
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


def test_what_is_whole_is_not_refused(brought):
    found = checks.findings(parameters(brought))
    assert checks.problems(found) == []
    assert any("14 matrices: q_proj" in each.said for each in found)


# ---- checkpoints ---------------------------------------------------------------------------------


def pointer(folder):
    (folder / "model.safetensors").write_text(POINTER)
    return "git lfs pull"


def cut_download(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return "model.safetensors"


def pickle_only(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return "save_pretrained"


def four_bits(folder):
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder / "config.json", quantization_config=how)
    return "bitsandbytes 4-bit"


def gptq(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return "gptq"


def a_tensor_less(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.1.mlp.up_proj.weight"


def another_shape(folder):
    edit(folder / "config.json", intermediate_size=48)
    return "config.json needs"


def an_encoder(folder):
    edit(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])
    return "BertForMaskedLM"


def a_web_page(folder):
    (folder / "tokenizer.json").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    return "tokenizer.json"


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return "okenizer"


def broken_jinja(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }")
    return "chat template"


def drops_the_prompt(folder):
    (folder / "chat_template.jinja").write_text("{{ bos_token }} [INST] [/INST]")
    return "chat template"


def no_template(folder):
    (folder / "chat_template.jinja").unlink()
    return "backbone.chat_template"


def short_context(folder):
    edit(folder / "config.json", max_position_embeddings=8)
    return "the model reads 8"


def an_adapter(folder):
    for path in folder.glob("*"):
        path.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b"}))
    return "merge_and_unload"


BREAKS = [
    *(pointer, cut_download, pickle_only, four_bits, gptq, a_tensor_less, another_shape),
    *(an_encoder, a_web_page, no_tokenizer, broken_jinja, drops_the_prompt, no_template),
    *(short_context, an_adapter),
]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_cannot_be_used(damage, brought):
    expected = damage(brought / "backbone")
    said = refused(parameters(brought), brought)
    assert expected in said and "Traceback" not in said


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt_neox", "mixtral"])
def test_default_targets_that_a_family_does_not_have(family, whole, tmp_path):
    """Names of LLaMA's layers; the sentence says what there is, and names auto."""
    tokens = whole_runs.tokenizer(whole_runs.LLAMA2)
    families.save(family, tmp_path / "backbone", len(tokens))
    tokens.save_pretrained(tmp_path / "backbone")
    shutil.copytree(whole / "data", tmp_path / "data")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    said = refused(parameters(tmp_path, derivation__lora__targets=names), tmp_path)
    assert "auto" in said and sorted(families.LANGUAGE[family])[0] in said
    assert checks.problems(checks.findings(parameters(tmp_path))) == []


def test_an_adapter_that_does_not_fit(brought):
    (brought / "mine").mkdir()
    (brought / "mine" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    said = refused(parameters(brought, derivation__se=str(brought / "mine")), brought)
    assert "derivation.se" in said and "IA3" in said


def test_one_adapter_as_both_patches(brought):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(brought / "backbone")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(brought / "mine")
    both = {"derivation__se": str(brought / "mine"), "derivation__osm": str(brought / "mine")}
    assert "is the same adapter as derivation.se" in refused(parameters(brought, **both), brought)
    one = {"derivation__se": str(brought / "mine")}
    assert checks.problems(checks.findings(parameters(brought, **one))) == []


def test_what_is_only_odd_is_a_remark(brought):
    arguments = {"backbone__chat_template_arguments": {"enable_thinking": False}}
    found = checks.findings(parameters(brought, **arguments))
    assert checks.problems(found) == []
    (said,) = [each.said for each in found if each.key == "remark"]
    assert "enable_thinking" in said


# ---- data ----------------------------------------------------------------------------------------


def twice(data):
    path = data / "beavertails_train.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first[:-1] + ', "prompt": "another"}', *rest]) + "\n")
    return "row 1"


def data_pointer(data):
    (data / "advbench.csv").write_text(POINTER)
    return "git lfs pull"


def cut_row(data):
    path = data / "beavertails_test.jsonl"
    path.write_text(path.read_text()[:-20])
    return "beavertails_test.jsonl, row"


def no_text(data):
    path = data / "texts.jsonl"
    path.write_text(path.read_text().replace('"text"', '"txt"'))
    return "'text'"


@pytest.mark.parametrize(
    "damage", [twice, data_pointer, cut_row, no_text], ids=lambda damage: damage.__name__
)
def test_a_data_file_that_cannot_be_used(damage, brought):
    expected = damage(brought / "data")
    changes = {"utility__perplexity": "texts"}
    changes["data__evaluation"] = ["advbench", "beavertails_test", "xstest"]
    assert expected in refused(parameters(brought, **changes), brought)


def test_a_csv_of_a_data_frame_is_read(brought):
    """df.to_csv() writes a first column without a name."""
    import pandas as pd

    path = brought / "data" / "advbench.csv"
    pd.read_csv(path).to_csv(path)
    assert checks.problems(checks.findings(parameters(brought))) == []


def test_all_of_it_at_once(brought):
    """Not the first thing only."""
    four_bits(brought / "backbone")
    data_pointer(brought / "data")
    changes = {"utility__tasks": ["helaswag"], "utility__perplexity": "gone.jsonl"}
    changes["judges__harmful"] = ["classifier"]
    said = refused(parameters(brought, **changes), brought)
    for words in ("bitsandbytes 4-bit", "git lfs pull", "helaswag", "gone.jsonl", "LibrAI"):
        assert words in said
    assert Path(brought / "data").is_dir()


def test_a_pair_that_is_longer_than_the_context(brought):
    path = brought / "data" / "beavertails_train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["response"] = " ".join([rows[0]["response"]] * 40)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(parameters(brought, data__max_tokens=512, data__pairs=None), brought)
    assert "data.harmful (as read)" in said and "the model reads 96" in said
