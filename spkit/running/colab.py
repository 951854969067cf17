"""Ready to run on a rented or shared machine, such as Google Colab: what is missing, what will fit.

    python spkit/running/colab.py            what is missing here, and what will fit
    python spkit/running/colab.py install    installs what is missing
    python spkit/running/colab.py badges     markdown links that open the notebooks in Colab

It runs from the repository's root before anything is installed: it needs the standard library, and
`packaging` (or pip's own copy of it) to compare versions. The first code cell of every notebook
(`first_cell`) calls `prepare`, which does nothing where the kit is installed.

The torch that is there is never replaced: on such machines it is built for their GPU. This file
clones nothing, mounts no drive, asks for no token and loads no model.
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from spkit.errors import SpkitError
except ImportError:  # loaded by its path, before spkit is installed

    class SpkitError(ValueError):
        """As in spkit/errors.py: one sentence."""


PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
EXTRA = "notebooks"  # of pyproject.toml: what a notebook needs besides the core
PINNED = re.compile(r"torch|torchvision|torchaudio|triton|numpy|nvidia-.*")
COLAB = "https://colab.research.google.com"
GIB = 2**30
# a rough table, not a measurement: weights by size, bytes by use
SIZES = {"1B": 1.2e9, "3B": 3.2e9, "7-8B": 8e9, "13B": 13e9}
NF4_BYTES = 0.55  # a weight of the frozen backbone: 4 bits, its share of scales, embeddings apart
WORKING_BYTES = 0.4  # a weight: embeddings in 16 bits, one layer's gradients and factors
WORKING = 3 * GIB  # CUDA itself, activations and logits of a small batch
SHARD = 5e9  # the largest file of a checkpoint; the host holds one at a time
HOST = 4 * GIB  # Python with its libraries, data, one layer unquantised
DISK_BYTES = 4  # a weight: the downloaded checkpoint and the patched one, 16 bits each
USABLE = 0.9  # of the GPU's memory: the rest is lost to fragments and to others


def first_cell() -> str:
    """The source of the first code cell of every notebook; a test holds the cells to it."""
    return """\
# installs what is missing, on Colab for instance (first clone the repository and change into it)
import sys

sys.path += [".", ".."]
from spkit.running.colab import prepare

