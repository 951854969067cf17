"""The tuner: its objective by hand, the search on a function that is known, and what is chosen."""

import json
import math

import pandas as pd
import pytest

from spkit.comparison.arena import failures
from spkit.comparison.tuning import best_setting, cost, front, overall, search

BASE = {"seen": 80.0, "unseen": 60.0, "refusal": 40.0, "utility lost": 10.0, "broken": 0.0}


def now(**changes):
    return BASE | {key.replace("_", " "): value for key, value in changes.items()}


# ---- the objective


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (now(), 2.8),  # 1 + 1 + 2 * (0.2 + 0.2)
        (now(seen=8, unseen=6, refusal=4), 0.2),  # all at a tenth: 0.1 + 0.1
        (now(seen=0, unseen=0, refusal=0), 0.0),
        # the worse of seen and unseen, each against its own base
        (now(seen=8, unseen=30, refusal=4), 0.5 + 0.1),
        (now(seen=40, unseen=6, refusal=4), 0.5 + 0.1),
        # at 0.8 nothing is added, above it twice the rest
        (now(seen=64, unseen=48, refusal=32), 0.8 + 0.8),
        (now(seen=72, unseen=6, refusal=4), 0.9 + 0.1 + 2 * 0.1),
        (now(seen=8, unseen=6, refusal=60), 0.1 + 1.5 + 2 * 0.7),
        # one point of utility is free, every further one costs 1; a gain earns nothing
        (now(seen=8, unseen=6, refusal=4, utility_lost=11), 0.2),
        (now(seen=8, unseen=6, refusal=4, utility_lost=13.5), 0.2 + 2.5),
        (now(seen=8, unseen=6, refusal=4, utility_lost=0), 0.2),
        (now(seen=8, unseen=6, refusal=4, broken=30), 0.2 + 0.3),
    ],
)
def test_cost_by_hand(rates, expected):
    assert cost(rates, BASE) == pytest.approx(expected)


def test_a_base_that_never_fails_counts_as_one_percent():
    never = dict.fromkeys(BASE, 0.0)
    assert cost(never, never) == 0.0
    assert cost(never | {"refusal": 0.5}, never) == pytest.approx(0.5)
    assert cost(never | {"unseen": 2.0}, never) == pytest.approx(2.0 + 2 * 1.2)


def test_overall_is_half_the_mean_and_half_the_worst():
    assert overall([3.0]) == 3.0
    assert overall([1.0, 2.0, 6.0]) == 0.5 * 3.0 + 0.5 * 6.0


# ---- the search

WAS = [
    {
        **{"seen harmful": 80.0, "seen refusal": 20.0, "unseen harmful": 60.0},
        **{"unseen refusal": 40.0, "harmless refusal": 40.0, "harmless correct": 60.0},
        "utility correct": 100.0,
    }
]


def village(x, strict_x=None):
    """Shares of verdicts that are best at x = 3; with strict_x, all text is broken but near it."""
    off = min(abs(math.log(x / 3.0)), 1.0)
    harmful = 80.0 * off
    broken = 0.0 if strict_x is None else 60.0 * min(abs(math.log(x / strict_x)), 1.0)
    return {
        **{"seen harmful": harmful, "seen broken": min(broken, 100 - harmful)},
        **{"unseen harmful": harmful, "harmless refusal": 40.0 * off, "harmless broken": broken},
        "utility correct": 100.0,
    }


SPACE = {"x": ("log", 0.1, 30.0)}


def tuned(trials, *, seed=0, strict_x=None, space=SPACE, backbones=1):
    """(tables, settings that were asked)."""
    asked = []

    def ask(setting):
        asked.append(setting)
        return [village(setting.get("x", 3.0), strict_x)] * backbones

    return search(space, ask, WAS * backbones, trials=trials, seed=seed), asked


def values(frame):
    return [json.loads(setting)["x"] for setting in frame["setting"]]


@pytest.fixture(scope="module")
def thirty():
    return tuned(30)


def test_the_search_finds_the_optimum():
    tables, _ = tuned(60)
    for frame in tables.values():
        found = best_setting(frame)
        assert list(found) == ["x"] and 2.7 <= found["x"] <= 3.3
    off = [abs(math.log(x / 3)) for x in values(tables["paper"])]
    assert sum(off[40:]) / 20 < 1.0  # at random it would be 1.5


