"""The loop over stages, with methods made up for the purpose: any model, any way of adding."""

import pytest
import torch

from spkit.method.continual import run_stages, stage_seed

STAGES = ["a", "b", "c"]


def appended(k, model, data):
    return [*model, (k, data)]


def test_each_stage_starts_from_what_the_last_one_left():
    given = []

    def step(k, model, data):
        given.append((k, list(model), data))
        return appended(k, model, data)

    assert list(run_stages(["base"], STAGES, step)) == [
        (1, ["base", (1, "a")]),
        (2, ["base", (1, "a"), (2, "b")]),
        (3, ["base", (1, "a"), (2, "b"), (3, "c")]),
    ]
    assert given[2] == (3, ["base", (1, "a"), (2, "b")], "c")


def test_a_sum_of_deltas_is_the_equation():
    """theta_k = theta_(k-1) + delta_k, and the delta of a stage depends on the model before."""
    theta = torch.tensor([1.0, 2.0])
    pairs = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])]
    found = list(run_stages(theta, pairs, lambda k, model, data: model + k * data * model))
    assert [(k, model.tolist()) for k, model in found] == [(1, [2.0, 2.0]), (2, [2.0, 18.0])]
    assert theta.tolist() == [1.0, 2.0]


def test_a_stage_is_made_when_it_is_asked_for():
    """What comes after a stage (its answers) is done before the next one begins."""
    seen = []

    def step(k, model, data):
        seen.append(f"step {k}")
        return model

    for k, _ in run_stages("base", STAGES, step):
        seen.append(f"answers {k}")
    assert seen == [f"{what} {k}" for k in (1, 2, 3) for what in ("step", "answers")]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resumed_it_goes_on_as_if_it_had_not_been_cut(done):
    whole = list(run_stages(["base"], STAGES, appended))
    last = whole[done - 1][1] if done else None
    steps = []

    def step(k, model, data):
        steps.append(k)
        return appended(k, model, data)

    rest = list(run_stages(["base"], STAGES, step, done, last))
    assert whole[:done] + rest == whole
    assert steps == list(range(done + 1, 4))  # no finished stage is made again


def test_a_failed_stage_is_not_passed_on():
    def step(k, model, data):
        if k == 2:
            raise KeyboardInterrupt
        return appended(k, model, data)

    walk = run_stages(["base"], STAGES, step)
    assert next(walk) == (1, ["base", (1, "a")])
    with pytest.raises(KeyboardInterrupt):
        next(walk)
    assert list(walk) == []


def test_the_first_stage_does_not_read_last():
    assert list(run_stages("base", ["a"], lambda k, model, data: model, last="other")) == [
        (1, "base")
    ]


def test_stage_seeds_are_all_different():
    seeds = {stage_seed(seed, stage) for seed in range(20) for stage in range(20)}
    assert len(seeds) == 400
    assert stage_seed(3, 2) == 3002
