"""NF4 against a decoding written here: every width, a broken kernel, broken data, training."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spkit.errors import SpkitError
from spkit.models.loading import load
from spkit.models.nf4 import check_nf4, decoded, mend
from spkit.models.weights import effective_weight, guard_nf4, target_weights
from spkit.sandbox.backbone import SHIPPED

bnb = pytest.importorskip("bitsandbytes")

WIDTHS = range(16, 1025, 16)
ROWS = 24
# the 16 values of NF4, from the appendix of QLoRA (arXiv 2305.14314), not from bitsandbytes
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def layer_of(width, dtype=torch.float32, rows=ROWS, bias=False):
    """(a 4-bit layer as loading leaves it, the fp32 weights that it was made of)."""
    weights = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    layer = bnb.nn.Linear4bit(width, rows, bias=bias, compute_dtype=dtype, quant_type="nf4")
    made = bnb.nn.Params4bit(weights.to(dtype), requires_grad=False, quant_type="nf4")
    layer.weight = made
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-300, 300, rows).to(dtype))
    layer = layer.to("cpu")
    guard_nf4(layer)
    assert layer.weight.quant_state.nested
    return layer, weights


def by_hand(weight):
    """The fp64 matrix behind the codes, byte after byte and block after block."""
    state = weight.quant_state
    codes = [half for byte in weight.data.flatten().tolist() for half in (byte >> 4, byte & 15)]
    values = torch.tensor(NF4, dtype=torch.float64)[torch.tensor(codes)]
    steps = state.state2.code.double()[state.absmax.long()]
    scales = torch.empty(len(steps), dtype=torch.float64)
    for block in range(len(steps)):
        scales[block] = steps[block] * state.state2.absmax[block // 256].double() + state.offset
    for block in range(len(steps)):
        values[64 * block : 64 * (block + 1)] *= scales[block]
    return values[: state.shape.numel()].view(state.shape)


def relative(found, right):
    return float((found.double() - right.double()).norm() / right.double().norm())


def checked(layer):
    """The layer after the check, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_nf4(layer)
    return layer


# ---- every width on the CPU at hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_width_computes_with_the_weights_behind_its_codes(dtype):
    """16 ... 1024: decoded, forward for one token and several, train and eval, gradient."""
    rounding = torch.finfo(dtype).eps
    for width in WIDTHS:
        layer, source = layer_of(width, dtype)
        checked(layer)
        right = by_hand(layer.weight)
        assert relative(right, source) < 0.11
        assert relative(decoded(layer.weight, torch.float32), right) < 1e-6
        assert relative(effective_weight(layer), right) < rounding
        for train in (False, True):
            layer.train(train)
            for tokens in (1, 5):
                x = torch.randn(1, tokens, width).to(dtype).requires_grad_(train)
                y = layer(x)
                assert y.dtype == dtype
                assert relative(y, x.double() @ right.T) < 4 * max(rounding, 1e-6), width
                if train:
                    g = torch.randn(1, tokens, ROWS).to(dtype)
                    (grad,) = torch.autograd.grad(y, x, g)
                    assert relative(grad, g.double() @ right) < 4 * max(rounding, 1e-6), width


