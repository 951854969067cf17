"""The glue between patches and importance: which model is scored, on which pairs and which loss."""

import copy
import hashlib

import pytest
import tiny
import torch

from spkit import chat, scoring
from spkit.backbone import effective_weight, load, target_weights
from spkit.config import ImportanceConfig
from spkit.derivation import Patch
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.importance import snip
from spkit.scoring import score_patch

TOKENIZER = tiny.tokenizer()
TARGETS = ["q_proj", "down_proj"]
PAIRS = [
    HarmfulPair(f"pair-{i}", prompt, response, "boats")
    for i, (prompt, response) in enumerate(
        [
            *tiny.PAIRS,
            ("the old net", "first use paint"),
            ("mend a fence", "take the boat then sorry"),
            ("and then", "no sure"),
            ("how do i use paint", "no"),
        ]
    )
]


def patch(name="se", seed=0):
    """Factors large enough to matter, with a dropout that must be off."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        tensor: (
            0.3 * torch.randn(2, layer.in_features, generator=generator),
            0.3 * torch.randn(layer.out_features, 2, generator=generator),
        )
        for tensor, layer in target_weights(tiny.model("llama"), TARGETS).items()
    }
    lora = {"r": 2, "alpha": 8.0, "dropout": 0.5, "targets": TARGETS}
    return Patch(name, factors, 4.0, {"lora": lora})


def config(**changes):
    return ImportanceConfig(**dict(samples=5, batch_size=2) | changes)


def score(model, of=None, seed=0, pairs=PAIRS, **changes):
    return score_patch(model, TOKENIZER, of or patch(), pairs, config(**changes), seed=seed)


def chosen(seed, count=5):
    """The calibration pairs: those with the smallest hash of seed and id, in D_h's order."""
    rank = lambda pair: hashlib.sha256(f"{seed}|{pair.id}".encode()).digest()  # noqa: E731
    few = sorted(PAIRS, key=rank)[:count]
    return [pair for pair in PAIRS if pair in few]


def batch(pairs, loss_on="answer"):
    encoded = [chat.encode_pair(TOKENIZER, p.prompt, p.response, loss_on) for p in pairs]
    return chat.collate(encoded, TOKENIZER.pad_token_id)


def merged(checkpoint, quantization, of):
    """A dense model whose weights *are* the effective ones: dequantised, plus the patch."""
    dense, _ = load(checkpoint)
    if quantization == "nf4":
        quantized, _ = load(checkpoint, quantization="nf4")
        for name, layer in target_weights(quantized, tiny.TARGETS).items():
            dense.get_parameter(name).data.copy_(effective_weight(layer))
    for name in of.factors if of else ():
        dense.get_parameter(name).data.add_(of.delta(name))
    return dense


