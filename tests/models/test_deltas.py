"""Deltas that a 4-bit layer carries beside its weight, against dense products and dense models."""

import pytest
import tiny
import torch
from bitsandbytes.functional import quantize_4bit
from torch.nn.functional import linear

from spkit.comparison.ablations import ablated
from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors, MergedPatch, whole_patches
from spkit.method.patching import retention_mask
from spkit.method.safepatching import SafePatching
from spkit.method.sets import Lazy
from spkit.models.deltas import LowRankDelta, SparseDelta
from spkit.models.loading import load
from spkit.models.patched import patched
from spkit.models.weights import effective_weight, target_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # the largest relative error of one rounding
architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the two forms


def test_sparse_by_hand():
    dense = torch.tensor([[0.0, 2.0, 0.0], [-1.0, -0.0, 3.0]])
    sparse = SparseDelta.of(dense)
    assert sparse.positions.tolist() == [1, 3, 5] and sparse.positions.dtype == torch.int32
    assert sparse.values.tolist() == [2.0, -1.0, 3.0]
    assert sparse.shape == (2, 3)
    assert torch.equal(sparse.dense(), dense)
    x = torch.tensor([[1.0, 10.0, 100.0], [0.0, 1.0, 0.0]])
    assert sparse.output(x).tolist() == [[20.0, 299.0], [2.0, 0.0]]
    assert sparse.output(x[None]).shape == (1, 2, 2)


def test_a_sparse_delta_holds_little():
    dense = torch.zeros(100, 80)
    dense[3, ::2] = 1.0
    sparse = SparseDelta.of(dense)
    assert sparse.positions.nbytes + sparse.values.nbytes == 40 * (4 + 4)
    assert SparseDelta.of(torch.zeros(4, 3)).dense().tolist() == [[0.0] * 3] * 4


def test_sparse_is_the_dense_product():
    dense = torch.where(random(30, 20, seed=1) > 0.5, random(30, 20), 0.0)
    x = random(2, 5, 20, seed=2)
    assert torch.equal(SparseDelta.of(dense).output(x), linear(x, dense))
    turned = dense.T.contiguous().T  # another layout in memory, the same delta
    assert torch.equal(SparseDelta.of(turned).dense(), dense)


def test_sparse_in_another_dtype():
    dense = torch.tensor([[1.0, 0.0, 1 / 3]])
    moved = SparseDelta.of(dense).to("cpu", torch.bfloat16)
    assert moved.values.dtype == torch.bfloat16 and moved.shape == (1, 3)
    assert torch.equal(moved.dense(), dense.bfloat16())
    assert SparseDelta.of(dense).to("cpu").values.dtype == torch.float32
    assert (
        SparseDelta.of(dense).output(torch.ones(1, 3, dtype=torch.float16)).dtype == torch.float16
    )


def test_low_rank_is_the_sum_of_its_terms():
    a, b, c, d = random(2, 9), random(7, 2, seed=1), random(3, 9, seed=2), random(7, 3, seed=3)
    delta = LowRankDelta(((a, b, 2.0), (c, d, -0.5)))
    dense = (2 * (b.double() @ a.double()) - 0.5 * (d.double() @ c.double())).float()
    x = random(4, 5, 9, seed=4)
    assert delta.shape == (7, 9)
    assert torch.allclose(delta.dense(), dense, rtol=0, atol=1e-5)
    assert torch.allclose(delta.output(x), linear(x, dense), rtol=0, atol=1e-4)
    assert not torch.allclose(delta.output(x), linear(x, 2 * b @ a), rtol=0, atol=0.1)
    half = delta.to("cpu", torch.bfloat16)
    assert {f.dtype for term in half.terms for f in term[:2]} == {torch.bfloat16}
    assert [term[2] for term in half.terms] == [2.0, -0.5]
    assert half.output(x.bfloat16()).dtype == torch.bfloat16


# ---- on 4-bit layers


