"""Memory of make, apply and verify on the shapes of LLaMA-2-70B and LLaMA-3.1-405B.

    .venv/bin/python benchmarks/large_shapes.py        22 GB of disk; 33 minutes on a busy machine

What is real and what is not: a checkpoint is a set of real safetensors files with the shapes of
that model, but of its first layers only, and *sparse*: made with truncate, all weights 0. Both
embeddings, its largest tensors, are always there. make's input is simulated: of every 67 weights of
a matrix one, drawn at random, gets a random number. So a layer's patch is as large as one at
a = 3 %, b = 2 %, p = 30 %. `apply` writes all of its bytes; nothing is sparse there. Each command
is a process of its own; memory is the highest RssAnon, read every 5 ms (spkit/bench/watched.py), in
which pages of files do not count. make's includes the matrix in full precision of its caller.

The last part is a simulation: the header of the patch of *all* layers, from the manifest of one, in
front of sparse data. "finish" is how make ends (the manifest as text), "open" how apply and verify
begin. The manifest is the only part that grows with the number of layers.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tabulate import tabulate

from spkit.bench.watched import WATCH
from spkit.patchfile.file import PatchFile, header, layout
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.manifest import Manifest
from spkit.running.widths import PUBLIC
from spkit.system.machine import hardware, versions

COUNTS = {"llama2-70b": (1, 2, 4), "llama3.1-405b": (1, 2)}  # layers
AT_ONCE = 2**18  # values drawn at once: the caller should take little memory beside its matrix
SHARD = 5e9  # bytes, as on the hub
EVERY, DEVIATION = 67, 1e-3  # how many weights a patch keeps, and how large its values are
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


# ---- what is made --------------------------------------------------------------------------------


def tensors(name: str, layers: int) -> dict[str, list[int]]:
    """{tensor: shape} of the first layers of a model, embeddings and last norm included."""
    widths, shape = PUBLIC[name], PUBLIC[name].shape()
    found = {EMBEDDINGS[0]: [widths.vocabulary, widths.hidden]}
    for layer in range(layers):
        for matrix in shape.matrices:
            found[f"{matrix.paths[layer]}.weight"] = [matrix.rows, matrix.columns]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = [widths.hidden]
    return found | {"model.norm.weight": [widths.hidden], EMBEDDINGS[1]: found[EMBEDDINGS[0]]}


def write_sparse(folder: Path, shapes: Mapping[str, list[int]]) -> int:
    """A checkpoint of zeros in bf16 that takes no disk; returns how many files there are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and _bytes({**shards[-1], name: shape}) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    where = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(part, file)
        head, end = {}, 0
        for name, shape in part.items():
            first, end = end, end + _bytes({name: shape})
            head[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": _bytes(shapes)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(shards)


def _bytes(shapes: Mapping[str, list[int]]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


class Simulated(Mapping):
    """{matrix: float32 [out, in]}, one at a time: 0 but at one of every EVERY weights."""

    def __init__(self, shapes: Mapping[str, list[int]]):
        self.shapes = {name: shape for name, shape in shapes.items() if "_proj" in name}

    def __getitem__(self, name: str) -> np.ndarray:
        matrix = np.zeros(self.shapes[name], dtype=np.float32)
        generator = np.random.default_rng(len(name))
        for start in range(0, matrix.size - EVERY, EVERY * AT_ONCE):
            where = np.arange(start, min(start + EVERY * AT_ONCE, matrix.size - EVERY), EVERY)
            where += generator.integers(0, EVERY, len(where))
            values = generator.standard_normal(len(where), dtype=np.float32)
            matrix.reshape(-1)[where] = DEVIATION * values
        return matrix

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def child(what: str, folder: Path, name: str, layers: int) -> None:
    """What runs in a process of its own: make, its end, or opening a patch."""
    if what == "make":
        shapes = tensors(name, layers)
        make_patch(
            *(folder / "base", Simulated(shapes), folder / "patch.safetensors", About("simulated")),
            progress=False,
        )
    elif what == "finish":
        print(json.dumps(write_whole(folder, layers)))
    else:
        PatchFile(folder / "whole.safetensors").__exit__()


def write_whole(folder: Path, layers: int) -> dict:
    """The patch of all layers: the manifest of one layer, repeated, before sparse data."""
    path = folder / "patch.safetensors"
    with PatchFile(path) as patch:
        one = patch.manifest
    repeated = {
        matrix.replace(".layers.0.", f".layers.{layer}."): about
        for layer in range(layers)
        for matrix, about in one.tensors.items()
    }
    whole: Manifest = one.model_copy(update={"tensors": repeated})
    tree = whole.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    head = header(text, whole)
    data = max(last for parts in layout(repeated).values() for _, last in parts.values())
    with (folder / "whole.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + data)
    blocks = sum(len(about.blocks) for about in repeated.values())
    return {"blocks": blocks, "header MB": len(head) / 1e6, "patch GB": (len(head) + data) / 1e9}


# ---- what is measured ----------------------------------------------------------------------------


def run(command: list[str]) -> dict:
    """Seconds and MiB of one command, and what it says as JSON; it must succeed."""
    watched = [sys.executable, "-I", "-S", "-c", WATCH, *command]
    done = subprocess.run(watched, capture_output=True)
    *said, last = done.stdout.decode().splitlines()
    found = json.loads(last)
    if found.pop("exit"):
        sys.exit(f"{' '.join(command)}\n{done.stderr.decode()[-2000:]}")
    own = {"seconds": found["seconds"], "MiB": found["MiB without files"]}
    return own | (json.loads(said[-1]) if said and said[-1].startswith("{") else {})


def measure(work: Path, name: str, layers: int) -> Iterator[dict]:
    """A row for each command, on the first layers of a model."""
    folder = work / f"{name}-{layers}"
    shapes = tensors(name, layers)
    shards = write_sparse(folder / "base", shapes)
    base, patch, target = folder / "base", folder / "patch.safetensors", folder / "target"
    tool = [sys.executable, "-m", "spkit.cli"]
    own = [sys.executable, __file__, "--folder", str(folder), "--shape", name]
    commands = {
        "make": [*own, "--layers", str(layers), "--child", "make"],
        "apply": [*tool, "apply", "--quiet", *map(str, (patch, base, target))],
        "verify": [*tool, "verify", str(patch), "--backbone", str(base), "--checkpoint"],
    }
    commands["verify"] += [str(target), "--quiet"]
    about = {"shape": name, "layers": layers, "files": shards, "GB": _bytes(shapes) / 1e9}
    for what, command in commands.items():
        yield about | {"command": what} | run(command)
    shutil.rmtree(target)
    if layers == 1:
        layers = PUBLIC[name].layers
        about |= {
            "layers": layers,
            "files": "simulated",
            "GB": 2 * PUBLIC[name].shape().weights / 1e9,
        }
        for what in ("finish", "open"):
            command = [*own, "--layers", str(layers), "--child", what]
            yield about | {"command": what} | run(command)
    shutil.rmtree(folder)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--most", type=int, default=4, help="layers, at most")
    parser.add_argument("--folder", help="where to write; else the system's temporary folder")
    for hidden in ("--child", "--shape", "--layers"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """The command line."""
    given = parser().parse_args()
    if given.child:
        child(given.child, Path(given.folder), given.shape, int(given.layers or 0))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as work:
        for name in given.shapes:
            for layers in (count for count in COUNTS[name] if count <= given.most):
                for row in measure(Path(work), name, layers):
                    rows.append({k: round(v, 1) if type(v) is float else v for k, v in row.items()})
                    print(rows[-1], flush=True)
    print("\n" + tabulate(rows, "keys", "pipe"))
    machine, found = hardware(), versions()
    print(f"\n{machine['cpu']}, {machine['cores']} cores; spkit {found['spkit']}")


if __name__ == "__main__":
    main()
