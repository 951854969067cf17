"""A sweep's units done one after the other: folders, links, failures, and what a rerun does.

Notebooks are stood in for by a function that opens its stage as a notebook does; tests/sweeps/
test_work.py runs one as such.
"""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from spkit.cli import app
from spkit.cli import sweep as _registers  # noqa: F401
from spkit.errors import SpkitError
from spkit.evaluation.rates import COLUMNS
from spkit.running import checks
from spkit.running.runs import STAGES, Run
from spkit.sweeps import work
from spkit.sweeps.points import expand
from spkit.sweeps.run import failures, plan_of, remarks, require_runnable
from spkit.sweeps.units import build
from spkit.workflow import engine, job

ROOT = Path(__file__).parents[2]
TEXT = """
name: made
params: params/micro.yaml
seeds: [0, 1]
set: {outputs: OUT}
grid:
  patching.retention_rate: [0.3, 1.0]
"""
BAD = 0.3  # the retention rate of the points that fail while `failing` is there


def notebook(own, stage, executed, failed):
    """Reads what the stage reads, writes a file and results."""
    run = Run(own, stage)
    for need in STAGES[stage].needs:
        assert run.input(need, "made.txt").read_text() == need
    bad = stage == "03_controllable_patching" and own.patching.retention_rate == BAD
    if bad and (failed.parents[2] / "failing").exists():
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.write_text("{}")
        raise SpkitError(f"{stage} failed: no such luck (see {failed})")
    with open(failed.parents[2] / "begun", "a") as file:
        file.write(f"{stage[:2]} {own.seed}\n")
    with run.write("made.txt") as path:
        path.write_text(stage)
    model = {"00_backbone": "base", "03_controllable_patching": "SafePatching"}.get(stage)
    if model:
        row = ["run", model, own.seed, "test", "harmful", "seen", "all", "harmful", 10, 4, 0.4]
        run.save_frame("results.csv", pd.DataFrame([[*row, 0.1, 0.8]], columns=COLUMNS))
    executed.write_text("{}")
    run.finish()


def one_by_one(plan, **options):
    """As engine.run, in this process."""
    failed, blocked = {}, []
    plan.root.mkdir(parents=True, exist_ok=True)
    for unit in plan.todo():
        if {*failed, *blocked} & {*unit.needs}:
            blocked.append(unit.name)
            continue
        try:
            job.do(unit, plan.places)
        except SpkitError as error:
            failed[unit.name] = str(error)
    return engine.Outcome(plan.places, failed, blocked)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The sweep's file; its root is tmp_path/out/sweeps/made."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(work, "_execute", notebook)
    monkeypatch.setattr(engine, "run", one_by_one)
    monkeypatch.setattr(checks, "findings", lambda config, fetch: [])
    path = tmp_path / "made.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "out")))
    return path


