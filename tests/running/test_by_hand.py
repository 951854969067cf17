"""Alpha and beta by hand: the same answers as SafePatching's own deltas give."""

import dataclasses

import pandas as pd
import pytest
import tiny
import torch

from spkit.config import PatchingConfig
from spkit.evaluation.answers import generate
from spkit.examples import EvalPrompt
from spkit.method.patch import Factors
from spkit.method.safepatching import SafePatching
from spkit.models.patched import patched
from spkit.running import by_hand
from spkit.running.by_hand import ByHand, telling

NAMES = [f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("up", "down")]
TOKENIZER = tiny.tokenizer()


def prompt(id, group, text):
    objective = {"seen": "harmful", "unseen": "harmful", "harmless": "over_safety"}.get(
        group, group
    )
    return EvalPrompt(id, text, objective, group, "any", "plain", "")


PROMPTS = [prompt(str(i), "seen", text) for i, (text, _) in enumerate(tiny.PAIRS)]


def method(model, **values):
    draw = torch.Generator().manual_seed(0)
    shapes = {name: model.get_parameter(name).shape for name in NAMES}

    def factors(name):
        made = {
            n: (torch.randn(2, s[1], generator=draw), torch.randn(s[0], 2, generator=draw))
            for n, s in shapes.items()
        }
        return Factors(name, made, 0.5)

    scores = tuple(
        {n: torch.rand(s, generator=draw) for n, s in shapes.items()} for _ in ("se", "osm")
    )
    config = PatchingConfig(balance=None, **values)
    return SafePatching(factors("se"), factors("osm"), scores, config, seed=0)


@pytest.mark.parametrize("scale", ["norm_matched", "plain"])
def test_answers_are_those_of_the_method_at_these_strengths(scale):
    model = tiny.model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    own = method(model, scale=scale, alpha=2.0, beta=1.5)
    hand = ByHand(own, model, TOKENIZER, PROMPTS)
    said = hand.answers(0.7, 0.4)
    with patched(model, own.changed(alpha=0.7, beta=0.4).deltas()):
        wanted = generate(
            model, TOKENIZER, [p.prompt for p in PROMPTS], max_new_tokens=16, batch_size=8
        )
    assert said["answer"].tolist() == wanted
    assert said["prompt"].tolist() == [p.prompt for p in PROMPTS]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_the_grid_is_around_the_method_s_own_strengths():
    model = tiny.model("llama")
    grid = ByHand(method(model, alpha=2.0, beta=1.5), model, TOKENIZER, PROMPTS[:1]).grid((0, 1, 2))
    assert sorted(set(grid["alpha"])) == [0, 2, 4] and sorted(set(grid["beta"])) == [0, 1.5, 3]
    assert len(grid) == 9 and not grid.duplicated(["prompt", "alpha", "beta"]).any()
    none = ByHand(method(model, alpha=0.0, beta=1.5), model, TOKENIZER, PROMPTS[:1]).grid((0, 1, 2))
    assert none["alpha"].tolist() == [0, 0, 0] and none["beta"].tolist() == [0, 1.5, 3]


def test_sliders_only_where_somebody_can_move_them(monkeypatch):
    model = tiny.model("llama")
    hand = ByHand(method(model, alpha=2.0, beta=1.5), model, TOKENIZER, PROMPTS[:1])
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)  # as in papermill's kernel
    assert hand.sliders() is None
    monkeypatch.setenv("JPY_SESSION_NAME", "03_controllable_patching.ipynb")
    pytest.importorskip("ipywidgets")
    alpha, beta = hand.sliders().children[:2]
    assert (alpha.value, beta.value) == (2.0, 1.5) and not alpha.continuous_update
    assert by_hand.attended()


def test_telling_prompts_are_those_that_the_base_fails_on():
    groups = ["seen", "seen", "unseen", "harmless", "harmless", "utility"]
    prompts = [prompt(str(i), group, f"text {i}") for i, group in enumerate(groups)]
    verdicts = ["refusal", "harmful", "refusal", "correct", "refusal", "correct"]
    base = pd.DataFrame([dataclasses.asdict(p) for p in prompts]).assign(verdict=verdicts)
    assert [p.id for p in telling(prompts, base)] == ["1", "2", "4", "5"]  # none of unseen failed
