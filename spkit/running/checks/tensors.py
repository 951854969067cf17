"""The backbone's tensors, the layers that get a patch, and given patches. No weight is read."""

from collections.abc import Iterator
from pathlib import Path

from spkit.config import Config
from spkit.models.adapters import WEIGHTS, check_adapter, linear_shapes
from spkit.models.checkpoint_check import checkpoint_problems
from spkit.models.gguf import is_gguf
from spkit.running.checks.finding import Finding, looked
from spkit.running.shape import model_on_meta, shape_of
from spkit.system.fingerprint import digests


def files(config: Config, folder: Path, derives: bool) -> Iterator[Finding]:
    """Of a checkpoint's folder; derives: whether the targets must be there, too."""
    targets = config.derivation.lora.targets if derives else "auto"
    whole = Path(config.backbone.source).exists() or is_gguf(config.backbone)
    checked = checkpoint_problems(folder, targets, whole=whole)
    for said in checked.problems:
        own = said.startswith(("The target", "derivation.lora.targets"))
        yield Finding("derivation.lora.targets" if own else "backbone.source", said, ok=False)
    yield from (Finding("backbone.source", said) for said in checked.remarks)


def layers(config: Config) -> Iterator[Finding]:
    """The layers that get a patch, and the adapters that take a patch's place."""
    own = config.derivation
    yield looked("derivation.lora.targets", lambda: _targets(config))
    given = {key: getattr(own, key) for key in ("se", "osm") if getattr(own, key) is not None}
    for key, folder in given.items():
        yield looked(f"derivation.{key}", lambda folder=folder: _adapter(config, folder))
    if len(given) == 2:
        yield from _same(*(Path(folder) / WEIGHTS for folder in given.values()))


def _same(se: Path, osm: Path) -> Iterator[Finding]:
    if not (se.is_file() and osm.is_file()):
        return
    if len(set(digests({"se": se, "osm": osm}).values())) == 1:
        said = "is the same adapter as derivation.se: no weight would be in either difference set"
        yield Finding("derivation.osm", said, ok=False)


def _targets(config: Config) -> str:
    matrices = shape_of(config).targeted(config.derivation.lora.targets)
    names = ", ".join(dict.fromkeys(matrix.name for matrix in matrices))
    return f"{sum(matrix.count for matrix in matrices)} matrices: {names}"


def _adapter(config: Config, folder: str) -> str:
    adapter = check_adapter(folder, linear_shapes(model_on_meta(config, fetch=False)))
    return f"{len(adapter.keys)} matrices of {folder}"