def spkit(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def test_a_failed_point_is_named_and_a_rerun_does_only_that(file, tmp_path):
    root = tmp_path / "out" / "sweeps" / "made"
    root.mkdir(parents=True)
    (root / "failing").touch()
    done = spkit(file)
    said = done.stdout
    assert done.exit_code == 1
    assert "4 points in" in said and "16 notebooks, 10 of them different: 10 to run" in said
    assert f"03_controllable_patching failed: no such luck (see {root}/failed/patching/" in said
    assert "point 1: patching.retention_rate=0.3, seed 0, params/micro.yaml" in said
    assert "2 of 4 points failed; the same command does what is missing" in said
    begun = (root / "begun").read_text().split("\n")[:-1]
    assert sorted(begun) == [f"0{stage} {seed}" for stage in range(4) for seed in (0, 1)]
    table = pd.read_csv(root / "table.csv")
    assert table["patching.retention_rate"].unique() == [1.0]  # what is complete is gathered

    (root / "failing").unlink()
    done = spkit(file)
    assert done.exit_code == 0 and "2 to run" in done.stdout
    assert (root / "begun").read_text().split("\n")[8:-1] == ["03 0", "03 1"]
    assert not list((root / "failed").rglob("*.ipynb"))
    whole = {name: (root / name).read_bytes() for name in ("results.csv", "table.csv")}
    assert len(pd.read_csv(root / "results.csv")) == 8

    done = spkit(file)  # nothing to be done: the same tables
    assert done.exit_code == 0 and "all are done" in done.stdout
    assert {name: (root / name).read_bytes() for name in whole} == whole


def test_a_failure_upstream_stops_its_points_and_no_others(file, tmp_path, monkeypatch):
    def derivation_of_seed_1(own, stage, executed, failed):
        if stage == "01_patch_derivation" and own.seed == 1:
            raise SpkitError("01_patch_derivation failed: out of luck")
        notebook(own, stage, executed, failed)

    monkeypatch.setattr(work, "_execute", derivation_of_seed_1)
    done = spkit(file)
    assert done.exit_code == 1 and done.stdout.count("failed: ") == 2  # once in its own words
    assert "point 2: patching.retention_rate=0.3, seed 1" in done.stdout
    assert "2 of 4 points failed" in done.stdout
    found = pd.read_csv(tmp_path / "out" / "sweeps" / "made" / "results.csv")
    assert found["seed"].unique().tolist() == [0]


def test_results_that_cannot_be_read_hide_no_failure(file, tmp_path, monkeypatch):
    root = tmp_path / "out" / "sweeps" / "made"
    assert spkit(file).exit_code == 0
    results = next(root.glob("units/backbone/*/run/seed-0/00_backbone/results.csv"))
    for text in ("", "n,k\n1,2\n"):
        results.write_text(text)
        done = spkit(file)
        assert done.exit_code == 1 and str(done.exception) == "1"
        assert "results.csv: cannot be read (" in done.stderr and "delete /" in done.stderr
    (root / "failing").touch()
    shutil.rmtree(root / "units" / "patching")
    done = spkit(file, "--stop")
    assert "2 of 4 points failed; the same" in done.stdout and "cannot be read" in done.stderr


def test_points_that_did_not_run_are_counted(file):
    planned = plan_of(expand(file))
    name = planned.graph.chains[0]["03_controllable_patching"]
    other = planned.graph.chains[3]["03_controllable_patching"]
    said = failures(planned, engine.Outcome({}, {name: "no luck"}, [other]))
    assert said.endswith(
        "failed: no luck\n  point 1: patching.retention_rate=0.3, seed 0, params/micro.yaml\n\n"
        "1 of 4 points failed, 1 did not run; the same command does what is missing"
    )


def test_a_unit_is_a_run_folder_with_relative_links(file, tmp_path):
    assert spkit(file).exit_code == 0
    sweep = expand(file)
    links = [path for path in sweep.root.rglob("*") if path.is_symlink()]
    assert len(links) == 2 * 1 + 2 * 2 + 4 * 3
    for link in links:
        assert not os.path.isabs(os.readlink(link))
        assert (link / "made.txt").read_text() == link.name
    moved = tmp_path / "moved"
    sweep.root.rename(moved)  # to other storage, as a whole
    links = [path for path in moved.rglob("*") if path.is_symlink()]
    assert links and all((link / "made.txt").is_file() for link in links)
    assert not list(moved.rglob(".tmp-*"))


def test_a_key_that_changes_nothing_is_told(file):
    text = file.read_text() + "  patching.alpha: [1, 2]\n"  # found, as balance is set
    file.write_text(text)
    said = "patching.alpha has no effect here: alpha is found, because patching.balance is 7.0"
    assert any(line.startswith(said) and "8 points" in line for line in remarks(expand(file)))


def test_what_is_in_the_way_is_told_before_anything_runs_with_its_point(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "bad.yaml"
    text = TEXT.replace("OUT", str(tmp_path / "out"))
    path.write_text(text + "points: [{data.harmful: nowhere.csv}, {data.pairs: 8}]\n")
    with pytest.raises(SpkitError, match=r"nowhere\.csv"):
        build(expand(path))  # its contents are part of what a notebook is made from
    path.write_text(text + "points: [{judges.harmful: [classifier]}, {}]\n")
    with pytest.raises(SpkitError) as error:
        require_runnable(expand(path))
    assert str(error.value).startswith("point 1 (patching.retention_rate=0.3, judges.harmful=")
    assert "judges.classifier.model" in str(error.value)
    path.write_text(text + "points: [{backbone.device: 'cuda:9'}]\n")
    with pytest.raises(SpkitError, match="cuda:9"):
        require_runnable(expand(path))
    require_runnable(expand(path), cluster=True)  # another machine may have it
    assert not (tmp_path / "out").exists()


def test_a_plan_needs_no_input_file_and_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "bad.yaml"
    text = TEXT.replace("OUT", str(tmp_path / "out"))
    path.write_text(text + "points: [{data.harmful: nowhere.csv}]\n")
    done = spkit(path, "--plan")
    assert (
        done.exit_code == 0 and "10 notebooks to run (16 if points shared nothing)" in done.stdout
    )
    assert not (tmp_path / "out").exists()