prepare()"""


def prepare(pyproject: Path = PYPROJECT) -> None:
    """Install what is missing; print the report in Colab or after an installation, else nothing.

    So a notebook that is executed elsewhere stays the same, byte for byte, and names no machine.
    """
    if install(pyproject) or in_colab():
        print(report())
    from spkit.running.dotted import refuse_dotted_names  # not before all is installed

    refuse_dotted_names()


# ---- what is missing -----------------------------------------------------------------------------


def missing(pyproject: Path = PYPROJECT) -> list[str]:
    """The requirements of the notebooks that no installed version satisfies.

    They are [project].dependencies and the extra `notebooks`, with the extras that it names. An
    installed torch is never among them, whatever its version.
    """
    requirement = _requirement_class()
    found = []
    for text in _requirements(_project(pyproject)):
        wanted = requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        here = _version(wanted.name)
        if here is None or not (
            _is_torch(wanted.name) or wanted.specifier.contains(here, prereleases=True)
        ):
            found.append(text)
    return found


def install(pyproject: Path = PYPROJECT, runner: Callable[..., Any] = subprocess.run) -> list[str]:
    """Install what is missing and spkit itself, and return what was installed.

    torch, and what was built with it, is pinned to what is there. Nothing missing and spkit
    importable: nothing is called. SpkitError where pip fails, where torch is another one
    afterwards, or where this Python still holds the old version of something that was replaced.
    """
    wanted, here = missing(pyproject), find_spec("spkit") is not None
    if not wanted and here:
        return []
    root, before = Path(pyproject).resolve().parent, _installed()
    print("installing", ", ".join([*wanted, "spkit"]))
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(pins(before, wanted)) + "\n", encoding="utf-8")
            _pip(runner, "--constraint", str(constraints), *wanted)
    _pip(runner, "--no-deps", "--editable", str(root))
    importlib.invalidate_caches()
    if find_spec("spkit") is None:  # a running Python does not see a new editable package
        sys.path.insert(0, str(root))
    after = _installed()
    if "torch" in before and after.get("torch") != before["torch"]:
        raise SpkitError(
            f"torch was {before['torch']} and is {after.get('torch')} after the installation, it "
            f"must stay as it was: start a new runtime, or install torch {before['torch']} again"
        )
    _must_not_be_loaded({name for name, old in before.items() if after.get(name, old) != old})
    return [*wanted, "spkit"]


def pins(installed: dict[str, str], wanted: list[str]) -> list[str]:
    """The lines of the constraints file: torch, what was built with it, and numpy, as they are.

    What is itself among the wanted (a numpy that is too old) is left free.
    """
    free = {_normal(_requirement_class()(text).name) for text in wanted}
    return [
        f"{name}=={version}"
        for name, version in sorted(installed.items())
        if PINNED.fullmatch(name) and name not in free
    ]


def _pip(runner: Callable[..., Any], *arguments: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    command = [sys.executable, "-m", "pip", "install", *options, *arguments]
    ended = runner(command, capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in (ended.stderr or "").splitlines() if "error" in line.lower()]
        raise SpkitError(
            f"pip could not install {arguments[-1] if '--editable' in arguments else 'the rest'}: "
            f"{lines[0].strip() if lines else 'no message'}; expected: a network connection, "
            f"Python 3.11 or newer, and versions that go together with the torch that is here"
        )


def _must_not_be_loaded(changed: set[str]) -> None:
    """A replaced library whose old modules are loaded would be a mixture of two versions."""
    if not changed:
        return
    owners = metadata.packages_distributions()
    loaded = {name.partition(".")[0] for name in sys.modules}
    mixed = sorted(
        name for name in changed if any(name in map(_normal, owners.get(m, ())) for m in loaded)
    )
    if mixed:
        raise SpkitError(
            f"{', '.join(mixed)} was replaced while the old version is loaded: restart the runtime "
            f"(in Colab: Runtime, Restart session) and run this cell again, then it goes on"
        )


def _installed() -> dict[str, str]:
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and _normal(name) not in found:  # the first on the path is the one that is used
            found[_normal(name)] = distribution.version
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_torch(name: str) -> bool:
    return _normal(name) == "torch"


def _requirement_class() -> type:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            raise SpkitError(
                "neither packaging nor pip can be imported, one of them is needed to compare "
                "versions: python -m ensurepip"
            ) from None
    return Requirement


def _requirements(project: dict[str, Any], extra: str = EXTRA) -> list[str]:
    """The dependencies and those of an extra, whose references to extras are followed."""
    own = rf"{re.escape(project.get('name', ''))}\[([\w,-]+)\]"
    found = list(project.get("dependencies", []))
    for text in project.get("optional-dependencies", {}).get(extra, []):
        inner = re.fullmatch(own, text)
        more = [text] if inner is None else []
        for name in inner[1].split(",") if inner else ():
            more += _requirements(project, name)
        found += [line for line in more if line not in found]
    return found


def _project(pyproject: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        raise SpkitError(
            f"this is Python {platform.python_version()}, expected: 3.11 or newer"
        ) from None
    try:
        return tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError) as error:
        raise SpkitError(
            f"{pyproject}: expected a pyproject.toml with a section [project] ({error!r})"
        ) from None


# ---- what will fit -------------------------------------------------------------------------------


def in_colab() -> bool:
    """Whether this Python runs in Google Colab."""
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def runtime() -> dict[str, Any]:
    """What this machine offers; None for what is not there. Sizes in GiB."""
    gpu = memory = capability = None
    if find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
            memory = round(torch.cuda.get_device_properties(0).total_memory / GIB, 1)
            capability = torch.cuda.get_device_capability()
    host = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        host = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "gpu": gpu,
        "gpu_memory_gib": memory,
        "capability": capability,
        "native_bfloat16": capability and capability >= (8, 0),
        "host_memory_gib": host,
        "free_disk_gib": round(shutil.disk_usage(".").free / GIB, 1),
        "colab": in_colab(),
    }


def fits(here: dict[str, Any]) -> dict[str, str]:
    """{model size: what is too small for it, or ""} by the table above; {} without a GPU."""
    if here["gpu_memory_gib"] is None:
        return {}
    found = {}
    for size, weights in SIZES.items():
        needs = {
            "GPU memory": (NF4_BYTES + WORKING_BYTES) * weights + WORKING,
            "host memory": min(2 * weights, SHARD) + HOST,
            "disk": DISK_BYTES * weights,
        }
        offers = {
            "GPU memory": USABLE * here["gpu_memory_gib"],
            "host memory": here["host_memory_gib"],
            "disk": here["free_disk_gib"],
        }
        short = [k for k in needs if offers[k] is not None and needs[k] > offers[k] * GIB]
        found[size] = " and ".join(short)
    return found


def report(here: dict[str, Any] | None = None) -> str:
    """Two lines: what is here, and what will fit."""
    here = here or runtime()
    parts = [f"Python {here['python']}", f"torch {here['torch'] or 'not installed'}"]
    if here["gpu"]:
        bfloat16 = "native bfloat16" if here["native_bfloat16"] else "no native bfloat16"
        capability = ".".join(map(str, here["capability"]))
        parts.append(f"{here['gpu']} with {here['gpu_memory_gib']} GiB ({capability}, {bfloat16})")
    else:
        parts.append("no GPU")
    if here["host_memory_gib"]:
        parts.append(f"{here['host_memory_gib']} GiB of host memory")
    parts.append(f"{here['free_disk_gib']} GiB of free disk")
    parts.append("Colab" if here["colab"] else "not Colab")
    return ", ".join(parts) + "\n" + _sentence(fits(here))


def _sentence(fitting: dict[str, str]) -> str:
    if not fitting:
        return "What will fit: without a GPU the sandbox only."
    good = [size for size, short in fitting.items() if not short]
    bad = [f"{size} (too little {short})" for size, short in fitting.items() if short]
    likely = f"models of {', '.join(good)} in NF4" if good else "the sandbox only"
    unlikely = f", likely not {', '.join(bad)}" if bad else ""
    return (
        f"What will fit: likely {likely}{unlikely}. This is an estimate from the number of "
        f"weights; each notebook predicts exactly for its backbone."
    )


# ---- badges --------------------------------------------------------------------------------------


def badge(notebook: str, pyproject: Path = PYPROJECT) -> str | None:
    """A markdown link that opens notebooks/<notebook>.ipynb of branch main in Colab.

    None where pyproject.toml has no [project.urls].Repository; SpkitError if it is not on GitHub.
    """
    url = _project(pyproject).get("urls", {}).get("Repository")
    if url is None:
        return None
    place = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", url)
    if place is None:
        raise SpkitError(
            f"{pyproject}: project.urls.Repository is {url!r}, expected: "
            f"https://github.com/<owner>/<name>, for Colab opens notebooks from GitHub only"
        )
    path = f"{place[1]}/{place[2]}/blob/main/notebooks/{notebook.removesuffix('.ipynb')}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{path})"


def main(arguments: list[str]) -> str:
    """The text that the command prints."""
    if arguments == ["badges"]:
        names = sorted(path.stem for path in (PYPROJECT.parent / "notebooks").glob("*.ipynb"))
        links = [badge(name) for name in names]
        if None in links:
            return (
                "no URL is set: write the repository's into pyproject.toml, "
                '[project.urls] Repository = "https://github.com/<owner>/<name>"'
            )
        return "\n".join(links)
    if arguments == ["install"]:
        return f"{report()}\ninstalled: {', '.join(install()) or 'nothing, all is there'}"
    if arguments:
        raise SpkitError(f"unknown arguments {' '.join(arguments)}, allowed: install, badges")
    return f"{report()}\nmissing: {', '.join(missing()) or 'nothing'}"


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except SpkitError as error:
        sys.exit(f"spkit: {error}")
