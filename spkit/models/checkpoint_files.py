"""The files of a checkpoint, and where in them each tensor is. Nothing that is read is trusted.

    folder/config.json, tokenizer..., model.safetensors
    folder/model.safetensors.index.json, model-00001-of-00002.safetensors, ...

A safetensors file is 8 bytes (the length of its header), a JSON header {tensor name: {dtype, shape,
data_offsets}}, and the tensors' bytes one after the other. This file needs neither torch nor
memory for any tensor.
"""

import json
import re
import stat
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from spkit.errors import SpkitError, first_line, needs
from spkit.system.pointers import refuse_pointer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# weights in other formats, among them pickles: never copied
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"}
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MOST_DIMENSIONS, LARGEST = 64, 2**63 - 1  # of a shape, and in it
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
    if Path(source).exists():
        raise SpkitError(f"The checkpoint {source} is a file: give the folder that it is in.")
    if not is_hub_id(str(source)):
        what = "there is no such folder, and it is no hub id (owner/name)"
        raise SpkitError(f"The checkpoint {str(source)!r} cannot be read: {what}.")
    with needs("A checkpoint of the hub", "hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=WANTED))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise SpkitError(
            f"The checkpoint {str(source)!r} cannot be downloaded: {first_line(error)} (and "
            f"{Path.cwd()} has no such folder)"
        ) from None


def is_hub_id(name: str) -> bool:
    """Whether it is spelt like one: owner/name, or a name alone."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def place(tensor: str) -> dict[str, str | int]:
    """Layer number (-1 outside of the layers) and module of "model.layers.3.mlp.up_proj.weight"."""
    layer = re.search(r"\.(\d+)\.", tensor)
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    return {"tensor": tensor, "layer": int(layer[1]) if layer else -1, "module": module}


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: the file that holds it}; SpkitError for a folder without safetensors.

    An index that names files outside of its folder is refused, too, and one beside a single file.
    """
    folder = Path(folder)
    try:
        if (folder / INDEX).is_file():
            index = load_json(read_small(folder / INDEX))
            files = {name: folder / _plain(file) for name, file in index["weight_map"].items()}
            refuse_two(folder, {path.name for path in files.values()})
            for path in sorted(set(files.values())):
                if not path.exists():
                    raise ValueError(_absent(path))
                _require_file(path)
            return files
        if not (folder / SINGLE).exists() and (instead := _instead(folder)):
            raise ValueError(instead)
        _require_file(folder / SINGLE)
        with (folder / SINGLE).open("rb") as file:
            return {name: folder / SINGLE for name, _ in read_header(file, folder / SINGLE)[0]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpkitError):
            raise
        what = brief(f"it lacks {error}" if isinstance(error, KeyError) else error)
        raise SpkitError(f"{folder} is no checkpoint in safetensors files: {what}") from None


def refuse_two(folder: Path, indexed: Collection[str]) -> None:
    """SpkitError for a folder with two sets of weights: transformers reads the single file, and
    others what the index names. A model that was saved again leaves the old one there."""
    if indexed and SINGLE not in indexed and (folder / SINGLE).exists():
        raise SpkitError(
            f"{folder} has both {SINGLE} and {INDEX}, which names {min(indexed)}: two sets of "
            "weights, of which programs take one or the other; keep a folder with one of them."
        )


def _absent(path: Path) -> str:
    """A file that the index names is not there; what is, may be the same under another name."""
    others = sorted(p.name for p in path.parent.glob("*.safetensors"))
    there = f" (there is {others[0]})" if others else ""
    return f"the index names {path.name}, and there is no such file{there}"


