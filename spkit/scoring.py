"""The importance of patches: calibration pairs from D_h, the right model, SNIP window by window.

This is the glue between derivation.py and importance.py: which pairs are used, whether a patch is
scored on its own model (theta + P) or on the backbone, and how many layers at a time. Both patches
hang on one loaded backbone, as two adapters of which one is active.

What it does not do: compute a score, or keep one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spkit import importance
from spkit.backbone import target_weights
from spkit.chat import collate, encode_pair
from spkit.config import Config, ImportanceConfig, PatchingConfig
from spkit.data import sample
from spkit.derivation import Patch, attach
from spkit.examples import HarmfulPair
from spkit.importance import decoder_layers, snip, snip_windows
from spkit.lazy import BitSets
from spkit.machine import free_memory
from spkit.out_of_memory import explained
from spkit.patching import top_rate_set

SHARE_OF_FREE_MEMORY = 0.4  # for the scores of one window; the passes need the rest

Scores = dict[str, dict[str, Tensor]]  # {patch name: {tensor name: importance}}


def score_windows(
    model,
    tokenizer,
    patches: Sequence[Patch],
    pairs: Sequence[HarmfulPair],
    config: ImportanceConfig,
    *,
    seed: int,
    max_tokens: int | None = None,
) -> Iterator[Scores]:
    """{patch name: {tensor name: importance fp32 [out, in]}} of one window after the other, on the
    CPU.

    model: the bare backbone, dense or NF4; it comes back bare. With scored_model "patched" [ours]
    I_SE is measured on theta_GA and I_OSM on theta_GD, where the LoRA factors make the difference;
    with "backbone" all are measured on theta, and are then the same.
    pairs: D_h, of which `config.samples` are the calibration set, the same ones for all patches.
    The scores do not depend on `layers_per_pass`; only the memory does.
    """
    batches = calibration_batches(
        tokenizer, pairs, config, seed=seed, loss_on=config.loss_on, max_tokens=max_tokens
    )
    targets = patches[0].manifest["lora"]["targets"]
    depth = layers_per_pass(model, targets, config, len(patches))

    lower = {
        "importance.batch_size": config.batch_size,
        "importance.layers_per_pass": depth,
        "data.max_tokens": max_tokens,
    }

    def windows(scored) -> Iterator[dict[str, Tensor]]:
        with explained("scoring the weights", lower):
            if depth is None:
                yield snip(scored, batches, targets)
            else:
                yield from snip_windows(scored, batches, targets, depth)

    if config.scored_model == "backbone":
        for scores in windows(model):
            on_host = {name: score.cpu() for name, score in scores.items()}
            yield {patch.name: on_host for patch in patches}
        return
    with _attached(model, patches) as wrapped:
        walks = {patch.name: windows(wrapped) for patch in patches}
        while True:
            scores = {}
            for name, walk in walks.items():
                wrapped.set_adapter(name)
                window = next(walk, None)
                if window is None:
                    return
                scores[name] = {tensor: score.cpu() for tensor, score in window.items()}
            yield scores


def score_patch(
    model,
    tokenizer,
    patch: Patch,
    pairs: Sequence[HarmfulPair],
    config: ImportanceConfig,
    *,
    seed: int,
    max_tokens: int | None = None,
) -> dict[str, Tensor]:
    """All scores of one patch at once: `score_windows` put together, where they fit in memory."""
    scores: dict[str, Tensor] = {}
    windows = score_windows(
        model, tokenizer, [patch], pairs, config, seed=seed, max_tokens=max_tokens
    )
    for window in windows:
        scores |= window[patch.name]
    return scores


def score_and_save(
    model,
    tokenizer,
    patches: Sequence[Patch],
    pairs: Sequence[HarmfulPair],
    config: Config,
    folder: str | Path,
    *,
    watch: Callable[[Scores], object] = lambda window: None,
) -> None:
    """Score the SE and the OSM patch and write what `importance.save` asks for into `folder`.

    "scores": importance_<patch>.safetensors, fp32. "sets": top_<patch>.safetensors, one bit a
    weight, after which the scores of each window are forgotten. watch: sees every window.
    """
    windows = score_windows(
        *(model, tokenizer, patches, pairs, config.importance),
        seed=config.seed,
        max_tokens=config.data.max_tokens,
    )
    scores: Scores = {patch.name: {} for patch in patches}
    with closing(windows):  # the backbone comes back bare at once, also where `watch` fails
        seen = _watched(windows, watch)
        if config.importance.save == "sets":
            for name, sets in top_rate_bits(seen, config.patching).items():
                sets.save(Path(folder) / f"top_{name}.safetensors")
            return
        for window in seen:
            for name, found in window.items():
                scores[name] |= found
    for name, found in scores.items():
        importance.save(found, Path(folder) / f"importance_{name}.safetensors")


def _watched(windows: Iterator[Scores], watch: Callable[[Scores], object]) -> Iterator[Scores]:
    for window in windows:
        watch(window)
        yield window


def top_rate_bits(windows: Iterator[Scores], patching: PatchingConfig) -> dict[str, BitSets]:
    """{"se": S_SE, "osm": S_OSM}: each matrix's top a % and b %, one bit a weight.

    The scores of one window are ranked and forgotten. Needs scope "matrix" and order "rank_all".
    """
    rates = {"se": patching.top_rate_se, "osm": patching.top_rate_osm}
    sets = {name: BitSets(about={"top_rate": rate}) for name, rate in rates.items()}
    for window in windows:
        for name, scores in window.items():
            for tensor, score in scores.items():
                sets[name].add(tensor, top_rate_set(score, rates[name]))
    return sets


def calibration_batches(
    tokenizer,
    pairs: Sequence[HarmfulPair],
    config: ImportanceConfig,
    *,
    seed: int,
    loss_on: str = "answer",
    max_tokens: int | None = None,
    at_once: bool = False,
) -> list[Mapping[str, Tensor]]:
    """`config.samples` of the pairs, drawn with `seed`, as chat.collate's batches.

    at_once: as one batch instead of batches of `config.batch_size`.
    """
    chosen = sample(list(pairs), config.samples, seed)
    size = len(chosen) if at_once else config.batch_size
    encoded = [encode_pair(tokenizer, p.prompt, p.response, loss_on, max_tokens) for p in chosen]
    return [
        collate(encoded[i : i + size], tokenizer.pad_token_id) for i in range(0, len(encoded), size)
    ]


def layers_per_pass(
    model, targets: Sequence[str], config: ImportanceConfig, patches: int
) -> int | None:
    """config.layers_per_pass with "auto" resolved: as many as leave room; None: all at once."""
    if config.layers_per_pass != "auto":
        return config.layers_per_pass
    weights = sum(
        layer.in_features * layer.out_features for layer in target_weights(model, targets).values()
    )
    depth = len(decoder_layers(model))
    free = free_memory(model.get_input_embeddings().weight.device)
    return layers_that_fit(free, weights, depth, patches)


def layers_that_fit(free: float, weights: int, depth: int, patches: int) -> int:
    """How many of `depth` layers, with `weights` targeted ones in all, to score at once: 1 or more.

    free: bytes. A layer takes 4 bytes a weight and patch, and once more for the product being
    added.
    """
    a_layer = 4 * (patches + 1) * weights / depth
    return max(1, min(depth, int(SHARE_OF_FREE_MEMORY * free / a_layer)))


@contextmanager
def _attached(model, patches: Sequence[Patch]) -> Iterator[torch.nn.Module]:
    wrapped = attach(model, *patches)
    try:
        yield wrapped
    finally:
        wrapped.unload()