def relative_error(scores, expected):
    assert list(scores) == list(expected)
    return max(float((scores[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("loss_on", chat.LOSS_ON)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_patched_scores_are_those_of_the_merged_model(quantization, loss_on, checkpoints):
    """Measured 8e-6 at most, and the other model's scores 1.9 and more away."""
    model, _ = load(checkpoints["llama"], quantization=quantization)
    of, pairs = patch(), [batch(chosen(0), loss_on)]
    scores = score(model, of, loss_on=loss_on)
    assert all(s.dtype == torch.float32 and s.device.type == "cpu" for s in scores.values())
    expected = snip(merged(checkpoints["llama"], quantization, of), pairs, TARGETS)
    assert relative_error(scores, expected) < 1e-4
    bare = snip(merged(checkpoints["llama"], quantization, None), pairs, TARGETS)
    assert relative_error(scores, bare) > 0.1
    scores = score(model, of, loss_on=loss_on, scored_model="backbone")
    assert relative_error(scores, bare) < 1e-5


def test_each_patch_is_scored_on_its_own_model_or_both_on_the_backbone(checkpoints):
    model, _ = load(checkpoints["llama"])
    se, osm = patch("se", 1), patch("osm", 2)
    on_backbone = [score(model, of, scored_model="backbone") for of in (se, osm)]
    assert all(torch.equal(on_backbone[0][name], on_backbone[1][name]) for name in se.factors)
    on_own = [score(model, of) for of in (se, osm)]
    assert relative_error(on_own[0], on_own[1]) > 0.1


def test_question_and_answer_are_two_scores(checkpoints):
    model, _ = load(checkpoints["llama"])
    for scored_model in ("patched", "backbone"):
        answer = score(model, scored_model=scored_model)
        question = score(model, scored_model=scored_model, loss_on="question")
        assert relative_error(question, answer) > 0.1


@pytest.fixture
def calls(monkeypatch):
    """What snip was given, call after call: (model, batches, targets)."""
    given = []

    def spy(model, batches, targets):
        given.append((model, list(batches), targets))
        return {"w": torch.ones(1)}

    monkeypatch.setattr(scoring, "snip", spy)
    return given


def assert_same(batches, pairs, sizes):
    assert [len(found["input_ids"]) for found in batches] == sizes
    pairs = iter(pairs)
    for found in batches:
        expected = batch([next(pairs) for _ in found["input_ids"]])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list(pairs)


@pytest.mark.parametrize("scored_model", ["patched", "backbone"])
def test_both_patches_are_scored_on_the_same_calibration_pairs(scored_model, calls):
    model = tiny.model("llama")
    for of in (patch("se", 1), patch("osm", 2)):
        score(model, of, seed=3, scored_model=scored_model)
        assert_same(calls[-1][1], chosen(3), [2, 2, 1])
        assert calls[-1][2] == TARGETS
    score(model, seed=4, scored_model=scored_model)
    assert chosen(4) != chosen(3)
    assert_same(calls[-1][1], chosen(4), [2, 2, 1])
    assert all((found is model) == (scored_model == "backbone") for found, _, _ in calls)


def test_a_small_calibration_set_is_used_whole(calls):
    score(tiny.model("llama"), samples=100, batch_size=3, seed=1)
    assert_same(calls[-1][1], PAIRS, [3, 3, 1])
    score(tiny.model("llama"), samples=1, seed=1)
    assert_same(calls[-1][1], chosen(1, 1), [1])


def test_the_batch_size_is_for_speed_only(checkpoints):
    model, _ = load(checkpoints["llama"])
    assert relative_error(score(model, batch_size=1), score(model, batch_size=5)) < 1e-5


def anatomy(model):
    """All that could change: names, classes, modes, hooks and the bits of every tensor."""
    modules = [
        (name, type(m).__name__, m.training, len(m._forward_hooks))
        for name, m in model.named_modules()
    ]
    return modules, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    modules, tensors = anatomy(model)
    assert modules == before[0] and list(tensors) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in tensors.items())


@pytest.mark.parametrize("scored_model", ["patched", "backbone"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_model_comes_back_bare_and_unchanged(quantization, scored_model, checkpoints):
    model, _ = load(checkpoints["llama"], quantization=quantization)
    before = anatomy(model)
    first = score(model, scored_model=scored_model)
    assert_untouched(model, before)
    again = score(model, scored_model=scored_model)  # nothing of the first pass is left in it
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_model_comes_back_bare_after_an_error():
    model = tiny.model("llama", tied=False)
    word = TOKENIZER.convert_tokens_to_ids("fence")
    model.get_input_embeddings().weight.data[word] = float("inf")
    modules, _ = anatomy(model)
    with pytest.raises(SpkitError, match="loss of calibration sample"):
        score(model, samples=7)
    assert anatomy(model)[0] == modules


def test_a_patch_of_another_model_is_named():
    model = tiny.model("llama", layers=3)
    before = anatomy(model)
    with pytest.raises(SpkitError, match=r"the patch has no 'model\.layers\.2\.self_attn\.q_proj"):
        score(model)
    assert_untouched(model, before)


def test_no_pairs():
    for scored_model in ("patched", "backbone"):
        with pytest.raises(SpkitError, match="no calibration samples"):
            score(tiny.model("llama"), pairs=[], scored_model=scored_model)
