"""What every variant answers on the test pool: one backbone, one derivation, one mask."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from spkit.comparison.arena import mask_seed
from spkit.comparison.steps.shared import Places, Site, chosen, settings
from spkit.comparison.variants import Variant, ablations, base, of_method
from spkit.method.safepatching import NAME as SAFEPATCHING

KEPT = ["id", "group", "category", "phrasing", "verdict", "response"]


def answer(
    folder: Path,
    places: Places,
    site: Site,
    tuned: Mapping[str, str],
    part: str,
    draw: tuple[int, int],
) -> None:
    """answers.parquet: one row for every variant and prompt.

    tuned: {method: the unit that tuned it}. part: "methods", "fronts" or "ablations". draw: the
    numbers of the derivation and of the mask; variants that do not depend on the mask are answered
    with the first one only.
    """
    derivation, mask = draw
    arena = site.arena(places)
    bundles = {kind: site.bundle(arena, places, kind) for kind in site.bundles}
    frames = []
    for score, variant in _variants(part, tuned, places):
        if mask and not variant.masks:
            continue
        deltas = variant.deltas(bundles[variant.bundle], mask_seed(site.seed, mask))
        frame = arena.answers(deltas, variant.label)[KEPT]
        # most answers are right or a refusal, and known; only the broken ones are worth reading
        frame.loc[frame["verdict"] != "broken", "response"] = ""
        frames.append(frame.assign(tuned=score, variant=variant.label))
    if frames:
        whole = pd.concat(frames, ignore_index=True)
        whole = whole.assign(backbone=site.config.seed, derivation=derivation, mask=mask)
        text = whole.select_dtypes("object").columns
        whole[text] = whole[text].astype("category")
        whole.to_parquet(folder / "answers.parquet", index=False)


def _variants(part: str, tuned: Mapping[str, str], places: Places) -> list[tuple[str, Variant]]:
    """(the score for which it was tuned, the variant)."""
    if part == "ablations":
        setting = chosen(places[tuned[SAFEPATCHING]])
        return [("paper", variant) for variant in ablations(setting)]
    found = [("", base())] if part == "methods" else []
    for name, unit in tuned.items():
        for score, of_score in settings(places[unit]).items():
            if part == "methods":
                found.append((score, of_method(name, of_score["setting"])))
            else:
                for number, setting in enumerate(of_score["front"]):
                    found.append((score, of_method(name, setting, f"{name} #{number}")))
    return found
