"""The predictor of memory: counts by hand, what makes it smaller, and no weight read."""

import importlib.util
import sys
from pathlib import Path

import families
import pandas as pd
import pytest
import tiny

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.running.memory import LIBRARIES, STAGES, needs, predict
from spkit.running.runs import STAGES as NOTEBOOKS
from spkit.running.shape import shape_of, shape_of_model

ROOT = Path(__file__).parents[2]
GIB = 2**30
LLAMA2 = ROOT / "params" / "llama2-7b-chat.yaml"


def shape(architecture="llama", **options):
    return shape_of_model(tiny.model(architecture, **options))


def config(**overrides):
    return load_params(LLAMA2, {key.replace("__", "."): v for key, v in overrides.items()})


def peak(stage, device="cuda", of=None, **overrides):
    return predict(config(**overrides), of or shape(), stage, device, free=15 * GIB).loc["peak"]


# ---- the shape -----------------------------------------------------------------------------------


def test_a_shape_by_hand():
    """Two layers of width 64, MLP 128, 4 heads of 16 with 2 for keys and values, 32 words."""
    found = shape("llama", tied=False)
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
    assert found.linear == 2 * (attention + 3 * 64 * 128)
    norms = 2 * 2 * 64 + 64
    assert found.outside == 2 * 32 * 64 + norms  # embeddings and head
    assert (found.layers, found.hidden, found.query, found.kv) == (2, 64, 64, 32)
    assert shape("gemma").outside == 32 * 64 + norms  # tied: they come once


def test_a_shape_needs_no_weights(tmp_path):
    folder = tiny.save(tmp_path / "model", "mistral")
    whole = shape_of(Config.from_sources({"backbone": {"source": str(folder)}}))
    (folder / "model.safetensors").unlink()
    assert shape_of(Config.from_sources({"backbone": {"source": str(folder)}})) == whole
    (folder / "config.json").write_text("{}")
    with pytest.raises(SpkitError, match="^The sizes of '.*model' cannot be read"):
        shape_of(Config.from_sources({"backbone": {"source": str(folder)}}))


def test_targets_by_rule_are_counted_as_they_are_trained(tmp_path):
    llama, named = shape("llama"), tiny.TARGETS
    assert llama.targeted("auto") == llama.targeted(named) == llama.matrices
    (first,) = llama.targeted(r"model\.layers\.0\..*up_proj")
    assert (first.name, first.count) == ("up_proj", 1)
    mixture = shape_of_model(families.model("mixtral"))
    assert {m.name for m in mixture.targeted("auto")} == families.LANGUAGE["mixtral"]
    for targets in ("lm_head", ["lm_head"]):
        (head,) = mixture.targeted(targets)
        assert (head.name, head.rows, head.columns, head.count) == ("lm_head", 64, 32, 1)
    assert mixture.targeted(["0.self_attn.q_proj"])[0].count == 1
    assert mixture.left_out[0].startswith("The experts (model.layers.0.mlp.experts")
    families.save("phi3", tmp_path)
    usual = {"backbone": {"source": str(tmp_path)}}
    with pytest.raises(SpkitError, match="are no linear layers of this model; it has o_proj, qkv"):
        shape_of(Config.from_sources(usual))
    shape_of(Config.from_sources(usual, {"derivation.lora.targets": "auto"}))


# ---- the parts -----------------------------------------------------------------------------------


def test_the_backbone_in_four_bits_by_hand():
    of = shape("llama", tied=False)
    frame = predict(config(), of, "load", "cuda")
    nf4 = of.linear * (0.5 + 1 / 64 + 4 / 16384)
    assert frame.loc["backbone", "GPU GiB"] * GIB == pytest.approx(nf4 + 2 * of.outside)
    frame = predict(config(derivation__quantization="none"), of, "load", "cuda")
    assert frame.loc["backbone", "GPU GiB"] * GIB == pytest.approx(2 * of.weights)


def test_factors_and_moments_by_hand():
    of = shape("llama")
    pairs = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    numbers = 2 * sum(8 * (rows + columns) for rows, columns in pairs)
    frame = predict(config(), of, "derivation", "cuda")
    assert frame.loc["LoRA factors", "GPU GiB"] * GIB == pytest.approx(4 * numbers)
    # a gradient in fp32 and two 8-bit moments; two of fp32 otherwise
    assert frame.loc["gradients and moments", "GPU GiB"] * GIB == pytest.approx(6 * numbers)
    frame = predict(config(derivation__optimizer="adamw"), of, "derivation", "cuda")
    assert frame.loc["gradients and moments", "GPU GiB"] * GIB == pytest.approx(12 * numbers)


