"""The area that a method's settings dominate: how good it is whatever balance one wants."""

import numpy as np

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
