"""PEFT's own adapters, read as factors, held against what PEFT computes; and what is refused."""

import hashlib
import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from spkit.config import DerivationConfig, ImportanceConfig, PatchingConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method.derivation import COLUMNS, derive
from spkit.method.importance import Calibration, gathered, score_windows
from spkit.method.safepatching import SafePatching
from spkit.method.training import TrainingSet, attach
from spkit.models.adapters import check_adapter, described, linear_shapes, read_adapter
from spkit.models.weights import effective_weight, target_weights

PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
TOKENIZER = tiny.tokenizer()
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SHAPES = linear_shapes(tiny.model("llama"))
# of several ranks and scales, on the upper layer's down_proj alone
KINDS = {
    "plain": dict(target_modules=["q_proj", "v_proj"]),
    "several": dict(
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "one layer": dict(target_modules=["down_proj"], layers_to_transform=[1]),
}


def write(folder, kind):
    """An adapter with random factors; what it adds to each weight, by PEFT's own scale."""
    model = tiny.model("llama")
    model.name_or_path = "owner/Some-Model"
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **KINDS[kind])
    wrapped = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(len(kind))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    wrapped.save_pretrained(folder)
    layers = [(n, m) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")]
    return {
        f"{n.removeprefix('base_model.model.')}.weight": m.get_delta_weight("default")
        for n, m in layers
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{kind: (folder, {tensor name: delta})}; not to be written to."""
    root = tmp_path_factory.mktemp("adapters")
    return {kind: (root / kind, write(root / kind, kind)) for kind in KINDS}


@pytest.fixture
def copy(adapters, tmp_path):
    return shutil.copytree(adapters["plain"][0], tmp_path / "copy")


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, sentence, shapes=SHAPES):
    with pytest.raises(SpkitError, match=sentence) as found:
        check_adapter(folder, shapes)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_give_what_peft_adds(kind, adapters):
    folder, expected = adapters[kind]
    factors, manifest = read_adapter(folder, SHAPES)
    assert list(factors) == [name for name in SHAPES if name in expected]
    for name, (a, b) in factors.items():
        assert a.dtype == b.dtype == torch.float32
        assert torch.allclose(b @ a, expected[name], atol=1e-6) and (b @ a).any()
    about = manifest["adapter"]
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (about["name"], about["sha256"]) == (kind, digest)
    assert (about["base_model"], about["r"], about["lora_alpha"]) == ("owner/Some-Model", 4, 8)
    assert str(folder.parent) not in json.dumps(manifest)


def test_other_spellings_of_the_names(adapters, copy):
    """With the adapter's name in it, in half precision, and of a multimodal package."""
    tensors = load_file(copy / "adapter_model.safetensors")
    for old, new in (
        (".weight", ".default.weight"),
        ("model.layers", "model.language_model.layers"),
    ):
        changed = {key.replace(old, new): value.bfloat16() for key, value in tensors.items()}
        save_file(changed, copy / "adapter_model.safetensors")
        assert list(read_adapter(copy, SHAPES)[0]) == list(adapters["plain"][1])


def test_another_base_model_is_a_remark(adapters):
    about = check_adapter(adapters["plain"][0], SHAPES).about
    for same in ("owner/Some-Model", "/data/some-model"):
        assert "\n" not in described("derivation.se", about, same)
    said = described("derivation.se", about, "/data/mine/other")
    assert "was trained on owner/Some-Model, and the backbone is other" in said


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'; only LORA"),
        ({"use_dora": True}, r"has use_dora True \(DoRA\): only a plain LoRA"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out True"),
        ({"lora_bias": True}, "has lora_bias True"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"of_next_year": {"on": 1}}, "has of_next_year"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the backbone's"),
        ({"r": 3}, r"factors \[4, 64\] and \[64, 4\] of '.*', and the backbone .* \[3, 64\]"),
        ({"r": 0}, "has r 0, must be a whole number above 0"),
        ({"lora_alpha": True}, "has lora_alpha True, must be a number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern that is no regex"),
        ({"rank_pattern": 3}, "rank_pattern 3, must be a JSON object"),
    ],
)
def test_a_configuration_that_is_no_plain_lora(values, sentence, copy):
    edit(copy, **values)
    refused(copy, sentence)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop(f"{LAYER}.lora_A.weight"), f"lacks the factor A of '{Q_PROJ}'"),
        (lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(64)}), "no factor of a"),
        (lambda t: t.update({"x.lora_embedding_A": torch.ones(4, 9)}), "no factor of a plain LoRA"),
        (lambda t: t.update({"no.such.lora_A.weight": torch.ones(4, 9)}), "no such linear layer"),
        (
            lambda t: t[f"{LAYER}.lora_B.weight"].fill_(float("inf")),
            "values in '.*' that are not fin",
        ),
        (
            lambda t: [x.zero_() for k, x in t.items() if "lora_B" in k],
            "changes nothing: every B @ A",
        ),
        (lambda t: t.clear(), "holds no tensor"),
        (
            lambda t: t.update({"x.lm_head.base_layer.weight": torch.ones(4, 9)}),
            "a whole matrix beside the factors.*save_embedding_layers=False",
        ),
        (
            lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}),
            "in I8; read are F64, F32",
        ),
        (lambda t: t.update({f"{LAYER}.lora_A.b.weight": torch.ones(4, 64)}), "two factors A"),
    ],
)
def test_tensors_that_do_not_fit(change, sentence, copy):
    tensors = load_file(copy / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, copy / "adapter_model.safetensors")
    refused(copy, sentence)


