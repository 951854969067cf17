"""What a checkpoint's files call the tensors that the model in memory has.

transformers renames while it loads. The same matrix can be

    model.layers.0.mlp.up_proj.weight                       in memory, and in most files
    layers.0.mlp.up_proj.weight                             in a file saved without the head
    language_model.model.layers.0.mlp.up_proj.weight        in a package with a vision tower

The part from the list of layers on is the same, so one prefix is sought that fits all matrices.
A patch is written under the names in the file: it can be applied without any model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import headers, tensor_files

# parts of a name that belong to another model of the package; "mtp" predicts further tokens
FOREIGN = re.compile(r"(^|[._])(vision|visual|image|img|vit|audio|speech|mtp)([._]|$)")
CORE = re.compile(r"(?:^|\.)([^.\d]+\.\d+\..+)$")  # "layers.0.mlp.up_proj.weight"


def stored_names(
    wanted: Mapping[str, Sequence[int] | None], stored: Mapping[str, Any], where: object
) -> dict[str, str]:
    """{name in the model: name in the files}.

    wanted: {tensor name in the model: its shape, or None where that is not known}. stored: what
    checkpoint_files.headers or tensor_files gives. where: the checkpoint, to be named in errors.
    SpkitError names the first tensor that has no place, and a prefix that is not the only one.
    """
    if all(name in stored for name in wanted):
        return {name: name for name in wanted}
    cores = {name: _core(name) for name in wanted}
    inside = [name for name in wanted if CORE.search(name)]
    prefixes = _prefixes(cores[inside[0]], stored) if inside else []
    placed = {prefix: _placed(inside, cores, prefix, wanted, stored) for prefix in prefixes}
    whole = [prefix for prefix, names in placed.items() if len(names) == len(inside)]
    if len(whole) > 1:
        both = ", ".join(repr(prefix + cores[inside[0]]) for prefix in whole[:2])
        raise SpkitError(
            f"The checkpoint {where} has {inside[0]!r} in more than one place: {both}."
        )
    best = max(placed.values(), key=len, default={})
    found = dict(best)
    for name in wanted:
        if name not in cores or name in inside:
            continue
        ends = [p + name for p in _prefixes(name, stored) if _fits(wanted[name], p + name, stored)]
        if len(ends) == 1:
            found[name] = ends[0]
    for name in wanted:
        if name not in found:
            raise SpkitError(
                f"The checkpoint {where} has no tensor {name!r}{_nearest(name, stored)}."
            )
    return {name: found[name] for name in wanted}


def places_in(folder: str | Path, wanted: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """{name in the model: (the file that holds the tensor, its name there)}."""
    files = tensor_files(folder)
    names = stored_names(dict.fromkeys(wanted), files, folder)
    return {name: (files[stored], stored) for name, stored in names.items()}


def checked_names(folder: str | Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """`stored_names` with the shapes compared, too; the headers of all files are read."""
    found = headers(folder)
    names = stored_names(shapes, found, folder)
    for name, stored in names.items():
        have = found[stored][2]["shape"]
        if list(shapes[name]) != have:
            raise SpkitError(
                f"The checkpoint {folder} has {stored!r} in the shape {have}; the model of its "
                f"config.json needs {list(shapes[name])}."
            )
    return names


def _core(name: str) -> str:
    found = CORE.search(name)
    return found[1] if found else name


def _prefixes(core: str, stored: Mapping[str, Any]) -> list[str]:
    """What stands before `core` in the files, "" or with its dot; not of a vision tower."""
    found = [name[: -len(core)] for name in stored if name == core or name.endswith("." + core)]
    return [prefix for prefix in found if not FOREIGN.search(prefix)]


def _placed(inside, cores, prefix: str, wanted, stored) -> dict[str, str]:
    names = {name: prefix + cores[name] for name in inside}
    return {name: there for name, there in names.items() if _fits(wanted[name], there, stored)}


def _fits(shape: Sequence[int] | None, name: str, stored: Mapping[str, Any]) -> bool:
    if name not in stored:
        return False
    about = stored[name]
    return shape is None or not isinstance(about, tuple) or list(shape) == about[2]["shape"]


def _nearest(name: str, stored: Mapping[str, Any]) -> str:
    """What the files call a tensor of that last name, for a reader to see how they differ."""
    end = ".".join(name.split(".")[-2:])
    other = next((n for n in sorted(stored) if n.endswith(end) and not FOREIGN.search(n)), None)
    return f"; the nearest there is {other!r}" if other else ""
