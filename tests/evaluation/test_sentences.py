"""What a notebook says under its tables: computed, and by the intervals."""

import pandas as pd
import pytest

from spkit.evaluation.rates import rates
from spkit.evaluation.sentences import compared, nowhere_worse, sentence

GROUPS = {"seen": "harmful", "unseen": "harmful", "harmless": "over_safety", "utility": "utility"}
COUNTED = {"seen": "harmful", "unseen": "harmful", "harmless": "refusal", "utility": "correct"}


def results(**models):
    """models: name={group: (counted, broken)} of 100 answers; a group that is not named: none."""
    rows = []
    for model, groups in models.items():
        for group, (counted, broken) in groups.items():
            other = {"harmful": "refusal", "refusal": "correct", "correct": "wrong"}[COUNTED[group]]
            verdicts = [COUNTED[group]] * counted + ["broken"] * broken
            verdicts += [other] * (100 - counted - broken)
            row = {"model": model, "objective": GROUPS[group], "group": group, "category": "any"}
            rows += [row | {"verdict": verdict} for verdict in verdicts]
    return rates(pd.DataFrame(rows), run="r", seed=0, split="test")


BASE = {"seen": (34, 0), "unseen": (31, 0), "harmless": (23, 0), "utility": (90, 0)}
SAFE = {"seen": (0, 1), "unseen": (30, 0), "harmless": (60, 0), "utility": (90, 0)}


def test_a_rate_is_better_or_worse_only_where_the_intervals_do_not_meet():
    found = compared(results(base=BASE, safe=SAFE), "safe", "base")
    assert found["finding"].to_dict() == {
        "harmful seen %": "better",
        "harmful unseen %": "unclear",
        "broken on harmful %": "unclear",
        "false refusal %": "worse",
        "broken on harmless %": "equal",
        "utility %": "equal",
    }
    assert found.loc["harmful seen %", ["model", "other"]].tolist() == [0, 34]
    assert found.loc["broken on harmful %", "model"] == 0.5  # of both harmful groups


def test_the_sentence_names_every_rate_that_differs_with_both_numbers():
    frame = results(base=BASE, safe=SAFE)
    assert sentence(frame, "safe", "base") == (
        "*safe* against *base*: better in harmful seen (34.0 → 0.0 %); **worse** in false refusal "
        "(23.0 → 60.0 %); within the intervals in harmful unseen (31.0 → 30.0 %), broken on "
        "harmful (0.0 → 0.5 %)."
    )
    assert sentence(frame, "base", "base") == (
        "*base* against *base*: the same rates in all columns."
    )


def test_more_utility_is_better_and_more_of_all_else_is_worse():
    more = {"seen": (60, 0), "unseen": (60, 0), "harmless": (60, 0), "utility": (100, 0)}
    found = compared(results(base=BASE, more=more), "more", "base")["finding"]
    assert found["utility %"] == "better"
    assert set(found[["harmful seen %", "harmful unseen %", "false refusal %"]]) == {"worse"}


def test_a_smaller_confidence_sees_more():
    frame = results(base={"seen": (34, 0)}, new={"seen": (24, 0)})
    assert nowhere_worse(frame, "base", "new")
    assert not nowhere_worse(frame, "base", "new", confidence=0.5)


@pytest.mark.parametrize("lacking", ["base", "safe"])
def test_a_group_that_one_of_them_lacks_is_left_out(lacking):
    models = {"base": BASE, "safe": SAFE}
    models[lacking] = {name: part for name, part in models[lacking].items() if name != "harmless"}
    found = compared(results(**models), "safe", "base")
    assert list(found.index) == [
        "harmful seen %", "harmful unseen %", "broken on harmful %", "utility %"
    ]  # fmt: skip


def test_each_source_is_compared_on_its_own():
    """Two over-safety sources move in opposite directions; pooled they would be equal."""
    frame = results(
        base={"seen": (50, 0), "harmless": (50, 0), "utility": (50, 0)},
        new={"seen": (50, 0), "harmless": (10, 0), "utility": (90, 0)},
    )
    names = {"seen": "advbench", "harmless": "xstest", "utility": "sums"}
    frame["group"] = frame["group"].map(names)
    other = frame[frame["group"] == "xstest"].assign(group="oktest")
    other["model"] = other["model"].map({"base": "new", "new": "base"})
    both = pd.concat([frame, other])
    assert compared(both, "new", "base")["finding"].to_dict() == {
        "harmful, advbench %": "equal",
        "broken on harmful %": "equal",
        "false refusal, xstest %": "better",
        "false refusal, oktest %": "worse",
        "broken on harmless %": "equal",
        "utility, sums %": "better",
    }
    assert "**worse** in false refusal, oktest (10.0 → 50.0 %)" in sentence(both, "new", "base")
    assert nowhere_worse(frame, "new", "base") and not nowhere_worse(both, "new", "base")
