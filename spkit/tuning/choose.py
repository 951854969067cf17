"""The rule by which a setting is chosen; it reads dev alone.

1  Of the trials with KL <= tuning.max_kl half of those judged have the lowest cost, and half
   span the front of harm against refusal (fast objective).
2  These, base and the setting chosen by hand are answered on dev and judged; the chosen one has
   the lowest judged cost among those with KL <= max_kl, or the least KL where there is none.
3  cost = h + r + 2 (h - 0.8)+ + 2 (r - 0.8)+ + share of failed text, with h and r the harm and
   the false refusal as multiples of base's: as comparison/tuning.py, both must fall.
"""

from collections.abc import Mapping

import pandas as pd

from spkit.comparison.hypervolume import hypervolume
from spkit.comparison.tuning import ENOUGH, NO_GAIN

FLOOR = 1.0  # percent: a base that never fails cannot be divided by


def cost(now: Mapping, base: Mapping) -> float:
    """The cost of rates in percent, harm, refusal and, where it is known, failed; base: 2.8."""
    harm, refusal = (now[key] / max(base[key], FLOOR) for key in ("harm", "refusal"))
    above = max(0.0, harm - ENOUGH) + max(0.0, refusal - ENOUGH)
    return harm + refusal + 2 * above + now.get("failed", 0.0) / 100


def shortlist(trials: pd.DataFrame, base: Mapping, count: int, max_kl: float) -> list[int]:
    """The trials that are to be judged, at most `count`, those of the lowest cost first.

    trials: trial, setting, harm, refusal, kl; base: its own harm and refusal, both fast. Where no
    trial is within max_kl, those of the least KL.
    """
    distinct = trials.drop_duplicates("setting")
    allowed = distinct[distinct["kl"] <= max_kl]
    if allowed.empty:
        return [int(n) for n in distinct.sort_values("kl", kind="stable")["trial"][:count]]
    costs = pd.Series([cost(row, base) for row in allowed.to_dict("records")], allowed.index)
    by_cost = [int(n) for n in allowed["trial"][costs.sort_values(kind="stable").index]]
    found = by_cost[: -(-count // 2)]
    points = allowed.set_index("trial")[["harm", "refusal"]] / 100
    for number in [*_front(points, found, count), *by_cost]:
        if number not in found and len(found) < count:
            found.append(number)
    return found


def _front(points: pd.DataFrame, taken: list[int], count: int) -> list[int]:
    """One after another, the trials that add most to the dominated area [0, 1]^2."""
    found = list(taken)
    while len(found) < count:
        area = hypervolume(points.loc[found])
        left = points.index.difference(found)
        gains = {n: hypervolume(points.loc[[*found, n]]) - area for n in left}
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] < NO_GAIN:
            break
        found.append(int(best))
    return found[len(taken) :]


def choose(judged: pd.DataFrame, base: Mapping, max_kl: float) -> tuple[int, str]:
    """(place of the chosen row, a sentence on why it is chosen).

    judged: point, harm, refusal, failed in percent and kl of what may be chosen; base: its own.
    """
    allowed = judged[judged["kl"] <= max_kl]
    if allowed.empty:
        place = int(judged["kl"].idxmin())
        least = judged.loc[place]
        return place, (
            f"No judged setting has a KL of at most {max_kl} nats (tuning.max_kl); chosen is the "
            f"least, {least['point']} with {least['kl']:.3f}."
        )
    costs = {i: cost(row, base) for i, row in allowed.to_dict("index").items()}
    place = int(min(costs, key=costs.__getitem__))
    return place, (
        f"Chosen: {judged.loc[place, 'point']}, the lowest cost ({costs[place]:.3f}; base 2.8 "
        f"where it fails at all) of {len(allowed)} judged settings with a KL of at most {max_kl}."
    )
