"""When two prompts are the same one, and which split or share a prompt belongs to.

Both look at the text alone, so they are the same on every machine and in every order of rows.
This file knows nothing of data sets and files.
"""

import hashlib
import sys
import unicodedata
from collections.abc import Mapping
from functools import cache

from spkit.config import SharesConfig


def normalised(text: str) -> str:
    """The text without what two copies of one prompt may differ in: case, punctuation, spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join(folded.translate(_punctuation()).split())
    return plain or " ".join(folded.split())  # "???" is not the same prompt as "!"


def split_of(text: str, dev_share: float) -> str:
    """Dev for a share `dev_share` of all texts, else test: by a hash of the normalised text."""
    return _interval(text, {"dev": dev_share})


def share_of(text: str, shares: SharesConfig) -> str:
    """Who may read a text of the one harmful source: "align", "harmful", "dev" or "test"."""
    return _interval(text, {"align": shares.align, "harmful": shares.harmful, "dev": shares.dev})


def instruction_share_of(text: str, align: float, dev_share: float) -> str:
    """ "align" for a share `align` of all texts; of the rest "dev" for `dev_share`, else "test"."""
    return _interval(text, {"align": align, "dev": (1 - align) * dev_share})


def _interval(text: str, lengths: Mapping[str, float]) -> str:
    """Where the hash of the normalised text, in [0, 1), falls: one interval after the other."""
    place, end = place_of(normalised(text)), 0.0
    for name, length in lengths.items():
        end += length
        if place < end:
            return name
    return "test"


def place_of(text: str) -> float:
    """A number in [0, 1) that the hash of a text decides, whatever it is drawn for."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def _punctuation() -> dict[int, str]:
    """Every code point of punctuation (Unicode's P...), to be read as a space."""
    return {i: " " for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "P"}
