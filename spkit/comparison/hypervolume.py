"""The area that a method's settings dominate: how good it is whatever balance one wants."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from spkit.comparison.bootstrap import Outcomes, Resampling, _holm, _p_value, interval, rates
from spkit.errors import SpkitError


def hypervolume(points, reference: tuple[float, float] = (1.0, 1.0)) -> float:
    """The area between the reference and an array [n, 2] of points, where smaller is better.

    A point that is beyond the reference in one coordinate counts nothing; no points give 0.
    SpkitError for another shape and for values that are no numbers.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.size == 0:
        return 0.0
    if points.ndim != 2 or points.shape[1] != 2:
        raise SpkitError(f"points must have the shape [n, 2], not {list(points.shape)}")
    return float(hypervolumes(points[None, :, 0], points[None, :, 1], reference)[0])


def hypervolumes(harm_draws, refusal_draws, reference=(1.0, 1.0)) -> np.ndarray:
    """hypervolume() of every draw: two arrays [draws, points] -> float64 [draws].

    SpkitError for shapes that differ and for values that are no numbers.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (harm_draws, refusal_draws))
    if x.shape != y.shape or x.ndim != 2:
        raise SpkitError(
            "harm and refusal must have one shape [draws, points], "
            f"not {list(x.shape)} and {list(y.shape)}"
        )
    if np.isnan(x).any() or np.isnan(y).any():
        raise SpkitError("a point of the hypervolume has a coordinate that is no number")
    # from left to right: until the next point, the height is that of the lowest point so far;
    # on the reference's edge a point has no width or no height
    order = np.argsort(x, axis=1, kind="stable")
    x = np.minimum(np.take_along_axis(x, order, axis=1), reference[0])
    y = np.minimum(np.take_along_axis(y, order, axis=1), reference[1])
    heights = reference[1] - np.minimum.accumulate(y, axis=1)
    widths = np.diff(x, axis=1, append=reference[0])
    return (widths * heights).sum(axis=1)


def paired_hypervolumes(
    harm: Outcomes,
    refusal: Outcomes,
    harm_resampling: Resampling,
    refusal_resampling: Resampling,
    methods: Mapping[str, Sequence[int]],
    against: str,
    *,
    reference: tuple[float, float] = (1.0, 1.0),
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A row a method: the area that its settings dominate, and its difference from one method.

    harm and refusal: the outcomes of the same variants on harmful and on harmless prompts; failure
    rates are shares of 1. The second resampling is harm_resampling.with_items(...). methods: name
    -> its variants' places on the first axis. against: the method to compare with.
    Columns: method, hypervolume, low, high, against, difference (method minus against),
    difference_low, difference_high, p, p_holm (Holm over the rows); the last five are empty in
    that method's own row. An area in a draw takes the best of noisy points: draws lie above the
    data's own area on average, the more so the more settings a method has.
    SpkitError for variants, backbones or runs that do not agree, equal item draws, an unknown
    method, a method without variants, and a place that does not exist.
    """
    _check_pair(harm, refusal, harm_resampling, refusal_resampling)
    if against not in methods:
        raise SpkitError(f"there is no method {against!r}; there are {list(methods)}")
    for method, places in methods.items():
        wrong = [place for place in places if not 0 <= place < len(harm.variants)]
        if wrong or not len(places):
            raise SpkitError(
                f"method {method!r} must have variants from 0 to {len(harm.variants) - 1}, "
                f"not {list(places)}"
            )
    x, y = rates(harm, harm_resampling), rates(refusal, refusal_resampling)
    points = np.stack([harm.means(), refusal.means()], axis=1)
    areas = {m: hypervolume(points[list(own)], reference) for m, own in methods.items()}
    draws = {
        m: hypervolumes(x[:, list(own)], y[:, list(own)], reference) for m, own in methods.items()
    }
    rows = []
    for method in methods:
        low, high = interval(draws[method], confidence)
        row = {"method": method, "hypervolume": areas[method], "low": low, "high": high}
        row["against"] = against
        if method != against:
            gaps = draws[method] - draws[against]
            row["difference"] = areas[method] - areas[against]
            row["difference_low"], row["difference_high"] = interval(gaps, confidence)
            row["p"] = float(_p_value(gaps))
        rows.append(row)
    names = "method hypervolume low high against difference difference_low difference_high p"
    table = pd.DataFrame(rows, columns=names.split()).assign(p_holm=np.nan)
    compared = table["method"] != against
    if compared.any():
        table.loc[compared, "p_holm"] = _holm(table.loc[compared, "p"].to_numpy())
    return table


def _check_pair(harm, refusal, harm_resampling, refusal_resampling) -> None:
    for name in ("variants", "backbones"):
        first, second = getattr(harm, name), getattr(refusal, name)
        if first != second:
            raise SpkitError(f"harm and refusal have other {name}: {first} and {second}")
    if not np.array_equal(harm_resampling.runs, refusal_resampling.runs):
        raise SpkitError("harm and refusal must share their resampled runs: use with_items()")
    # two sets of prompts drawn alike would move together, as if they were one set
    if np.array_equal(harm_resampling.items, refusal_resampling.items) and len(harm.items) > 1:
        raise SpkitError("harm and refusal must not share their item draws: use with_items()")
