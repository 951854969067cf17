"""The small door: one call from harmful pairs to a merged patch, with no run folder and no file.

    model, tokenizer = spkit.sandbox_backbone()          or spkit.load("a/model")
    patch = spkit.safepatch(model, tokenizer, pairs)
    with spkit.patched(model, patch):
        spkit.generate(model, tokenizer, ["how do i dye a goat ?"])

The notebooks take the same steps one by one, keep what each leaves, and measure.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation import answers
from spkit.examples import HarmfulPair
from spkit.method.balancing import balanced, first_token_losses
from spkit.method.derivation import derive
from spkit.method.importance import Calibration, gathered, score_windows, top_rate_bits
from spkit.method.patch import MergedPatch
from spkit.method.safepatching import SafePatching
from spkit.method.training import TrainingSet
from spkit.models.loading import load
from spkit.models.nf4 import is_4bit
from spkit.models.patched import patched
from spkit.sandbox import world
from spkit.sandbox.backbone import SHIPPED

__all__ = ["generate", "load", "patched", "safepatch", "sandbox_backbone", "sandbox_pairs"]


def safepatch(
    model,
    tokenizer,
    pairs: Sequence[HarmfulPair | tuple[str, str]],
    *,
    config: Config | Mapping[str, object] | None = None,
    seed: int = 0,
    threads: int | None = 1,
) -> MergedPatch:
    """SafePatching of a backbone: derive both patches, score them, find alpha, merge [paper].

    model: bare, in full precision or NF4; it comes back as it was. pairs: D_h, harmful questions
    with harmful responses. config: what differs from params/sandbox.yaml, by dotted keys
    ({"patching.beta": 1.0}), or a Config (config.load_params); its sections derivation, importance
    and patching count, and data.max_tokens.
    threads: of torch while it runs; small models take many times longer on several, on a busy
    machine above all. None: as torch is set.
    The same model, pairs, config, seed and threads give the same patch on the same machine.
    SpkitError for an unknown key or value, and for pairs that cannot be trained on.
    """
    config = config if isinstance(config, Config) else Config.from_sources({}, config)
    pairs = [_pair(number, pair) for number, pair in enumerate(pairs)]
    with _torch_threads(threads), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        data = TrainingSet.of(tokenizer, pairs, config.data.max_tokens)
        how = "nf4" if any(is_4bit(layer) for layer in model.modules()) else "none"
        derivation = config.derivation.model_copy(update={"quantization": how})
        se, osm = (derive(model, data, d, derivation, seed)[0] for d in ("ascent", "descent"))
        calibration = Calibration(pairs, config.importance, seed, config.data.max_tokens)
        windows = score_windows(model, tokenizer, (se, osm), calibration)
        if config.importance.save == "sets":
            found = top_rate_bits(windows, config.patching)
        else:
            found = gathered(windows)
        method = SafePatching(se, osm, (found["se"], found["osm"]), config.patching, seed)
        losses = first_token_losses(model, tokenizer, calibration)
        return balanced(method, losses).deltas()


def generate(
    model, tokenizer, prompts: Sequence[str], *, max_new_tokens: int = 64, batch_size: int = 16
) -> list[str]:
    """Greedy answers to the prompts, in their order."""
    if isinstance(prompts, str):
        raise SpkitError("prompts is one text, must be a list of texts.")
    lengths = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return answers.generate(model, tokenizer, prompts, **lengths)


def sandbox_backbone(quantization: str = "none"):
    """(model, tokenizer) of the village, seed 0, as the package brings it; in memory alone."""
    return load(SHIPPED, quantization=quantization, device="cpu")


def sandbox_pairs(count: int | None = 192, seed: int = 0) -> list[HarmfulPair]:
    """D_h of the village: at most `count` pairs, drawn by the seed; None: all there are."""
    return world.harmful_pairs(count=count, seed=seed)


def _pair(number: int, pair) -> HarmfulPair:
    if isinstance(pair, HarmfulPair):
        return pair
    texts = tuple(pair) if isinstance(pair, list | tuple) else ()
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise SpkitError(f"pairs[{number}] is no pair of texts (prompt, response).")
    return HarmfulPair(str(number), *texts, category="")


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
