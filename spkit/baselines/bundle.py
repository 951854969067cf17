"""Bundles: derived and scored once per seed, then shared by all methods; written and read whole.

    <folder>/patch-<name>.safetensors         derivation.Patch.save
    <folder>/importance-<name>.safetensors    importance.save

The folder holds the OSM patch, which alone is a jailbreak: it belongs into the run folder, and
is never published. What this file does not do: combine anything (the methods do), or decide
whether a bundle that lies on the disk is still up to date.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from spkit import importance
from spkit.balancing import first_token_losses
from spkit.baselines.method import Bundle
from spkit.baselines.npo import derive_npo
from spkit.config import Config, PatchingConfig
from spkit.derivation import NAMES, Patch, derive
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.files import atomic
from spkit.scoring import score_patch

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
    checkpoints: str | Path | None = None,
    saved: Callable[[], object] | None = None,
) -> Bundle:
    """Derive the patches that `needs` names, and score those of SafePatching if `scored`.

    model: the bare backbone as the derivation wants it; it comes back bare. Every patch depends on
    its own name and the seed alone, and not on what else is needed. checkpoints, saved: a folder in
    which a cut derivation of SE or OSM goes on, as in derivation.train_lora. SpkitError for an
    unknown name, and as in derivation.derive.
    """
    wanted = set(needs)
    for name in sorted(wanted - set(PATCHES)):
        raise SpkitError(f"There is no patch {name!r}; allowed are {', '.join(PATCHES)}.")
    patches, scores = {}, {}
    how = {"seed": seed, "max_tokens": config.data.max_tokens}
    for direction, name in NAMES.items():
        if name in wanted:
            patches[name], _ = derive(
                *(model, tokenizer, pairs),
                direction=direction,
                config=config.derivation,
                checkpoint=None if checkpoints is None else Path(checkpoints) / name,
                saved=saved,
                **how,
            )
            if scored:
                scores[name] = score_patch(
                    model, tokenizer, patches[name], pairs, config.importance, **how
                )
    if "npo" in wanted:
        patches["npo"], _ = derive_npo(model, tokenizer, pairs, config, seed)
    return Bundle(patches, scores, config.patching)


def with_backbone(
    bundle: Bundle, model, tokenizer, pairs: list[HarmfulPair], config: Config, *, seed: int
) -> Bundle:
    """The bundle with `first_token_losses`: of `model`, unquantised, on the calibration pairs.

    The pairs are those of the importances: `importance.samples` of `pairs`, drawn with `seed`.
    """
    losses = first_token_losses(
        model, tokenizer, pairs, config.importance, seed=seed, max_tokens=config.data.max_tokens
    )
    return replace(bundle, first_token_losses=losses)


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

    patches = {name: Patch.load(path) for name, path in files("patch").items()}
    if not patches:
        raise SpkitError(f"There is no bundle of patches in {str(folder)!r}.")
    scores = {name: importance.load(path) for name, path in files("importance").items()}
    return Bundle(patches, scores, patching)
