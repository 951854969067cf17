"""Loading, naming, the NF4 guard, effective weights and `patched`, on three architectures."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from spkit.errors import SpkitError
from spkit.method import patching
from spkit.models.deltas import add_delta
from spkit.models.loading import check_tokenizer, load, load_tokenizer
from spkit.models.patched import patched
from spkit.models.weights import effective_weight, guard_nf4, target_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def bits(tensor):
    return tensor.detach().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def forward(model):
    with torch.no_grad():
        return model(torch.tensor([[2, 4, 9, 10, 5]])).logits


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A Llama checkpoint that the test may break."""
    return shutil.copytree(checkpoints["llama"], tmp_path / "copy")


# ---- loading


@architectures
def test_load_gives_the_saved_weights(architecture, checkpoints):
    model, tokenizer = load(checkpoints[architecture])
    assert not model.training
    assert tokenizer.chat_template == tiny.TEMPLATE
    saved = load_file(checkpoints[architecture] / "model.safetensors")
    layers = target_weights(model, tiny.TARGETS)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(bits(layer.weight), bits(saved[name]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_in_half_precision(dtype, checkpoints):
    model, _ = load(checkpoints["llama"], dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {"dtype": "int8"},
            "compute_dtype is 'int8'; allowed are auto, float32, bfloat16, float16.",
        ),
        ({"quantization": "int4"}, "quantization is 'int4'; allowed are none, nf4."),
        ({"device": "tpu"}, "device is 'tpu'; allowed are auto, cpu, cuda, cuda:N, mps, balanced."),
    ],
)
def test_unknown_options(options, sentence, checkpoints):
    with pytest.raises(SpkitError, match=sentence):
        load(checkpoints["llama"], **options)


def test_no_such_folder(tmp_path):
    with pytest.raises(SpkitError, match="neither a folder with a checkpoint nor a hub id"):
        load(tmp_path / "nowhere")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(SpkitError, match="has no config.json"):
        load(tmp_path)


def test_a_folder_without_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SpkitError, match="No tokenizer can be loaded from"):
        load(copy)


OWN_TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("tokenizer.json", {"model": {"type": "Novel"}}, "Exception: data did not match"),
        ("tekken.json", {"vocab": []}, "'config'"),  # Mistral's, and none else is there
        ("tokenizer_config.json", OWN_TOKENIZER, "none is run"),
    ],
)
def test_a_tokenizer_that_the_library_does_not_know_is_one_sentence(copy, name, values, said):
    if name == "tekken.json":
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer_config.json").unlink()
    path = copy / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    with pytest.raises(SpkitError, match=said) as error:
        load_tokenizer(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_a_tokenizer_without_chat_template(copy):
    tiny.tokenizer(chat_template=None).save_pretrained(copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(SpkitError, match="has no chat template"):
        load(copy)


def test_the_tokenizer_of_another_model(copy):
    tiny.tokenizer(extra=10).save_pretrained(copy)
    with pytest.raises(SpkitError, match=r"ids up to \d+, but the model has 32 embeddings"):
        load(copy)


def test_a_missing_pad_token_becomes_a_known_one(copy):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(copy).pad_token == "<unk>"


def test_a_missing_eos_token_is_an_error(copy):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy)
    with pytest.raises(SpkitError, match="has no eos token"):
        load_tokenizer(copy)


def test_a_missing_tensor_is_named(copy):
    """transformers fills it with random numbers and a mere warning."""
    tensors = load_file(copy / "model.safetensors")
    del tensors[Q_PROJ]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpkitError, match=f"lacks the tensor '{Q_PROJ}'"):
        load(copy)


def test_pickled_weights_are_not_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(SpkitError, match="No model can be loaded from"):
        load(copy)


def test_code_from_a_checkpoint_is_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SpkitError, match="can be loaded from"):
        load(copy)


def test_check_tokenizer_accepts_unused_rows(checkpoints):
    check_tokenizer(tiny.model("llama"), tiny.tokenizer())  # 25 words, 32 rows


# ---- names


