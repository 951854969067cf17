"""A patched checkpoint, written tensor by tensor: no model is loaded, and no GPU is needed.

    theta_PSA = theta + delta        for each weight matrix, in the checkpoint's own dtype

A checkpoint is a folder of safetensors files (one, or shards with an index). A patched one has the
same files: every header and every untouched tensor is copied as bytes, and so are configuration
and tokenizer. In memory is one weight matrix in full precision and its delta, whatever the model's
size.

What this file does not do: make deltas (ablations.py), or load models (backbone.py).
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from spkit.checkpoint_files import other_files, read_header, tensor_files
from spkit.errors import SpkitError
from spkit.files import atomic
from spkit.lazy import Lazy
from spkit.patching import add_delta

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 16 * 2**20  # bytes copied at once


@dataclass(frozen=True)
class Written:
    """What became of the deltas: how many weights have a delta, and how many were lost.

    lost: non-zero deltas that change nothing in the checkpoint's dtype.
    """

    tensors: int
    moved: int
    lost: int
    dtype: str


def write_patched(source: str | Path, deltas: Mapping[str, Tensor], folder: str | Path) -> Written:
    """Write `source` + deltas as a checkpoint of its own; `folder` appears whole or not at all.

    deltas: {tensor name: fp32 [out, in]}, read one at a time. Equal bit for bit to
    patching.add_delta in memory. SpkitError for a tensor that the checkpoint does not have, another
    shape, a dtype that is no float, or a sum that is not finite.
    """
    source = Path(source)
    if Path(folder).resolve() == source.resolve():
        raise SpkitError(f"The patched checkpoint would replace its own backbone, {source}.")
    files = tensor_files(source)
    for name in deltas:
        if name not in files:
            raise SpkitError(f"The checkpoint {source} has no tensor {name!r}.")
    moved = lost = 0
    dtypes: set[str] = set()
    with atomic(folder) as made, tqdm(total=len(files), desc="write", unit="tensor") as progress:
        made.mkdir()
        for path in other_files(source):
            shutil.copyfile(path, made / path.name)
        for path in sorted(set(files.values())):
            with path.open("rb") as old, (made / path.name).open("wb") as new:
                header, start = read_header(old, path)
                for name in sorted({n for n, f in files.items() if f == path} - set(dict(header))):
                    raise SpkitError(f"{path} has no tensor {name!r}, which the index puts there.")
                old.seek(0)
                _copy(old, new, start)
                for name, about in header:
                    first, last = about["data_offsets"]
                    if name in deltas:
                        weight = _read(old, path, name, about)
                        data, counts = _patched(weight, deltas[name], name)
                        new.write(data)
                        moved, lost = moved + counts[0], lost + counts[1]
                        dtypes.add(about["dtype"])
                        del weight, data  # before the next ones are made
                    else:
                        _copy(old, new, last - first)
                    progress.update()
    return Written(len(deltas), moved, lost, ", ".join(sorted(dtypes)))


def difference(before: str | Path, after: str | Path, names: Iterable[str]) -> Mapping[str, Tensor]:
    """{tensor name: after - before, fp32}, each read and subtracted when it is asked for.

    For a backbone in memory that is to answer as a later checkpoint does (backbone.patched).
    """
    old, new = tensor_files(before), tensor_files(after)

    def subtract(name: str) -> Tensor:
        values = []
        for files in (new, old):
            with safe_open(files[name], framework="pt") as file:
                values.append(file.get_tensor(name).float())
        return values[0] - values[1]

    return Lazy(names, subtract)


def _read(file, path: Path, name: str, about: Mapping) -> Tensor:
    if about["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise SpkitError(f"{path}: {name!r} is {about['dtype']}; a patch needs one of {known}.")
    first, last = about["data_offsets"]
    data = bytearray(last - first)
    file.readinto(data)
    try:
        return torch.frombuffer(data, dtype=DTYPES[about["dtype"]]).reshape(about["shape"])
    except (ValueError, RuntimeError, TypeError, KeyError):
        what = f"{name!r} has {last - first} bytes, which are no {about.get('shape')}"
        raise SpkitError(f"{path} is no intact safetensors file: {what}") from None


def _patched(weight: Tensor, delta: Tensor, name: str) -> tuple[memoryview, tuple[int, int]]:
    """(the sum's bytes, (non-zero deltas, those of them that change nothing))."""
    try:
        patched = add_delta(weight, delta).contiguous()
    except ValueError as error:
        raise SpkitError(f"The delta of {name!r} cannot be added: {error}.") from None
    changed = delta != 0
    counts = int(changed.sum()), int(((patched == weight) & changed).sum())
    return patched.view(torch.uint8).numpy().data, counts


def _copy(source, target, count: int) -> None:
    for chunk in _chunks(source, count):
        target.write(chunk)


def _chunks(source, count: int) -> Iterator[bytes]:
    while count:
        chunk = source.read(min(CHUNK, count))
        count -= len(chunk)
        yield chunk
