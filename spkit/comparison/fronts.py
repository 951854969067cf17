"""Every method's front on the resampled experiment: the area that its settings dominate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spkit.comparison.bootstrap import Outcomes, Resampling, holm, interval, p_value, rates
from spkit.comparison.hypervolume import hypervolume, hypervolumes
from spkit.errors import SpkitError

COLUMNS = "method hypervolume low high against difference difference_low difference_high p".split()


@dataclass(frozen=True, eq=False)
class Failures:
    """One of the two objectives: its outcomes, and how they are resampled."""

    outcomes: Outcomes
    resampling: Resampling

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The rate of every variant: on the data [variant], and in every draw [draws, variant]."""
        return self.outcomes.means(), rates(self.outcomes, self.resampling)


def paired_hypervolumes(
    harm: Failures,
    refusal: Failures,
    methods: Mapping[str, Sequence[int]],
    against: str,
    *,
    reference: tuple[float, float] = (1.0, 1.0),
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A row a method: the area that its settings dominate, and its difference from one method.

    harm and refusal: the same variants on harmful and on harmless prompts; failure rates are shares
    of 1. The second resampling is the first one's with_items(...). methods: name -> its variants'
    places on the first axis. against: the method to compare with.
    Columns: method, hypervolume, low, high, against, difference (method minus against),
    difference_low, difference_high, p, p_holm (Holm over the rows); the last five are empty in
    that method's own row. An area in a draw takes the best of noisy points: draws lie above the
    data's own area on average, the more so the more settings a method has.
    SpkitError for variants, backbones or runs that do not agree, equal item draws, an unknown
    method, a method without variants, and a place that does not exist.
    """
    _check_pair(harm, refusal)
    _check_methods(methods, against, len(harm.outcomes.variants))
    (x, xs), (y, ys) = harm.points(), refusal.points()
    areas, draws = {}, {}
    for method, places in methods.items():
        own = list(places)
        areas[method] = hypervolume(np.stack([x[own], y[own]], axis=1), reference)
        draws[method] = hypervolumes(xs[:, own], ys[:, own], reference)
    rows = [_row(method, areas, draws, against, confidence) for method in methods]
    table = pd.DataFrame(rows, columns=COLUMNS).assign(p_holm=np.nan)
    compared = table["method"] != against
    if compared.any():
        table.loc[compared, "p_holm"] = holm(table.loc[compared, "p"].to_numpy())
    return table


def _row(method: str, areas: Mapping, draws: Mapping, against: str, confidence: float) -> dict:
    low, high = interval(draws[method], confidence)
    row = {"method": method, "hypervolume": areas[method], "low": low, "high": high}
    row["against"] = against
    if method != against:
        gaps = draws[method] - draws[against]
        row["difference"] = areas[method] - areas[against]
        row["difference_low"], row["difference_high"] = interval(gaps, confidence)
        row["p"] = float(p_value(gaps))
    return row


def _check_methods(methods: Mapping[str, Sequence[int]], against: str, variants: int) -> None:
    if against not in methods:
        raise SpkitError(f"there is no method {against!r}; there are {list(methods)}")
    for method, places in methods.items():
        if not len(places) or any(not 0 <= place < variants for place in places):
            raise SpkitError(
                f"method {method!r} must have variants from 0 to {variants - 1}, not {list(places)}"
            )


def _check_pair(harm: Failures, refusal: Failures) -> None:
    for name in ("variants", "backbones"):
        first, second = getattr(harm.outcomes, name), getattr(refusal.outcomes, name)
        if first != second:
            raise SpkitError(f"harm and refusal have other {name}: {first} and {second}")
    one, other = harm.resampling, refusal.resampling
    if not np.array_equal(one.runs, other.runs):
        raise SpkitError("harm and refusal must share their resampled runs: use with_items()")
    # two sets of prompts drawn alike would move together, as if they were one set
    if np.array_equal(one.items, other.items) and len(harm.outcomes.items) > 1:
        raise SpkitError("harm and refusal must not share their item draws: use with_items()")
