"""The alignment's loop: where it ends, that it resumes to the same bits, and what it learns."""

import pytest
import tiny
import torch

from spkit.alignment import recipe
from spkit.alignment.loop import Check, in_windows, train, utility_kept
from spkit.config import AlignConfig
from spkit.errors import SpkitError

CONFIG = AlignConfig(learning_rate=1e-3, batch_size=2, max_steps=6, check_every=2)


def encoded():
    tokens = tiny.tokenizer()
    harmful, harmless = [q for q, _ in tiny.PAIRS[:2]], tiny.PAIRS[2:]
    questions, answers = zip(*harmless, strict=True)
    return recipe.examples(tokens, harmful, questions, answers, seed=0, longest=9)


def aligned(folder, checks, config=CONFIG):
    """(model, checks) of one training; checks: {step: what is found}, missing steps raise."""
    model = tiny.model("llama")

    def ask(step):
        if step not in checks:
            raise KeyboardInterrupt
        return checks[step]

    identity = {"made from": "a test"}
    found = train(model, encoded(), 0, config, 0, ask=ask, folder=folder, identity=identity)
    return model, found


FAR = {step: Check(step, 90.0, 2.0) for step in range(0, 7)}
NEAR = FAR | {6: Check(6, 30.0, 30.0)}


def test_it_ends_at_the_first_check_in_both_windows(tmp_path):
    _, checks = aligned(tmp_path / "a", FAR | {4: Check(4, 30.0, 30.0)})
    assert [check.step for check in checks] == [0, 2, 4]


def test_it_resumes_to_the_same_bits(tmp_path):
    whole, checks = aligned(tmp_path / "whole", NEAR)
    cut = {step: check for step, check in NEAR.items() if step < 4}
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "cut", cut)
    model, resumed = aligned(tmp_path / "cut", NEAR)
    assert [check.step for check in resumed] == [check.step for check in checks] == [0, 2, 4, 6]
    assert resumed[-1].loss == checks[-1].loss
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    fresh = tiny.model("llama").state_dict()
    assert not all(torch.equal(value, fresh[name]) for name, value in weights.items())


def test_windows_that_are_not_reached_are_one_sentence_and_nothing_stays(tmp_path):
    with pytest.raises(SpkitError, match="nearest was step 0 with 90 % of harmful prompts .* 2 %"):
        aligned(tmp_path / "a", FAR)
    assert not (tmp_path / "a").exists()


def test_utility_that_is_lost_is_not_the_end(tmp_path):
    lost = {4: Check(4, 30.0, 30.0, utility=57.9), 0: Check(0, 90.0, 2.0, utility=60.0)}
    _, checks = aligned(tmp_path / "a", NEAR | lost)
    assert checks[-1].step == 6
    assert utility_kept(Check(4, 30, 30, utility=58.0), lost[0], CONFIG)
    assert not in_windows(Check(4, 45.1, 30.0), CONFIG) and in_windows(Check(4, 45, 15), CONFIG)


def test_every_pass_has_every_example_once():
    places = [i for step in range(6) for i in recipe.batch_of(4, 2, seed=1, step=step)]
    assert [sorted(places[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert places[:4] != places[4:8] or places[4:8] != places[8:]


def test_harmful_requests_are_refused_and_a_cut_answer_has_no_end():
    tokens = tiny.tokenizer()
    found = encoded()
    assert len(found) == 3
    labels = [i for i in found[0][1] if i != -100]
    refusals = [tokens.encode(r, add_special_tokens=False) for r in recipe.REFUSALS]
    assert labels[:-1] in refusals and labels[-1] == tokens.eos_token_id
    question, answer = tiny.PAIRS[0]
    cut = recipe.examples(tokens, [], [question], [answer], seed=0, longest=3)
    assert cut[0][0][-1] != tokens.eos_token_id
