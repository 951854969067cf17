"""The batches of a run as numbers of tokens: from its texts, as its tokenizer cuts them.

    read(config)     None where a text or the tokenizer is not on this machine

Nothing is downloaded and no model is loaded. The batches are those that the stages form: what they
are drawn with is the same.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

from spkit.config import Config
from spkit.data.readers.source import is_local, resolve
from spkit.data.selection import load_eval_prompts
from spkit.errors import SpkitError
from spkit.evaluation.utility.likelihood import encoded_text, perplexity_texts
from spkit.examples import sample
from spkit.method.balancing import AT_ONCE
from spkit.models.chat import IGNORE, encode_pair, length_bucketed_batches, prompt_ids
from spkit.models.gguf import converted, is_gguf
from spkit.models.loading import load_tokenizer
from spkit.running.checks.texts import named, pairs
from spkit.running.sizes import Batch, Batches
from spkit.sandbox.tokenizer import build_tokenizer
from spkit.system import hub, pypi

Lengths = list[tuple[int, int]]  # (tokens, those of them that count in the loss) of each text


def read(config: Config, continual: bool = False) -> Batches | None:
    """The batches of notebooks 00 to 03, or those of all stages of continual PSA, notebook 04.

    None where the tokenizer or a text that a parameter names is not on this machine, or cannot be
    read: what is wrong with it is said where it is needed.
    """
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = _tokenizer(config)
            if tokenizer is None or not all(_here(config, *each) for each in named(config).items()):
                return None
            parts = config.continual.stages if continual else [None]
            return _batches(config, tokenizer, [_pairs(config, tokenizer, part) for part in parts])
        except SpkitError:
            return None


def _tokenizer(config: Config):
    """None where its files are not here."""
    own = config.backbone
    if own.source == "sandbox":
        return build_tokenizer()
    if is_gguf(own):
        folder = converted(own)
    else:
        folder = own.source if is_local(own.source) else hub.in_cache(own.source, own.revision)
    if folder is None:
        return None
    keys = ("system_prompt", "chat_template", "chat_template_arguments")
    return load_tokenizer(folder, **{key: own.loading[key] for key in keys})


def _here(config: Config, key: str, name: str) -> bool:
    """Whether a data source is a file of this machine, or one of a package that was fetched."""
    parameter = key.partition(" ")[0]
    source = resolve(config.data, name, parameter, fetch=False)
    if pypi.is_pypi(source.path):
        return pypi.cached(source.path, source.sha256, parameter).is_file()
    return is_local(source.path) and Path(source.path).exists()


# ---- pairs ---------------------------------------------------------------------------------------


def _pairs(config: Config, tokenizer, categories: list[str] | None) -> tuple[Lengths, Lengths]:
    """Of all pairs of D_h, and of those that are scored.

    Where the backbone is still to be asked for the responses, all that may be in D_h count, each
    with as long a response as it may get, and the longest of them are scored.
    """
    d_h, data = pairs(config, categories), config.data
    if isinstance(d_h[0], str):
        asked = [len(prompt_ids(tokenizer, prompt)) for prompt in d_h]
        found = [(tokens + data.response_tokens, data.response_tokens) for tokens in asked]
        longest = sorted(found, reverse=True)[: data.pairs]
        return longest, longest[: config.importance.samples]
    scored = sample(list(d_h), config.importance.samples, config.seed)
    on = config.importance.loss_on
    return (
        [_pair(tokenizer, pair, "answer", data.max_tokens) for pair in d_h],
        [_pair(tokenizer, pair, on, data.max_tokens) for pair in scored],
    )


def _pair(tokenizer, pair, loss_on: str, max_tokens: int | None) -> tuple[int, int]:
    how = (loss_on, max_tokens, pair.ends)
    ids, labels = encode_pair(tokenizer, pair.prompt, pair.response, *how)
    return len(ids), sum(label != IGNORE for label in labels)


# ---- batches -------------------------------------------------------------------------------------


def _batches(config: Config, tokenizer, parts: Sequence[tuple[Lengths, Lengths]]) -> Batches:
    scoring, size = config.importance, config.evaluation.batch_size
    derived, scored, first = [], [], []
    for all_pairs, chosen in parts:
        derived += _trained(config, all_pairs)
        scored += _cut(chosen, scoring.batch_size)
        whole = _cut([(tokens, 1) for tokens, _ in chosen], len(chosen))
        one_by_one = [(tokens, 1) for tokens, _ in chosen]
        first += whole if whole[0].tokens <= AT_ONCE else _cut(one_by_one, scoring.batch_size)
    prompts = load_eval_prompts(config.data, config.evaluation)
    asked = sorted((len(prompt_ids(tokenizer, prompt.prompt)), 0) for prompt in prompts)
    texts = sorted((len(encoded_text(tokenizer, x)[0]), 0) for x in perplexity_texts(config))
    return Batches(
        derivation=tuple(derived),
        importance=tuple(scored),
        balance=tuple(first),
        evaluation=tuple(_cut(asked, size)),
        texts=tuple(_cut(texts, config.utility.batch_size)),
    )


def _trained(config: Config, found: Lengths) -> Iterator[Batch]:
    """Every pass of both derivations, each once."""
    own, seen = config.derivation, set()
    for settings in (own.ascent, own.descent):
        at_once = own.micro_batch_size or settings.batch_size
        drawn = _drawn([tokens for tokens, _ in found], settings.batch_size, config.seed)
        for indices in islice(drawn, settings.max_steps + 1):
            seen |= set(_cut([found[i] for i in indices], at_once))
    yield from seen


def _drawn(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """As the loop of method/training.py draws them."""
    epoch = 0
    while True:
        yield from length_bucketed_batches(lengths, batch_size, (seed, epoch))
        epoch += 1


def _cut(found: Lengths, size: int) -> list[Batch]:
    parts = (found[start : start + size] for start in range(0, len(found), size))
    return [
        Batch(len(part), max(tokens for tokens, _ in part), sum(own for _, own in part))
        for part in parts
    ]
