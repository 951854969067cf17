"""When two prompts are the same one, and which split a prompt belongs to.

Both look at the text alone, so they are the same on every machine and in every order of rows.
This file knows nothing of data sets and files.
"""

import hashlib
import sys
import unicodedata
from functools import cache


def normalised(text: str) -> str:
    """The text without what two copies of one prompt may differ in: case, punctuation, spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join(folded.translate(_punctuation()).split())
    return plain or " ".join(folded.split())  # "???" is not the same prompt as "!"


def split_of(text: str, dev_share: float) -> str:
    """Dev for a share `dev_share` of all texts, else test: by a hash of the normalised text."""
    digest = hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()
    return "dev" if int.from_bytes(digest[:8], "big") / 2**64 < dev_share else "test"


@cache
def _punctuation() -> dict[int, str]:
    """Every code point of punctuation (Unicode's P...), to be read as a space."""
    return {i: " " for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "P"}
