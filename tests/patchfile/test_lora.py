"""A patch as a LoRA adapter: the nearest of its rank, its error, and what PEFT makes of it."""

import json

import numpy as np
import plain
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from spkit.cli import app
from spkit.errors import SpkitError
from spkit.models.weights import target_weights
from spkit.patchfile.apply import apply
from spkit.patchfile.file import PatchFile
from spkit.patchfile.lora import CONFIG, RECORD, WEIGHTS, factors, lora


def product(folder, name):
    found = load_file(folder / WEIGHTS)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_factors_are_the_truncated_svd(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 3, 6, 8):
        b, a = factors(matrix, rank)
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        assert b.dtype == a.dtype == np.float32 and b.flags.c_contiguous and a.flags.c_contiguous
        best = np.sqrt(np.square(values[rank:]).sum())
        assert np.linalg.norm(matrix - b @ a) == pytest.approx(best, rel=1e-4, abs=1e-5)
    b, a = factors(np.zeros((3, 4), dtype=np.float32), 2)
    assert not b.any() and not a.any()


def test_peft_loads_it_and_at_full_rank_it_is_the_patch(tmp_path):
    base, path = tiny.save(tmp_path / "base"), tmp_path / "p.safetensors"
    named = target_weights(tiny.model("llama"), tiny.TARGETS)
    draw = torch.Generator().manual_seed(0)
    deltas = {}
    for name, layer in named.items():
        keep = torch.rand(layer.weight.shape, generator=draw) < 0.1
        deltas[name] = torch.where(keep, 0.2 * torch.randn(keep.shape, generator=draw), 0.0)
    plain.patch(path, base, deltas)
    apply(path, base, tmp_path / "patched", progress=False)
    ids = torch.tensor([[2, 4, 9, 10, 5]])

    def logits(model):
        with torch.no_grad():
            return model.eval()(ids).logits

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    patched, gaps = logits(load(tmp_path / "patched")), []
    for rank in (1, 8, 64):
        done = lora(path, tmp_path / f"r{rank}", rank, progress=False)
        adapted = PeftModel.from_pretrained(load(base), tmp_path / f"r{rank}")
        layers = [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
        assert len(layers) == len(deltas) == done.tensors  # all are in use
        gaps.append((done.error, float((logits(adapted) - patched).abs().max())))
    assert gaps[0][0] > gaps[1][0] > 0.3 and gaps[2][0] < 1e-6
    assert gaps[2][1] < 1e-4 < 0.05 < gaps[0][1]


def test_the_error_of_each_matrix_is_stated(tmp_path):
    base = plain.save(tmp_path / "base", plain.weights(dtype="float32"))
    path = plain.patch(tmp_path / "p", base)
    done = lora(path, tmp_path / "made", 3, progress=False)
    squared = total = 0.0
    for row in done.rows:
        delta = plain.deltas()[row["tensor"]].numpy()
        left = np.linalg.norm(delta - product(tmp_path / "made", row["tensor"]))
        assert row["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert row["error"] == pytest.approx(left / np.linalg.norm(delta), rel=1e-5)
        assert row["kept"] == np.count_nonzero(delta) and 0.3 < row["error"] < 1
        squared, total = squared + left**2, total + np.linalg.norm(delta) ** 2
    assert done.error == pytest.approx(np.sqrt(squared / total), rel=1e-5)
    assert done.worst == max(row["error"] for row in done.rows)
    record = json.loads((tmp_path / "made" / RECORD).read_text())
    assert (record["error"], record["rank"]) == (done.error, 3) and record["rows"]
    with PatchFile(path) as opened:
        assert record["patch"] == done.patch == opened.id
    readme = (tmp_path / "made" / "README.md").read_text()
    assert f"relative error is {done.error:.3f}" in readme and done.patch in readme
    config = json.loads((tmp_path / "made" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["target_modules"] == [name.removesuffix(".weight") for name in plain.TOUCHED]


def test_weights_that_are_stored_as_patched_need_the_backbone(tmp_path):
    base = plain.save(tmp_path / "base")
    path, both = plain.patch(tmp_path / "p", base), tmp_path / "both"
    plain.patch(both, base, revertible=True)
    with pytest.raises(
        SpkitError, match="stores some weights as patched.*village/tiny with --back"
    ):
        lora(path, tmp_path / "made", 48, progress=False)
    other = plain.save(tmp_path / "other", plain.weights(seed=9))
    with pytest.raises(SpkitError, match="'[abc].weight': the original's weights are not those"):
        lora(path, tmp_path / "made", 48, backbone=other, progress=False)
    assert not (tmp_path / "made").exists()
    lora(path, tmp_path / "made", 48, backbone=base, progress=False)
    lora(both, tmp_path / "alone", 48, progress=False)
    apply(path, base, tmp_path / "patched", dtype="float32", progress=False)
    patched = {}
    for file in (tmp_path / "patched").glob("*.safetensors"):
        patched |= load_file(file)
    for name in plain.TOUCHED:
        added = patched[name] - plain.weights()[name].float().numpy()
        assert np.abs(product(tmp_path / "made", name) - added).max() < 1e-5
        assert np.array_equal(product(tmp_path / "made", name), product(tmp_path / "alone", name))


@pytest.mark.parametrize("before", ["", "language_model.model."])
def test_names_of_files_that_the_model_has_not(before, tmp_path):
    """PEFT would load none of the factors, and only warn."""
    name = f"{before}layers.0.mlp.up_proj.weight"
    weights = plain.weights({name: (8, 9)}, "float32")
    base = plain.save(tmp_path / "base", weights)
    path = plain.patch(tmp_path / "p", base, plain.deltas(weights, [name], share=0.5))
    with pytest.raises(SpkitError, match="say with --prefix what stands before 'layers.0' in the"):
        lora(path, tmp_path / "made", 2, progress=False)
    for prefix in ("model", "model."):
        lora(path, tmp_path / "made", 2, prefix=prefix, overwrite=True, progress=False)
        config = json.loads((tmp_path / "made" / CONFIG).read_text())
        assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]
        keys = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB"]
        assert sorted(load_file(tmp_path / "made" / WEIGHTS)) == keys
    usual = "model.language_model" if before else "model"  # as transformers builds Gemma 3
    with pytest.raises(SpkitError, match=rf"\(mostly: {usual}\)"):
        lora(path, tmp_path / "other", 2, progress=False)


def test_the_command(tmp_path):
    base = plain.save(tmp_path / "base", plain.weights(dtype="float32"))
    path = plain.patch(tmp_path / "p", base)

    def run(*more):
        arguments = ["lora", str(path), str(tmp_path / "made"), *more]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})

    done = run("--rank", "2")
    assert done.exit_code == 0 and "64x48" in done.output and "a.weight" in done.output
    before = (tmp_path / "made" / RECORD).read_text()
    assert f"{json.loads(before)['error']:.6g}" in done.output
    assert "exists already" in run("--rank", "2").stderr
    again = run("--rank", "2", "--overwrite", "--json")
    assert json.loads(again.stdout)["rows"] == json.loads(before)["rows"]
    assert (tmp_path / "made" / RECORD).read_text() == before  # the same bytes each time
    (tmp_path / "made" / CONFIG).unlink()
    assert "exists already" in run("--rank", "2", "--overwrite").stderr  # not an adapter
    assert run("--rank", "0").exit_code == 2
