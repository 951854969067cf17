"""Alpha found on D_h: the rule that notebooks 03 and 04 use, on losses that are known."""

import pytest
import torch

from spkit.config import PatchingConfig
from spkit.method.balancing import balanced, held_beta
from spkit.method.patch import Factors
from spkit.method.safepatching import SafePatching

NAME = "model.layers.0.mlp.up_proj.weight"
SE = Factors("se", {NAME: (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]))}, 1.0)
OSM = Factors("osm", {NAME: (torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0], [1.0]]))}, 1.0)
# the top half of SE is its second row, that of OSM its first: both patches keep half of the matrix
SCORES_SE = {NAME: torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
SCORES_OSM = {NAME: torch.tensor([[4.0, 3.0], [2.0, 1.0]])}


def method(**values):
    config = PatchingConfig(
        retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, scale="plain", **values
    )
    return SafePatching(SE, OSM, (SCORES_SE, SCORES_OSM), config, seed=0)


def losses(deltas):
    """The two kept entries of SE (2 and 4) less those of OSM (3 and 3), for three equal pairs."""
    delta = deltas[NAME]
    return (delta[1].sum() - delta[0].sum()).repeat(3)


def test_without_a_balance_nothing_changes():
    given = method(balance=None, alpha=7.0, beta=2.0)
    assert balanced(given, losses) is given


def test_alpha_is_the_smallest_that_reaches_the_balance_at_this_beta():
    found = balanced(method(balance=5.0, alpha=7.0, beta=2.0), losses)
    # alpha (2 + 4) - beta (3 + 3) = 5 at alpha = 17 / 6; bisection errs upwards, by at most 3 %
    assert 17 / 6 <= found.config.alpha <= 1.03 * 17 / 6
    assert found.config.beta == 2.0
    assert losses(found.deltas()).min() >= 5.0


def test_a_larger_beta_needs_a_larger_alpha():
    alphas = [balanced(method(balance=5.0, beta=b), losses).config.alpha for b in (0.0, 1.0, 3.0)]
    assert alphas == sorted(alphas) and alphas[0] < alphas[2]


def test_where_no_alpha_is_enough_beta_is_lowered_until_d_h_stays_unlearnt():
    # at alpha = 20 it is 120 - 6 beta: out of reach for beta = 30; at alpha = 1 it is 6 - 6 beta
    found = balanced(method(balance=3.0, beta=30.0), losses).config
    assert found.alpha == 1.0
    assert 0.5 - 30 / 2**8 <= found.beta <= 0.5
    assert losses(balanced(method(balance=3.0, beta=30.0), losses).deltas()).min() >= 3


def test_what_cannot_be_unlearnt_gets_no_osm_at_all():
    found = balanced(method(balance=99.0, beta=10.0), losses).config
    assert (found.alpha, found.beta) == (1.0, 0.0)


def test_held_beta_ends_on_the_safe_side():
    assert held_beta(lambda alpha, share: 10.0 - 4.0 * share, 9.0) == pytest.approx(0.25, abs=2**-8)
    assert held_beta(lambda alpha, share: 10.0 - 4.0 * share, 9.0) <= 0.25
    assert held_beta(lambda alpha, share: 1.0, 2.0) == 0.0
