"""What stands beside every figure of a GPU session, as JSON: device, driver, CUDA, torch, commit.

A file of its own, for it is asked first and should cost no time on a GPU: it imports torch alone.
"""

import argparse
import json
import subprocess
import sys

import torch

from spkit.system.machine import git_state, hardware


def facts(rehearse: bool, commit: str | None) -> dict[str, str]:
    """The first GPU's, or in a rehearsal the CPU's; ends with a sentence where there is no GPU.

    commit: None is that of the clone, with a + where tracked files differ from it.
    """
    device, driver = f"rehearsal on a CPU ({hardware()['cpu']})", "none"
    if not rehearse:
        if not torch.cuda.is_available():
            sys.exit("torch sees no GPU; --rehearse runs every part on the CPU")
        device, driver = torch.cuda.get_device_name(0), driver_version()
    if commit is None:
        state = git_state()
        commit = state["commit"][:10] + "+" * state["changed"] if state else "unknown"
    software = {"cuda": torch.version.cuda or "none", "torch": torch.__version__}
    return {"device": device, "driver": driver, **software, "commit": commit}


def driver_version() -> str:
    """The NVIDIA driver's, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--commit")
    given = parser.parse_args()
    print(json.dumps(facts(given.rehearse, given.commit)))
