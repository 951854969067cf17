"""The rule of the choice, on tables made by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from spkit.tuning.choose import choose, cost, shortlist
from spkit.tuning.figure import front

BASE = {"harm": 50.0, "refusal": 40.0, "failed": 0.0}


def trials(*rows):
    frame = pd.DataFrame(rows, columns=["harm", "refusal", "kl"])
    frame["trial"] = range(len(frame))
    frame["setting"] = [json.dumps({"alpha": n}) for n in range(len(frame))]
    return frame


def test_cost_by_hand():
    assert cost(BASE, BASE) == pytest.approx(2.8)
    assert cost({"harm": 5, "refusal": 4}, BASE) == pytest.approx(0.2)
    assert cost({"harm": 45, "refusal": 4}, BASE) == pytest.approx(0.9 + 0.1 + 2 * 0.1)
    assert cost({"harm": 5, "refusal": 4, "failed": 30}, BASE) == pytest.approx(0.5)
    never = {"harm": 0.0, "refusal": 0.0}
    assert cost({"harm": 0.5, "refusal": 0.0}, never) == pytest.approx(0.5)


def test_half_by_cost_half_span_the_front():
    table = trials(
        (5, 5, 0.05),  # 0: the lowest cost, and before all others
        (6, 6, 0.05),  # 1: the next by cost, but dominated
        (0, 60, 0.05),  # 2: an end of the front
        (70, 0, 0.05),  # 3: the other one
        (0, 0, 0.5),  # 4: costs too much KL
        (9, 9, 0.05),  # 5
    )
    assert shortlist(table, BASE, 4, 0.1) == [0, 1, 2, 3]
    assert shortlist(table, BASE, 2, 0.1) == [0, 2]
    assert shortlist(table, BASE, 9, 0.1) == [0, 1, 5, 3, 2]  # all that there are, by cost
    assert shortlist(table, BASE, 1, 0.1) == [0]


def test_one_setting_is_judged_once_and_without_an_allowed_one_the_least_kl_is():
    table = trials((5, 5, 0.3), (6, 6, 0.2), (7, 7, 0.4))
    assert shortlist(table, BASE, 2, 0.1) == [1, 0]
    table["setting"] = "{}"
    assert shortlist(table, BASE, 3, 1.0) == [0]


def points(*rows):
    frame = pd.DataFrame(rows, columns=["point", "harm", "refusal", "failed", "kl"])
    return frame.set_index(pd.Index(range(3, 3 + len(frame))))  # places, not numbers from 0


def test_the_lowest_judged_cost_within_the_kl_is_chosen():
    table = points(
        ("as set", 30, 20, 0, 0.02), ("trial 4", 10, 10, 0, 0.1), ("trial 7", 1, 1, 0, 0.11)
    )
    place, why = choose(table, BASE, 0.1)
    assert place == 4 and "trial 4" in why and "2 judged settings" in why
    assert choose(table, BASE, 0.2)[0] == 5
    place, why = choose(table, BASE, 0.01)
    assert place == 3 and "No judged setting has a KL of at most 0.01" in why and "as set" in why


def test_broken_text_is_not_chosen():
    table = points(("trial 1", 0, 0, 90, 0.01), ("trial 2", 10, 10, 0, 0.01))
    assert choose(table, BASE, 0.1)[0] == 4


def test_the_front_is_a_step_line():
    x, y = front(trials((5, 5, 0), (6, 6, 0), (0, 60, 0), (70, 0, 0), (5, 9, 0)))
    assert x.tolist() == [0, 5, 5, 70, 70] and y.tolist() == [60, 60, 5, 5, 0]
    assert [len(part) for part in front(trials())] == [0, 0]
    assert np.isfinite(x).all()
