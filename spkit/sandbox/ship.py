"""Make the shipped sandbox backbone again: `python -m spkit.sandbox.ship params/sandbox.yaml`.

Trains by the recipe of the params file and its seed, and writes the weights, with the recipe that
made them, to spkit/sandbox/weights, from where notebook 00 copies them. About three minutes.
"""

import json
import sys

from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.sandbox.backbone import SHIPPED, prepare_backbone, sandbox_recipe
from spkit.system.determinism import make_deterministic


def ship(params: str, folder=SHIPPED) -> None:
    """Train and write `folder`; SpkitError for parameters whose backbone is not the sandbox's."""
    config = load_params(params, {"sandbox.weights": "train"})
    if config.backbone.source != "sandbox":
        raise SpkitError(f"{params}: backbone.source is {config.backbone.source!r}, not 'sandbox'")
    make_deterministic(config.seed, config.threads)
    prepare_backbone(config, folder)
    recipe = json.dumps(sandbox_recipe(config), indent=2)
    (folder / "recipe.json").write_text(recipe + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        ship(*sys.argv[1:2])
    except SpkitError as error:
        sys.exit(str(error))