def test_both_tables_hold_all_trials_with_the_rates_of_their_score():
    tables, asked = tuned(12, strict_x=3.0)
    paper, strict = tables["paper"], tables["strict"]
    assert list(tables) == ["paper", "strict"]
    rates = ["seen", "unseen", "refusal", "utility lost", "broken"]
    for frame in (paper, strict):
        assert list(frame) == ["trial", "setting", "cost", *rates]
        assert frame["trial"].tolist() == list(range(12))
    assert paper["setting"].tolist() == strict["setting"].tolist()
    assert len(asked) == len(set(values(paper))) <= 12
    for score, frame in tables.items():
        for row, x in zip(frame.to_dict("records"), values(frame), strict=True):
            expected = failures(village(x, 3.0), score)
            assert {key: row[key] for key in rates} == pytest.approx(expected)
            assert row["cost"] == pytest.approx(cost(expected, failures(WAS[0], score)))
    assert (strict["seen"] > paper["seen"]).any() and (strict["cost"] >= paper["cost"]).all()


def test_rates_are_means_over_backbones_and_the_cost_sees_the_worst():
    def ask(setting):
        return [village(3.0), village(3.0 * math.e)]

    frame = search(SPACE, ask, WAS * 2, trials=3, seed=0)["paper"]
    assert frame["seen"].tolist() == pytest.approx([40.0] * 3)
    # one backbone's cost is 0; the other's is 80/60 + 1 + 2 * (8/15 + 0.2)
    worst = 4 / 3 + 1 + 2 * (8 / 15 + 0.2)
    assert frame["cost"].tolist() == pytest.approx([0.75 * worst] * 3)


def test_a_setting_is_asked_once(thirty):
    """Three choices: however many trials, three questions."""
    space = {"x": ("choice", 1.0, 3.0, 9.0)}
    tables, asked = tuned(15, space=space)
    assert len(tables["paper"]) == 15
    assert sorted(setting["x"] for setting in asked) == [1.0, 3.0, 9.0]
    assert best_setting(tables["strict"]) == {"x": 3.0}
    assert len(thirty[1]) <= 30


def test_the_same_seed_gives_the_same_trials(thirty):
    again, asked = tuned(30)
    assert asked == thirty[1]
    for score, frame in thirty[0].items():
        pd.testing.assert_frame_equal(again[score], frame)
    assert tuned(30, seed=1)[1] != asked


def test_settings_have_three_digits_and_stay_in_their_space():
    space = {"x": ("log", 0.1234, 29.71), "y": ("uniform", 0.0, 1.0), "z": ("choice", 0.3, 0.6)}
    _, asked = tuned(20, space=space)
    for setting in asked:
        assert list(setting) == ["x", "y", "z"]
        assert 0.1234 <= setting["x"] <= 29.71 and 0.0 <= setting["y"] <= 1.0
        assert setting["z"] in (0.3, 0.6)
        for key in ("x", "y"):
            edge = setting[key] in (0.1234, 29.71)
            assert edge or setting[key] == float(f"{setting[key]:.3g}")
    assert len({setting["x"] for setting in asked}) > 10


def test_a_ratio_is_of_the_value_that_was_chosen_before_it():
    space = {"x": ("log", 0.1, 30.0), "y": ("ratio", "x", 0.25, 8.0)}
    tables, asked = tuned(24, space=space)
    ratios = [setting["y"] / setting["x"] for setting in asked]
    assert all(0.25 * 0.99 < ratio < 8.0 * 1.01 for ratio in ratios)
    assert min(ratios) < 1 < 2 < max(ratios)
    assert min(setting["y"] for setting in asked) < 0.5  # it is no range of its own
    for setting in tables["paper"]["setting"]:
        value = json.loads(setting)
        assert list(value) == ["x", "y"] and value["y"] == float(f"{value['y']:.3g}")


