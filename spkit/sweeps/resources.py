"""What a unit is given: seconds, memory of the host, threads and GPUs. No result depends on it.

Seconds are those of the same notebook on the same backbone, of this sweep or of an ordinary run;
then the sandbox's; then a rough rule by the number of weights, good to a factor of ten. Memory is
the predictor's (running/memory.py).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from spkit.config import Config, SandboxConfig
from spkit.errors import SpkitError
from spkit.running.runs import STAGES, stage_folder
from spkit.running.walkthrough import SANDBOX_SECONDS
from spkit.workflow.units import Unit

STARTING = 6.0  # seconds that a kernel takes to start and to import
LEAST_MIB, SPARE, UNKNOWN_MIB = 2048, 1.3, 16_384
JOB_MIB = 256  # the process beside the notebook's kernel
GPU_SPEED = 100  # times a CPU core, where nothing has been timed
SANDBOX_WEIGHTS = 1_880_000


def resources(units: Iterable[Unit], root: Path, cluster: bool) -> dict[str, dict[str, Any]]:
    """{unit: seconds, memory_mib, threads, gpus}. root: of the sweep, whose earlier units count.

    cluster: whether device "auto" finds a GPU where the unit will run, rather than here.
    """
    of_units, predictor, found = _times(root.glob("units/*/*")), _Memory(), {}
    for unit in units:
        stage, config = unit.inputs["stage"], unit.inputs["config"]
        gpu = gpus(config, cluster)
        weights = predictor.weights(config)
        seconds = of_units.get(_alike(stage, config.model_dump(mode="json")))
        found[unit.name] = {
            "seconds": round(seconds or _seconds(config, stage, weights, gpu), 1),
            "memory_mib": predictor.mib(config, stage, gpu),
            "threads": config.threads or 1,
            "gpus": gpu,
        }
    return found


def gpus(config: Config, cluster: bool) -> int:
    """How many GPUs a notebook is given: 1 where its parameters' device is one.

    "auto" is one on a cluster, but for the sandbox's small model; here it is what this machine has.
    """
    device = config.backbone.device
    if device == "auto":
        if not cluster:
            from torch import cuda

            return int(cuda.is_available())
        return int(config.backbone.source != "sandbox")
    return int(device not in ("cpu", "mps"))


def _seconds(config: Config, stage: str, weights: int | None, gpu: int) -> float:
    """Where this sweep has not run the notebook on this backbone."""
    plain = config.sandbox == SandboxConfig()
    runs = stage_folder(config, stage).parents[1].glob(f"seed-*/{stage}/record.json")
    taken = [seconds for path in sorted(runs) if (seconds := _taken(path)[1])]
    if taken:
        return STARTING + median(taken)
    if config.backbone.source == "sandbox" and plain:
        return STARTING + SANDBOX_SECONDS[stage]
    share = (weights or SANDBOX_WEIGHTS) / SANDBOX_WEIGHTS / (GPU_SPEED if gpu else 1)
    return STARTING + share * SANDBOX_SECONDS[stage]


def _times(units: Iterable[Path]) -> dict[str, float]:
    """{what is alike in notebooks: seconds} of finished units."""
    times: dict[str, list[float]] = {}
    for folder in units:
        for path in folder.glob(f"run/seed-*/{_stage_in(folder)}/record.json"):
            alike, seconds = _taken(path)
            if alike and seconds:
                times.setdefault(alike, []).append(STARTING + seconds)
    return {alike: median(seconds) for alike, seconds in times.items()}


def _stage_in(folder: Path) -> str:
    return next((path.stem for path in folder.glob("*.ipynb")), "none")


def _taken(path: Path) -> tuple[str, float]:
    """(what is alike, seconds) of a stage's record; ("", 0) where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return _alike(record["stage"], record["params"]), float(record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0.0


def _alike(stage: str, params: Mapping[str, Any]) -> str:
    """The backbone: notebooks of one stage take about as long with other parameters."""
    return json.dumps([stage, params.get("backbone"), params.get("sandbox")], sort_keys=True)


class _Memory:
    """The predictor, asked once for what needs the same."""

    def __init__(self):
        self._shapes: dict[str, Any] = {}
        self._found: dict[tuple, int] = {}

    def weights(self, config: Config) -> int | None:
        """Of the backbone; None where its sizes cannot be read here."""
        shape = self._shape(config)
        return None if shape is None else shape.weights

    def mib(self, config: Config, stage: str, gpu: int) -> int:
        """Of the host's memory."""
        from spkit.running import memory

        shape = self._shape(config)
        if shape is None or stage not in STAGES:
            return UNKNOWN_MIB
        alike = config.model_copy(update={"seed": 0}).model_dump_json()
        if (stage, alike) not in self._found:
            table = memory.predict(config, shape, stage, "cuda" if gpu else "cpu")
            need = table.loc[memory.PEAK, "host GiB"] * 1024
            self._found[stage, alike] = max(LEAST_MIB, round(SPARE * need) + JOB_MIB)
        return self._found[stage, alike]

    def _shape(self, config: Config):
        from spkit.running.shape import shape_of

        parts = (config.backbone, config.sandbox, config.derivation.lora)
        alike = " ".join(part.model_dump_json() for part in parts)
        if alike not in self._shapes:
            try:
                self._shapes[alike] = shape_of(config)
            except SpkitError:  # a hub model whose configuration is not here
                self._shapes[alike] = None
        return self._shapes[alike]
