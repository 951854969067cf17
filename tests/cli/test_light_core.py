"""Patch files need the core alone: the commands run where everything else cannot be imported."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import plain
import pytest
import torch

ROOT = Path(__file__).parents[2]
ABSENT = """
accelerate bitsandbytes datasets gguf huggingface_hub ipywidgets IPython jupyterlab lm_eval
matplotlib optuna pandas papermill peft psutil pyarrow seaborn snakemake statsmodels tabulate
tokenizers torch transformers
""".split()
BLOCKED = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_blocked(code, *arguments):
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def spkit(*arguments):
    return run_blocked("from spkit.cli import app; app(prog_name='spkit')", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, a revertible patch for it, and one for what that leaves."""
    from spkit.patchfile.apply import apply

    folder = tmp_path_factory.mktemp("core")
    deltas = {"a.weight": torch.zeros(40, 50), "b.weight": torch.zeros(8, 9)}
    deltas["a.weight"][3], deltas["b.weight"][0, 0] = 0.5, 1.0
    weights = plain.weights({name: tuple(delta.shape) for name, delta in deltas.items()})
    base = plain.save(folder / "base", weights)
    plain.patch(folder / "p.safetensors", base, deltas, revertible=True)
    apply(folder / "p.safetensors", base, folder / "made", progress=False)
    plain.patch(folder / "q.safetensors", folder / "made", deltas)
    return folder


def test_every_library_beyond_the_core_is_blocked_here():
    """Otherwise this file would show nothing."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    names = {"lm-eval": "lm_eval"}
    for line in (*extras["notebooks"], *extras["run"], *extras["hub"], *extras["eval"]):
        name = line.partition(">=")[0]
        assert name.startswith("spkit[") or names.get(name, name) in ABSENT, line
    assert run_blocked("import torch").returncode == 1


def test_the_package_brings_neither_torch_nor_pandas():
    ended = run_blocked("import spkit.patchfile, spkit.cli")
    assert ended.returncode == 0, ended.stderr
    plainly = (
        "import spkit.patchfile, spkit.cli, sys\nfor n in ('torch', 'pandas', 'matplotlib'):\n"
    )
    plainly += "    assert n not in sys.modules, n"
    ended = subprocess.run(
        [sys.executable, "-c", plainly], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_the_commands_of_patch_files_run_on_the_core(place, tmp_path):
    patch, base, made = place / "p.safetensors", place / "base", tmp_path / "made"
    for arguments in (
        ("apply", patch, base, made),
        ("verify", patch, "--backbone", base, "--checkpoint", made),
        ("revert", patch, made, tmp_path / "back"),
        ("inspect", patch),
        ("stack", tmp_path / "s", patch, place / "q.safetensors", "--backbone", base),
        ("lora", patch, tmp_path / "adapter", "--rank", "2"),
        ("card", patch, tmp_path / "card.md"),
    ):
        ended = spkit(*arguments)
        assert ended.returncode == 0, ended.stderr
    assert plain.contents(made) == plain.contents(place / "made")
    assert plain.contents(tmp_path / "back") == plain.contents(base)
    assert (tmp_path / "card.md").read_text().startswith("---\nbase_model: ")


def test_what_the_core_lacks_is_one_sentence_with_the_command(place, tmp_path):
    figure = tmp_path / "map.png"
    for arguments, what, extra in (
        (
            ("inspect", place / "p.safetensors", "--figure", figure),
            "A figure of a patch",
            "notebooks",
        ),
        (
            ("verify", place / "p.safetensors", "--backbone", "a/b"),
            "A checkpoint of the hub",
            "hub",
        ),
        (("run", "params/sandbox.yaml"), "spkit run", "run"),
        (("seeds", "params/sandbox.yaml"), "spkit seeds", "run"),
        (("experiment", "params/sandbox.yaml"), "spkit experiment", "run"),
        (("report",), "spkit report", "notebooks"),
        (("memory", "params/sandbox.yaml"), "spkit memory", "notebooks"),
        (("ask", "sandbox", "-p", "hello"), "spkit ask", "notebooks"),
        (("make", "params/sandbox.yaml", tmp_path / "p"), "spkit make", "notebooks"),
    ):
        ended = spkit(*arguments)
        assert ended.returncode == 1 and ended.stdout == "", arguments
        assert ended.stderr.startswith(f"error: {what} needs "), ended.stderr
        assert f"which is not installed here: pip install '.[{extra}]' in" in ended.stderr
        assert ended.stderr.count("\n") == 1
    assert not figure.exists() and not (tmp_path / "p").exists()


def test_tables_of_a_patch_are_rows_without_pandas_and_frames_with_it(place):
    code = """
from spkit.errors import SpkitError
from spkit.patchfile.summary import inspect
found = inspect(sys.argv[1])
assert [row["module"] for row in found.rows] and found.modules() and found.facts()["kept"] == 51
try:
    found.where
except SpkitError as error:
    print(error)
"""
    ended = run_blocked(code, place / "p.safetensors")
    assert ended.stdout.startswith("A table as a pandas frame needs pandas"), ended.stderr
    from spkit.patchfile.summary import inspect

    found = inspect(place / "p.safetensors")
    assert found.where.to_dict("records") == found.rows
    assert found.by_module().to_dict("records") == found.modules()
    assert json.loads(json.dumps(found.facts())) == found.facts()