@architectures
def test_names_are_the_checkpoints_also_under_peft(architecture, checkpoints):
    model, _ = load(checkpoints[architecture])
    bare = list(target_weights(model, tiny.TARGETS))
    assert bare[0] == Q_PROJ and bare[-1] == "model.layers.1.mlp.down_proj.weight"
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    wrapped = target_weights(peft, tiny.TARGETS)
    assert list(wrapped) == bare
    assert hasattr(wrapped[Q_PROJ], "lora_A")
    assert isinstance(wrapped["model.layers.0.self_attn.k_proj.weight"], torch.nn.Linear)


def test_an_unknown_target_is_named_with_what_exists():
    with pytest.raises(SpkitError, match="'w_pack' is no linear layer .* it has q_proj, k_proj"):
        target_weights(tiny.model("llama"), ["q_proj", "w_pack"])


def test_tied_embeddings():
    tied = tiny.model("llama", tied=True)
    assert len(target_weights(tied, tiny.TARGETS)) == 14
    with pytest.raises(SpkitError, match="'lm_head.weight' is tied to the input embeddings"):
        target_weights(tied, ["lm_head"])
    assert list(target_weights(tiny.model("llama", tied=False), ["lm_head"])) == ["lm_head.weight"]


# ---- NF4 and effective weights


@architectures
def test_nf4_is_double_quantised_and_close(architecture, checkpoints):
    model, _ = load(checkpoints[architecture], quantization="nf4")
    dense, _ = load(checkpoints[architecture])
    dense_layers = target_weights(dense, tiny.TARGETS)
    for name, layer in target_weights(model, tiny.TARGETS).items():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)
        error = effective_weight(layer) - dense_layers[name].weight
        assert error.norm() / dense_layers[name].weight.norm() < 0.1
    assert type(model.get_output_embeddings()) is torch.nn.Linear  # the head stays as it is


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_nf4_guard(architecture, dtype, checkpoints):
    """The dequantised weights before and after a forward in eval mode are the same bits."""
    model, _ = load(checkpoints[architecture], quantization="nf4", dtype=dtype)
    layers = target_weights(model, tiny.TARGETS)
    before = {name: effective_weight(layer) for name, layer in layers.items()}
    first, second = forward(model), forward(model)
    assert torch.equal(first, second)
    for name, layer in layers.items():
        assert torch.equal(effective_weight(layer), before[name])


