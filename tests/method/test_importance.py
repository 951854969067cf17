"""Importance of patches: which model is scored, on which pairs and which loss; what is saved."""

import copy
import hashlib
from dataclasses import replace

import pytest
import tiny
import torch

from spkit.comparison.ablations import ABLATIONS, ablated
from spkit.config import Config, ImportanceConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method import importance as scoring
from spkit.method import snip as scores_of
from spkit.method.importance import (
    Calibration,
    layers_per_pass,
    save_windows,
    score_patch,
    score_windows,
)
from spkit.method.overlap import ImportanceSummary
from spkit.method.patch import Factors
from spkit.method.patching import rate_count, top_rate_set
from spkit.method.sets import BitSets
from spkit.method.snip import snip
from spkit.models import chat
from spkit.models.loading import load
from spkit.models.weights import effective_weight, target_weights
from spkit.running.patch_of_run import load_safepatching

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
    return Factors(name, factors, 4.0, {"lora": lora})


def config(**changes):
    return ImportanceConfig(**dict(samples=5, batch_size=2) | changes)


def score(model, of=None, seed=0, pairs=PAIRS, **changes):
    calibration = Calibration(pairs, config(**changes), seed)
    return score_patch(model, TOKENIZER, of or patch(), calibration)


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
    same = modules == before[0] and list(tensors) == list(before[1])
    assert same  # apart, because pytest would take minutes to print the difference
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


# ---- two patches, window by window


TENSOR = "model.layers.1.mlp.down_proj.weight"
BOTH = (patch("se", 1), patch("osm", 2))
RATES = dict(top_rate_se=0.3, top_rate_osm=0.45)


def windows(model, patches=BOTH, **changes):
    return score_windows(model, TOKENIZER, patches, Calibration(PAIRS, config(**changes), 0))