def nf4(checkpoints, architecture="llama", dtype="float32"):
    model, _ = load(checkpoints[architecture], quantization="nf4", dtype=dtype, device="cpu")
    return model


def deltas(model, scale=0.3, rate=0.3):
    """Every target's, about a third of the positions of each; as large as the weights are."""
    made = {}
    for number, (name, layer) in enumerate(target_weights(model, tiny.TARGETS).items()):
        shape = (layer.out_features, layer.in_features)
        keep = retention_mask(shape, rate, seed=0, patch="se", tensor=name)
        made[name] = torch.where(keep, scale * random(*shape, seed=number), 0.0)
    return made


def dense_model(model, checkpoint, more):
    """The fp32 model with dequant(W4) + delta as its weights."""
    dense, _ = load(checkpoint, dtype="float32", device="cpu")
    dense.load_state_dict(  # embeddings, norms and head in the precision that the other has
        {n: v for n, v in model.state_dict().items() if v.is_floating_point() and "proj" not in n},
        strict=False,
    )
    for name, layer in target_weights(model, tiny.TARGETS).items():
        dense.get_parameter(name).data.copy_(effective_weight(layer) + more.get(name, 0.0))
    return dense


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[2, 4, 9, 10, 5, 7, 6]])).logits.float()


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def relative(one, other):
    return float((one - other).norm() / other.norm())


@architectures
@dtypes
def test_a_layer_answers_w4_x_plus_d_x(architecture, dtype, checkpoints):
    """Element by element, within the rounding that a product of this length can make.

    fp32: sums of n products, at most n + 2 roundings of each. bf16: D, W4 x, D x and their sum
    are rounded once each (sums inside of a product are kept in fp32), so 4 roundings.
    """
    model = nf4(checkpoints, architecture, dtype)
    more = deltas(model)
    layers = target_weights(model, tiny.TARGETS)
    with patched(model, more), torch.no_grad():
        for name, layer in layers.items():
            x = random(6, layer.in_features, seed=9).to(model.dtype)
            weight, delta = effective_weight(layer).double(), more[name].double()
            exact = linear(x.double(), weight + delta)
            size = linear(x.double().abs(), weight.abs() + delta.abs())
            roundings = layer.in_features + 2 if dtype == "float32" else 4
            output = layer(x)
            assert output.dtype == model.dtype
            assert ((output.double() - exact).abs() <= roundings * UNIT[dtype] * size).all(), name
            assert (linear(x.double(), delta).abs() > roundings * UNIT[dtype] * size).any()


@architectures
@dtypes
def test_patched_nf4_is_the_dense_model(architecture, dtype, checkpoints):
    """14 products in a row: in fp32 of up to 128 terms each, in bf16 rounded 4 times each."""
    model = nf4(checkpoints, architecture, dtype)
    more, plain = deltas(model), logits(model)
    expected = logits(dense_model(model, checkpoints[architecture], more))
    tolerance = {"float32": 14 * 128, "bfloat16": 14 * 4}[dtype] * UNIT[dtype]
    with patched(model, more) as inside:
        assert inside is model
        found = logits(model)
    assert relative(found, expected) < tolerance
    assert relative(plain, expected) > 2 * tolerance  # the deltas matter
    assert relative(plain, logits(dense_model(model, checkpoints[architecture], {}))) < tolerance
    assert hooks(model) == 0
    assert torch.equal(logits(model), plain)


