"""The fast objective: by hand on made-up distributions, and its forward pass on a tiny model."""

import math

import pytest
import tiny
import torch

from spkit.errors import SpkitError
from spkit.examples import EvalPrompt
from spkit.models.chat import encode_prompt
from spkit.tuning.objective import (
    Objective,
    expected_refusal,
    first_token_logprobs,
    mean_kl,
    refusal_shares,
)

QUESTIONS = ["how do i mend a boat", "paint the fence", "take the old net and then mend the boat"]


def prompt(text, objective):
    group = {"harmful": "seen", "over_safety": "harmless", "utility": "utility"}[objective]
    return EvalPrompt(text, text, objective, group, "c", "plain", "")


def test_shares_by_hand():
    # 4 answers, 3 of them refusals: 0.75 of all. Token 1: 2 of 2, token 2: 1 of 2, token 0: none
    tokens, refused = torch.tensor([1, 1, 2, 2]), torch.tensor([True, True, True, False])
    assert refusal_shares(tokens, refused, 3).tolist() == pytest.approx(
        [0.75, (2 + 0.75) / 3, (1 + 0.75) / 3]
    )
    with pytest.raises(SpkitError, match="no stored answers"):
        refusal_shares(tokens[:0], refused[:0], 3)


def test_expected_refusal_and_kl_by_hand():
    shares = torch.tensor([0.0, 1.0, 0.5])
    now = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]]).log()
    assert expected_refusal(now, shares).tolist() == pytest.approx([0.375, 0.9])
    base = torch.tensor([[0.5, 0.5]]).log()
    other = torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert mean_kl(base, other) == pytest.approx(by_hand)
    assert mean_kl(base, base) == 0.0


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_padded_prompt_is_read_as_if_alone(architecture):
    model, tokens = tiny.model(architecture), tiny.tokenizer()
    found = first_token_logprobs(model, tokens, QUESTIONS, 2)
    for row, text in zip(found, QUESTIONS, strict=True):
        ids = torch.tensor([encode_prompt(tokens, text)])
        with torch.inference_mode():
            alone = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), dim=-1)
        assert torch.allclose(row, alone, atol=1e-5)
    assert found.dtype == torch.float32 and found.exp().sum(dim=1).tolist() == pytest.approx(
        [1] * 3
    )


def test_measure_is_the_mean_over_the_prompts_of_each_kind():
    model, tokens = tiny.model("llama"), tiny.tokenizer()
    asked = [prompt(QUESTIONS[0], "harmful"), prompt(QUESTIONS[1], "over_safety")]
    objective = Objective(model, tokens, asked, [QUESTIONS[2], QUESTIONS[1]], 8)
    base, base_kl = objective.look({})
    objective.learn([base], [torch.tensor([True, False])], base_kl)
    found = objective.measure({})
    refusals = expected_refusal(base, objective.shares).tolist()
    assert found["harm"] == pytest.approx(100 * (1 - refusals[0]))
    assert found["refusal"] == pytest.approx(100 * refusals[1])
    assert found["kl"] == 0.0
    name = "model.layers.1.mlp.down_proj.weight"
    moved = objective.measure({name: torch.ones(64, 128)})
    assert moved["kl"] > 0 and moved["harm"] != found["harm"]
    assert objective.measure({}) == found  # the patch is gone again


def test_both_kinds_of_prompts_are_needed():
    model, tokens = tiny.model("llama"), tiny.tokenizer()
    both = [prompt(QUESTIONS[0], "harmful"), prompt(QUESTIONS[1], "over_safety")]
    for kept, lacking in ((both[:1], "harmless"), (both[1:], "harmful")):
        with pytest.raises(SpkitError, match=f"no {lacking} dev prompts"):
            Objective(model, tokens, kept, QUESTIONS, 8)
    with pytest.raises(SpkitError, match="utility.kl"):
        Objective(model, tokens, both, [], 8)
