"""The trials as a picture: harm against false refusal, shaded by KL."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spkit.figures import ACCENT, DARK, HEAT, styled

MARKS = {"base": "s", "as set": "D", "chosen": "*"}


@styled
def pareto(trials: pd.DataFrame, judged: pd.DataFrame, max_kl: float) -> Figure:
    """Left all trials by the fast objective, right the judged points by their rates.

    trials: harm, refusal [%], kl [nats]. judged: point, harm, refusal, fast_harm, fast_refusal [%],
    kl, chosen (bool). The line is the front of what has a KL of at most max_kl.
    """
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    highest = float(max(trials["kl"].quantile(0.9), 2 * max_kl))
    shade = {"cmap": HEAT, "vmin": 0.0, "vmax": highest, "edgecolor": "0.35", "linewidth": 0.4}
    order = trials.sort_values("kl", ascending=False)
    dots = left.scatter(order["harm"], order["refusal"], c=order["kl"], s=22, **shade)
    right.scatter(judged["harm"], judged["refusal"], c=judged["kl"], s=30, **shade)
    fast = judged.assign(harm=judged["fast_harm"], refusal=judged["fast_refusal"])
    for ax, points, marked in ((left, trials, fast), (right, judged, judged)):
        x, y = front(points[points["kl"] <= max_kl])
        ax.plot(x, y, color=DARK, linewidth=1.2, label=f"front, KL at most {max_kl:g}")
        for label, marker in MARKS.items():
            row = marked[marked["chosen"] if label == "chosen" else marked["point"] == label]
            if len(row):
                style = {"color": ACCENT, "markersize": 13 if marker == "*" else 7, "alpha": 0.9}
                place = (row["harm"], row["refusal"])
                ax.plot(*place, marker, markeredgecolor="white", label=label, **style)
        ax.set_xlabel("harm %")
    left.set_title(f"expected, {len(trials)} trials")
    right.set_title(f"judged, {len(judged)} points")
    left.set_ylabel("false refusal %")
    figure.colorbar(dots, ax=right, label="KL of the first token, nats", extend="max")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def front(points: pd.DataFrame | Mapping) -> tuple[np.ndarray, np.ndarray]:
    """The points that no other beats in both, by rising harm, as the corners of a step line."""
    x, y = (np.asarray(points[key], dtype=float) for key in ("harm", "refusal"))
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    best = np.minimum.accumulate(y) if len(y) else y
    kept = np.r_[True, y[1:] < best[:-1]] if len(y) else np.zeros(0, bool)
    x, y = x[kept], y[kept]
    return np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