def test_what_quantising_again_would_swallow(checkpoints):
    """NF4's narrowest step is 0.08 of a block's largest weight; the delta is a thousandth of it."""
    model = nf4(checkpoints)
    layer = target_weights(model, ["q_proj"])[Q_PROJ]
    weight = effective_weight(layer)
    delta = torch.full((64, 64), 1e-3) * weight.abs().max()
    codes = [
        quantize_4bit(w.contiguous(), quant_type="nf4", blocksize=64)[0]
        for w in (weight, weight + delta)
    ]
    assert torch.equal(*codes)
    x = random(5, 64)
    with torch.no_grad():
        before = layer(x)
        with patched(model, {Q_PROJ: delta}):
            moved = layer(x) - before
    assert relative(moved, linear(x, delta)) < 1e-2  # of differences of numbers 1000 times as large
    assert moved.abs().max() > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_are_gone_after_an_exception(error, checkpoints):
    model = nf4(checkpoints, "gemma")
    plain = logits(model)
    with pytest.raises(error), patched(model, deltas(model)):
        assert hooks(model) == 14
        raise error
    assert hooks(model) == 0
    assert torch.equal(logits(model), plain)


def test_patched_nests_on_nf4(checkpoints):
    model = nf4(checkpoints)
    more = deltas(model)
    with patched(model, more):
        once = logits(model)
        with patched(model, more):
            twice = logits(model)
        assert torch.equal(logits(model), once)
    expected = logits(
        dense_model(model, checkpoints["llama"], {n: 2 * delta for n, delta in more.items()})
    )
    assert relative(twice, expected) < 14 * 128 * UNIT["float32"] < relative(once, expected)


def low_rank(value, shape=(64, 64), scale=1.0):
    return LowRankDelta(
        ((torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0),)
        + ((torch.full((1, shape[1]), value), torch.ones(shape[0], 1), scale),)
    )


@pytest.mark.parametrize(
    "name, delta, sentence",
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(1), "no weight matrix 'model.layers.9"),
        (Q_PROJ, torch.ones(2, 64), r"'model.*q_proj.*has shape \[2, 64\], its weight \[64, 64\]"),
        (Q_PROJ, torch.ones(2048, 1), r"has shape \[2048, 1\], its weight \[64, 64\]"),
        (Q_PROJ, SparseDelta.of(torch.ones(64, 65)), r"has shape \[64, 65\], its weight"),
        (Q_PROJ, low_rank(1.0, (63, 64)), r"has shape \[63, 64\], its weight"),
        (Q_PROJ, torch.full((64, 64), float("nan")), "delta of 'model.*q_proj.*not finite in"),
        (Q_PROJ, SparseDelta.of(torch.full((64, 64), float("inf"))), "not finite"),
        (Q_PROJ, torch.full((64, 64), 1e5), "not finite in torch.float16"),  # too large for it
        (Q_PROJ, low_rank(float("nan")), "not finite"),
        (Q_PROJ, low_rank(1.0, scale=float("inf")), "not finite"),
    ],
)
def test_patched_refuses_and_leaves_no_hook(name, delta, sentence, checkpoints):
    model = nf4(checkpoints, dtype="float16")
    more = {DOWN: torch.ones(64, 128), name: delta}
    with pytest.raises(SpkitError, match=sentence), patched(model, more):
        pytest.fail("the body must not run")
    assert hooks(model) == 0


def test_a_delta_that_cannot_be_computed_leaves_no_hook(checkpoints):
    model = nf4(checkpoints)

    def compute(name):
        if name == DOWN:
            return torch.ones(64, 128)
        raise ValueError("too hard")

    with (
        pytest.raises(ValueError, match="too hard"),
        patched(model, Lazy([DOWN, Q_PROJ], compute)),
    ):
        pytest.fail("the body must not run")
    assert hooks(model) == 0


# ---- whole patches, by their factors


def patch(model, name, seed):
    """As the derivation makes them, large enough to matter."""
    factors = {
        tensor: (
            0.4 * random(2, layer.in_features, seed=seed + i),
            0.4 * random(layer.out_features, 2, seed=100 + seed + i),
        )
        for i, (tensor, layer) in enumerate(target_weights(model, tiny.TARGETS).items())
    }
    return Factors(name, factors, 0.5)


