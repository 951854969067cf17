"""Prompts that come with the kit: written for it, harmless, in the keys of the reader `own`."""

from pathlib import Path

from spkit.errors import SpkitError

NAMES = ("over_safety", "instructions")


def shipped(name: str) -> Path:
    """The JSONL file of that name, a path for SourceConfig. SpkitError for an unknown name."""
    if name not in NAMES:
        raise SpkitError(f"no shipped file has the name {name!r}, allowed: {', '.join(NAMES)}")
    return Path(__file__).with_name(f"{name}.jsonl")
