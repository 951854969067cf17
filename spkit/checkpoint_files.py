"""The files of a checkpoint, and where in them each tensor lies. Nothing that is read is trusted.

    folder/config.json, tokenizer..., model.safetensors
    folder/model.safetensors.index.json, model-00001-of-00002.safetensors, ...

A safetensors file is 8 bytes (the length of its header), a JSON header {tensor name: {dtype, shape,
data_offsets}}, and the tensors' bytes one behind the other. This file needs neither torch nor
memory for any tensor.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from spkit.errors import SpkitError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# weights in other formats, among them pickles: never copied
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"}
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
WIDTHS = {  # bytes a value; dtypes that are not here are copied and not looked into
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
About = dict[str, Any]  # {"dtype": str, "shape": [int], "data_offsets": [first, last]}


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
    """{tensor name: the file that holds it}; SpkitError for a folder without safetensors.

    An index that names files outside of its folder is refused, too.
    """
    folder = Path(folder)
    try:
        if (folder / INDEX).is_file():
            index = load_json((folder / INDEX).read_bytes())
            files = {name: folder / _plain(file) for name, file in index["weight_map"].items()}
            for path in sorted(set(files.values())):
                path.stat()  # a shard that is missing ends here
            return files
        with (folder / SINGLE).open("rb") as file:
            return {name: folder / SINGLE for name, _ in read_header(file, folder / SINGLE)[0]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpkitError):
            raise
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise SpkitError(f"{folder} is no checkpoint in safetensors files: {what}") from None


def other_files(folder: str | Path) -> list[Path]:
    """What lies beside the weights and goes with them: configuration, tokenizer, licence, card."""
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(p for p in files if p.suffix not in {".safetensors", *OTHER_WEIGHTS})


def read_header(file: BinaryIO, path: Path) -> tuple[list[tuple[str, About]], int]:
    """([(tensor name, {dtype, shape, data_offsets})] in the order of the data, where it begins).

    SpkitError unless the tensors lie one behind the other to the file's end and each has as many
    bytes as its shape and dtype need.
    """
    try:
        text, size = read_header_text(file, path)
        header = load_json(text)
        header.pop("__metadata__", None)
        for name, about in header.items():
            _check(name, about)
        tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = 0
        for name, about in tensors:
            first, last = about["data_offsets"]
            if first != end or last < first:
                raise ValueError(f"the tensor {name!r} does not follow the one before")
            end = last
        if 8 + len(text) + end != size:
            raise ValueError(f"{size - 8 - len(text)} bytes of data, {end} expected")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise SpkitError(f"{path} is no intact safetensors file: {what}") from None
    return tensors, 8 + len(text)


def read_header_text(
    file: BinaryIO, path: Path, longest: int = LONGEST_HEADER
) -> tuple[bytes, int]:
    """(the JSON header, the file's size); ValueError where the file cannot hold it."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("the header is longer than the file")
    if length > longest:
        raise ValueError(f"a header of {length} bytes, at most {longest} are read")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("the file has become shorter")
    return text, size


def load_json(text: bytes) -> Any:
    """JSON without repeated keys, NaN or infinity; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _check(name: str, about: About) -> None:
    shape, offsets = about["shape"], about["data_offsets"]
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"the tensor {name!r} has the shape {shape} and the offsets {offsets}")
    width = WIDTHS.get(about["dtype"])
    if width is not None and offsets[1] - offsets[0] != width * prod(shape):
        have = offsets[1] - offsets[0]
        raise ValueError(f"{name!r} has {have} bytes, which are no {shape} of {about['dtype']}")


def _plain(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"the index names {name!r}, which is no safetensors file of the folder")
    if "\\" in name or "\0" in name:
        raise ValueError(f"the index names {name!r}, which is no safetensors file of the folder")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
