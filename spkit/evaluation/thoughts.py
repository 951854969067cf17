"""Thoughts: what a reasoning model writes before its answer, between two marks.

Stored answers keep them. Judges see what is outside (judges/__init__.py: judged). Marks in code are
text: an answer may well explain what <think> means.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

from spkit.models.chat import special_ids
from spkit.models.templates import CLOSED, OPENED, messages, opening_at_end, rendered

FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)(`{1,2})(?!`)[^\n]*?(?<!`)\1(?!`)")
FOLDED = re.DOTALL | re.IGNORECASE


def without_thoughts(response: str, marks: tuple[str, str] | None = None) -> str | None:
    """What a response says outside its thoughts; None where it never gets out of one.

    marks: the opening and the closing one; None: all published spellings. A closing mark without an
    opening one ends a thought that the prompt began.
    """
    opened, closed = _patterns(marks)
    if not opened.search(response) and not closed.search(response):
        return response
    said = _outside(response, opened, closed, (FENCED, INLINE))
    # a thought may hold a fence that it does not close, and the answer another
    return _outside(response, opened, closed, (INLINE,)) if said is None else said


def _outside(response: str, opened, closed, code: tuple[re.Pattern, ...]) -> str | None:
    kept: list[str] = []

    def hide(found: re.Match) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    for pattern in code:
        response = pattern.sub(hide, response)
    inner = f"(?:(?!{opened.pattern}).)*?"
    thought = re.compile(f"{opened.pattern}{inner}{closed.pattern}", FOLDED)
    whole, previous = response, None
    while previous != response:  # a thought within a thought goes first
        previous, response = response, thought.sub("", response)
    if opened.search(response):  # a thought may say its opening mark, or begin with it twice
        response = re.sub(f"{opened.pattern}.*?{closed.pattern}", "", whole, flags=FOLDED)
    response = re.sub(f".*{closed.pattern}", "", response, flags=FOLDED)
    begun = opened.search(response)
    if begun is not None:
        response = response[: begun.start()]
        if not any(map(str.isalpha, response)):
            return None
    while "\0" in response:
        response = re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], response)
    return response


@cache
def _patterns(marks: tuple[str, str] | None) -> tuple[re.Pattern, re.Pattern]:
    """(opening, closing)."""
    pair = (OPENED, CLOSED) if marks is None else map(re.escape, marks)
    opened, closed = (re.compile(mark, re.IGNORECASE) for mark in pair)
    return opened, closed


# ---- marks that a prompt or a tokenizer would hide -----------------------------------------------


def opened_thought(tokenizer) -> str:
    """The opening mark that the chat template writes for the model (DeepSeek-R1), with the blanks
    after it; else "". An answer is stored with it, so that what is cut in its thought is seen."""
    turns = messages(tokenizer, "x")
    return opening_at_end(rendered(tokenizer, turns, tokenize=False, add_generation_prompt=True))


def as_answer(tokenizer) -> Callable[[Sequence[int]], str]:
    """How token ids become an answer's text: without special tokens, but for marks of thoughts.

    In some vocabularies (Magistral's) these are special; a thought would pass for an answer.
    """
    mark = re.compile(f"{OPENED}|{CLOSED}", re.IGNORECASE)
    special = special_ids(tokenizer)
    skipped = {i for i in special if not mark.fullmatch(tokenizer.convert_ids_to_tokens(i) or "")}
    if skipped == special:
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()
    return lambda ids: tokenizer.decode([i for i in ids if int(i) not in skipped]).strip()
