"""The sizes of a backbone and its batches as numbers. Nothing imported here could load a model.

Where they come from: shape.py builds the model without weights, widths.py counts them from a
handful of widths, batches.py reads the texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spkit.config import Config
from spkit.models.targets import chosen, is_named

PATCH_SHARE = 0.05  # a patch file, of the checkpoint: more than any of docs/patch_format.md


@dataclass(frozen=True)
class Matrix:
    """A linear layer that stands `count` times in the model, once in each decoder layer.

    paths: of those that can be targets; experts cannot.
    """

    name: str
    rows: int
    columns: int
    count: int
    paths: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Of one of them."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """Numbers of weights, and widths in weights.

    matrices: the linear layers of the decoder, which NF4 quantises. outside: all other weights
    (embeddings, norms, lm_head; a tied lm_head counts once). query, kv: widths of all the heads
    together. checkpoint_bytes: of a weight on the disk. stack: path of the decoder layers.
    left_out: a line for each part that no targets reach. head: the one behind the decoder, where
    it can be a target; it is not among the matrices, for NF4 leaves it alone.
    """

    matrices: tuple[Matrix, ...]
    stack: str
    left_out: tuple[str, ...]
    outside: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    kv: int
    vocabulary: int
    checkpoint_bytes: int
    head: Matrix | None = None

    @property
    def linear(self) -> int:
        """Weights of all matrices."""
        return sum(m.weights * m.count for m in self.matrices)

    @property
    def weights(self) -> int:
        """All weights of the model."""
        return self.linear + self.outside

    def targeted(self, targets: Sequence[str] | str) -> tuple[Matrix, ...]:
        """The matrices that `targets` names (models/targets.py), each with the number of them."""
        matrices = (*self.matrices, *filter(None, [self.head]))
        paths = [path for matrix in matrices for path in matrix.paths]
        if isinstance(targets, str):
            hit = set(chosen(paths, targets, self.stack, {}))
        else:
            hit = {path for path in paths if is_named(path, targets)}
        own = ((m, tuple(path for path in m.paths if path in hit)) for m in matrices)
        return tuple(replace(m, count=len(found), paths=found) for m, found in own if found)


@dataclass(frozen=True)
class Batch:
    """rows: texts at once. width: tokens of the longest. counted: tokens of all that count in the
    loss."""

    rows: int
    width: int
    counted: int

    @property
    def tokens(self) -> int:
        """With the padding."""
        return self.rows * self.width


@dataclass(frozen=True)
class Batches:
    """What goes through the model at once; of each kind those that may be the largest.

    derivation: pairs of one pass. importance: all that are scored. balance: those of first tokens.
    evaluation: prompts. texts: of the perplexity.
    """

    derivation: tuple[Batch, ...]
    importance: tuple[Batch, ...]
    balance: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    texts: tuple[Batch, ...]


def written_by(config: Config, shape: Shape) -> dict[str, float]:
    """{notebook: bytes that it leaves in the run folder}, figures and tables not counted."""
    targets = shape.targeted(config.derivation.lora.targets)
    targeted = sum(m.weights * m.count for m in targets)
    factors = sum(config.derivation.lora.r * (m.rows + m.columns) * m.count for m in targets)
    checkpoint = shape.weights * shape.checkpoint_bytes
    return {
        "01_patch_derivation": 2 * 4 * factors,
        "02_importance_analysis": (
            2 * 4 * targeted if config.importance.save == "scores" else 2 * targeted / 8
        ),
        "03_controllable_patching": (1 + PATCH_SHARE) * checkpoint,
        # of each method its last model stays, and one more is being written
        "04_continual_psa": (len(config.continual.methods) + 1) * checkpoint,
    }


def written(config: Config, shape: Shape) -> float:
    """Bytes that notebooks 00 to 04 leave in the run folder, figures and tables not counted."""
    return sum(written_by(config, shape).values())
