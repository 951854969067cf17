"""Mappings over the weight matrices of a model too large to hold every value of them at once.

    Lazy      a value is computed each time it is asked for, and not kept
    BitSets   sets of weights, one bit a weight: 0.8 GB for the 6.5 billion weights of a 7 B model,
              where torch's bool takes 6.5 GB and fp32 importances 26 GB

Both behave like a dictionary {tensor name: tensor}.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spkit.errors import SpkitError
from spkit.system.tensors import load_tensors, save_tensors


class Lazy(Mapping):
    """{name: compute(name)} for the given names, computed anew at each access."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]):
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would compute the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class BitSets(Mapping):
    """{tensor name: bool [out, in]}, held as one bit a weight and unpacked when asked for."""

    def __init__(self, sets: Mapping[str, Tensor] = (), about: Mapping | None = None):
        """`sets` is read matrix by matrix. about: anything JSON can hold, saved with the sets."""
        self._bits: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.about = dict(about or {})
        for name in sets:
            self.add(name, sets[name])

    def add(self, name: str, members: Tensor) -> None:
        """Put one set in; ValueError unless it is bool."""
        if members.dtype != torch.bool:
            raise ValueError(f"the set of {name!r} must be bool; it is {members.dtype}")
        self._shapes[name] = tuple(members.shape)
        self._bits[name] = torch.from_numpy(np.packbits(members.cpu().numpy().reshape(-1)))

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        flat = np.unpackbits(self._bits[name].numpy(), count=prod(shape)).view(np.bool_)
        return torch.from_numpy(flat).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._bits  # Mapping's own would unpack the set

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of one matrix, without unpacking it."""
        return self._shapes[name]

    def save(self, path: str | Path) -> None:
        """One safetensors file of uint8, with shapes and `about` in its header; whole or not."""
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        save_tensors(self._bits, path, {"shapes": shapes, "about": self.about})

    @classmethod
    def load(cls, path: str | Path) -> "BitSets":
        """Read what `save` wrote; SpkitError where the file is missing, unreadable or no sets."""
        loaded = cls()
        loaded._bits, header = load_tensors(path, "sets of weights")
        try:
            loaded._shapes = {n: tuple(map(int, header["shapes"][n])) for n in loaded._bits}
            loaded.about = header["about"]
        except (ValueError, TypeError, KeyError) as error:
            raise SpkitError(f"{path} cannot be read as sets of weights: {error}") from error
        for name, bits in loaded._bits.items():
            needed = -(-prod(loaded._shapes[name]) // 8)
            if bits.dtype != torch.uint8 or bits.numel() != needed:
                what = f"the set of {name!r} has {bits.numel()} bytes, its shape needs {needed}"
                raise SpkitError(f"{path}: {what}")
        return loaded
