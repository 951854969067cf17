"""Other people's packages, installed at run time into a folder of their own.

They are no dependencies of the kit: their pins would bind everybody. Each is installed without its
dependencies where ours serve; where the package index cannot be reached, its rows are left out and
the table says why.
"""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from spkit.errors import SpkitError

TRL = "trl==1.16.0"
MERGEKIT = "mergekit==0.1.5"


@dataclass(frozen=True)
class Peers:
    """folder: where they are installed; None: nothing is."""

    folder: Path | None = None

    def place(self, requirement: str) -> Path:
        """The folder of an installed requirement "trl==1.16.0"; SpkitError with the reason."""
        if self.folder is None:
            raise SpkitError("not installed (without --peers)")
        target = self.folder / requirement
        if not target.is_dir():
            install(requirement, target)
        return target

    def module(self, requirement: str, name: str):
        """The imported module `name` of a requirement; SpkitError with the reason."""
        target = self.place(requirement)
        sys.path.append(str(target))  # behind ours: only what we do not have comes from there
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise SpkitError(f"cannot be imported: {error}") from error


def install(requirement: str, target: Path) -> None:
    """pip, without dependencies, into `target`; SpkitError with pip's own last line."""
    part = target.with_name(target.name + ".part")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    done = subprocess.run(
        [*command, "--target", str(part), requirement], capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SpkitError(f"pip could not install {requirement}: {lines[-1] if lines else ''}")
    part.rename(target)
