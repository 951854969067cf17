"""The backbone of one seed and size: trained, or the shipped one."""

from collections.abc import Mapping
from pathlib import Path

from spkit.config import Config
from spkit.sandbox.backbone import prepare_backbone
from spkit.system.determinism import make_deterministic


def backbone(folder: Path, places: Mapping[str, Path], config: Config) -> None:
    """model/: the backbone of config.seed."""
    make_deterministic(config.seed, config.threads)
    prepare_backbone(config, folder / "model")
