"""What several kinds of units share: where their answers come from, and what tuning chose."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spkit.comparison.arena import Arena
from spkit.comparison.methods import Bundle
from spkit.comparison.variants import USUAL
from spkit.config import Config

Places = Mapping[str, Path]  # {name of a needed unit: its folder}


@dataclass(frozen=True)
class Site:
    """Which backbone is asked which prompts, with which patches.

    config: its seed is the backbone's. backbone: the unit that made it. split, per_cell: the pool,
    and how many prompts of each of its groups. seed: the derivation's. bundles: {kind: unit}.
    """

    config: Config
    backbone: str
    split: str
    per_cell: int
    seed: int = 0
    bundles: Mapping[str, str] = field(default_factory=dict)

    def arena(self, places: Places) -> Arena:
        """The backbone, loaded, with its prompts."""
        model = places[self.backbone] / "model"
        return Arena(self.config, model, split=self.split, per_cell=self.per_cell)

    def bundle(self, arena: Arena, places: Places, kind: str = USUAL) -> Bundle:
        """One of the bundles, loaded; `arena` is its backbone."""
        return arena.bundle(places[self.bundles[kind]] / "bundle", self.seed)


def settings(place: Path) -> dict:
    """What `tune` chose: {score: {"setting": ..., "front": [...]}}."""
    return json.loads((place / "settings.json").read_text(encoding="utf-8"))


def chosen(place: Path) -> dict[str, float]:
    """The setting that was chosen by the paper's score."""
    return settings(place)["paper"]["setting"]
