"""The ground holds together: pins, versions, licence, and what pre-commit and make name."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import spkit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(lines) -> dict[str, str]:
    """{canonical name: version} of the lines `name==version`."""
    found = (re.fullmatch(r"([\w.-]+)==(\S+)", line.strip()) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def requirements(extra="all") -> list[Requirement]:
    """The dependencies and those of an extra, with those of the extras that it names."""
    found = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS[extra])]
    inner = [name for r in found if r.name == PROJECT["name"] for name in sorted(r.extras)]
    found = [r for r in found if r.name != PROJECT["name"]]
    known = {r.name for r in found}
    for name in inner:
        more = [r for r in requirements(name) if r.name not in known]
        found, known = found + more, known | {r.name for r in more}
    return found


def test_all_is_every_extra():
    every = {r.name for name in EXTRAS for r in requirements(name)}
    assert {r.name for r in requirements()} == every > {"torch", "snakemake", "ruff", "lm-eval"}


def test_the_core_is_light():
    """What patch files need, and no more: neither torch nor Jupyter nor bitsandbytes."""
    core = "blake3 numpy pydantic pyyaml rich safetensors tqdm typer zstandard".split()
    assert sorted(Requirement(line).name for line in PROJECT["dependencies"]) == core


def test_constraints_pin_every_dependency_to_a_version_that_it_allows():
    for requirement in requirements():
        pin = CONSTRAINTS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), requirement
    assert CONSTRAINTS["torch"] == "2.13.0"


def test_constraints_hold_nothing_of_one_machine():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"file:|https?://| @ |\+cpu|\+cu", text)


def test_constraints_pin_all_that_is_installed_with_the_kit():
    """A whole lock: what the dependencies bring in, too, in the version that is here."""
    left, seen = [(r.name, frozenset(r.extras)) for r in requirements()], set()
    while left:
        name, extras = found = left.pop()
        if found in seen:
            continue
        seen.add(found)
        assert canonicalize_name(name) in CONSTRAINTS, f"{name} has no pin"
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that this environment does without
        pin = CONSTRAINTS[canonicalize_name(name)]
        assert Version(installed.version).public == pin, f"{name} {installed.version} is installed"
        for needed in map(Requirement, installed.requires or ()):
            asked = [{"extra": extra} for extra in ("", *extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, asked)):
                left.append((needed.name, frozenset(needed.extras)))
    assert len(seen) > 150


def test_conda_environment_has_the_same_pins():
    conda = ENVIRONMENT["dependencies"]
    pip = pins(conda[-1]["pip"])
    assert set(pip) == {canonicalize_name(r.name) for r in requirements()}
    assert all(CONSTRAINTS[name] == version for name, version in pip.items())
    assert "--editable ." in conda[-1]["pip"]
    python = next(line for line in conda if str(line).startswith("python="))
    assert python.split("=")[1] == PROJECT["requires-python"].removeprefix(">=")


def test_one_version_of_the_kit():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert spkit.__version__ == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_pre_commit_uses_the_pinned_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    names = {"ruff-pre-commit": "ruff", "nbstripout": "nbstripout"}
    for repo in hooks["repos"]:
        name = names[repo["repo"].rsplit("/", 1)[1]]
        assert repo["rev"].removeprefix("v") == CONSTRAINTS[name]


def test_make_has_its_targets_and_ci_calls_them():
    for target in ("walkthrough", "test", "lint", "lab", "clean"):
        command = ["make", "--dry-run", "--always-make", target]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -e" in script and "make lint" in script and "make test" in script


def test_walkthrough_takes_any_params_file():
    command = ["make", "--no-print-directory", "--dry-run", "walkthrough"]
    command += ["PARAMS=params/mine.yaml", "SEED=3", "RUN=mine"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = made.replace("\\\n", " ").split()
    assert words[words.index("run") - 1].endswith("/spkit") and "params/mine.yaml" in words
    assert " ".join(words).endswith("--seed 3 --run-name mine")
