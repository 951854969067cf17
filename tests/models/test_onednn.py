"""Linear layers by oneDNN: which ones, and that they give the same to rounding."""

import tiny
import torch
import torch.nn.functional as F

from spkit.models.onednn import fast_linear


def called(monkeypatch):
    """The shapes of what oneDNN's operator is given."""
    operator, seen = torch.ops.mkldnn._linear_pointwise, []

    def counted(given, *rest):
        seen.append(tuple(given.shape))
        return operator(given, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return seen


def test_fp32_without_gradients_is_onednns(monkeypatch):
    model, seen = tiny.model("llama"), called(monkeypatch)
    ids = torch.arange(20).reshape(4, 5)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert not seen
        with fast_linear(model):
            found = model(input_ids=ids).logits
    assert seen == [(4, 5, 64)] * 6 + [(4, 5, 128)] + [(4, 5, 64)] * 6 + [(4, 5, 128), (4, 5, 64)]
    assert torch.allclose(found, expected, atol=1e-5)


def test_bias_empty_batches_and_keywords(monkeypatch):
    seen = called(monkeypatch)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    with torch.no_grad(), fast_linear(tiny.model("llama")):
        assert torch.allclose(F.linear(x, weight, bias), x @ weight.T + bias, atol=1e-5)
        assert F.linear(x[:0], weight).shape == (0, 5)
        assert torch.allclose(F.linear(x, weight, bias=bias), x @ weight.T + bias, atol=1e-5)
        half = F.linear(x.bfloat16(), weight.bfloat16())
    assert seen == [(3, 8)]
    assert torch.equal(half, F.linear(x.bfloat16(), weight.bfloat16()))


def test_gradients_go_through_frozen_layers(monkeypatch):
    """Those of the embeddings, which are below all of them, are torch's to rounding."""
    model, seen = tiny.model("llama", tied=False).requires_grad_(False), called(monkeypatch)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.arange(20).reshape(4, 5)
    (expected,) = torch.autograd.grad(model(input_ids=ids).logits.square().sum(), embeddings)
    assert not seen
    with fast_linear(model):
        loss = model(input_ids=ids).logits.square().sum()
    forward = len(seen)
    (found,) = torch.autograd.grad(loss, embeddings)
    assert forward == 15 and len(seen) == 30  # 7 in each of 2 layers and the head, both ways
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_gradient_checkpointing_is_left_alone(monkeypatch):
    model, seen = tiny.model("llama").requires_grad_(False).train(), called(monkeypatch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fast_linear(model):
        model(input_ids=torch.arange(20).reshape(4, 5))
    assert not seen


def test_bf16_and_trained_layers_are_left_alone(monkeypatch):
    model, seen = tiny.model("llama"), called(monkeypatch)
    ids = torch.arange(20).reshape(4, 5)
    with fast_linear(model):
        model(input_ids=ids).logits.sum().backward()
    model.to(torch.bfloat16)
    with torch.inference_mode(), fast_linear(model):
        model(input_ids=ids)
    assert not seen