def test_multiples_of_64_stay_bitsandbytes_own():
    """Their results keep their bits: nothing is mended, and `decoded` gives the same bits."""
    from bitsandbytes.functional import dequantize_4bit

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (64, 192, 512, 1024):
            layer, _ = layer_of(width, dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check_nf4(layer)
            assert "forward" not in vars(layer)
            theirs = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert theirs.dtype == dtype
            assert torch.equal(theirs, decoded(layer.weight))


def test_the_sandbox_keeps_its_bits():
    """Widths 192 and 512: no layer is mended, and the decoded weights are bitsandbytes' own."""
    from bitsandbytes.functional import dequantize_4bit

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = load(SHIPPED, quantization="nf4", device="cpu")
    layers = target_weights(model, tiny.TARGETS)
    assert {layer.in_features for layer in layers.values()} == {192, 512}
    for layer in layers.values():
        assert "forward" not in vars(layer)
        theirs = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(theirs.view(torch.int32), effective_weight(layer).view(torch.int32))


@pytest.mark.parametrize("shape", [(3, 5), (1, 63), (7, 9), (5, 100), (2, 1), (33, 65)])
def test_odd_shapes_decode(shape):
    rows, width = shape
    layer, _ = layer_of(width, rows=rows)
    assert decoded(layer.weight).shape == shape
    assert relative(decoded(layer.weight), by_hand(layer.weight)) < 1e-6


def test_many_chunks_and_scales_that_are_not_nested():
    from bitsandbytes.functional import quantize_4bit

    source = torch.randn(1120, 1000, generator=torch.Generator().manual_seed(3))
    packed, state = quantize_4bit(source, quant_type="nf4", compress_statistics=False)
    packed.quant_state = state
    values = torch.tensor(NF4)[torch.stack((packed >> 4, packed & 15), 1).long().flatten()]
    right = (values.view(-1, 64) * state.absmax.view(-1, 1)).view(1120, 1000)
    assert torch.equal(decoded(packed), right)
    assert relative(right, source) < 0.11


def test_a_bias_a_thousand_times_the_product_is_no_fault():
    layer, _ = layer_of(128, torch.bfloat16, bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_nf4(layer)
    x = torch.randn(2, 128).bfloat16()
    before = layer(x)
    mend(layer)
    assert relative(layer(x), before) < 2**-8  # bf16's rounding


def test_the_check_leaves_mode_and_random_numbers_as_they_were():
    layer, _ = layer_of(48)
    for train in (True, False):
        state = torch.random.get_rng_state()
        checked(layer.train(train))
        assert layer.training is train
        assert torch.equal(torch.random.get_rng_state(), state)


# ---- a kernel that is wrong


def model_of(width):
    """A model of two layers, hidden size `width`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    ends = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, initializer_range=0.2))


@pytest.fixture
def checkpoint(tmp_path):
    def save(width):
        model_of(width).save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return save


def wrong_dequantise(packed, state, own):
    """The last weight of the layer is off."""
    found = own(packed, state).clone()
    found.view(-1)[-1] += 0.1
    return found


def test_one_weight_that_is_off_is_seen_and_mended(monkeypatch, checkpoint):
    from bitsandbytes import functional

    own = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda p, s: wrong_dequantise(p, s, own))
    sentence = (
        r"bitsandbytes [\d.]+ computes wrongly with 14 of 14 4-bit layers on this machine, first "
        r"'model.layers.0.self_attn.q_proj' \[32, 64\] \(relative error 0.0\d+\)"
    )
    with pytest.warns(UserWarning, match=sentence):
        model, _ = load(checkpoint(64), quantization="nf4", device="cpu")
    layers = target_weights(model, tiny.TARGETS)
    assert all("forward" in vars(layer) for layer in layers.values())


@pytest.mark.parametrize("what", ["one token", "several", "eval", "train", "gradient"])
def test_a_product_that_is_wrong_is_seen_and_mended(what, monkeypatch):
    """Each of the cases that another kernel may serve."""
    own = bnb.matmul_4bit

    def wrong(x, *rest, **options):
        one = x.numel() == x.shape[-1]
        bad = {"one token": one, "several": not one, "train": x.requires_grad}
        bad |= {"eval": not x.requires_grad, "gradient": False}
        y = own(x, *rest, **options)
        if what == "gradient" and y.requires_grad:
            y.register_hook(lambda gradient: gradient.flip(-1))
        return y * (1.5 if bad[what] else 1)

    monkeypatch.setattr(bnb, "matmul_4bit", wrong)
    layer, _ = layer_of(64)
    with pytest.warns(UserWarning, match="1 of 1 4-bit layers"):
        check_nf4(layer)
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    right = by_hand(layer.weight)
    assert relative(y, x.double() @ right.T) < 1e-6
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative(grad, torch.ones(4, ROWS).double() @ right) < 1e-6
    with torch.no_grad():
        assert relative(layer(x[:1]), x[:1].double() @ right.T) < 1e-6


def test_an_answer_that_is_not_a_number_is_wrong_too(monkeypatch):
    own = bnb.matmul_4bit
    monkeypatch.setattr(bnb, "matmul_4bit", lambda *a, **o: own(*a, **o) * float("nan"))
    layer, _ = layer_of(64)
    with pytest.warns(UserWarning, match="1 of 1 4-bit layers"):
        check_nf4(layer)
    assert torch.isfinite(layer(torch.randn(1, 64))).all()


def test_scales_that_are_not_finite_are_refused():
    layer, _ = layer_of(64)
    layer.weight.quant_state.offset = torch.tensor(float("nan"))
    sentence = (
        r"The 4-bit layer 'here' \[24, 64\] has scales that are not finite with bitsandbytes "
        r"[\d.]+ on this machine: set quantization to 'none', or install another version"
    )
    with pytest.raises(SpkitError, match=sentence):
        check_nf4(nn.ModuleDict({"here": layer}))


def test_codes_that_do_not_stand_for_the_weights_are_refused(monkeypatch):
    from bitsandbytes import functional

    own = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda w, **o: own(w.flip(1), **o))
    with pytest.raises(SpkitError, match=r"\[24, 64\] has a width at which quantising has a rel"):
        check_nf4(layer_of(64)[0])


def test_a_layer_that_cannot_be_mended_is_refused(monkeypatch):
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, *rest, **options: x[..., :ROWS])
    monkeypatch.setattr("spkit.models.nf4.mend", lambda layer: None)
    with pytest.raises(SpkitError, match="computes with a relative error of"):
        check_nf4(layer_of(64)[0])


# ---- a model of such a width


def test_a_mended_model_is_the_dense_one(checkpoint):
    """Width 48: its forward, its training and its patches are those of the decoded weights."""
    folder = checkpoint(48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = load(folder, quantization="nf4", device="cpu")
    dense = model_of(48).eval()
    layers = target_weights(model, tiny.TARGETS)
    for name, layer in target_weights(dense, tiny.TARGETS).items():
        assert relative(by_hand(layers[name].weight), layer.weight) < 0.12
        layer.weight.data = by_hand(layers[name].weight).float()
    assert type(model.get_output_embeddings()) is nn.Linear
    ids = torch.tensor([[2, 4, 9, 10, 5]])
    with torch.no_grad():
        assert relative(model(ids).logits, dense(ids).logits) < 1e-5
        assert relative(copy.deepcopy(model)(ids).logits, dense(ids).logits) < 1e-5
    gradients = []
    for one in (model, dense):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=tiny.TARGETS)
        wrapped = get_peft_model(one, lora)
        wrapped(ids).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        assert relative(gradient, gradients[1][name]) < 1e-4, name


def test_this_cpu_and_the_fault():
    """Why the check is there. Should this fail one day, bitsandbytes has mended its bug."""
    from bitsandbytes.functional import dequantize_4bit

    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX512")
    layer, source = layer_of(432)
    theirs = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert relative(theirs, source) > 0.2 and relative(decoded(layer.weight), source) < 0.1
    with pytest.warns(UserWarning, match=r"\[24, 432\] \(relative error 0.2\d\)"):
        check_nf4(layer)
