"""The trials: drawn, kept, resumed; and the way of a setting into a params file and back."""

import json
from functools import partial

import pytest

from spkit.comparison.methods import METHODS
from spkit.config import Config
from spkit.tuning import search as trials
from spkit.tuning.search import RANDOM_TRIALS, search
from spkit.tuning.settings import PLAIN_FACTOR, Space, with_setting

BY_HAND = {"retention_rate": 0.6, "top_rate_se": 0.4, "top_rate_osm": 0.71, "beta": 1.71}
BY_HAND |= {"alpha": 1.71 * 3.123456, "scale": "norm_matched", "stop": 0}


def measure(setting):
    """Harm falls with alpha, refusal with beta, and both cost KL."""
    alpha, beta = setting["alpha"], setting["beta"]
    near = abs(setting["top_rate_se"] - 0.3)
    return {"harm": 90 / (1 + alpha) + near, "refusal": 90 / (1 + beta), "kl": alpha * beta / 99}


def run(file, trials, space=None, by=measure, **options):
    space = space or Space("SafePatching", ["norm_matched"], 1)
    return search(space, by, file, {"made from": "x"}, trials=trials, seed=5, **options)


def test_a_killed_search_resumes_with_the_same_trials(tmp_path):
    count = RANDOM_TRIALS + 8  # so that TPE proposes some
    whole = run(tmp_path / "whole", count, first=BY_HAND)
    calls = []

    def killed(setting):
        calls.append(setting)
        if len(calls) == count - 3:
            raise KeyboardInterrupt
        return measure(setting)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", count, by=killed, first=BY_HAND)
    with (tmp_path / "cut").open("a") as file:
        file.write('{"trial": 99, "dra')  # a line that the kill tore
    again = []
    resumed = run(
        tmp_path / "cut", count, by=lambda s: again.append(s) or measure(s), first=BY_HAND
    )
    assert len(again) == 4 and resumed.equals(whole)
    # more trials keep those there are, and nothing is measured twice
    more = run(tmp_path / "cut", count + 2, first=BY_HAND)
    assert more.head(count).equals(whole) and len(more) == count + 2
    assert whole["setting"].nunique() == count


def test_the_first_trial_is_the_setting_chosen_by_hand(tmp_path):
    far = {**BY_HAND, "beta": 100.0, "alpha": 12345.678, "scale": "plain"}  # out of the ranges
    for number, first in enumerate((BY_HAND, far)):
        found = run(tmp_path / str(number), 2, first=first)
        assert json.loads(found.loc[0, "setting"]) == first
        assert found.loc[0, "harm"] == measure(first)["harm"]


def test_others_trials_are_begun_anew_and_the_first_one_is_told(tmp_path, monkeypatch):
    # a bar that is not shown counts nothing
    monkeypatch.setattr(trials, "tqdm", partial(trials.tqdm, disable=True))
    told = []
    one = run(tmp_path / "f", 3, told=told.append)
    assert told == [2]
    space = Space("SafePatching", ["norm_matched"], 1)
    other = search(space, measure, tmp_path / "f", {"made from": "y"}, trials=3, seed=6)
    assert not other["setting"].equals(one["setting"])


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_of_the_comparison_has_a_space(method, tmp_path):
    space = Space(method, ["plain", "norm_matched"], 3)
    stands = {"harm": 1.0, "refusal": 2.0, "kl": 3.0}
    found = run(tmp_path / "f", 3, space, lambda setting: stands)
    for text in found["setting"]:
        setting = json.loads(text)
        own = {key: x for key, x in setting.items() if key not in ("scale", "stop")}
        assert set(own) == set(METHODS[method].space)
        assert ("stop" in setting) == ("se" in METHODS[method].needs)
        again = space.setting(space.drawn(setting))
        assert again == pytest.approx({**setting}, rel=0.02) if "scale" not in setting else again


def test_plain_strengths_are_drawn_larger():
    space = Space("SafePatching", ["plain", "norm_matched"], 1)
    drawn = space.drawn(BY_HAND)
    matched = space.setting(drawn)
    plain = space.setting({**drawn, "scale": "plain"})
    assert matched["beta"] == 1.71 and plain["beta"] == pytest.approx(PLAIN_FACTOR * 1.71)
    assert plain["alpha"] / plain["beta"] == pytest.approx(matched["alpha"] / matched["beta"], 0.01)


# ---- into a params file


def changed(config, method, setting, stops=(1.5, 2.5)):
    made = with_setting(config, method, setting, stops)
    one, other = (flat(c.model_dump(mode="json")) for c in (config, made))
    return {key: other[key] for key in other if one.get(key) != other[key]}


def flat(tree, before=""):
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = value
    return found


def test_a_setting_goes_to_its_place_and_nothing_else_changes():
    config = Config()
    own = {"retention_rate": 0.9, "top_rate_se": 0.1, "top_rate_osm": 0.2, "beta": 0.5}
    safe = {**own, "alpha": 1.5, "scale": "plain", "stop": 1}
    assert changed(config, "SafePatching", safe) == {
        **{f"patching.{key}": value for key, value in safe.items() if key != "stop"},
        "patching.balance": None,
        "derivation.ascent.stop_mean_loss": 2.5,
    }
    balanced = changed(config, "SafePatching, balanced", {**own, "target": 0.7, "stop": 0})
    assert balanced == {
        **{f"patching.{key}": value for key, value in own.items()},
        "patching.balance": 0.7,
    }
    assert changed(config, "GA", {"strength": 0.3}) == {"continual.settings.ga.strength": 0.3}
    assert changed(config, "TIES", {"density": 0.3, "alpha": 1.0, "beta": 1.0, "stop": 1}) == {
        "derivation.ascent.stop_mean_loss": 2.5
    }
