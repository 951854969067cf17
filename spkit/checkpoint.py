"""A patched checkpoint, written tensor by tensor: no model is loaded, and no GPU is needed.

    theta_PSA = theta + delta        for each weight matrix, in the checkpoint's own dtype

A checkpoint is a folder of safetensors files (one, or shards with an index). A patched one has the
same files: every header and every untouched tensor is copied as bytes, and so are configuration
and tokenizer. In memory is one weight matrix in full precision and its delta, whatever the model's
size.

What this file does not do: make deltas (ablations.py), or load models (backbone.py).
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from spkit.errors import SpkitError
from spkit.files import atomic
from spkit.lazy import Lazy
from spkit.patching import add_delta

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# weights in other formats, among them pickles: never copied
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"}
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
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


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or the hub's, downloaded into the hub's cache."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=WANTED))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = str(error).strip().split("\n")[0]
        raise SpkitError(f"The checkpoint {str(source)!r} cannot be downloaded: {first}") from None


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: the file that holds it}; SpkitError for a folder without safetensors."""
    folder = Path(folder)
    try:
        if (folder / INDEX).is_file():
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in names.items()}
            for path in sorted(set(files.values())):
                path.stat()  # a shard that is missing ends here
            return files
        with safe_open(folder / SINGLE, framework="pt") as file:
            return {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SpkitError(f"{folder} is no checkpoint in safetensors files: {error}") from None


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
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in {".safetensors", *OTHER_WEIGHTS}:
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


def read_header(file, path: Path) -> tuple[list[tuple[str, dict]], int]:
    """([(tensor name, {dtype, shape, data_offsets})] in the order of the data, where it begins).

    SpkitError unless the tensors lie one behind the other to the file's end.
    """
    size = path.stat().st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = 0
        for name, about in tensors:
            first, last = about["data_offsets"]
            if first != end or last < first:
                raise ValueError(f"the tensor {name!r} does not follow the one before")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"{size - 8 - length} bytes of data, {end} expected")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpkitError(f"{path} is no intact safetensors file: {error}") from None
    return tensors, 8 + length


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
