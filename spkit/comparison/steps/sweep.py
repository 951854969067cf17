"""SafePatching with one or two parameters varied, on the dev pool."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from spkit.comparison.arena import mask_seed, shares
from spkit.comparison.steps.shared import Places, Site, chosen
from spkit.comparison.variants import BASE, of_method
from spkit.method.safepatching import NAME as SAFEPATCHING


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    points: ({parameter: value}, the kind of bundle). A value is put over SafePatching's chosen
    setting where it is one of its parameters; alpha_factor and beta_factor multiply the chosen
    strengths; others are only written down (a rank is in the bundle). masks: so many a point.
    """

    label: str
    points: tuple[tuple[dict[str, float], str], ...]
    masks: int = 2


def sweep(folder: Path, places: Places, site: Site, tuned: str, what: Sweep) -> None:
    """sweep.csv: shares of verdicts; one row for every point and mask, and base's (mask -1)."""
    arena, setting = site.arena(places), chosen(places[tuned])
    seed = site.config.seed
    rows = [{"backbone": seed, "mask": -1, **shares(arena.answers({}, BASE))}]
    bundles = {kind: site.bundle(arena, places, kind) for kind in site.bundles}
    for values, kind in what.points:
        variant = of_method(SAFEPATCHING, _put_over(setting, values))
        for mask in range(what.masks):
            deltas = variant.deltas(bundles[kind], mask_seed(site.seed, mask))
            found = shares(arena.answers(deltas, what.label))
            rows.append({"backbone": seed, "mask": mask, **values, **found})
    frame = pd.DataFrame(rows).fillna({c: 0.0 for row in rows for c in row if " " in c})
    frame.insert(0, "sweep", what.label)
    frame.to_csv(folder / "sweep.csv", index=False, lineterminator="\n")


def _put_over(setting: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    over = {key: value for key, value in values.items() if key in setting}
    for key in ("alpha", "beta"):
        over[key] = setting[key] * values.get(f"{key}_factor", 1.0)
    return {**setting, **over}
