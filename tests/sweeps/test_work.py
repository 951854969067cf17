"""The notebook of a unit in a kernel, what is left of one that fails, and checkpoints."""

import json
import os
from pathlib import Path

import nbformat
import notebook_cells
import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.running import checks
from spkit.running.runs import STAGES
from spkit.sweeps import gather, work
from spkit.sweeps.points import expand
from spkit.sweeps.run import plan_of
from spkit.system.files import atomic
from spkit.workflow import job

ROOT = Path(__file__).parents[2]


def test_a_notebook_that_fails_is_kept_with_its_reason(tmp_path, monkeypatch):
    """One kernel: parameters arrive, the error is told, the environment is as before."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(work, "NOTEBOOKS", tmp_path)
    monkeypatch.delenv(checks.CHECKED, raising=False)
    cells = [
        new_code_cell("outputs, patching = 'x', {}", metadata={"tags": ["parameters"]}),
        new_code_cell(f"import os\nassert len(os.environ[{checks.CHECKED!r}]) == 64"),
        new_code_cell("raise ValueError(f'{patching} in {outputs}')"),
    ]
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "03_controllable_patching.ipynb")
    own = load_params("params/sandbox.yaml", {"patching.beta": 2, "outputs": str(tmp_path / "o")})
    failed = tmp_path / "failed" / "patching" / "seed-0-1234567890.ipynb"
    executed = tmp_path / "executed.ipynb"
    with pytest.raises(SpkitError) as error:
        work._execute(own, "03_controllable_patching", executed, failed)
    text = f"ValueError: {{'beta': 2.0}} in {tmp_path / 'o'} (see {failed})"
    assert str(error.value) == f"03_controllable_patching failed: {text}"
    assert "raise ValueError" in json.dumps(json.loads(failed.read_text()))
    assert checks.CHECKED not in os.environ
    with pytest.raises(SpkitError, match="02_importance_analysis did not run: .*No such file"):
        work._execute(own, "02_importance_analysis", tmp_path / "none.ipynb", failed)


def test_a_kernel_that_is_killed_is_told_so(tmp_path, monkeypatch):
    """Also in the last cell, after which nothing is left to run."""

    def killed(notebook, executed, **options):
        cell = new_code_cell("x = 1", execution_count=1)
        nbformat.write(new_notebook(cells=[cell]), executed)
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", killed)
    monkeypatch.chdir(ROOT)
    failed = tmp_path / "failed.ipynb"
    with pytest.raises(SpkitError) as error:
        own = load_params("params/sandbox.yaml")
        work._execute(own, "01_patch_derivation", tmp_path / "executed.ipynb", failed)
    why = f"its kernel was killed, often for want of memory (see {failed})"
    assert str(error.value) == f"01_patch_derivation: {why}" and failed.is_file()


def test_checkpoints_outlive_a_killed_process_and_no_finished_unit(tmp_path):
    kept, stages = tmp_path / "checkpoints" / "unit", [tmp_path / str(n) for n in range(4)]
    link = "checkpoints/made-from/ascent"

    def save(stage, text):
        with atomic(stage / link) as folder:  # as system/resume.py
            folder.mkdir()
            (folder / "state.json").write_text(text)

    for number in (0, 1):  # two that are killed, the second after it went on
        with pytest.raises(KeyboardInterrupt), work._checkpoints(stages[number], kept, used=True):
            if number:
                assert (stages[1] / link / "state.json").read_text() == "step 0"
            save(stages[number], f"step {number}")
            raise KeyboardInterrupt
    (kept / "torn" / "made-from" / ".tmp-ascent").mkdir(parents=True)
    with work._checkpoints(stages[2], kept, used=True):
        assert (stages[2] / link / "state.json").read_text() == "step 1"
        assert [path.name for path in (stages[2] / link).parent.iterdir()] == ["ascent"]
        save(stages[2], "step 2")
    assert not kept.exists() and not (stages[2] / "checkpoints").is_symlink()
    with work._checkpoints(stages[3], kept, used=False):
        assert not kept.exists() and not stages[3].exists()


def test_two_points_of_the_real_notebooks_share_the_first_three(tmp_path, monkeypatch):
    """In this process, through the job's own function; figures are made and not drawn."""
    monkeypatch.chdir(ROOT)
    began = []

    def here(own, stage, executed, failed):
        began.append(stage)
        notebook_cells.run(stage, own, figures=False)
        executed.write_text("{}")

    monkeypatch.setattr(work, "_execute", here)
    path = tmp_path / "two.yaml"
    path.write_text(f"""
params: params/micro.yaml
set: {{outputs: {tmp_path / "out"}, evaluation.prompts_per_cell: 2, evaluation.max_new_tokens: 2}}
grid: {{patching.retention_rate: [0.3, 1.0]}}
""")
    sweep = expand(path)
    planned = plan_of(sweep)
    for unit in planned.plan.units:
        job.do(unit, planned.plan.places)
    assert began == [*list(STAGES)[:4], "03_controllable_patching"]
    found = gather.collect(sweep, planned.graph, planned.plan.places, [0, 1])
    ours = found[found["model"] == "SafePatching"]
    assert ours["point"].unique().tolist() == [1, 2]
    kept = []
    for folder in sorted(sweep.root.glob("units/patching/*/run/seed-0/03_controllable_patching")):
        assert not (folder / "model").exists()
        record = json.loads((folder / "record.json").read_text())
        rate = record["params"]["patching"]["retention_rate"]
        kept.append((rate, (folder / "patch.safetensors").stat().st_size))
    (_, few), (_, all_) = sorted(kept)
    assert few < all_
