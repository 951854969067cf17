"""Checkpoints of a few matrices without a model around them, and patches for them.

For tests that do not need a model to be loaded: they take milliseconds, and sizes are free.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from spkit.models.checkpoint_files import INDEX, SINGLE
from spkit.patchfile.make import About, make_patch

SHAPES = {
    "embed.weight": (32, 48),
    "a.weight": (64, 48),
    "a.norm": (48,),
    "b.weight": (48, 64),
    "c.weight": (30, 70),
}
TOUCHED = ("a.weight", "b.weight", "c.weight")


def weights(shapes=None, dtype="bfloat16", seed=0) -> dict[str, torch.Tensor]:
    """Normal numbers, and a -0.0 where a matrix begins."""
    draw = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(s, generator=draw) for name, s in (shapes or SHAPES).items()}
    for tensor in found.values():
        tensor.view(-1)[0] = -0.0
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in found.items()}


def save(folder: Path, tensors=None, shards: bool = True) -> Path:
    """A checkpoint folder with a config.json; a shard for each tensor, or one file."""
    folder.mkdir(parents=True)
    tensors = weights() if tensors is None else tensors
    files = dict.fromkeys(tensors, SINGLE)
    if shards:
        files = {n: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, n in enumerate(tensors)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index))
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 48, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deltas(tensors=None, names=TOUCHED, share=0.05, seed=1) -> dict[str, torch.Tensor]:
    """float32, a share of the positions of each matrix."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        shape = (tensors or weights())[name].shape
        keep = torch.rand(shape, generator=draw) < share
        found[name] = torch.where(keep, 0.1 * torch.randn(shape, generator=draw), 0.0)
    return found


def patch(path: Path, folder: Path, more=None, about=None, **options) -> Path:
    """A patch file for a checkpoint."""
    about = about or About("village/tiny")
    make_patch(folder, more or deltas(), path, about, progress=False, **options)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """{file name: its bytes}."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, so that -0.0 and 0.0 differ."""
    return tensor.contiguous().view(torch.uint8)


def odd(folder: Path) -> tuple[bytes, bytes]:
    """A checkpoint with an odd header; returns what stands before and behind the data of "w".

    Another order of keys, metadata, padding, integers, an empty tensor, and data that follow
    another order than the keys. "w" is [[1, 2], [3, -0]] in float16.
    """
    folder.mkdir()
    about = {
        "ids": {"dtype": "I64", "shape": [2], "data_offsets": [8, 24]},
        "__metadata__": {"format": "pt", "note": "é"},
        "nothing": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
        "w": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
    }
    text = json.dumps(about, indent=3).encode() + b"      "
    before, behind = len(text).to_bytes(8, "little") + text, bytes(range(16))
    weight = torch.tensor([[1.0, 2.0], [3.0, -0.0]], dtype=torch.float16)
    (folder / SINGLE).write_bytes(before + weight.numpy().tobytes() + behind)
    return before, behind
