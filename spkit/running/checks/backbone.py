"""Where the backbone is, and whether its files, tensors and chat format will do.

What needs torch's larger neighbours is in tensors.py and reading.py, and is imported only where the
backbone is on this machine: without one there is nothing for them to look at.
"""

from collections.abc import Iterator
from pathlib import Path

from spkit.config import PLACEHOLDER, Config
from spkit.errors import SpkitError
from spkit.models.checkpoint_files import is_hub_id
from spkit.models.gguf import checkpoint_of, gguf_file, is_gguf
from spkit.running.checks.finding import Finding
from spkit.system import hub, pypi


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
        try:
            return Finding(key, own.source), Path(checkpoint_of(own))
        except SpkitError as error:
            return Finding(key, str(error), ok=False), None
    if Path(own.source).is_file():
        return Finding(key, f"{own.source!r} is a file: give the folder it is in", ok=False), None
    if Path(own.source).exists():
        return Finding(key, own.source), Path(own.source)
    if not is_hub_id(own.source):
        said = f"{own.source!r}: there is no such folder, and it is no hub id (owner/name)"
        return Finding(key, said, ok=False), None
    folder = hub.in_cache(own.source, own.revision)
    if folder is not None:
        return Finding(key, f"{own.source}, in the hub's cache"), folder
    said = hub.problem(own.source, "model", own.revision)
    if said is None:
        return Finding(key, f"{own.source}: to be downloaded", ok=None), None
    return Finding(key, said, ok=False), None


def found(config: Config, *, derives: bool) -> Iterator[Finding]:
    """The files and their tensors; derives: also the layers that get a patch, and given patches."""
    folder = None
    if config.backbone.source == "sandbox":
        yield Finding("backbone.source", f"the sandbox's, {config.sandbox.weights}")
    else:
        finding, folder = place(config)
        yield finding
        if folder is None or not finding.ok:
            return
    from spkit.running.checks import tensors

    checked = [] if folder is None else list(tensors.files(config, folder, derives))
    yield from checked
    if derives and all(each.ok for each in checked):
        yield from tensors.layers(config)


def reads(config: Config) -> Iterator[Finding]:
    """What the model will read; call it where backbone and data are there."""
    if config.backbone.source == "sandbox":
        return  # its tokenizer is made of its world
    _, folder = place(config)
    if folder is not None:
        from spkit.running.checks import reading

        yield from reading.found(config, folder)