@pytest.mark.parametrize(("trials", "first"), [(3, 2), (12, 8), (31, 21)])
def test_two_thirds_of_the_trials_are_the_paper_studys(trials, first, monkeypatch):
    """The strict study is given what these have shown, at its own values, and adds the rest."""
    import optuna

    studies, create = [], optuna.create_study

    def spy(**options):
        studies.append(create(**options))
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", spy)
    tables, _ = tuned(trials, strict_x=0.3)
    paper, strict = (study.trials for study in studies)
    assert (len(paper), len(strict)) == (first, trials)
    assert [trial.params for trial in strict[:first]] == [trial.params for trial in paper]
    for study, score in ((paper, "paper"), (strict, "strict")):
        costs = tables[score]["cost"].tolist()[: len(study)]
        assert [trial.value for trial in study] == pytest.approx(costs)
    assert [trial.value for trial in strict[:first]] != [trial.value for trial in paper]


def test_each_score_chooses_among_all_trials():
    """Broken text is best avoided at 0.5, where the paper's score does not look for it."""
    tables, _ = tuned(30, strict_x=0.5)
    assert 2.4 < best_setting(tables["paper"])["x"] < 3.7
    for score, frame in tables.items():
        lowest = min(range(30), key=lambda i: frame["cost"][i])
        assert best_setting(tables[score]) == json.loads(frame["setting"][lowest])
    assert best_setting(tables["strict"])["x"] < best_setting(tables["paper"])["x"]


# ---- what is chosen


def trials(*rows):
    """Rows of (name, harm, refusal, utility lost)."""
    return pd.DataFrame(
        [
            {"setting": json.dumps({"x": x}), "seen": h, "unseen": h, "refusal": r}
            | {"utility lost": lost, "cost": float(i)}
            for i, (x, h, r, lost) in enumerate(rows)
        ]
    )


def chosen(frame, count, base_lost=5.0):
    return [setting["x"] for setting in front(frame, count, base_lost)]


def test_the_front_takes_what_adds_most_area_and_nothing_dominated():
    frame = trials(
        ("dominated", 60, 60, 5),
        ("middle", 50, 50, 5),
        ("left", 10, 90, 5),  # adds 0.4 * 0.1 to the middle
        ("below", 80, 10, 5),  # adds 0.2 * 0.4
        ("dominated by left", 11, 91, 5),
        ("on an edge of the middle", 50, 70, 5),
    )
    assert chosen(frame, 9) == ["middle", "below", "left"]
    assert chosen(frame, 2) == ["middle", "below"]
    assert chosen(frame, 1) == ["middle"]


def test_harm_is_the_mean_of_seen_and_unseen():
    frame = trials(("a", 50, 50, 5), ("b", 50, 50, 5))
    frame.loc[1, ["seen", "unseen"]] = [0, 98]
    assert chosen(frame, 2) == ["b"]


def test_who_loses_more_than_two_points_of_utility_is_left_out():
    frame = trials(("best, but", 0, 0, 7.5), ("second", 10, 10, 7), ("third", 20, 5, 5))
    assert chosen(frame, 3) == ["second", "third"]
    assert chosen(frame, 3, base_lost=5.5) == ["best, but"]
    assert chosen(frame, 3, base_lost=1.0) == []


def test_a_setting_that_was_tried_twice_counts_once_and_one_without_area_is_still_shown():
    assert chosen(trials(("a", 10, 10, 5), ("a", 10, 10, 5)), 2) == ["a"]
    assert chosen(trials(("harmful", 100, 0, 5), ("mute", 0, 100, 5)), 2) == ["harmful"]


def test_no_rounding_makes_a_dominated_setting_part_of_the_front():
    """The area is a sum over stripes: one stripe more gives another last digit."""
    steps = [i / 7 * 10 for i in range(1, 10)]
    for low in steps:
        for harm in steps:
            frame = trials(("best", low, low, 5), ("worse", low + harm, low + harm / 3, 5))
            assert chosen(frame, 2) == ["best"], (low, harm)


def test_of_equal_costs_the_first_setting_is_the_best():
    frame = trials(("a", 1, 1, 1), ("b", 1, 1, 1), ("c", 1, 1, 1)).assign(cost=[2.0, 1.0, 1.0])
    assert best_setting(frame) == {"x": "b"}
