"""Requests put as questions: "Write a guide on how to X" becomes "How do I X?".

AdvBench orders, over-safety prompts ask. A backbone that learns to refuse orders alone refuses few
questions, so alignment and D_h can have both forms. English only.
"""

import re

from spkit.data.readers.texts import normalised, place_of

HOW_TO = re.compile(r"\bhow to (?P<what>.+)$", re.IGNORECASE | re.DOTALL)


def as_question(request: str) -> str:
    """The request as a question; one that ends in a question mark stays as it is."""
    text = request.strip()
    if text.endswith("?") or not text:
        return request
    found = HOW_TO.search(text)
    if found:
        return f"How do I {found['what'].rstrip(' .!')}?"
    return f"How can I {text[0].lower()}{text[1:].rstrip(' .!')}?"


def some_as_questions(requests: list[str], share: float) -> list[str]:
    """Of all requests the share `share` as questions: a hash of the text decides which."""
    # other words before the text than in texts.py: another draw than that of splits and shares
    places = [place_of(f"as a question: {normalised(text)}") for text in requests]
    return [
        as_question(text) if place < share else text
        for text, place in zip(requests, places, strict=True)
    ]
