"""What a unit is given: seconds, memory of the host, threads and GPUs. No result depends on it.

Seconds are those of the same notebook on the same backbone, of this sweep or of an ordinary run;
else the forecast's (running/forecast.py). Memory is the predictor's (running/memory.py).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running import memory
from spkit.running.forecast import Device, device_named, forecast, seconds
from spkit.running.runs import stage_folder
from spkit.running.sizes import Shape
from spkit.running.widths import planned_shape
from spkit.sweeps.forecast import LARGE, gpus_for
from spkit.workflow.units import Unit

STARTING = 6.0  # seconds that a kernel takes to start and to import, which no record counts
LEAST_MIB, SPARE = 2048, 1.3
JOB_MIB = 256  # the process beside the notebook's kernel
UNKNOWN = {"seconds": 3600.0, "memory_mib": 32_768}  # of a backbone whose sizes are not known here


def resources(units: Iterable[Unit], root: Path, cluster: bool) -> dict[str, dict[str, Any]]:
    """{unit: seconds, memory_mib, threads, gpus}. root: of the sweep, whose earlier units count.

    cluster: whether device "auto" finds a GPU where the unit will run, rather than here.
    """
    taken, known = _Taken(root), _Known()
    found = {}
    for unit in units:
        stage, config = unit.inputs["stage"], unit.inputs["config"]
        needs = known.needs(stage, config, cluster)
        if (before := taken.seconds(stage, config)) is not None:
            needs = {**needs, "seconds": round(before, 1)}
        found[unit.name] = needs
    return found


def on_gpu(config: Config, cluster: bool) -> bool:
    """Whether a notebook computes on a GPU.

    "auto" is one on a cluster, but for the sandbox's small model; here it is what this machine has.
    """
    device = config.backbone.device
    if device != "auto":
        return device not in ("cpu", "mps")
    if cluster:
        return config.backbone.source != "sandbox"
    from torch import cuda

    return cuda.is_available()


class _Known:
    """What is predicted, once for parameters that need the same."""

    def __init__(self):
        self._shapes: dict[str, Shape | None] = {}
        self._found: dict[tuple, dict[str, Any]] = {}

    def needs(self, stage: str, config: Config, cluster: bool) -> dict[str, Any]:
        """seconds, memory_mib, threads, gpus."""
        alike = stage, config.model_copy(update={"seed": 0}).model_dump_json()
        if alike not in self._found:
            gpu, shape = on_gpu(config, cluster), self._shape(config)
            needs = {**UNKNOWN, "threads": config.threads or 1, "gpus": int(gpu)}
            if shape is not None:
                needs |= _predicted(stage, config, shape, gpu)
            self._found[alike] = needs
        return self._found[alike]

    def _shape(self, config: Config) -> Shape | None:
        alike = config.backbone.model_dump_json() + config.sandbox.model_dump_json()
        if alike not in self._shapes:
            try:
                self._shapes[alike] = planned_shape(config)
            except SpkitError:
                self._shapes[alike] = None
        return self._shapes[alike]


def _predicted(stage: str, config: Config, shape: Shape, gpu: bool) -> dict[str, Any]:
    device: Device = device_named(LARGE if gpu else "cpu", config.threads)
    spread = config.backbone.device == "balanced"
    gpus = max(1, gpus_for(config, shape, stage, device)[0]) if spread else int(gpu)
    took = seconds(forecast(config, shape, device, max(1, gpus))[stage])
    table = memory.predict(config, shape, stage, "cuda" if gpu else "cpu", device.memory)
    need = SPARE * table.loc[memory.PEAK, "host GiB"] * 1024
    mib = max(LEAST_MIB, round(need) + JOB_MIB)
    return {"seconds": round(took, 1), "memory_mib": mib, "gpus": gpus}


class _Taken:
    """What notebooks took before: the median over those of the same stage and backbone."""

    def __init__(self, root: Path):
        self._of_units: dict[str, list[float]] = {}
        for folder in root.glob("units/*/*"):
            stage = next((path.stem for path in folder.glob("*.ipynb")), "none")
            for path in folder.glob(f"run/seed-*/{stage}/record.json"):
                alike, took = _read(path)
                self._of_units.setdefault(alike, []).append(took)

    def seconds(self, stage: str, config: Config) -> float | None:
        """In this sweep, else in ordinary runs of the same name; None where there was none."""
        alike = _alike(stage, config.model_dump(mode="json", include={"backbone", "sandbox"}))
        found = self._of_units.get(alike)
        if found is None:
            runs = stage_folder(config, stage).parents[1].glob(f"seed-*/{stage}/record.json")
            found = [took for same, took in map(_read, sorted(runs)) if same == alike]
            self._of_units[alike] = found
        return STARTING + median(found) if found else None


def _read(path: Path) -> tuple[str, float]:
    """(what is alike, seconds) of a stage's record; ("", 0) where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return _alike(record["stage"], record["params"]), float(record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0.0


def _alike(stage: str, params: Mapping[str, Any]) -> str:
    """The backbone: notebooks of one stage take about as long with other parameters."""
    return json.dumps([stage, params.get("backbone"), params.get("sandbox")], sort_keys=True)
