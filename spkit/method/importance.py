"""The importance of patches: which pairs, which model, how many layers at a time.

    Calibration       which pairs of D_h are scored, and on which tokens the loss is
    score_windows     I_SE on theta + P_SE and I_OSM on theta + P_OSM, window after window
    top_rate_bits     S_SE and S_OSM of every window; then its scores are forgotten

Both patches are adapters of one loaded backbone, and one of them is active. The score itself is
computed in snip.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from spkit.config import ImportanceConfig, PatchingConfig
from spkit.examples import HarmfulPair, sample
from spkit.method.patch import Factors
from spkit.method.patching import top_rate_set
from spkit.method.sets import BitSets
from spkit.method.snip import snip, snip_windows
from spkit.method.training import attach
from spkit.models.chat import collate, encode_pair
from spkit.models.devices import devices_of
from spkit.models.weights import decoder_layers, target_weights
from spkit.system import processes
from spkit.system.machine import free_memory, layers_that_fit
from spkit.system.out_of_memory import explained
from spkit.system.tensors import load_tensors, save_tensors

Scores = dict[str, dict[str, Tensor]]  # {patch name: {tensor name: importance}}
Batches = list[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Calibration:
    """The calibration samples: `config.samples` of the pairs, drawn with `seed`.

    pairs: D_h. The same samples serve both patches. max_tokens: a longer pair is cut.
    """

    pairs: Sequence[HarmfulPair]
    config: ImportanceConfig
    seed: int
    max_tokens: int | None = None

    def batches(self, tokenizer) -> Batches:
        """As chat.collate's batches of `config.batch_size`, with the loss on `config.loss_on`."""
        return self._batches(tokenizer, self.config.loss_on, self.config.batch_size)

    def answers(self, tokenizer, at_most: int) -> Batches:
        """With the loss on the answer, in one batch where that has at most so many tokens."""
        whole = self._batches(tokenizer, "answer", self.config.samples)
        if whole[0]["input_ids"].numel() <= at_most:
            return whole
        return self._batches(tokenizer, "answer", self.config.batch_size)

    def _batches(self, tokenizer, loss_on: str, size: int) -> Batches:
        chosen = sample(list(self.pairs), self.config.samples, self.seed)
        how = (loss_on, self.max_tokens)
        pairs = [encode_pair(tokenizer, p.prompt, p.response, *how, p.ends) for p in chosen]
        pad = tokenizer.pad_token_id
        return [collate(pairs[i : i + size], pad) for i in range(0, len(pairs), size)]


# ---- scores --------------------------------------------------------------------------------------


def score_windows(
    model, tokenizer, patches: Sequence[Factors], calibration: Calibration
) -> Iterator[Scores]:
    """{patch name: {tensor name: importance fp32 [out, in]}} of some layers at a time, on the CPU.

    model: the bare backbone, dense or NF4; it comes back bare. With scored_model "patched" I_SE is
    measured on theta_GA and I_OSM on theta_GD; with "backbone" all are measured on theta, and are
    then the same. The scores do not depend on `layers_per_pass`, only the memory does.
    """
    config, batches = calibration.config, calibration.batches(tokenizer)
    targets = patches[0].manifest["lora"]["targets"]
    depth = layers_per_pass(model, targets, config, len(patches))
    lower = {"importance.batch_size": config.batch_size, "importance.layers_per_pass": depth}
    lower["data.max_tokens"] = calibration.max_tokens

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
    wrapped = attach(model, *patches)
    try:
        walks = {patch.name: windows(wrapped) for patch in patches}
        while (scores := _next_window(wrapped, walks)) is not None:
            yield scores
    finally:
        wrapped.unload()


def _next_window(wrapped, walks: Mapping[str, Iterator[dict[str, Tensor]]]) -> Scores | None:
    """The next window of every patch, each with its own adapter active; None at the end."""
    scores = {}
    for name, walk in walks.items():
        wrapped.set_adapter(name)
        window = next(walk, None)
        if window is None:
            return None
        scores[name] = {tensor: score.cpu() for tensor, score in window.items()}
    return scores


def score_patch(model, tokenizer, patch: Factors, calibration: Calibration) -> dict[str, Tensor]:
    """All scores of one patch at once: `score_windows` put together, where they fit in memory."""
    return gathered(score_windows(model, tokenizer, [patch], calibration))[patch.name]


def gathered(windows: Iterable[Scores]) -> Scores:
    """All windows in one: {patch name: {tensor name: importance}}."""
    scores: Scores = {}
    for window in windows:
        for name, found in window.items():
            scores.setdefault(name, {}).update(found)
    return scores


def top_rate_bits(windows: Iterable[Scores], patching: PatchingConfig) -> dict[str, BitSets]:
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


def layers_per_pass(
    model, targets: Sequence[str] | str, config: ImportanceConfig, patches: int
) -> int | None:
    """config.layers_per_pass with "auto" resolved: as many as leave room; None: all at once."""
    if config.layers_per_pass != "auto":
        return config.layers_per_pass
    layers = target_weights(model, targets).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    free = min(map(free_memory, devices_of(model)), default=0)  # a window lies on one, mostly
    free = processes.here().smallest(free)
    return layers_that_fit(free, weights, len(decoder_layers(model)), patches)


# ---- files ---------------------------------------------------------------------------------------


def save_windows(
    windows: Iterator[Scores],
    what: Literal["scores", "sets"],
    patching: PatchingConfig,
    folder: str | Path,
) -> None:
    """Write what `importance.save` asks for into `folder`.

    windows: of score_windows; after an error they are closed at once, so that the backbone is bare.
    "scores": importance_<patch>.safetensors, fp32. "sets": top_<patch>.safetensors, one bit a
    weight, after which the scores of each window are forgotten.
    """
    with closing(windows):
        if what == "sets":
            for name, sets in top_rate_bits(windows, patching).items():
                sets.save(Path(folder) / f"top_{name}.safetensors")
            return
        scores = gathered(windows)
    for name, found in scores.items():
        save(found, Path(folder) / f"importance_{name}.safetensors")


def save(scores: Mapping[str, Tensor], path: str | Path) -> None:
    """Write {tensor name: importance} as one safetensors file, whole or not at all."""
    save_tensors({name: s.detach().cpu().contiguous() for name, s in scores.items()}, path)


def load(path: str | Path) -> dict[str, Tensor]:
    """Read what `save` wrote; SpkitError where the file is missing or unreadable."""
    return load_tensors(path, "importances")[0]
