"""What a sweep will take: its notebooks, memory, hours and disk, by numbers alone.

    print(table("paper", points, units, "h100"))

Nothing is loaded: sizes come from widths (running/widths.py), memory and time from the predictors
(running/memory.py, running/forecast.py), with their assumptions (docs/planning.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spkit.config import Config
from spkit.running import memory
from spkit.running.forecast import Device, device_named, forecast, seconds
from spkit.running.memory import GIB
from spkit.running.sizes import Shape, written_by
from spkit.running.widths import planned_shape

AUTO, SMALL = "auto", 1e9  # weights; a smaller backbone is planned for the CPU
LARGE = "a100"  # and what any other is planned for
ROOM = 0.95  # of a GPU's memory: fragments and what else is on it
MOST_GPUS = 16


@dataclass(frozen=True)
class Work:
    """A notebook that runs once. points: how many points need it."""

    stage: str
    config: Config
    points: int = 1


@dataclass
class Row:
    """A notebook of one backbone, over all units: GiB are the largest, the rest is the sum."""

    units: int = 0
    alone: int = 0  # how many there would be if points shared nothing
    gpus: int = 1
    device: float = 0.0
    host: float = 0.0
    seconds: float = 0.0
    used: float = 0.0  # seconds times GPUs, unit by unit
    longest: float = 0.0
    bytes: float = 0.0


def table(
    name: str, points: Sequence, units: Sequence[Work], device: str = AUTO, cores: int = 2
) -> str:
    """The plan in words and columns: backbone by backbone, then the sums.

    points: only counted. device: of running/forecast.py, or "auto": the CPU for a backbone of less
    than a billion weights, else an A100. cores: of a CPU. SpkitError for another device, and for a
    backbone whose sizes are not known without the hub.
    """
    alone = sum(unit.points for unit in units)
    said = f"{name}: {len(points):,} points, {len(units):,} notebooks to run"
    parts = [f"{said} ({alone:,} if points shared nothing).\nPredicted; nothing was loaded."]
    sums = Sums()
    by_backbone: dict[str, list[Work]] = {}
    for unit in units:
        by_backbone.setdefault(unit.config.backbone.public_name, []).append(unit)
    for own in by_backbone.values():
        config = own[0].config
        shape = planned_shape(config)
        on = _device(device, shape, config)
        rows = planned(own, shape, on)
        parts.append(_section(config, shape, on, rows))
        sums.add(on, rows, config.threads or cores)
    return "\n\n".join([*parts, sums.said(cores)])


@dataclass
class Sums:
    """Of all backbones, in seconds. gpu: by device. longest: of a point on the CPU."""

    gpu: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0
    longest: float = 0.0
    disk: float = 0.0
    threads: int = 1

    def add(self, device: Device, rows: Mapping[str, Row], threads: int) -> None:
        """The rows of one backbone."""
        self.disk += sum(row.bytes for row in rows.values())
        if device.name != "cpu":
            self.gpu[device.name] = self.gpu.get(device.name, 0.0) + gpu_seconds(rows)
            return
        self.threads = max(self.threads, threads)
        self.cpu += sum(row.seconds for row in rows.values())
        self.longest = max(self.longest, sum(row.longest for row in rows.values()))

    def said(self, cores: int) -> str:
        """A line for each device, and the disk."""
        lines = [f"{name}: {took / 3600:,.0f} GPU-hours" for name, took in self.gpu.items()]
        if self.cpu:
            together = max(1, cores // self.threads)
            wall = duration(max(self.longest, self.cpu / together))
            lines.append(f"cpu: {wall} on {cores} cores, {together} at a time")
        return "\n".join([*lines, f"disk: {self.disk / GIB:,.1f} GiB at the end"])


def gpu_seconds(rows: Mapping[str, Row]) -> float:
    """All notebooks, each times the GPUs that it needs."""
    return sum(row.used for row in rows.values())


def planned(work: Sequence[Work], shape: Shape, device: Device) -> dict[str, Row]:
    """{notebook: its row} of the work on one backbone."""
    rows: dict[str, Row] = {}
    known: dict[tuple[str, str], tuple] = {}
    for one in work:
        config = one.config.model_copy(update={"seed": 0})  # another seed takes as long
        key = (one.stage, config.model_dump_json())
        if key not in known:
            known[key] = _one(one.stage, config, shape, device)
        gpus, of_device, of_host, took, left = known[key]
        row = rows.setdefault(one.stage, Row())
        row.units, row.alone = row.units + 1, row.alone + one.points
        row.gpus, row.device = max(row.gpus, gpus), max(row.device, of_device)
        row.host, row.longest = max(row.host, of_host), max(row.longest, took)
        row.seconds, row.bytes = row.seconds + took, row.bytes + left
        row.used += took * max(1, gpus)
    return dict(sorted(rows.items()))


def _one(stage: str, config: Config, shape: Shape, device: Device) -> tuple:
    """(GPUs, GiB of each, GiB of the host, seconds, bytes left) of one notebook."""
    gpus, each = 1, 0.0
    if device.name == "cpu":
        host = memory.predict(config, shape, stage, "cpu", device.memory)
    else:
        gpus, each = gpus_for(config, shape, stage, device)
        host = memory.predict(config, shape, stage, "balanced", max(1, gpus) * device.memory)
    took = seconds(forecast(config, shape, device, max(1, gpus))[stage])
    left = left_by(stage, config, shape)
    return gpus, each, float(host.loc[memory.PEAK, "host GiB"]), took, left


def left_by(stage: str, config: Config, shape: Shape) -> float:
    """Bytes that a notebook leaves in a sweep, which keeps of notebook 03 its patch, no model."""
    left = written_by(config, shape).get(stage, 0.0)
    whole = shape.weights * shape.checkpoint_bytes
    return left - whole if stage == "03_controllable_patching" else left


def gpus_for(
    config: Config, shape: Shape, stage: str, device: Device, how: str = "balanced"
) -> tuple[int, float]:
    """(the fewest GPUs that are enough, GiB of the fullest); (0, GiB) where MOST_GPUS are not."""
    each = math.inf
    for gpus in range(1, MOST_GPUS + 1):
        each = memory.of_each_gpu(config, shape, stage, gpus, device.memory, how)
        if each * GIB <= ROOM * device.memory:
            return gpus, each
    return 0, each


def _device(name: str, shape: Shape, config: Config) -> Device:
    if name == AUTO:
        small = shape.weights < SMALL or config.backbone.device == "cpu"
        name = "cpu" if small else LARGE
    return device_named(name, config.threads)


def _section(config: Config, shape: Shape, device: Device, rows: Mapping[str, Row]) -> str:
    """A heading and a line for every notebook of one backbone."""
    weights = f"{shape.weights / 1e9:.2f} billion" if shape.weights > 1e8 else f"{shape.weights:,}"
    gpu = device.name != "cpu"
    threads = "" if gpu else f", {config.threads or 'all'} threads"
    name = config.backbone.public_name.rpartition("/")[2]
    lines = [f"{name}, {weights} weights, on {device.name}{threads}"]
    heads = ["units", "shared", *(["GPUs", "GiB a GPU"] if gpu else []), "GiB host", "one", "all"]
    lines.append(f"  {'notebook':<26}" + "".join(f"{head:>10}" for head in heads))
    for stage, row in rows.items():
        cells = [str(row.units), str(row.alone - row.units)]
        cells += [str(row.gpus or "none"), f"{row.device:.1f}"] if gpu else []
        cells += [f"{row.host:.1f}", duration(row.longest), duration(row.seconds)]
        lines.append(f"  {stage.replace('_', ' '):<26}" + "".join(f"{cell:>10}" for cell in cells))
    took = gpu_seconds(rows) if gpu else sum(row.seconds for row in rows.values())
    lines.append(f"  all: {duration(took)}" + (" of one GPU" if gpu else ""))
    return "\n".join(lines)


def duration(took: float) -> str:
    """ "40 s", "12 min", "3.4 h"."""
    if took < 90:
        return f"{took:.0f} s"
    return f"{took / 60:.0f} min" if took < 5400 else f"{took / 3600:.1f} h"
