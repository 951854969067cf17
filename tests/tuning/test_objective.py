"""The fast objective: openings and fit by hand, and its forward pass on tiny models."""

import pandas as pd
import pytest
import tiny
import torch

from spkit.errors import SpkitError
from spkit.examples import EvalPrompt
from spkit.models.chat import encode_prompt
from spkit.tuning.objective import (
    OPENING,
    USUAL,
    Objective,
    batches,
    fitted,
    opening_logprobs,
    openings_of,
)

QUESTIONS = ["how do i mend a boat", "paint the fence", "take the old net and then mend the boat"]


def prompt(text, objective):
    group = {"harmful": "seen", "over_safety": "harmless", "utility": "utility"}[objective]
    return EvalPrompt(text, text, objective, group, "c", "plain", "")


def stored(*rows):
    return pd.DataFrame(rows, columns=["id", "response", "refused"])


ANSWERS = stored(
    (QUESTIONS[0], "sorry no", True),
    (QUESTIONS[0], "first take the net", False),
    (QUESTIONS[1], "use a old net", False),
)
BOTH = [prompt(QUESTIONS[0], "harmful"), prompt(QUESTIONS[1], "over_safety")]


def test_an_opening_of_each_kind_for_every_prompt():
    tokens = tiny.tokenizer()
    refusing, helping = openings_of(tokens, BOTH, ANSWERS)
    no, help_, net = (tokens.encode(t, add_special_tokens=False) for t in ANSWERS["response"])
    assert refusing == [no, no]  # nothing refused the second prompt: the usual refusal
    assert helping == [help_, net]


def test_openings_where_no_answer_is_of_a_kind():
    tokens = tiny.tokenizer()
    refusing, _ = openings_of(tokens, BOTH, ANSWERS.iloc[1:])
    assert refusing[0] == tokens.encode(USUAL[True], add_special_tokens=False)[:OPENING]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_openings_are_scored_as_if_alone(architecture):
    model, tokens = tiny.model(architecture), tiny.tokenizer()
    batch = batches(tokens, QUESTIONS, 3)[0]
    texts = [["sorry no", "no", "first take the net"], ["use a old net", "paint", "net fence"]]
    rows = [[tokens.encode(t, add_special_tokens=False) for t in kind] for kind in texts]
    with torch.inference_mode():
        found = opening_logprobs(model, batch, rows)
        for kind, openings in enumerate(rows):
            for place, number in enumerate(batch[0]):
                question = encode_prompt(tokens, QUESTIONS[number])
                ids = torch.tensor([question + openings[place]])
                logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
                own = [
                    logprobs[len(question) + i - 1, token].item()
                    for i, token in enumerate(openings[place])
                ]
                assert found[kind, place].item() == pytest.approx(sum(own) / len(own), abs=1e-4)


def test_the_line_is_fitted_by_hand():
    # refusals above 0, helps below: b is positive and a near 0 by symmetry
    margins = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    a, b = fitted(margins, margins > 0)
    assert a == pytest.approx(0.0, abs=1e-3) and b > 1
    a, b = fitted(margins, torch.zeros(4, dtype=torch.bool))
    assert torch.sigmoid(torch.tensor(a + b * 2.0)) < 0.05
    with pytest.raises(SpkitError, match="no stored answers"):
        fitted(margins[:0], margins[:0] > 0)


def test_measure_is_the_mean_over_the_prompts_of_each_kind():
    model, tokens = tiny.model("llama"), tiny.tokenizer()
    objective = Objective(model, tokens, BOTH, [QUESTIONS[2], QUESTIONS[1]], 8)
    objective.openings(ANSWERS)
    base, base_kl = objective.look({})
    objective.learn([base], [torch.tensor([True, False])], base_kl)
    found = objective.measure({})
    refusals = torch.sigmoid(objective.line[0] + objective.line[1] * base).tolist()
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