def test_without_the_guard_bitsandbytes_repacks(checkpoints):
    """Why the guard exists. Should this fail one day, bitsandbytes has mended its bug."""
    from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    model, _ = load(checkpoints["llama"], quantization="nf4", dtype="bfloat16", device="cpu")
    layer = target_weights(model, tiny.TARGETS)[Q_PROJ]
    before = effective_weight(layer)
    layer.support_avx512bf16_for_cpu = True
    forward(model)
    after = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (after - before).norm() / before.norm() > 0.5
    with pytest.raises(SpkitError, match="repacked by bitsandbytes"):
        effective_weight(layer)
    guard_nf4(model)
    assert not layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_effective_weight_is_what_the_layer_multiplies_with(quantization, checkpoints):
    model, _ = load(checkpoints["llama"], quantization=quantization, device="cpu")
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["up_proj"])
    model = get_peft_model(model, config).eval()
    name = "model.layers.1.mlp.up_proj.weight"
    layer = target_weights(model, ["up_proj"])[name]
    base = effective_weight(layer.base_layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(effective_weight(layer), base + b @ a * 1.5, rtol=1e-6, atol=1e-6)
    identity = torch.eye(64)
    with torch.no_grad():
        assert torch.allclose(layer(identity).T, effective_weight(layer), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(layer(identity).T, base, rtol=1e-6, atol=1e-6)
            assert torch.equal(effective_weight(layer), base)


def test_effective_weight_is_a_copy_and_knows_merged_adapters():
    model = tiny.model("llama")
    layer = target_weights(model, ["up_proj"])["model.layers.0.mlp.up_proj.weight"]
    effective_weight(layer).zero_()
    assert layer.weight.any()
    peft = get_peft_model(
        model, LoraConfig(r=2, init_lora_weights=False, target_modules=["up_proj"])
    )
    layer = target_weights(peft, ["up_proj"])["model.layers.0.mlp.up_proj.weight"]
    before = effective_weight(layer)
    layer.merge()
    assert torch.allclose(effective_weight(layer), before, atol=1e-6)


def test_dora_is_no_plain_sum():
    config = LoraConfig(r=2, use_dora=True, target_modules=["up_proj"])
    peft = get_peft_model(tiny.model("llama"), config)
    with pytest.raises(SpkitError, match="'default' is a LoRA variant"):
        effective_weight(next(iter(target_weights(peft, ["up_proj"]).values())))


# ---- patched


def sparse_deltas(model, scale=0.5):
    """For two matrices, about a third of the positions each."""
    deltas = {}
    for name in (Q_PROJ, "model.layers.1.mlp.down_proj.weight"):
        shape = target_weights(model, tiny.TARGETS)[name].weight.shape
        keep = patching.retention_mask(shape, 0.3, seed=0, patch="se", tensor=name)
        deltas[name] = torch.where(keep, torch.full(shape, scale), 0.0)
    return deltas


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_patched_is_add_delta_and_is_undone(architecture, dtype, checkpoints):
    model, _ = load(checkpoints[architecture], dtype=dtype)
    layers = target_weights(model, tiny.TARGETS)
    layers[Q_PROJ].weight.data[0, :8] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = forward(model)
    deltas = sparse_deltas(model)
    with patched(model, deltas) as inside:
        assert inside is model
        assert not torch.equal(forward(model), plain)
        for name, layer in layers.items():
            expected = before[name]
            if name in deltas:
                expected = add_delta(before[name], deltas[name])
            assert torch.equal(bits(layer.weight), bits(expected))
    for name, value in model.state_dict().items():
        assert torch.equal(bits(value), bits(before[name]))
    assert torch.equal(forward(model), plain)


def test_patched_is_undone_after_an_exception():
    model = tiny.model("gemma")  # tied embeddings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), patched(model, sparse_deltas(model)):
        raise KeyboardInterrupt
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_patched_nests():
    model = tiny.model("llama")
    weight = target_weights(model, ["q_proj"])[Q_PROJ].weight
    before = weight.detach().clone()
    deltas = sparse_deltas(model)
    with patched(model, deltas):
        once = weight.detach().clone()
        with patched(model, deltas):
            assert not torch.equal(weight, once)
        assert torch.equal(weight, once)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "name, delta, sentence",
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(1), "no weight matrix 'model.layers.9"),
        (Q_PROJ, torch.ones(2, 64), r"has shape \[2, 64\], its weight \[64, 64\]"),
        (Q_PROJ, torch.full((64, 64), float("nan")), "not finite"),
        (Q_PROJ, torch.full((64, 64), 1e5), "not finite"),  # overflows in fp16
    ],
)
def test_patched_refuses_and_leaves_everything_as_it_was(name, delta, sentence, checkpoints):
    model, _ = load(checkpoints["llama"], dtype="float16")
    before = {n: value.clone() for n, value in model.state_dict().items()}
    deltas = {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64), name: delta}
    with pytest.raises(SpkitError, match=sentence), patched(model, deltas):
        pytest.fail("the body must not run")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_patched_refuses_other_quantisations():
    """NF4 is in test_deltas.py; here a weight of 8-bit integers, as LLM.int8 has."""
    model = tiny.model("llama")
    layer = target_weights(model, ["q_proj"])[Q_PROJ]
    codes = (layer.weight.data * 100).to(torch.int8)
    layer.weight = torch.nn.Parameter(codes.clone(), requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deltas = {"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64), Q_PROJ: torch.ones(64, 64)}
    with (
        pytest.raises(SpkitError, match=f"'{Q_PROJ}' is neither a full-precision weight nor NF4"),
        patched(model, deltas),
    ):
        pytest.fail("the body must not run")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
