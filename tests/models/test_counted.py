"""Which files of a folder count, and that nothing else does."""

import json

import pytest

from spkit.models.checkpoint_files import INDEX
from spkit.models.counted import (
    adapter_files,
    checkpoint_files,
    data_files,
    of_checkpoint,
    of_files,
)

COUNT = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
    *("model.safetensors", "adapter_config.json", "adapter_model.safetensors"),
]
NOISE = [
    *(".DS_Store", ".git/index", ".cache/huggingface/download/x.metadata", "x.lock", "README.md"),
    *("config.json~", "config.json.bak", ".config.json.swp", "#config.json#", "Thumbs.db"),
    *("__pycache__/a.pyc", "LICENSE", ".gitattributes", "pytorch_model.bin", "training_args.bin"),
    *(
        "consolidated.safetensors",
        "model.safetensors.incomplete",
        "onnx/model.onnx",
        "._config.json",
    ),
]


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_of_a_checkpoint_config_tokenizer_and_the_weights_in_use(tmp_path):
    fill(tmp_path, COUNT)
    before = of_checkpoint(tmp_path)
    assert sorted(before) == sorted(COUNT)
    fill(tmp_path, NOISE)
    assert of_checkpoint(tmp_path) == before
    for name in COUNT:
        (tmp_path / name).write_text("changed")
        after = of_checkpoint(tmp_path)
        assert [n for n in before if before[n] != after[n]] == [name]
        (tmp_path / name).write_text(name)


def test_of_shards_those_that_the_index_names(tmp_path):
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    fill(tmp_path, ["config.json", *shards, "old-00001-of-00001.safetensors"])
    assert len(checkpoint_files(tmp_path)) == 4  # without an index nothing tells which are used
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert list(checkpoint_files(tmp_path)) == sorted(["config.json", *shards, INDEX])
    (tmp_path / INDEX).write_text("{")  # which loading tells
    assert len(checkpoint_files(tmp_path)) == 5


def test_a_moved_folder_is_the_same_and_a_hub_id_is_its_name(tmp_path):
    fill(tmp_path / "a", COUNT)
    (tmp_path / "a").rename(tmp_path / "b")
    fill(tmp_path / "a", COUNT)
    assert of_checkpoint(tmp_path / "a") == of_checkpoint(tmp_path / "b")
    assert of_checkpoint("nobody/nothing", "v1") == {"hub": "nobody/nothing v1"}


@pytest.mark.parametrize("name", ["tasks/a.yaml", "helper.py", "rows.jsonl", "license_plates.csv"])
def test_of_data_everything_but_what_is_hidden_or_left_over(name, tmp_path):
    fill(tmp_path, [name])
    before = of_files(data_files(tmp_path))
    fill(tmp_path, [n for n in NOISE if not n.endswith(("safetensors", ".bin", ".onnx"))])
    assert of_files(data_files(tmp_path)) == before and list(before) == [name]
    assert of_files(data_files(tmp_path / name)) == before[name]


def test_of_an_adapter_two_files(tmp_path):
    fill(tmp_path, [*COUNT, *NOISE])
    assert list(adapter_files(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter_files(tmp_path / "gone") == {}
