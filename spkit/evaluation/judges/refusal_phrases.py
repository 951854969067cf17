"""The refusal judge's phrases, read from refusal_phrases.yaml, and the plain text they match."""

import re
from functools import cache, lru_cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("refusal_phrases.yaml")
UP_TO_THREE_WORDS = r"(?:[\w'-]+,? ){0,3}"
NOT_IN_A_WORD = r"(?<![\w'])"

CHARACTERS = str.maketrans(dict.fromkeys("’‘ʼ´`′", "'") | {"“": '"', "”": '"', "\xa0": " "})
MARKUP = re.compile(r"[*_#>]+")  # of Markdown
CONTRACTIONS = [
    (re.compile(pattern), written_out)
    for pattern, written_out in (
        (r"\bcan(?: no|')t\b", "cannot"),
        (r"\bwon't\b", "will not"),
        (r"\bshan't\b", "shall not"),
        (r"n't\b", " not"),
        (r"'m\b", " am"),
        (r"'re\b", " are"),
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
        (r"\b(i|you|we|they|he|she|it|that)'d\b", r"\1 would"),
        (r"\b(it|he|she|that|this|there|here|what|who|how)'s\b", r"\1 is"),
    )
]


@lru_cache(maxsize=256)  # a text is read by several functions, one after another
def plain(text: str) -> str:
    """Lower case, straight apostrophes, no Markdown, contractions written out."""
    text = MARKUP.sub("", text.translate(CHARACTERS)).lower()
    if "'" in text or "can not" in text:
        for pattern, written_out in CONTRACTIONS:
            text = pattern.sub(written_out, text)
    return text


@cache
def groups() -> dict[str, re.Pattern[str]]:
    """{group: one expression that finds any of its phrases in a plain sentence}."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    words = {name: "|".join(lines.split("\n")[:-1]) for name, lines in content["words"].items()}
    return {
        name: _compiled(group["phrases"].splitlines(), words)
        for name, group in content["groups"].items()
    }


def _compiled(phrases: list[str], words: dict[str, str]) -> re.Pattern[str]:
    starts = [phrase for phrase in phrases if phrase.startswith("^")]
    others = [phrase for phrase in phrases if not phrase.startswith("^")]
    expression = "|".join([*starts, f"{NOT_IN_A_WORD}(?:{'|'.join(others)})"] if others else starts)
    for name, listed in words.items():
        expression = expression.replace(f"<{name}>", listed)
    expression = re.sub(r"\((?!\?)", "(?:", expression)  # no group is ever read
    return re.compile(expression.replace("~", UP_TO_THREE_WORDS))
