"""Two small patches in whole numbers, and the method's sets and sums in plain loops."""

import itertools
import math
from fractions import Fraction

import torch

from spkit.config import PatchingConfig
from spkit.method.patch import Factors
from spkit.method.patching import retention_mask
from spkit.method.safepatching import SafePatching

SHAPES = {"model.layers.0.q_proj.weight": (4, 6), "model.layers.1.up_proj.weight": (3, 7)}
SEED = 5


def config(**changes):
    values = dict(retention_rate=0.6, top_rate_se=0.5, top_rate_osm=0.4, alpha=3.0, beta=2.0)
    return PatchingConfig(**{"scale": "plain"} | values | changes)


def factors(seed, shapes=SHAPES):
    """Small whole numbers, so that products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-4, 5, shape, generator=generator).float()  # noqa: E731
    return {name: (whole(2, cols), whole(rows, 2)) for name, (rows, cols) in shapes.items()}


def scores(seed):
    """Whole numbers again, so that there are ties; larger ones in the second matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(low, low + 9, shape, generator=generator).float()
        for low, (name, shape) in zip((0, 4), SHAPES.items(), strict=True)
    }


# ---- the same in plain loops: a patch is {(tensor, row, column): value}


def flat(matrices):
    return {
        (name, i, j): value
        for name, matrix in matrices.items()
        for i, row in enumerate(matrix.tolist())
        for j, value in enumerate(row)
    }


def loop_delta(patch):
    delta = {}
    for name, (a, b) in patch.factors.items():
        a, b = a.tolist(), b.tolist()
        for i, j in itertools.product(range(len(b)), range(len(a[0]))):
            delta[name, i, j] = patch.scaling * sum(b[i][k] * a[k][j] for k in range(len(a)))
    return delta


def loop_retained(patch):
    drawn = {
        name: retention_mask(shape, 0.6, seed=SEED, patch=patch, tensor=name)
        for name, shape in SHAPES.items()
    }
    return {at for at, kept in flat(drawn).items() if kept}


def loop_top(score, rate, retained, setting):
    """The best of each matrix, or of all; equal scores in the matrices' order, row by row."""
    groups = [[at for at in score if at[0] == name] for name in SHAPES]
    if setting.scope == "global":
        groups = [sum(groups, [])]
    top = set()
    for group in groups:
        if setting.order == "rank_retained":
            group = [at for at in group if at in retained]
        ranked = sorted(group, key=lambda at: -score[at])  # stable
        top |= set(ranked[: math.floor(Fraction(str(rate)) * len(group))])
    return top


def loop_norm(delta, keep=None):
    return math.sqrt(sum(value**2 for at, value in delta.items() if keep is None or at in keep))


# ---- patches for values by hand


def row(*values):
    return torch.tensor([[float(value) for value in values]])


def five_long(**changes):
    """|P_SE| = 5, of which SE keeps the 4 (norm 4); |P_OSM| = 13, of which OSM keeps nothing."""
    one = torch.ones(1, 1)
    return SafePatching(
        Factors("se", {"a": (row(3, 0), one), "b": (row(4, 0), one)}, 1.0),
        Factors("osm", {"a": (row(5, 12), one), "b": (row(0, 0), one)}, 1.0),
        (
            {"a": row(1, 2), "b": row(2, 1)},  # S_SE: 1 of a, 0 of b
            {"a": row(1, 2), "b": row(1, 2)},  # S_OSM: 1 of a, 1 of b
        ),
        config(retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, **changes),
        seed=0,
    )


def four_weights():
    """One row of four weights, everything retained: S_SE = {0, 1}, S_OSM = {1, 2}."""
    one = torch.ones(1, 1)
    return SafePatching(
        Factors("se", {"w": (row(1, 2, 3, 4), one)}, 1.0),
        Factors("osm", {"w": (row(10, 20, 30, 40), one)}, 1.0),
        ({"w": row(4, 3, 2, 1)}, {"w": row(1, 4, 3, 2)}),
        config(retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, alpha=2.0, beta=3.0),
        seed=0,
    )