@pytest.mark.parametrize("depth", [None, 1, 2, 9, "auto"])
@pytest.mark.parametrize("scored_model", ["patched", "backbone"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_at_once_are_each_alone(quantization, scored_model, depth, checkpoints):
    model, _ = load(checkpoints["llama"], quantization=quantization)
    before = anatomy(model)
    expected = {of.name: score(model, of, scored_model=scored_model) for of in BOTH}
    found, sizes = {"se": {}, "osm": {}}, []
    for window in windows(model, scored_model=scored_model, layers_per_pass=depth):
        assert list(window) == ["se", "osm"]
        assert list(window["se"]) == list(window["osm"])
        sizes.append(len(window["se"]))
        for name in found:
            found[name] |= window[name]
    assert sizes == ([2, 2] if depth == 1 else [4])
    for name in found:
        assert list(found[name]) == list(expected[name])
        for tensor, value in expected[name].items():
            assert torch.equal(found[name][tensor], value), (name, tensor)
            assert found[name][tensor].device.type == "cpu"
    differ = not torch.equal(found["se"][TENSOR], found["osm"][TENSOR])
    assert differ is (scored_model == "patched")
    assert_untouched(model, before)


@pytest.mark.parametrize("scored_model", ["patched", "backbone"])
@pytest.mark.parametrize("taken", [0, 1])
def test_the_model_comes_back_bare_when_the_windows_are_closed(taken, scored_model, checkpoints):
    model, _ = load(checkpoints["llama"])
    before = anatomy(model)
    walk = windows(model, scored_model=scored_model, layers_per_pass=1)
    for _ in range(taken):
        next(walk)
    walk.close()
    assert_untouched(model, before)


def test_an_error_in_a_later_window_gives_the_model_back(checkpoints, monkeypatch):
    model, _ = load(checkpoints["llama"])
    before, calls, own = anatomy(model), [], scores_of._score

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 4:  # OSM's second window
            raise SpkitError("no more")
        return own(*arguments)

    monkeypatch.setattr(scores_of, "_score", fails)
    walk = windows(model, layers_per_pass=1)
    assert len(next(walk)["osm"]) == 2
    with pytest.raises(SpkitError, match="no more"):
        next(walk)
    assert_untouched(model, before)


def test_layers_per_pass_by_hand(monkeypatch):
    """A layer of 64 x 64 and 64 x 128 weights takes 4 bytes a weight, for each patch and once more;
    0.4 of the free memory is for that."""
    model = tiny.model("llama", layers=5)
    a_layer = (64 * 64 + 64 * 128) * 4
    free = 0
    monkeypatch.setattr(scoring, "free_memory", lambda device: free)

    def depth(setting="auto", patches=2):
        return layers_per_pass(model, TARGETS, config(layers_per_pass=setting), patches)

    for free, layers in ((0, 1), (1, 1), (2.9, 2), (3.1, 3), (4.99, 4), (1e6, 5)):
        free = int(free * 3 * a_layer / 0.4) + 1
        assert depth() == layers
    free = int(3 * 2 * a_layer / 0.4) + 1  # three layers of one patch, two of two
    assert (depth(patches=1), depth(patches=2)) == (3, 2)
    free = 0
    assert [depth(None), depth(1), depth(4), depth(77)] == [None, 1, 4, 77]


def test_auto_asks_for_the_memory_of_the_models_device(monkeypatch):
    asked = []
    monkeypatch.setattr(scoring, "free_memory", lambda device: asked.append(str(device)) or 0)
    model = tiny.model("llama")
    found = list(windows(model, layers_per_pass="auto"))
    assert asked == ["cpu"] and len(found) == 2


# ---- what is saved


def whole_config(save="scores", depth=1, patching=RATES, **more):
    return Config(
        importance=dict(samples=5, batch_size=2, save=save, layers_per_pass=depth),
        patching=patching,
        seed=0,
        **more,
    )


def score_and_save(model, config, folder, watch=None):
    """As notebook 02 does it. watch(window): sees every window, as the summary does."""
    calibration = Calibration(PAIRS, config.importance, config.seed, config.data.max_tokens)
    summary = ImportanceSummary()
    if watch is not None:
        summary.add = watch
    windows = summary.watch(score_windows(model, TOKENIZER, BOTH, calibration))
    save_windows(windows, config.importance.save, config.patching, folder)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_scores_are_saved(tmp_path, checkpoints):
    model, _ = load(checkpoints["llama"])
    before, seen = anatomy(model), []
    how = dict(watch=lambda window: seen.append({n: list(s) for n, s in window.items()}))
    score_and_save(model, whole_config(), tmp_path, **how)
    assert files(tmp_path) == ["importance_osm.safetensors", "importance_se.safetensors"]
    for of in BOTH:
        found = scoring.load(tmp_path / f"importance_{of.name}.safetensors")
        expected = score(model, of)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = list(expected)
    assert seen == [{"se": part, "osm": part} for part in (names[:2], names[2:])]
    assert_untouched(model, before)


@pytest.mark.parametrize("depth", [None, 1])
def test_sets_are_those_of_the_scores(depth, tmp_path, checkpoints):
    model, _ = load(checkpoints["llama"])
    score_and_save(model, whole_config("sets", depth), tmp_path)
    assert files(tmp_path) == ["top_osm.safetensors", "top_se.safetensors"]
    for of, rate in zip(BOTH, RATES.values(), strict=True):
        sets = BitSets.load(tmp_path / f"top_{of.name}.safetensors")
        assert sets.about == {"top_rate": rate}
        expected = score(model, of)
        assert sorted(sets) == sorted(expected)
        for name, value in expected.items():
            assert torch.equal(sets[name], top_rate_set(value, rate))
            assert int(sets[name].sum()) == rate_count(rate, value.numel())


@pytest.mark.parametrize("save", ["scores", "sets"])
def test_an_error_of_the_watcher_gives_the_model_back_and_saves_nothing(save, tmp_path):
    """At once: a notebook keeps the error, and with it all that was being computed."""
    model = tiny.model("llama")
    before = anatomy(model)

    def watch(window):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        score_and_save(model, whole_config(save), tmp_path, watch=watch)
    assert caught.tb is not None
    assert_untouched(model, before)
    assert files(tmp_path) == []


@pytest.mark.parametrize("save", ["scores", "sets"])
def test_an_error_while_saving_gives_the_model_back(save, tmp_path, monkeypatch):
    model = tiny.model("llama")
    before = anatomy(model)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "top_rate_set" if save == "sets" else "gathered", interrupted)
    walk = windows(model, layers_per_pass=1)
    if save == "scores":
        next(walk)  # the model is wrapped from here on
    with pytest.raises(KeyboardInterrupt) as caught:
        save_windows(walk, save, whole_config(save).patching, tmp_path)
    assert caught.tb is not None
    assert_untouched(model, before)
    assert files(tmp_path) == []


def test_the_limit_on_tokens_is_that_of_the_data(tmp_path, monkeypatch):
    limits = []

    def spy(tokenizer, prompt, response, loss_on, max_tokens, ends):
        limits.append(max_tokens)
        return own(tokenizer, prompt, response, loss_on, max_tokens, ends)

    own = scoring.encode_pair
    monkeypatch.setattr(scoring, "encode_pair", spy)
    limited = whole_config(data=dict(max_tokens=16))
    score_and_save(tiny.model("llama"), limited, tmp_path)
    assert set(limits) == {16} and len(limits) == 5


@pytest.fixture
def saved(tmp_path):
    """Both ways of saving, beside the patches: load(save, **patching parameters)."""
    model = tiny.model("llama")
    for of in BOTH:
        of.save(tmp_path / "patches" / f"{of.name}.safetensors")
    for save in ("scores", "sets"):
        score_and_save(model, whole_config(save), tmp_path / save)

    def read(save, **changes):
        made = whole_config(save, patching=RATES | changes)
        return load_safepatching(tmp_path / "patches", tmp_path / save, made)

    return read


CHANGED_RATES = ("global top rate", "ranked after retention")


@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_sets_make_the_same_variants_as_scores(scale, saved):
    by_scores, by_sets = saved("scores", scale=scale), saved("sets", scale=scale)
    assert [type(found) for found in by_scores.importance] == [dict, dict]
    assert [type(found) for found in by_sets.importance] == [BitSets, BitSets]
    assert by_scores.weights == by_sets.weights == 2 * (64 * 64 + 64 * 128)
    names = [name for name in ABLATIONS if name not in CHANGED_RATES]
    assert len(names) == 10
    for variant in names:
        scored, packed = ablated(by_scores, variant), ablated(by_sets, variant)
        for one, other in zip(scored.kept(), packed.kept(), strict=True):
            assert sorted(one) == sorted(other)
            assert all(torch.equal(one[name], other[name]) for name in one), variant
        assert scored.strengths() == packed.strengths()
        one, other = scored.deltas(), packed.deltas()
        assert sorted(one) == sorted(other)
        assert all(torch.equal(one[name], other[name]) for name in one), variant
        assert any(one[name].any() for name in one)


@pytest.mark.parametrize("scope, order", [("global", "rank_all"), ("matrix", "rank_retained")])
def test_sets_cannot_be_ranked_again(scope, order, saved):
    """Neither as an ablation, nor as a change, nor with other parameters from the start."""
    by_scores, by_sets = saved("scores"), saved("sets")
    variant = CHANGED_RATES[order == "rank_retained"]
    key, value = ("order", order) if scope == "matrix" else ("scope", scope)
    sentence = f"patching.{key} '{value}' needs the importances, and only the top-rate sets were"
    assert ablated(by_scores, variant).kept() and saved("scores", **{key: value}).kept()
    for ask in (
        lambda: ablated(by_sets, variant),
        lambda: by_sets.changed(**{key: value}),
        lambda: replace(by_sets, config=saved("scores", **{key: value}).config),
    ):
        with pytest.raises(SpkitError, match=f"^{sentence}"):
            ask()
    assert by_sets.changed(alpha=7.0, retention_rate=0.1, scale="plain").kept()


@pytest.mark.parametrize("key", list(RATES))
def test_sets_of_another_rate(key, saved):
    sentence = f"made with patching.{key} {RATES[key]}, and now it is 0.2: run notebook 02 again"
    with pytest.raises(SpkitError, match=sentence):
        saved("sets", **{key: 0.2})
    assert saved("scores", **{key: 0.2}).kept()
    by_scores, by_sets = saved("scores"), saved("sets")
    with pytest.raises(SpkitError, match=sentence):
        by_sets.changed(**{key: 0.2})
    assert by_sets.changed(**{key: RATES[key]}).kept() and by_scores.changed(**{key: 0.2}).kept()


def test_what_was_saved_in_the_other_way_is_missing(saved, tmp_path):
    for name in ("importance_se", "importance_osm"):
        (tmp_path / "scores" / f"{name}.safetensors").unlink()
    with pytest.raises(SpkitError, match="importance_se"):
        saved("scores")
    (tmp_path / "sets" / "top_osm.safetensors").unlink()
    with pytest.raises(SpkitError, match="top_osm.safetensors cannot be read as sets"):
        saved("sets")
    (tmp_path / "patches" / "osm.safetensors").unlink()
    with pytest.raises(SpkitError, match="osm.safetensors cannot be read as a patch"):
        saved("sets")


# ---- the batches of a calibration


def counts(batches):
    return [len(found["input_ids"]) for found in batches]


def test_answers_are_one_batch_where_it_is_small_enough():
    """`at_most` counts the padded tokens of the whole batch."""
    calibration = Calibration(PAIRS, config(loss_on="question"), 0)
    whole = batch(chosen(0))
    tokens = whole["input_ids"].numel()
    (one,) = calibration.answers(TOKENIZER, tokens)
    assert one.keys() == whole.keys() and all(torch.equal(one[k], whole[k]) for k in whole)
    assert counts(calibration.answers(TOKENIZER, tokens - 1)) == [2, 2, 1]
    several = calibration.answers(TOKENIZER, tokens - 1)
    assert_same(several, chosen(0), [2, 2, 1])  # on the answer, though the scores are not
    asked = calibration.batches(TOKENIZER)
    assert counts(asked) == [2, 2, 1]
    expected = batch(chosen(0)[:2], "question")
    assert torch.equal(asked[0]["labels"], expected["labels"])
    assert not torch.equal(asked[0]["labels"], several[0]["labels"])


def test_a_calibration_cuts_its_pairs_where_it_is_told():
    longest = max(found["input_ids"].shape[1] for found in batches_of(None))
    cut = batches_of(longest - 1)
    assert max(found["input_ids"].shape[1] for found in cut) == longest - 1


def batches_of(max_tokens):
    return Calibration(PAIRS, config(), 0, max_tokens).batches(TOKENIZER)
