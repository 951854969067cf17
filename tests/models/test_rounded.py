"""A model that answers in bf16 gets what a loader would make of the patched fp32 checkpoint."""

import pytest
import tiny
import torch

from spkit.models.loading import load
from spkit.models.patched import patched
from spkit.models.rounded import before_rounding

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "fp32"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_small_deltas_are_added_before_the_rounding(checkpoint):
    exact, _ = load(checkpoint, dtype="float32")
    weight = exact.get_submodule(NAME.removesuffix(".weight")).weight.detach()
    delta = 2**-10 * weight  # an eighth of the spacing of bf16 there
    model, _ = load(checkpoint, dtype="bfloat16")
    layer = model.get_submodule(NAME.removesuffix(".weight"))
    before = layer.weight.detach().clone()
    with patched(model, before_rounding({NAME: delta}, checkpoint, model)):
        assert torch.equal(layer.weight, (weight + delta).to(torch.bfloat16))
    assert torch.equal(layer.weight, before)
    with patched(model, {NAME: delta}):  # what is added to the rounded weight is mostly lost
        lost = (layer.weight == before).float().mean()
    rounded = ((weight + delta).to(torch.bfloat16) == before).float().mean()
    assert lost > 0.99 > rounded


def test_a_model_in_its_own_precision_gets_the_deltas_themselves(checkpoint):
    model, _ = load(checkpoint, dtype="float32")
    deltas = {NAME: torch.ones(64, 64)}
    assert before_rounding(deltas, checkpoint, model) is deltas
    assert before_rounding({}, checkpoint, model) == {}
