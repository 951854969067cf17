"""The patches that are tuned, and their importances: derived once, kept in a folder.

The ascent is derived once for every mean loss at which it may stop. Seed and batches are the same,
so a shorter one is the beginning of a longer one.
"""

from pathlib import Path

from spkit.comparison.methods import METHODS, Bundle
from spkit.comparison.methods.bundle import load_bundle, make_bundle, save_bundle
from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.errors import SpkitError
from spkit.models.loading import load


def stops(config: Config) -> list[float]:
    """The mean losses in nats at which the ascent is kept, rising; the config's own is one of them.

    SpkitError for one at or above the clamp, where the ascent may never stop.
    """
    ascent = config.derivation.ascent
    for value in config.tuning.ascent_stops:
        if value >= ascent.token_loss_clamp:
            raise SpkitError(
                f"tuning.ascent_stops has {value}, which must be below "
                f"derivation.ascent.token_loss_clamp = {ascent.token_loss_clamp}"
            )
    return sorted({ascent.stop_mean_loss, *config.tuning.ascent_stops})


def with_stop(config: Config, stop: float) -> Config:
    """The config with another mean loss at which the ascent stops."""
    ascent = config.derivation.ascent.model_copy(update={"stop_mean_loss": stop})
    derivation = config.derivation.model_copy(update={"ascent": ascent})
    return config.model_copy(update={"derivation": derivation})


def ingredients(config: Config, source: str | Path, folder: Path) -> dict[float, Bundle]:
    """{mean loss: bundle} for every stop that gives another SE patch than the one before.

    source: the backbone. folder: what is there already is read, the rest is derived, scored and
    written there; it holds the OSM patch, so it belongs into the run folder.
    """
    parts = {f"se-{stop}": (with_stop(config, stop), ("se",)) for stop in stops(config)}
    parts["osm"] = (config, ("osm",))
    if "npo" in METHODS[config.tuning.method].needs:
        parts["npo"] = (config, ("npo",))
    missing = {name: part for name, part in parts.items() if not (folder / name).is_dir()}
    if missing:
        quantization = config.derivation.quantization
        model, tokenizer = load(source, quantization=quantization, **config.backbone.loading)
        pairs = load_harmful_pairs(config.data, seed=config.seed)
        for name, (own, needs) in missing.items():
            made = make_bundle(model, tokenizer, pairs, own, seed=config.seed, needs=needs)
            save_bundle(made, folder / name)
        del model
    read = {name: load_bundle(folder / name, config.patching) for name in parts}
    shared = [read[name] for name in parts if not name.startswith("se-")]
    found, steps = {}, None
    for stop in stops(config):
        own = read[f"se-{stop}"]
        taken = own.patch("se").manifest["steps"]
        if taken == steps:
            print(f"The ascent does not reach {stop} nats beyond the stop before: left out.")
            continue
        steps = taken
        patches = {name: patch for part in (own, *shared) for name, patch in part.patches.items()}
        scores = {name: score for part in (own, *shared) for name, score in part.scores.items()}
        found[stop] = Bundle(patches, scores, config.patching)
    return found