def test_grouped_queries_make_the_cache_smaller():
    few, many = shape("llama"), shape_of_model(tiny.model("llama"))
    assert few.kv == 32  # of 64: half the heads
    frame = predict(config(), few, "evaluation", "cuda")
    values = 16 * (512 + 256) * 2 * 2 * 32
    assert frame.loc["KV cache", "GPU GiB"] * GIB == pytest.approx(2 * values)
    assert many == few


@pytest.mark.parametrize(
    "stage, column, key, less",
    [
        ("derivation", "GPU GiB", "derivation.micro_batch_size", 1),
        ("derivation", "GPU GiB", "data.max_tokens", 128),
        ("derivation", "GPU GiB", "derivation.lora.r", 4),
        ("importance", "GPU GiB", "importance.layers_per_pass", 1),
        ("importance", "GPU GiB", "data.max_tokens", 128),
        ("evaluation", "GPU GiB", "data.max_tokens", 64),
        ("evaluation", "GPU GiB", "evaluation.batch_size", 2),
        ("evaluation", "GPU GiB", "evaluation.max_new_tokens", 16),
        ("evaluation", "GPU GiB", "patching.top_rate_se", 0.001),
    ],
)
def test_what_a_user_is_told_to_lower_lowers_the_peak(stage, column, key, less):
    before = {"importance__layers_per_pass": 2}
    changed = before | {key.replace(".", "__"): less}
    assert peak(stage, **changed)[column] < peak(stage, **before)[column]


def test_without_a_gpu_all_of_it_is_on_the_host():
    frame = predict(config(backbone__compute_dtype="float16"), shape(), "importance", "cpu")
    assert list(frame) == ["host GiB"] and "CUDA context and fragments" not in frame.index
    assert frame["host GiB"].drop("peak").sum() == pytest.approx(frame.loc["peak", "host GiB"])
    assert frame.loc["Python and libraries", "host GiB"] * GIB == LIBRARIES["cpu"]


def test_a_seven_billion_backbone_keeps_to_the_goal():
    """LLaMA-2-7B's shape with its own params file: 14.5 GiB of GPU and 11 GiB of host memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # transformers' defaults are LLaMA-7B's sizes
    of = shape_of_model(model)
    assert of.weights == pytest.approx(6.74e9, rel=0.001)
    for stage in STAGES:
        need = peak(stage, of=of)
        assert need["GPU GiB"] <= 14.5 and need["host GiB"] <= 11, stage


# ---- what a notebook shows -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(NOTEBOOKS)[:-1])
def test_the_sandbox_fits(stage, capsys):
    frame = needs(Config(), stage)
    assert isinstance(frame, pd.DataFrame) and 0 < frame.loc["peak", "host GiB"] < 2
    assert (frame["host GiB"] >= 0.01).all()  # no rows of 0.00
    assert capsys.readouterr().out.startswith("fits")


def test_what_does_not_fit_says_what_to_lower(tmp_path, monkeypatch, capsys):
    folder = tiny.save(tmp_path / "model")
    monkeypatch.setattr("spkit.running.memory.available", lambda device: {"host GiB": 0.001})
    changes = {"backbone__source": str(folder), "backbone__revision": None}
    needs(config(**changes, backbone__device="cpu"), "01_patch_derivation")
    said = capsys.readouterr().out
    assert said.startswith("does not fit")
    assert "derivation.micro_batch_size (now 4)" in said or "data.max_tokens (now 512)" in said


# ---- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_measures_a_tiny_backbone(tmp_path, monkeypatch):
    path = ROOT / "benchmarks" / "memory_budget.py"
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("memory_budget", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out = tmp_path / "table.csv"
    size = ["--hidden", "64", "--layers", "2", "--intermediate", "128", "--heads", "4"]
    arguments = [
        *(*size, "--vocab", "200", "--set", "data.max_tokens=32", "--stages", "load"),
        *("patching", "--work", str(tmp_path / "work"), "--out", str(out)),
    ]
    monkeypatch.setattr(sys, "argv", ["memory_budget.py", *arguments])
    benchmark.main()
    table = pd.read_csv(out)
    assert table["stage"].tolist() == ["load", "patching"]
    assert (table["measured GiB"] > 0).all() and (table["predicted GiB"] > 0).all()


def test_the_template_s_placeholder_is_not_looked_for_on_the_hub():
    config = load_params(ROOT / "params" / "template.yaml")
    with pytest.raises(SpkitError, match="backbone.source is 'your-name/your-model', the template"):
        shape_of(config)
