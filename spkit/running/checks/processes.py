"""The Accelerate config files: whether they can be read, and this machine has what they ask for."""

from collections.abc import Iterator

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.checks.finding import Finding, looked
from spkit.system import accelerate_file
from spkit.system.accelerate_file import AccelerateFile

PAGE = "docs/larger_models.md"


def asked(config: Config, sections: set[str]) -> Iterator[Finding]:
    """A finding for each of these sections that names a file."""
    for section in ("derivation", "importance"):
        path = getattr(config, section).accelerate
        if section in sections and path is not None:
            key = f"{section}.accelerate"
            yield looked(key, lambda key=key, path=path: _described(config, key, path))


def _described(config: Config, key: str, path: str) -> str:
    file = accelerate_file.read(key, path)
    where = f"{key} is {path!r}"
    if file.machines > 1:
        raise SpkitError(
            f"{where}: num_machines is {file.machines} there, but a notebook starts processes on "
            f"its own machine; use the command line ({PAGE})."
        )
    if file.sharded and key == "importance.accelerate":
        raise SpkitError(
            f"{where}, which shards the backbone (FSDP), but importance needs whole matrices: give "
            "a MULTI_GPU file, with backbone.device: balanced where one GPU is too small."
        )
    _check_device(config, where, file)
    how = "a part of the backbone each" if file.sharded else "the whole backbone each"
    return f"{path}: {file.processes} processes, {how}"


def _check_device(config: Config, where: str, file: AccelerateFile) -> None:
    """SpkitError where the file and backbone.device, or the GPUs that are here, do not agree."""
    import torch

    from spkit.models.devices import ALL_GPUS
    from spkit.models.loading import resolve_device

    device = resolve_device(config.backbone.device)
    if file.on_cpu != (device == "cpu"):
        there = "is for processes on a CPU" if file.on_cpu else f"asks for {file.processes} GPUs"
        raise SpkitError(f"{where}, which {there}, but backbone.device comes to {device!r} here.")
    if file.on_cpu:
        return
    gpus = torch.cuda.device_count()
    if file.processes > gpus:
        raise SpkitError(
            f"{where}, which asks for {file.processes} GPUs, but torch sees {gpus} here."
        )
    if file.processes > 1 and device not in ("cuda", ALL_GPUS):
        raise SpkitError(
            f"{where}, where each process has a GPU of its own, but backbone.device is {device!r}; "
            "use auto, cuda or balanced."
        )
