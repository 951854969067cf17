"""How long a text may be: what a model reads, and one sentence for what is longer.

Beyond its context a model with learned positions fails with an index error, and one with rotary
positions writes nonsense without a word. The limit is kept on the tokenizer when it is loaded, so
that every text is checked where it is encoded.
"""

from collections.abc import Sequence

from spkit.errors import SpkitError

CONTEXT = "context_length"  # the tokenizer's attribute [tokens]; None: no limit is known
SANE = 10_000_000  # transformers writes 10**30 for "no limit"
SHORTEN = "shorten it or leave it out"


def context_length(config, tokenizer=None) -> int | None:
    """How many tokens a model reads, prompt and answer together; None where nothing says so.

    config: transformers' own, of any architecture. What stretches rotary positions counts. The
    tokenizer's model_max_length is taken only where the config names no length: some are far below
    what the model reads.
    """
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length"):
        known = getattr(text, name, None)
        if isinstance(known, int) and 0 < known < SANE:
            return max(known, _stretched(text, known))
    known = getattr(tokenizer, "model_max_length", None)
    return int(known) if known is not None and known < SANE else None


def _stretched(config, known: int) -> int:
    """The length that linear, dynamic or YaRN scaling of the rotary positions makes of `known`."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("linear", "dynamic", "yarn"):
        return known
    start = rope.get("original_max_position_embeddings") or known
    return int(start * (rope.get("factor") or 1))


def context_of(tokenizer) -> int | None:
    """The limit [tokens] that `load_tokenizer` found; None for a tokenizer made by hand."""
    return getattr(tokenizer, CONTEXT, None)


def check_context(tokenizer, tokens: int, what: str, otherwise: str = SHORTEN) -> None:
    """SpkitError where `what`, of so many tokens, is longer than the model's context.

    otherwise: what one can do about it.
    """
    limit = context_of(tokenizer)
    if limit is not None and tokens > limit:
        raise SpkitError(f"{what} takes {tokens} tokens, and the model reads {limit}: {otherwise}.")


def check_lengths(
    encoded: Sequence[Sequence[int]],
    limit: int | None,
    max_new_tokens: int,
    names: Sequence[str] = (),
) -> None:
    """SpkitError naming the first prompt that leaves no room for an answer of `max_new_tokens`.

    encoded: token ids of each prompt. limit: `context_of(tokenizer)`. names: of the prompts, else
    their numbers from 1 on.
    """
    if limit is None:
        return
    for number, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > limit:
            name = repr(names[number]) if names else f"number {number + 1}"
            raise SpkitError(
                f"The prompt {name} takes {len(ids)} tokens, and the model reads {limit} together "
                f"with an answer of {max_new_tokens}: {SHORTEN}, or lower max_new_tokens."
            )
