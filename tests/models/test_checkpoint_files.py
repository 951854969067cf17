"""Layer and module of a tensor's name; what is said about weights that cannot be read."""

import plain
import pytest

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import INDEX, SINGLE, headers, place, tensor_files


@pytest.mark.parametrize(
    "tensor, layer, module",
    [
        ("model.layers.3.mlp.up_proj.weight", 3, "up_proj"),
        ("model.layers.31.self_attn.q_proj.weight", 31, "q_proj"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", 2, "down_proj"),
        ("transformer.h.0.attn.c_attn.weight", 0, "c_attn"),
        ("lm_head.weight", -1, "lm_head"),
        ("proj2.weight", -1, "proj2"),
    ],
)
def test_layer_and_module_of_a_name(tensor, layer, module):
    assert place(tensor) == {"tensor": tensor, "layer": layer, "module": module}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 134\n"


def bare(folder, *files):
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"x")
    return folder


def test_weights_in_another_format_come_with_the_way_to_convert_them(tmp_path):
    """Every reader of checkpoints asks `tensor_files` first."""
    folder = bare(tmp_path / "a", "config.json", "training_args.bin", "pytorch_model.bin")
    with pytest.raises(SpkitError, match="its weights are in pytorch_model.bin; convert") as caught:
        headers(folder)
    assert f'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained(' in str(caught.value)
    assert "if you trust that file" in str(caught.value) and "\n" not in str(caught.value)
    shards = bare(tmp_path / "b", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)))
    with pytest.raises(SpkitError, match="are in pytorch_model-00001-of-00002.bin; convert"):
        tensor_files(shards)
    adapter = bare(tmp_path / "c", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(SpkitError, match="it is an adapter of PEFT, not a model"):
        tensor_files(adapter)
    for name in ("training_args.bin", "README.md"):
        with pytest.raises(SpkitError, match="in safetensors files: .*No such file"):
            tensor_files(bare(tmp_path / name, name))


def test_two_sets_of_weights_in_one_folder(tmp_path):
    """transformers reads the single file; this reader went by the index, so by other weights."""
    folder = plain.save(tmp_path / "a", shards=True)
    whole = plain.save(tmp_path / "b", shards=False) / SINGLE
    assert tensor_files(folder)
    (folder / SINGLE).write_bytes(whole.read_bytes())
    with pytest.raises(
        SpkitError, match=f"has both {SINGLE} and {INDEX}, which names model-00000-of"
    ):
        tensor_files(folder)
    (folder / INDEX).unlink()  # as when a smaller model was saved over a larger one
    assert set(tensor_files(folder).values()) == {folder / SINGLE}


def test_files_under_names_that_transformers_skips(tmp_path):
    for name, said in {
        "consolidated.safetensors": "in Mistral's own format: fetch the files of transformers'",
        "model.fp16.safetensors": f"which no index names .*; rename it to {SINGLE}",
    }.items():
        with pytest.raises(SpkitError, match=said):
            tensor_files(bare(tmp_path / name, "config.json", name))
    shards = plain.save(tmp_path / "shards", shards=True)
    first = min(shards.glob("*.safetensors"))
    first.rename(shards / f"old-{first.name}")
    with pytest.raises(SpkitError, match=f"the index names {first.name}, and there is no such"):
        tensor_files(shards)
    (shards / INDEX).unlink()
    with pytest.raises(SpkitError, match=f"{INDEX} is missing: fetch it"):
        tensor_files(shards)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_pointer_of_git_lfs_says_what_to_run(name, tmp_path):
    folder = bare(tmp_path / "a")
    (folder / name).write_text(POINTER)
    with pytest.raises(SpkitError, match=f"{name}: a git-lfs pointer .* `git lfs pull`"):
        tensor_files(folder)


def test_a_file_that_was_cut_says_so(tmp_path):
    folder = bare(tmp_path / "a")
    whole = plain.save(tmp_path / "b", shards=False) / SINGLE
    for size, what in ((-100, "it was cut, so fetch it again"), (100, "was it cut\\?"), (0, "cut")):
        (folder / SINGLE).write_bytes(whole.read_bytes()[:size])
        with pytest.raises(SpkitError, match=f"{SINGLE} is no intact safetensors file: .*{what}"):
            headers(folder)
