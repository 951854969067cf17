"""Bundles: derived and scored once per seed, then shared by all methods; written and read whole.

    <folder>/patch-<name>.safetensors         patch.Factors.save
    <folder>/importance-<name>.safetensors    importance.save

The folder holds the OSM patch, which alone is a jailbreak: it belongs into the run folder, and
is never published.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from spkit.comparison.methods.method import Bundle
from spkit.comparison.methods.npo import derive_npo
from spkit.config import Config, PatchingConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method import importance
from spkit.method.balancing import first_token_losses
from spkit.method.derivation import NAMES, derive
from spkit.method.importance import Calibration, score_patch
from spkit.method.patch import Factors
from spkit.method.training import Checkpoints, TrainingSet
from spkit.system.files import atomic

PATCHES = (*NAMES.values(), "npo")


def make_bundle(
    model,
    tokenizer,
    pairs: list[HarmfulPair],
    config: Config,
    *,
    seed: int,
    needs: Iterable[str] = ("se", "osm"),
    scored: bool = True,
    checkpoints: Checkpoints | None = None,
) -> Bundle:
    """Derive the patches that `needs` names, and score those of SafePatching if `scored`.

    model: the bare backbone as the derivation wants it; it comes back bare. Every patch depends on
    its own name and the seed alone, and not on what else is needed. checkpoints: where a cut
    derivation of SE or OSM resumes. SpkitError for an unknown name, and as in derivation.derive.
    """
    wanted = set(needs)
    for name in sorted(wanted - set(PATCHES)):
        raise SpkitError(f"There is no patch {name!r}; allowed are {', '.join(PATCHES)}.")
    patches, scores = {}, {}
    data = TrainingSet.of(tokenizer, pairs, config.data.max_tokens)
    calibration = calibrate(pairs, config, seed)
    for direction, name in NAMES.items():
        if name in wanted:
            own = None
            if checkpoints is not None:
                own = replace(checkpoints, folder=Path(checkpoints.folder) / name)
            patches[name], _ = derive(model, data, direction, config.derivation, seed, own)
            if scored:
                scores[name] = score_patch(model, tokenizer, patches[name], calibration)
    if "npo" in wanted:
        patches["npo"], _ = derive_npo(model, tokenizer, pairs, config, seed)
    return Bundle(patches, scores, config.patching)


def with_backbone(
    bundle: Bundle, model, tokenizer, pairs: list[HarmfulPair], config: Config, *, seed: int
) -> Bundle:
    """The bundle with `first_token_losses`: of `model`, unquantised, on the calibration pairs.

    The pairs are those of the importances: `importance.samples` of `pairs`, drawn with `seed`.
    """
    losses = first_token_losses(model, tokenizer, calibrate(pairs, config, seed))
    return replace(bundle, first_token_losses=losses)


def calibrate(pairs: Sequence[HarmfulPair], config: Config, seed: int) -> Calibration:
    """The calibration samples that a run's parameters ask for."""
    return Calibration(pairs, config.importance, seed, config.data.max_tokens)


def save_bundle(bundle: Bundle, folder: str | Path) -> None:
    """Write patches and importances to `folder`, which appears whole or not at all.

    A bundle that lay there before is replaced. The parameters (`bundle.patching`) are not written.
    """
    with atomic(folder) as temporary:
        temporary.mkdir()
        for name, patch in bundle.patches.items():
            patch.save(temporary / f"patch-{name}.safetensors")
        for name, scores in bundle.scores.items():
            importance.save(scores, temporary / f"importance-{name}.safetensors")


def load_bundle(folder: str | Path, patching: PatchingConfig) -> Bundle:
    """Read what `save_bundle` wrote; SpkitError where there is none, or a file is unreadable."""

    def files(kind: str) -> dict[str, Path]:
        paths = {name: Path(folder) / f"{kind}-{name}.safetensors" for name in PATCHES}
        return {name: path for name, path in paths.items() if path.is_file()}

    patches = {name: Factors.load(path) for name, path in files("patch").items()}
    if not patches:
        raise SpkitError(f"There is no bundle of patches in {str(folder)!r}.")
    scores = {name: importance.load(path) for name, path in files("importance").items()}
    return Bundle(patches, scores, patching)
