"""Ranked once or sorted anew: the same deltas, bit for bit."""

import pytest
import torch

from spkit.comparison.methods import METHODS, Bundle
from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors
from spkit.method.patching import top_rate_set
from spkit.method.safepatching import SafePatching
from spkit.tuning.candidates import Candidates, Ranked, ranks_of

SHAPES = {"a.weight": (12, 20), "b.weight": (16, 8)}


def bundle(seed=0):
    draw = torch.Generator().manual_seed(seed)
    patches, scores = {}, {}
    for name in ("se", "osm"):
        factors = {
            tensor: (torch.randn(2, n, generator=draw), torch.randn(m, 2, generator=draw))
            for tensor, (m, n) in SHAPES.items()
        }
        patches[name] = Factors(name, factors, 2.0)
        scores[name] = {  # few different values: many ties
            tensor: torch.randint(0, 9, shape, generator=draw).float()
            for tensor, shape in SHAPES.items()
        }
    return Bundle(patches, scores, PatchingConfig(balance=None))


def test_ranks_give_the_top_rate_sets():
    scores = bundle().scores["se"]["a.weight"]
    ranks = ranks_of(scores)
    assert sorted(ranks.flatten().tolist()) == list(range(240)) and ranks.dtype == torch.int32
    for rate in (0.05, 0.29, 0.5, 1.0):
        assert torch.equal(ranks < int(round(rate * 240, 6)), top_rate_set(scores, rate))
    scores[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ranks_of(scores)


@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
@pytest.mark.parametrize("order", ["rank_all", "rank_retained"])
def test_the_deltas_are_those_of_the_method(scale, order):
    given = bundle()
    patching = PatchingConfig(balance=None, order=order)
    candidates = Candidates("SafePatching", [given], patching, seed=3)
    for p, a, b in ((0.6, 0.4, 0.7), (0.35, 0.05, 0.3), (1.0, 0.9, 0.01)):
        setting = {"retention_rate": p, "top_rate_se": a, "top_rate_osm": b}
        setting |= {"alpha": 1.3, "beta": 0.7}
        found = candidates.deltas({**setting, "scale": scale, "stop": 0})
        config = PatchingConfig(**setting, scale=scale, order=order, balance=None)
        parts = (given.patches["se"], given.patches["osm"])
        scores = (given.scores["se"], given.scores["osm"])
        expected = SafePatching(*parts, scores, config, 3).deltas()
        assert list(found) == list(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name])
    assert isinstance(candidates.safepatching({}), Ranked) == (order == "rank_all")


def test_other_methods_are_those_of_the_comparison():
    first, second = bundle(0), bundle(1)
    candidates = Candidates("Task Arithmetic", [first, second], PatchingConfig(), seed=0)
    own = {"alpha": 0.5, "beta": 2.0}
    for stop, given in enumerate((first, second)):
        found = candidates.deltas({**own, "stop": stop})
        expected = METHODS["Task Arithmetic"].deltas(given, own, 0)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_an_unknown_method_and_a_value_out_of_range_are_one_sentence():
    with pytest.raises(SpkitError, match="'Safepatching', no method of the comparison.*SafePatch"):
        Candidates("Safepatching", [bundle()], PatchingConfig(), seed=0)
    with pytest.raises(SpkitError, match="top_rate_se"):
        Candidates("SafePatching", [bundle()], PatchingConfig(), 0).safepatching({"top_rate_se": 2})
