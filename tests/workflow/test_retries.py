"""What a cluster's failures do to units: a second attempt, and a job that comes after its work."""

import os
import subprocess
from pathlib import Path

import pytest

from spkit.workflow import engine, job
from spkit.workflow.plan import Plan

TESTS = Path(__file__).parents[1]
A = "one/a"


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A folder of notes from and to the units; jobs find work_of_units."""
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    return tmp_path


def logged(notes):
    log = notes / "log"
    return log.read_text().split() if log.exists() else []


def test_a_unit_that_has_said_why_it_failed_is_not_tried_again(notes, capsys):
    plan = Plan.of(notes / "root", "x", "work_of_units:planned", {})
    file = str(plan.write())
    (notes / "a.fail").touch()
    assert job.main(file, A) == 1
    (notes / "a.fail").unlink()
    assert job.main(file, A, "2") == 1 and logged(notes) == []
    assert "no such luck" in capsys.readouterr().err
    assert job.main(file, A) == 0 and logged(notes) == ["a"]  # a run of its own tries it


def test_a_second_attempt_does_what_was_killed(notes):
    plan = Plan.of(notes / "root", "x", "work_of_units:planned", {})
    assert job.main(str(plan.write()), A, "2") == 0 and logged(notes) == ["a"]


def test_snakemake_leaves_what_is_done_by_the_time_its_job_begins(notes):
    plan = Plan.of(notes / "root", "x", "work_of_units:planned", {})
    file = plan.write()
    for unit in plan.units:
        assert job.main(str(file), unit.name) == 0
    before = {name: (place / "unit.json").read_bytes() for name, place in plan.places.items()}
    command = [*engine._command(file, True), "--cores", "1", "--forceall"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert {name: (p / "unit.json").read_bytes() for name, p in plan.places.items()} == before
    assert sorted(logged(notes)) == ["a", "b", "c", "d"]  # and nothing is done twice
