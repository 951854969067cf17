"""Where a run writes and computes: its folders, the free disk, the device and its memory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running import mirror
from spkit.running.checks.finding import Finding, looked
from spkit.running.runs import run_folder
from spkit.running.sizes import written

GIB = 2**30


def folders(config: Config) -> Iterator[Finding]:
    """The run folder, and the mirror where one is set, can be written to."""
    yield looked("outputs", lambda: _writable(run_folder(config), "outputs", config.outputs))
    if config.mirror is not None:

        def mirrored() -> str:
            mirror.check(config.mirror, config.outputs)
            return config.mirror

        yield looked("mirror", mirrored)


def _writable(folder: Path, key: str, value: str) -> str:
    """The folder; SpkitError where it cannot be made or written to. Nothing is made."""
    if "{" in value or "}" in value:
        raise SpkitError(f"{key} is {value!r}, must be without braces: Snakemake fills them")
    try:
        here = _existing(folder)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise SpkitError(f"{key} is {value!r}, but {folder} cannot be: {error.strerror}") from None
    if not here.is_dir():
        raise SpkitError(f"{key} is {value!r}, but {here} is a file, must be a folder")
    if not os.access(here, os.W_OK | os.X_OK):
        raise SpkitError(f"{key} is {value!r}, but there is no permission to write in {here}")
    return str(folder)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    here = folder.absolute()
    while not here.exists():
        here = here.parent
    return here


def device(config: Config) -> Iterator[Finding]:
    """The device is there."""
    from spkit.models.loading import check_quantization, resolve_device, resolve_dtype

    def look() -> str:
        place = resolve_device(config.backbone.device)
        used = [config.derivation.quantization, config.evaluation.quantization]
        if "generative" in (*config.judges.harmful, *config.judges.over_safety):
            used.append(config.judges.generative.quantization)
        for quantization in used:
            check_quantization(quantization, place)
        if config.evaluation.dtype is not None:
            resolve_dtype(config.evaluation.dtype, place)
        return f"{place}, {resolve_dtype(config.backbone.compute_dtype, place)}"

    yield looked("backbone.device", look)


def disk_and_memory(config: Config) -> Iterator[Finding]:
    """What all stages write fits on the disk; what each needs fits into memory, predicted.

    Call it where the backbone is there. Too little memory is no error: it is a prediction.
    """
    from spkit.running import memory
    from spkit.running.shape import shape_of

    try:
        shape = shape_of(config)
    except SpkitError as error:
        yield Finding("backbone.source", str(error), ok=False)
        return
    need = written(config, shape) - _bytes_in(run_folder(config))
    free = shutil.disk_usage(_existing(run_folder(config))).free
    said = f"about {max(0, need) / GIB:.1f} GiB to be written, {free / GIB:.1f} GiB are free"
    yield Finding("outputs (disk)", said, ok=need < free)
    try:
        lines = memory.overview(config).split("\n\n")[-1].splitlines()
    except SpkitError as error:
        lines = [str(error)]
    for line in lines:
        fits = line.startswith("every notebook fits")
        yield Finding("memory", line, ok=True if fits else None)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
