"""The patches of one backbone and derivation, with their importances."""

from collections.abc import Mapping
from pathlib import Path

from spkit.comparison.methods import Bundle
from spkit.comparison.methods.bundle import calibrate, load_bundle, make_bundle, save_bundle
from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.method.importance import score_patch
from spkit.models.loading import load
from spkit.system.determinism import make_deterministic


def bundle(
    folder: Path,
    places: Mapping[str, Path],
    config: Config,
    seed: int,
    patches: tuple[str, ...],
    rescore: str | None = None,
) -> None:
    """bundle/: patches derived with `seed`; with `rescore`, that bundle's patches scored anew."""
    make_deterministic(seed, config.threads)
    (source,) = (place for name, place in places.items() if name != rescore)
    quantization = config.derivation.quantization
    model, tokenizer = load(source / "model", quantization=quantization, **config.backbone.loading)
    pairs = load_harmful_pairs(config.data, seed=seed)
    if rescore is None:
        made = make_bundle(model, tokenizer, pairs, config, seed=seed, needs=patches)
    else:
        old = load_bundle(places[rescore] / "bundle", config.patching)
        own = {name: old.patch(name) for name in ("se", "osm")}
        calibration = calibrate(pairs, config, seed)
        scores = {
            name: score_patch(model, tokenizer, patch, calibration) for name, patch in own.items()
        }
        made = Bundle(own, scores, config.patching)
    save_bundle(made, folder / "bundle")
