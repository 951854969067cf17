"""The studies of one method on the dev pool, over all backbones at once."""

import json
from pathlib import Path

from spkit.comparison.arena import Arena, mask_seed, shares
from spkit.comparison.methods import METHODS, Bundle
from spkit.comparison.steps.shared import Places, Site
from spkit.comparison.tuning import best_setting, front, search
from spkit.comparison.variants import BASE, of_method


def tune(
    folder: Path, places: Places, sites: list[Site], method: str, trials: int, fronts: int
) -> None:
    """trials-<score>.csv, settings.json: {score: {"setting": ..., "front": [...]}} of one method.

    sites: one for every backbone; the first mask of its derivation is used. fronts: at most so many
    settings of the front.
    """
    arenas = [site.arena(places) for site in sites]
    bundles = [site.bundle(arena, places) for site, arena in zip(sites, arenas, strict=True)]
    asked = list(zip(sites, arenas, bundles, strict=True))

    def ask(setting: dict) -> list[dict[str, float]]:
        return [_shares(*one, method, setting) for one in asked]

    was = [shares(arena.answers({}, BASE)) for arena in arenas]
    lost = sum(100 - found.get("utility correct", 0.0) for found in was) / len(was)
    found = {}
    for score, frame in search(METHODS[method].space, ask, was, trials=trials, seed=0).items():
        frame.to_csv(folder / f"trials-{score}.csv", index=False, lineterminator="\n")
        found[score] = {"setting": best_setting(frame), "front": front(frame, fronts, lost)}
    (folder / "settings.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _shares(site: Site, arena: Arena, bundle: Bundle, method: str, setting: dict) -> dict:
    """The shares of verdicts that one setting gets on one backbone."""
    deltas = of_method(method, setting).deltas(bundle, mask_seed(site.seed, 0))
    return shares(arena.answers(deltas, method))
