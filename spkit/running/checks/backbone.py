"""The backbone: its files, its tensors, the layers that get a patch, its chat format."""

from collections.abc import Iterator
from pathlib import Path

from spkit.config import Config
from spkit.models.gguf import checkpoint_of, gguf_file, is_gguf
from spkit.running.checks.finding import Finding, looked
from spkit.system import hub, pypi

PLACEHOLDER = "your-name/your-model"  # in params/template.yaml


def place(config: Config) -> tuple[Finding, Path | None]:
    """Where the backbone's files are; None where they are not on this machine yet."""
    own, key = config.backbone, "backbone.source"
    if own.source == PLACEHOLDER:
        return Finding(
            key, f"{own.source!r} is the template's: name your own model", ok=False
        ), None
    if is_gguf(own):
        if pypi.is_pypi(own.source) and not gguf_file(own, fetch=False).is_file():
            return Finding(key, f"{own.source} is fetched when it is first needed", ok=None), None
        found = looked(key, lambda: str(checkpoint_of(own)))
        return found, Path(found.said) if found.ok else None
    if Path(own.source).exists():
        return Finding(key, own.source), Path(own.source)
    folder = hub.in_cache(own.source, own.revision)
    if folder is not None:
        return Finding(key, f"{own.source}, in the hub's cache"), folder
    said = hub.problem(own.source, "model", own.revision)
    if said is None:
        return Finding(key, f"{own.source}: to be downloaded", ok=None), None
    return Finding(key, said, ok=False), None


def found(config: Config, *, derives: bool) -> Iterator[Finding]:
    """The files and their tensors; derives: also the layers that get a patch, and given patches."""
    if config.backbone.source == "sandbox":
        yield Finding("backbone.source", f"the sandbox's, {config.sandbox.weights}")
        return
    finding, folder = place(config)
    yield finding


def reads(config: Config) -> Iterator[Finding]:
    """What the model will read: the prompts and pairs in its chat format, no longer than it takes.

    Call it where backbone and data are there.
    """
    return iter(())