def test_folders_that_are_no_adapter(copy, tmp_path, checkpoints):
    refused(copy, "the backbone and adapter_config.json want", {**SHAPES, Q_PROJ: (64, 32)})
    refused(tmp_path / "nowhere", "There is no folder")
    refused(checkpoints["llama"], "a whole checkpoint, not an adapter")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, "is no intact safetensors file")
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(copy, "a git-lfs pointer")
    weights.unlink()
    refused(copy, "has no adapter_model.safetensors")
    (copy / "adapter_model.bin").write_bytes(b"")
    refused(copy, "is a pickle, which can run code")
    (copy / "adapter_config.json").write_text("{")
    refused(copy, "cannot be read as JSON")


# ---- as a patch ----------------------------------------------------------------------------------


def derivation(**values):
    steps = {"max_steps": 2, "batch_size": 3, "warmup_steps": 0, "learning_rate": 1e-2}
    lora = {"r": 2, "alpha": 4.0, "targets": ["v_proj"]}
    both = {"ascent": {**steps, "stop_window": 1}, "descent": steps, "lora": lora}
    return DerivationConfig(quantization="none", **both, **values)


def both_patches(model, config):
    data = TrainingSet.of(TOKENIZER, PAIRS)
    made = [derive(model, data, direction, config, 0) for direction in ("ascent", "descent")]
    return [patch for patch, _ in made], [curve for _, curve in made]


def test_two_adapters_are_the_two_patches_from_scoring_to_the_merged_delta(adapters):
    """Other layers, ranks and scales: where one changes nothing its delta is 0."""
    model = tiny.model("llama")
    (one, first), (two, second) = adapters["several"], adapters["one layer"]
    (se, osm), curves = both_patches(model, derivation(se=str(one), osm=str(two)))
    assert [list(curve) for curve in curves] == [COLUMNS, COLUMNS] and not any(map(len, curves))
    names = list(target_weights(model, ["q_proj", "v_proj", "down_proj"]))
    assert list(se.factors) == list(osm.factors) == names
    for patch, expected in ((se, first), (osm, second)):
        wrapped = attach(model, patch)
        for name, layer in target_weights(wrapped, patch.manifest["lora"]["targets"]).items():
            bare = layer.get_base_layer().weight.detach()
            delta = expected.get(name, torch.zeros_like(bare))
            assert torch.allclose(effective_weight(layer), bare + delta, atol=1e-6)
            assert torch.allclose(patch.delta(name), delta, atol=1e-6)
        wrapped.unload()
    importance = ImportanceConfig(samples=3, batch_size=3, layers_per_pass=1)
    patching = PatchingConfig(top_rate_se=0.5, top_rate_osm=0.5, alpha=1.0, beta=1.0, balance=None)
    windows = score_windows(model, TOKENIZER, (se, osm), Calibration(PAIRS, importance, 0))
    scores = gathered(windows)
    merged = SafePatching(se, osm, (scores["se"], scores["osm"]), patching, 0).deltas()
    moved = {name for name in names if merged[name].any()}
    assert moved and moved <= {*first, *second}


def test_one_adapter_beside_a_derived_patch(adapters):
    folder, expected = adapters["one layer"]
    (se, osm), (none, curve) = both_patches(tiny.model("llama"), derivation(se=str(folder)))
    assert len(curve) == 3 and not len(none)
    (_, plain), _ = both_patches(tiny.model("llama"), derivation())
    assert list(se.factors) == list(osm.factors) and "adapter" in se.manifest
    assert "adapter" not in osm.manifest and osm.manifest["lora"]["targets"] == [
        "v_proj",
        "down_proj",
    ]
    for name in osm.factors:  # what was derived is as without the adapter
        if name in plain.factors:
            assert torch.equal(osm.delta(name), plain.delta(name)) and not se.delta(name).any()
        else:
            assert not osm.delta(name).any()
    assert {name for name in se.factors if se.delta(name).any()} == set(expected)


def test_a_bad_osm_adapter_is_found_before_the_se_patch_is_trained(copy, monkeypatch):
    edit(copy, use_dora=True)
    monkeypatch.setattr("spkit.method.derivation.train_lora", lambda *a: pytest.fail("trained"))
    with pytest.raises(SpkitError, match="DoRA"):
        both_patches(tiny.model("llama"), derivation(osm=str(copy)))
