"""Where and with what a run was made: versions, commit, hardware, memory. For the record only."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
SHARE_OF_FREE_MEMORY = 0.4  # for the scores of one window of layers; the passes need the rest
LIBRARIES = (
    "spkit torch transformers peft accelerate bitsandbytes datasets gguf numpy pandas "
    "safetensors pydantic statsmodels papermill snakemake"
).split()


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that can change a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the code and whether tracked files differ from it; None outside of a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # the clone is ours, not a folder above
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU, to read the times by; nothing that names the machine."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    torch = sys.modules.get("torch")  # not imported just to be asked
    gpu = _gpus(torch) if torch else None
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "gpu": gpu,
    }


def _gpus(torch) -> str | None:
    """ "NVIDIA T4", or "4 x NVIDIA T4"."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    if not names:
        return "Apple GPU (mps)" if torch.backends.mps.is_available() else None
    kinds = {name: names.count(name) for name in names}
    return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in kinds.items())


def free_memory(device) -> int:
    """Bytes that can still be taken on "cpu", a CUDA device, "mps", or all GPUs ("balanced")."""
    torch = sys.modules.get("torch")
    if device == "balanced":
        return sum(free_memory(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    kind = torch.device(device).type if torch else "cpu"
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    if kind == "mps":  # one memory for both: what the system lets the GPU have of it
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable:"))
        return int(line.split()[1]) * 2**10
    return 4 * 2**30  # not Linux, and nothing to ask: a small machine's


def layers_that_fit(free: float, weights: int, depth: int, patches: int) -> int:
    """How many of `depth` layers, with `weights` targeted ones in all, to score at once: 1 or more.

    free: bytes. A layer takes 4 bytes a weight and patch, and once more for the product being
    added.
    """
    a_layer = 4 * (patches + 1) * weights / depth
    return max(1, min(depth, int(SHARE_OF_FREE_MEMORY * free / a_layer)))


def own_memory() -> int:
    """Bytes of host memory that this process holds now, mapped files left out; 0 if unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(x.split()[1]) * 2**10 for x in lines if x.startswith(("RssAnon:", "RssShmem:")))


def peak_memory_mib() -> dict[str, float]:
    """The most memory that this process has held so far, on the host and on all GPUs together."""
    peak = {}
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; getrusage starts from what the parent held
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), "")
        if line:
            peak["host"] = round(int(line.split()[1]) / 2**10, 1)
    try:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        used = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
        peak.setdefault("host", used)
    except ImportError:  # Windows
        pass
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        peak["gpu"] = round(sum(map(torch.cuda.max_memory_allocated, gpus)) / 2**20, 1)
    return peak