def unreadable(*terms):
    """Whole patches whose deltas must not be asked for."""

    def fail(name):
        raise AssertionError(f"the dense delta of {name} was computed")

    whole = whole_patches(*terms)
    return MergedPatch(list(whole), fail, whole.factors)


@dtypes
def test_factors_are_used_where_there_are_some(dtype, checkpoints):
    model = nf4(checkpoints, dtype=dtype)
    se, osm = patch(model, "se", 0), patch(model, "osm", 50)
    dense = {name: 0.7 * se.delta(name) - 0.2 * osm.delta(name) for name in se.factors}
    expected = logits(dense_model(model, checkpoints["llama"], dense))
    tolerance = {"float32": 14 * 128, "bfloat16": 14 * 4}[dtype] * UNIT[dtype]
    with patched(model, unreadable((se, 0.7), (osm, -0.2))):
        assert relative(logits(model), expected) < tolerance
    assert relative(logits(model), expected) > 2 * tolerance
    assert hooks(model) == 0


def test_a_full_precision_weight_gets_the_dense_delta():
    """The mapping's own values, written in place as add_delta does; or the sum of the factors."""
    model = tiny.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    se = patch(model, "se", 0)
    with pytest.raises(AssertionError, match="dense delta"), patched(model, unreadable((se, 1.0))):
        pytest.fail("the body must not run")
    with patched(model, whole_patches((se, 2.0))):
        for name in se.factors:
            assert torch.equal(model.get_parameter(name), before[name] + 2 * se.delta(name))
    with patched(model, {Q_PROJ: whole_patches((se, 2.0)).factors(Q_PROJ)}):
        expected = before[Q_PROJ] + 2 * se.delta(Q_PROJ)
        assert torch.allclose(model.get_parameter(Q_PROJ), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["SE only", "OSM only", "plain sum"])
def test_whole_variants_go_by_their_factors(variant, checkpoints, monkeypatch):
    model = nf4(checkpoints)
    se, osm = patch(model, "se", 0), patch(model, "osm", 50)
    scores = {name: torch.ones_like(se.delta(name)) for name in se.factors}
    method = SafePatching(se, osm, (scores, scores), PatchingConfig(), seed=0)
    whole = ablated(method, variant).deltas()
    dense = {name: whole[name].clone() for name in whole}
    parts = {"SE only": [se], "OSM only": [osm], "plain sum": [se, osm]}[variant]
    for name in dense:
        expected = sum(part.delta(name) for part in parts)
        assert torch.allclose(dense[name], expected, rtol=0, atol=1e-6)
        assert torch.allclose(whole.factors(name).dense(), dense[name], rtol=0, atol=1e-6)
        assert len(whole.factors(name).terms) == len(parts)
    with patched(model, dense):
        expected = logits(model)
    monkeypatch.setattr(MergedPatch, "__getitem__", lambda self, name: pytest.fail("a dense delta"))
    with patched(model, whole):
        assert relative(logits(model), expected) < 14 * 128 * UNIT["float32"]
    assert relative(logits(model), expected) > 0.01


def test_thinned_variants_have_no_factors(checkpoints):
    model = nf4(checkpoints)
    se, osm = patch(model, "se", 0), patch(model, "osm", 50)
    scores = [
        {name: random(*se.delta(name).shape, seed=s).abs() for name in se.factors} for s in (1, 2)
    ]
    kept = SafePatching(se, osm, tuple(scores), PatchingConfig(), seed=0).deltas()
    assert kept.factors(Q_PROJ) is None
    expected = logits(dense_model(model, checkpoints["llama"], dict(kept)))
    with patched(model, kept):
        assert relative(logits(model), expected) < 14 * 128 * UNIT["float32"]
    assert relative(logits(model), expected) > 0.01


def test_which_tensors_a_delta_has_is_told_without_computing_it():
    whole = unreadable((patch(tiny.model("llama"), "se", 0), 1.0))
    assert Q_PROJ in whole and "lm_head.weight" not in whole
