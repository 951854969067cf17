"""What is varied in the experiment: the bundles that differ from the usual one, and the sweeps."""

import itertools

from spkit.comparison.steps.sweep import Sweep
from spkit.comparison.variants import USUAL

RANKS = (2, 4, 16, 32)
PAIRS = (24, 48, 96, 384)
SAMPLES = (4, 16, 128)
# bundles that differ from the usual one in a parameter: name -> overrides; derived anew
BUNDLES = {
    **{f"rank-{r}": {"derivation.lora.r": r, "derivation.lora.alpha": 2.0 * r} for r in RANKS},
    **{f"pairs-{n}": {"data.pairs": n} for n in PAIRS},
}
# the usual patches, scored anew
RESCORED = {
    "snip-backbone": {"importance.scored_model": "backbone"},
    "snip-question": {"importance.loss_on": "question"},
    **{f"samples-{n}": {"importance.samples": n} for n in SAMPLES},
}
RATES = (0.02, 0.06, 0.2, 0.4, 0.8)  # a and b: nearly two orders of magnitude
STRENGTH_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the chosen alpha and beta
RETENTION_RATES = (0.05, 0.1, 0.3, 0.6, 0.9, 1.0)


def _of_bundles(key: str, values: tuple[int, ...], others: tuple[int, ...]):
    """One point for each value: in a bundle of its own, or in the usual one."""
    every = sorted((*values, *others))
    return tuple(({key: float(n)}, f"{key}-{n}" if n in others else USUAL) for n in every)


SWEEPS = (
    Sweep("retention", tuple(({"retention_rate": p}, USUAL) for p in RETENTION_RATES)),
    Sweep(
        "top-rates",
        tuple(
            ({"top_rate_se": a, "top_rate_osm": b}, USUAL)
            for a, b in itertools.product(RATES, RATES)
        ),
    ),
    Sweep(
        "strengths",
        tuple(
            ({"alpha_factor": x, "beta_factor": y}, USUAL)
            for x, y in itertools.product(STRENGTH_FACTORS, STRENGTH_FACTORS)
        ),
    ),
    Sweep("rank", _of_bundles("rank", (8,), RANKS)),
    Sweep("pairs", _of_bundles("pairs", (192,), PAIRS)),
    Sweep("samples", _of_bundles("samples", (64,), SAMPLES)),
)
