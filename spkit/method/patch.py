"""What a derivation leaves, and what a method makes of it: patch factors and merged patches.

    P = B @ A * lora_alpha / r                       `Factors`: the patch of every matrix, low rank
    alpha * P_SE on K_SE + beta * P_OSM on K_OSM     `MergedPatch`: what is added in the end

Neither holds dense deltas: that of one matrix is computed when it is asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spkit.errors import SpkitError
from spkit.method.patching import norm, squared_norm
from spkit.method.sets import Lazy
from spkit.models.deltas import LowRankDelta
from spkit.system.tensors import load_tensors, save_tensors

FORMAT = 1


@dataclass
class Factors:
    """The LoRA factors of one derivation or adapter: the patch of every targeted weight matrix.

    name: "se", "osm", or a baseline's ("npo"). factors: {tensor name: (A [r, in], B [out, r])},
    fp32. scaling: lora_alpha / r; 1 for an adapter. manifest: how they were made.
    The OSM patch alone is a jailbreak: it stays in memory or in the run folder.
    """

    name: str
    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    manifest: dict = field(default_factory=dict)

    def delta(self, tensor: str) -> Tensor:
        """P of one weight matrix: B @ A * lora_alpha / r, fp32 [out, in]."""
        a, b = self.factors[tensor]
        return (b @ a).mul_(self.scaling)

    def shape(self, tensor: str) -> tuple[int, int]:
        """(out, in) of one weight matrix, without computing its delta."""
        a, b = self.factors[tensor]
        return b.shape[0], a.shape[1]

    def norm(self) -> float:
        """The Frobenius norm of the whole patch."""
        return norm(squared_norm(self.delta(tensor)) for tensor in self.factors)

    def save(self, path: str | Path) -> None:
        """One safetensors file, the manifest in its header. Written whole or not at all."""
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a.contiguous(), b.contiguous()
        fixed = {"name": self.name, "scaling": self.scaling, "format": FORMAT}
        save_tensors(tensors, path, {**self.manifest, **fixed})

    @classmethod
    def load(cls, path: str | Path) -> "Factors":
        """Read what `save` wrote; SpkitError names the file and what is missing."""
        tensors, header = load_tensors(path, "a patch")
        found = header.pop("format", None) if isinstance(header, dict) else None
        if found != FORMAT:
            raise SpkitError(f"{path} has patch format {found}, this kit reads {FORMAT}.")
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        try:
            factors = {n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in names}
            return cls(header.pop("name"), factors, header.pop("scaling"), header)
        except KeyError as error:
            raise SpkitError(f"{path} is an incomplete patch: it lacks {error}.") from error


class MergedPatch(Lazy):
    """{tensor name: merged delta fp32 [out, in]}, computed one matrix at a time.

    strengths: (alpha, beta), where there are two. `factors` gives the low-rank form where whole
    patches are kept, for backbones whose weights cannot be written to (models/patched.py).
    """

    def __init__(
        self,
        names: Iterable[str],
        compute: Callable[[str], Tensor],
        factors: Callable[[str], LowRankDelta] | None = None,
        strengths: tuple[float, float] | None = None,
    ):
        super().__init__(names, compute)
        self._factors, self.strengths = factors, strengths

    def factors(self, name: str) -> LowRankDelta | None:
        """The delta as a sum of scale * B @ A, or None where only some positions are kept."""
        return self._factors(name) if self._factors else None

    @property
    def whole(self) -> bool:
        """Whether every weight is moved, so that the deltas are not sparse."""
        return self._factors is not None


def whole_patches(*terms: tuple[Factors, float]) -> MergedPatch:
    """strength * P of every (patch, strength), added up: every weight of each, nothing thinned."""

    def add(name: str) -> Tensor:
        return sum(strength * patch.delta(name) for patch, strength in terms)

    def factors(name: str) -> LowRankDelta:
        return LowRankDelta(tuple((*p.factors[name], p.scaling * x) for p, x in terms))

    return MergedPatch(terms[0][0].factors, add, factors)