def _instead(folder: Path) -> str:
    """What to do about the weights that are there in another format; "" where there are none."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if "adapter_config.json" in names:
        return "it is an adapter of PEFT, not a model: merge it into its backbone and save that"
    stored = [name for name in names if name.endswith(".safetensors")]
    if stored and stored[0].startswith("consolidated"):
        return f"{stored[0]} is in Mistral's own format: fetch the files of transformers' format"
    if stored:
        one = f"rename it to {SINGLE}" if len(stored) == 1 else f"{INDEX} is missing: fetch it"
        return f"its weights are in {stored[0]}, which no index names and transformers skips; {one}"
    other = [name for name in names if Path(name).suffix in OTHER_WEIGHTS - {".gguf", ".onnx"}]
    other = [name for name in other if not name.startswith(("training_args", "optimizer"))]
    if not other:
        return ""
    return (
        f"its weights are in {other[0]}; convert them, if you trust that file (loading it can run "
        f'its code), by AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW"), '
        "and copy the tokenizer's files"
    )


def headers(folder: str | Path) -> dict[str, tuple[Path, int, About]]:
    """{tensor name: (its file, where that one's data begins, what its header says)}.

    SpkitError also where a tensor is in two files, or not where the index puts it.
    """
    found: dict[str, tuple[Path, int, About]] = {}
    files = tensor_files(folder)
    for path in sorted(set(files.values())):
        try:
            with path.open("rb") as file:
                tensors, start = read_header(file, path)
        except OSError as error:
            raise SpkitError(f"{path} cannot be read: {error.strerror}") from None
        for name, about in tensors:
            if name in found:
                raise SpkitError(f"{path} and {found[name][0].name} both have a tensor {name!r}.")
            found[name] = (path, start, about)
    for name, path in files.items():
        if name not in found or found[name][0] != path:
            raise SpkitError(f"{path} has no tensor {name!r}, which the index puts there.")
    return found


def other_files(folder: str | Path) -> list[Path]:
    """What is beside the weights and goes with them: configuration, tokenizer, licence, card."""
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(p for p in files if p.suffix not in {".safetensors", *OTHER_WEIGHTS})


def read_header(file: BinaryIO, path: Path) -> tuple[list[tuple[str, About]], int]:
    """([(tensor name, {dtype, shape, data_offsets})] in the order of the data, where it begins).

    SpkitError unless the tensors follow one another to the file's end and each has as many
    bytes as its shape and dtype need; it says where the file is a git-lfs pointer or was cut.
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
            have = size - 8 - len(text)
            cut = ": it was cut, so fetch it again" if have < end else ""
            raise ValueError(f"{have} bytes of data, {end} expected{cut}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_pointer(path)
        what = brief(f"it lacks {error}" if isinstance(error, KeyError) else error)
        raise SpkitError(f"{path} is no intact safetensors file: {what}") from None
    return tensors, 8 + len(text)


def read_header_text(
    file: BinaryIO, path: Path, longest: int = LONGEST_HEADER
) -> tuple[bytes, int]:
    """(the JSON header, the file's size); ValueError where the file cannot hold it."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("the header is longer than the file: was it cut?")
    if length > longest:
        raise ValueError(f"a header of {length} bytes, at most {longest} are read")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("the file has become shorter")
    return text, size


def read_small(path: Path) -> bytes:
    """A whole file, such as a configuration; ValueError for a pipe, a folder, or too much."""
    size = _require_file(path)
    if size > LONGEST_HEADER:
        raise ValueError(f"{path.name} has {size} bytes, at most {LONGEST_HEADER} are read")
    refuse_pointer(path)
    return path.read_bytes()


def load_json(text: bytes) -> Any:
    """JSON without repeated keys, NaN or infinity; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _check(name: str, about: About) -> None:
    shape, offsets = about["shape"], about["data_offsets"]
    right = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    right = right and len(shape) <= MOST_DIMENSIONS
    if not right or any(type(n) is not int or not 0 <= n <= LARGEST for n in shape + offsets):
        what = f"the shape {shape!r:.100} and the offsets {offsets!r:.100}"
        raise ValueError(f"the tensor {name!r:.300} has {what}")
    width = WIDTHS.get(about["dtype"])
    if width is not None and offsets[1] - offsets[0] != width * prod(shape):
        have = offsets[1] - offsets[0]
        raise ValueError(f"{name!r} has {have} bytes, which are no {shape} of {about['dtype']}")


def _require_file(path: Path) -> int:
    """Its size; ValueError for a folder, or a pipe, which would be waited for for ever."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return about.st_size


def _plain(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"the index names {name!r}, which is no safetensors file of the folder")
    if "\\" in name or "\0" in name:
        raise ValueError(f"the index names {name!r}, which is no safetensors file of the folder")
    return name


def brief(what: object, longest: int = 500) -> str:
    """An error's text, which may quote a whole file."""
    text = str(what)
    return text if len(text) <= longest else text[:longest] + " ..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
