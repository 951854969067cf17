"""The settings that were chosen on the usual backbone, on one of another size."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from spkit.comparison.arena import mask_seed, shares
from spkit.comparison.steps.shared import Places, Site, chosen
from spkit.comparison.variants import base, of_method


def size(folder: Path, places: Places, site: Site, tuned: Mapping[str, str], label: str) -> None:
    """size.csv: shares of verdicts of base and of every method; tuned: {method: unit}."""
    arena = site.arena(places)
    given = site.bundle(arena, places)
    weights = sum(parameter.numel() for parameter in arena.model.parameters())
    variants = [base(), *(of_method(name, chosen(places[unit])) for name, unit in tuned.items())]
    rows = [
        {
            "size": label,
            "weights": weights,
            "backbone": site.config.seed,
            "variant": variant.label,
            **shares(arena.answers(variant.deltas(given, mask_seed(site.seed, 0)), variant.label)),
        }
        for variant in variants
    ]
    frame = pd.DataFrame(rows).fillna(0.0)
    frame.to_csv(folder / "size.csv", index=False, lineterminator="\n")
