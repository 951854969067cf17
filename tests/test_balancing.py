"""Alpha found on D_h: the rule that notebooks 03 and 04 use, on losses that are known."""

import torch

from spkit.ablations import SAFEPATCHING, Variants
from spkit.balancing import HIGHEST, balanced
from spkit.config import PatchingConfig
from spkit.derivation import Patch

NAME = "model.layers.0.mlp.up_proj.weight"
SE = Patch("se", {NAME: (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]))}, 1.0)
OSM = Patch("osm", {NAME: (torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0], [1.0]]))}, 1.0)
# the top half of SE is its second row, that of OSM its first: both patches keep half of the matrix
SCORES_SE = {NAME: torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
SCORES_OSM = {NAME: torch.tensor([[4.0, 3.0], [2.0, 1.0]])}


def variants(**values):
    config = PatchingConfig(
        retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, scale="plain", **values
    )
    return Variants(SE, OSM, SCORES_SE, SCORES_OSM, config, seed=0)


def losses(deltas):
    """The two kept entries of SE (2 and 4) less those of OSM (3 and 3), for three equal pairs."""
    delta = deltas[NAME]
    return (delta[1].sum() - delta[0].sum()).repeat(3)


def test_without_a_balance_nothing_changes():
    given = variants(balance=None, alpha=7.0, beta=2.0)
    assert balanced(given, losses) is given


def test_alpha_is_the_smallest_that_reaches_the_balance_at_this_beta():
    found = balanced(variants(balance=5.0, alpha=7.0, beta=2.0), losses)
    # alpha (2 + 4) - beta (3 + 3) = 5 at alpha = 17 / 6; bisection errs upwards, by at most 3 %
    assert 17 / 6 <= found.config.alpha <= 1.03 * 17 / 6
    assert found.config.beta == 2.0
    assert losses(found.deltas(SAFEPATCHING)).min() >= 5.0


def test_a_larger_beta_needs_a_larger_alpha_and_what_is_out_of_reach_gets_the_highest():
    alphas = [balanced(variants(balance=5.0, beta=b), losses).config.alpha for b in (0.0, 1.0, 3.0)]
    assert alphas == sorted(alphas) and alphas[0] < alphas[2]
    assert balanced(variants(balance=99.0, beta=10.0), losses).config.alpha == HIGHEST
