"""What docs/exports.md promises of the patched folder, as far as it can be run here."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import plain
import pytest
import tiny
import tiny_gguf
import torch
import typer
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spkit.cli import app
from spkit.config import BackboneConfig
from spkit.models.checkpoint_files import headers
from spkit.models.gguf import checkpoint_of
from spkit.patchfile.apply import apply

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bfloat16 Llama of which llama.cpp knows the shape, and its patched folder."""
    folder = tmp_path_factory.mktemp("exports")
    model = tiny_gguf.model().to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"the unpatched weights")
    shapes = {name: model.state_dict()[name] for name in NAMES}
    plain.patch(folder / "p", folder / "base", plain.deltas(shapes, NAMES, share=0.2))
    apply(folder / "p", folder / "base", folder / "patched", progress=False)
    return folder


def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_the_folder_has_what_a_converter_reads(place):
    patched, base = place / "patched", place / "base"
    assert not list(patched.glob("*.bin"))
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (patched / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((patched / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found, theirs = headers(patched), headers(base)
    assert {n: about for n, (*_, about) in found.items()} == {
        n: about for n, (*_, about) in theirs.items()
    }
    for name in found:
        assert names.get_name(name, (".weight",)) is not None, name
    old, new = weights(base), weights(patched)
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(NAMES)


@pytest.mark.parametrize("kind, exact", [("BF16", True), ("Q8_0", False)])
def test_through_a_gguf_file_and_back(kind, exact, place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(place / "patched", dtype=torch.float32)
    file = tiny_gguf.write(tmp_path / "patched.gguf", model, packed=kind)
    back = weights(checkpoint_of(BackboneConfig(source=str(file))))
    patched, base = weights(place / "patched"), weights(place / "base")
    for name in NAMES:
        assert torch.equal(back[name], patched[name].float()) == exact
        nearer = (back[name] - patched[name]).norm() < 0.1 * (back[name] - base[name]).norm()
        assert nearer, name  # packed, it is still the patched model


def test_the_python_block_runs(place, monkeypatch):
    (code,) = (text for language, text in BLOCKS if language == "python")
    monkeypatch.chdir(place)
    names = {}
    exec(compile(code, "docs/exports.md", "exec"), names)  # our own page
    assert names["model"].dtype == torch.bfloat16
    assert len(names["tokenizer"]) == len(AutoTokenizer.from_pretrained(place / "base"))


def commands(text):
    return [line for line in text.splitlines() if line.startswith("spkit ")]


def test_the_kits_commands_are_parsed():
    lines = [line for _, text in BLOCKS for line in commands(text)]
    lines += [line for line in re.findall(r"`([^`\n]+)`", PAGE) if re.match(r"spkit \w+ .", line)]
    known = typer.main.get_command(app).commands
    assert len(lines) >= 6
    for line in lines:
        _, name, *arguments = shlex.split(line.replace("--rank N", "--rank 4"))
        if arguments != ["--dtype"]:  # named in a sentence
            known[name].make_context(name, arguments)  # exits where an option is wrong


def benchmark():
    path = ROOT / "benchmarks" / "quantised_patch.py"
    spec = importlib.util.spec_from_file_location("quantised_patch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_quantising_erases_by_hand(tmp_path):
    """Q8_0 has 127 steps of the largest weight in 32: 2**-9 beside 1 is erased, 0.25 is not."""
    before = torch.zeros(2, 32)
    before[:, 0] = 1.0
    after = before.clone()
    after[0, 1], after[1, 1] = 2.0**-9, 0.25
    for name, tensor in (("base", before), ("made", after)):
        plain.save(tmp_path / name, {"w": tensor, "norm": torch.ones(3)})
    rows = {row["kind"]: row for row in benchmark().left(tmp_path / "base", tmp_path / "made")}
    assert (rows["F32"]["erased"], rows["F32"]["error"], rows["F32"]["other"]) == (0, 0, 0)
    assert rows["BF16"]["erased"] == 0 and rows["Q8_0"]["erased"] == 50
    lost = ((32 / 127 - 0.25) ** 2 + 2.0**-18) ** 0.5 / (0.25**2 + 2.0**-18) ** 0.5
    assert rows["Q8_0"]["error"] == pytest.approx(lost, rel=1e-2)
    assert rows["Q8_0"]["other"] == 0
