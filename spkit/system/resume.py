"""An interrupted training resumes where it was: its whole state in two files, without pickle.

    <folder>/tensors.safetensors    factors, optimiser moments, random states
    <folder>/state.json             everything that is no tensor, and the identity of the training

A folder appears whole or not at all, and replaces the one before. Resumed on the same device, a
training gives the same bits as one that was never cut. With the OSM patch's factors in it a
checkpoint is a jailbreak as that patch is: it belongs into the run folder, and goes with it.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spkit.errors import SpkitError
from spkit.system.files import atomic

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: str | Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write `state`, a nested mapping of tensors and of what JSON can hold; keys are texts."""
    tensors: dict[str, torch.Tensor] = {}
    rest = _without_tensors(state, "", tensors)
    with atomic(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / TENSORS)
        text = json.dumps({"identity": identity, "state": rest})
        (temporary / STATE).write_text(text, encoding="utf-8")


def load(folder: str | Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save` wrote, or None where nothing is there or it was another training's.

    SpkitError where the files are damaged.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        return None
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if found["identity"] != json.loads(json.dumps(identity)):
            return None
        return _with_tensors(found["state"], "", load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SpkitError(f"{folder} is a damaged checkpoint ({error}); delete it") from None


def discard(folder: str | Path) -> None:
    """Delete checkpoints that are no longer needed: no second copy of a patch is kept."""
    shutil.rmtree(folder, ignore_errors=True)


def random_states() -> dict[str, torch.Tensor]:
    """The random states of the CPU and of every GPU: "cpu", "cuda:0", "cuda:1", "mps"."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        every = enumerate(torch.cuda.get_rng_state_all())
        states |= {f"cuda:{number}": state for number, state in every}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `random_states` gave, on the devices that are there."""
    torch.set_rng_state(states["cpu"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(gpus):
        if f"cuda:{number}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{number}"], number)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


_PLACE = "tensor:"


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return _PLACE + path
    if isinstance(value, Mapping):
        return {str(k): _without_tensors(v, f"{path}/{k}", tensors) for k, v in value.items()}
    return value


def _with_tensors(value: Any, path: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_PLACE):
        return tensors[value.removeprefix(_PLACE)]
    if isinstance(value, dict):
        return {key: _with_tensors(v, f"{path}/{key}", tensors) for key, v in value.items()}
    return value
