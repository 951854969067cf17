"""What an Accelerate config file asks for: how many processes, on what, in what form.

    read("profiles/accelerate/2-gpus.yaml")     AccelerateFile(processes=2, sharded=False, ...)

`accelerate config` writes such a file. Of what it can say, the kit knows processes with a GPU each,
FSDP, and processes on a CPU; SpkitError for the rest, before anything is started.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spkit.errors import SpkitError, first_line

KINDS = ("MULTI_GPU", "FSDP", "MULTI_CPU", "NO")


@dataclass(frozen=True)
class AccelerateFile:
    """processes: of all machines. sharded: FSDP. on_cpu: with gloo instead of NCCL."""

    path: Path
    processes: int
    machines: int
    sharded: bool
    on_cpu: bool


def read(key: str, path: str | Path) -> AccelerateFile:
    """SpkitError, which names the parameter `key`, for a file that is missing or not known here."""
    where = f"{key} is {str(path)!r}"
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpkitError(f"{where}, which cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise SpkitError(f"{where}, which is no YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise SpkitError(f"{where}, must be a file that `accelerate config` writes")

    def need(name: str, ok: bool, rule: str) -> Any:
        if not ok:
            raise SpkitError(f"{where}: {name} is {values.get(name)!r} there, {rule}")
        return values.get(name)

    kind = values.get("distributed_type", "NO")
    need("distributed_type", kind in KINDS, f"allowed are {', '.join(KINDS)}")
    local = values.get("compute_environment", "LOCAL_MACHINE") == "LOCAL_MACHINE"
    need("compute_environment", local, "must be LOCAL_MACHINE")
    count, machines = values.get("num_processes", 1), values.get("num_machines", 1)
    need("num_processes", type(count) is int and count >= 1, "must be a number of 1 or more")
    need("num_machines", type(machines) is int and machines >= 1, "must be a number of 1 or more")
    precision = values.get("mixed_precision") in (
        None,
        "no",
        False,
    )  # YAML reads a bare no as false
    need("mixed_precision", precision, "must be 'no': backbone.compute_dtype is the precision")
    on_cpu = kind == "MULTI_CPU" or values.get("use_cpu") is True
    need("distributed_type", kind != "NO" or count == 1, "must be MULTI_GPU for several processes")
    if kind == "FSDP":
        _check_fsdp(where, values.get("fsdp_config") or {})
    return AccelerateFile(Path(path), count, machines, kind == "FSDP", on_cpu)


def _check_fsdp(where: str, section: dict) -> None:
    known = {"fsdp_version": (2,), "fsdp_offload_params": (None, False)}
    known["fsdp_cpu_ram_efficient_loading"] = (None, False)
    for name, allowed in known.items():
        if section.get(name) not in allowed:
            rule = f"must be {str(allowed[-1]).lower()}"
            raise SpkitError(f"{where}: fsdp_config.{name} is {section.get(name)!r} there, {rule}")
