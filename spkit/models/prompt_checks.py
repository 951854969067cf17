"""Whether a model reads what was written: the prompt must be found in what its token ids say.

A tokenizer folder without its files, the tokenizer of another model, and a template that cuts the
text all give token ids without an error, and a run on them means nothing. So the first prompts are
encoded, decoded and compared.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher

from spkit.errors import SpkitError
from spkit.models.chat import messages, prompt_ids, special_ids
from spkit.models.templates import rendered

CHECKED = 8  # prompts: a wrong tokenizer is wrong on the first
FOUND = 0.9  # share of a prompt's characters that a tokenizer without unknown words must give back
BLOCK = 3  # characters; shorter matches are chance


def check_rendered(tokenizer, prompts: Sequence[str | Sequence[str]]) -> None:
    """SpkitError unless the prompts are found in what their rendered token ids decode to.

    prompts: texts, or conversations (the last turn is looked for); the first CHECKED are read.
    Case, accents, white space and Unicode's compatibility forms do not count. Words that the
    tokenizer does not know may be missing, but not all words of all prompts.
    """
    known = []
    for prompt in prompts[:CHECKED]:
        words = prompt if isinstance(prompt, str) else prompt[-1]
        said = _plain(words)
        shown = rendered(
            tokenizer, messages(tokenizer, prompt), tokenize=False, add_generation_prompt=True
        )
        if said not in _plain(shown):
            raise SpkitError(
                f"The chat template of {tokenizer.name_or_path!r} does not show the whole prompt "
                f"{words[:60]!r}, but {shown[:200]!r}"
            )
        ids = prompt_ids(tokenizer, prompt)
        if tokenizer.unk_token_id not in ids and _share(tokenizer, said, ids) < FOUND:
            raise _lost(tokenizer, words, ids)
        known.append(_unknown(tokenizer, words) < 1)
    if known and not any(known):
        raise _lost(tokenizer, words, ids)


def _share(tokenizer, said: str, ids: Sequence[int]) -> float:
    """The share of a prompt's characters that its ids give back in their order; 1 is all."""
    text = _plain(_text(tokenizer, ids))
    if not said or said in text:
        return 1.0
    matcher = SequenceMatcher(None, said, text, autojunk=False)
    blocks = (block.size for block in matcher.get_matching_blocks())
    return sum(size for size in blocks if size >= min(BLOCK, len(said))) / len(said)


def _text(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))


def _lost(tokenizer, words: str, ids: Sequence[int]) -> SpkitError:
    text = _text(tokenizer, ids)
    return SpkitError(
        f"The prompt {words[:60]!r} is not found in what its token ids decode to, "
        f"{text[:200]!r}: the tokenizer of {tokenizer.name_or_path!r} lacks files, or belongs to "
        "another model."
    )


def _plain(text: str) -> str:
    """Without what tokenizers may change: case, accents, white space, compatibility forms."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in parts if not c.isspace() and not unicodedata.combining(c))


def check_vocabulary(tokenizer) -> None:
    """SpkitError for a tokenizer that knows no word, or whose end of text is none of its tokens.

    transformers makes an empty tokenizer where a folder has none of a tokenizer's files.
    """
    if not set(tokenizer.get_vocab().values()) - special_ids(tokenizer):
        raise SpkitError(
            f"The tokenizer of {tokenizer.name_or_path!r} knows {len(tokenizer)} special tokens "
            "and no word: the folder lacks the tokenizer's files (tokenizer.json or "
            "tokenizer.model)."
        )
    if tokenizer.eos_token_id in (None, tokenizer.unk_token_id) and (
        tokenizer.eos_token != tokenizer.unk_token
    ):
        raise SpkitError(
            f"The tokenizer of {tokenizer.name_or_path!r} names {tokenizer.eos_token!r} as its eos "
            "token, which is not in its vocabulary: no answer could end."
        )


def check_ids(tokenizer, config) -> None:
    """SpkitError where config.json tells that the tokenizer is another model's; needs no weights.

    It can emit an id for which the model has no embedding, or lacks the model's own bos or eos.
    config: transformers' own.
    """
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    known = tokenizer.get_vocab().values()
    if rows is None:
        return
    if max(known) >= rows:
        raise SpkitError(
            f"The tokenizer of {tokenizer.name_or_path!r} has token ids up to {max(known)}, but "
            f"the model has {rows} embeddings (ids 0 to {rows - 1}): it belongs to another model."
        )
    for name in ("bos_token_id", "eos_token_id"):
        own = getattr(text, name, None)
        for number in own if isinstance(own, list | tuple) else [own]:
            if number is not None and max(known) < number < rows:
                raise SpkitError(
                    f"The model's {name} is {number} (config.json), and the tokenizer of "
                    f"{tokenizer.name_or_path!r} has ids up to {max(known)} only: it belongs to "
                    "another model."
                )


# ---- pairs ---------------------------------------------------------------------------------------


def check_pairs(tokenizer, pairs: Sequence) -> None:
    """`check_rendered` of their prompts; a warning where at least half of a text is unknown.

    Such a pair teaches a model little but the unknown token. pairs: with prompt and response.
    """
    check_rendered(tokenizer, [pair.prompt for pair in pairs])
    strange = [
        p for p in pairs if max(_unknown(tokenizer, t) for t in (p.prompt, p.response)) >= 0.5
    ]
    if strange:
        words = " ".join(strange[0].prompt.split()[:8])
        warnings.warn(
            f"{len(strange)} of {len(pairs)} pairs have a text of which at least half is unknown "
            f"to the tokenizer ({tokenizer.unk_token}); the first is {words!r}",
            stacklevel=3,
        )


def _unknown(tokenizer, text: str) -> float:
    """The share of a text's tokens that are unknown."""
    if tokenizer.unk_token_id is None:
        return 0.0
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))
