"""Snakemake on a plan of four small units: order, reruns, failures, kills, and what a user sees."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from spkit.errors import SpkitError
from spkit.workflow import engine, job
from spkit.workflow.plan import Plan, unit_of
from spkit.workflow.units import is_done

TESTS = Path(__file__).parents[1]
A, B, C, D = "one/a", "one/deep/b", "two/c", "two/d"


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A folder of notes from and to the units; jobs find work_of_units."""
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    return tmp_path


def plan(notes, **given):
    return Plan.of(notes / "root", "the bar", "work_of_units:planned", given)


def logged(notes):
    log = notes / "log"
    return log.read_text().split() if log.exists() else []


def rest(root):
    """Temporary files and folders that are no result."""
    return [path for path in (root / "units").rglob(".tmp-*")]


def test_units_run_in_the_order_of_their_needs_and_once(notes, capfd, monkeypatch):
    made = plan(notes)
    outcome = engine.run(made, cores=2)
    assert outcome.complete and outcome.told() == ""
    order = logged(notes)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order.index("a") < order.index("b") and order[-1] == "d"
    place = outcome.places[D]
    assert (place / "text").read_text() == "abcd"  # what each need wrote, in their order
    assert outcome.places == made.places
    about = json.loads((place / "unit.json").read_text())
    assert (about["unit"], about["predicted"]) == (D, 2.0) and about["seconds"] >= 0
    assert sorted(path.name for path in place.iterdir()) == ["text", "unit.json"]
    said = capfd.readouterr()
    assert "the bar: 100%" in said.err and "4 of 4 units" in said.err
    assert "NEWS" not in said.out + said.err

    monkeypatch.setattr(engine, "child", lambda *_, **__: pytest.fail("Snakemake was started"))
    assert engine.run(made, cores=2) == outcome
    assert logged(notes) == order


def test_a_failure_stops_what_needs_it_and_a_rerun_does_only_that(notes):
    for name, why in (("b.fail", "no such luck"), ("b.kill", "its process was killed")):
        (notes / name).touch()
        outcome = engine.run(plan(notes), cores=1)
        assert list(outcome.failed) == [B] and why in outcome.failed[B]
        assert outcome.blocked == [D] and not outcome.complete
        told = outcome.told().splitlines()
        assert told[0].startswith(f"{B} failed: ") and told[1] == "1 more did not run, first two/d"
        assert sorted(logged(notes)) == ["a", "c"]
        assert not rest(notes / "root") or name == "b.kill"  # a kill leaves what is no result
        assert not is_done(outcome.places[B])
        (notes / name).unlink()
    assert engine.run(plan(notes), cores=1).complete
    assert logged(notes)[2:] == ["b", "d"]
    assert not rest(notes / "root") and not list((notes / "root/failed").rglob("*.txt"))

    (notes / "log").unlink()  # a changed unit moves what needs it, and nothing else
    changed = plan(notes, texts={B: "B"})
    (notes / "B.fail").touch()
    outcome = engine.run(changed, cores=1, keep_going=False)
    assert list(outcome.failed) == [B] and logged(notes) == []
    (notes / "B.fail").unlink()
    outcome = engine.run(changed, cores=1)
    assert logged(notes) == ["B", "d"]
    assert (outcome.places[D] / "text").read_text() == "aBcd"


def test_a_profile_that_is_none_or_wrong_is_told(notes):
    with pytest.raises(SpkitError, match="profile: expected a folder with Snakemake's config.yaml"):
        engine.run(plan(notes), profile=notes / "no-such-profile")
    wrong = notes / "wrong"
    wrong.mkdir()
    (wrong / "config.yaml").write_text("executor: none-such\n")
    with pytest.raises(SpkitError, match=r"none-such.* \(see .*snakemake\.txt\)$"):
        engine.run(plan(notes), profile=wrong)
    assert logged(notes) == []


def test_units_get_what_they_ask_for_on_this_machine(notes):
    units = [
        replace(unit, gpus=n % 2, memory_mib=10**9) for n, unit in enumerate(plan(notes).units)
    ]
    found = engine._here(units, 3)
    own = ["--profile", "none"]
    assert found == [*own, "--cores", "3", "--resources", "mem_mb=1000000000", "gpu=1"]


def test_snakemake_gets_the_folder_that_is_meant_or_it_is_told():
    from snakemake.cli import parse_config

    def made(path):
        return Plan(Path(path), "x", "work_of_units:planned", {}, [])

    for path in ("a b/it's", "/co,mma=x", "st*r?", "&a", "[list]", "1e5", "é", "/'q'", "dol$HOME"):
        command = engine._command(made(path).root / "plan.json", keep_going=True)
        given = command[command.index("--config") + 1]
        assert parse_config([given]) == {"plan": f"{path}/plan.json"}
    for path in ("br{ace}", "on: x", "x #1", "!x", "'q'", "new\nline"):
        with pytest.raises(SpkitError, match="^outputs: Snakemake cannot write to .*: choose a"):
            made(path)


def test_why_a_unit_failed_where_there_is_no_note(notes, monkeypatch, capsys):
    """Its process was killed, or the disk was full; clocks of other machines do not matter."""
    made = plan(notes)
    file, places = made.write(), made.places
    (notes / "a.fail").touch()
    monkeypatch.setattr(job, "atomic", no_place)
    assert job.main(str(file), A) == 1
    for name, text in ((A, capsys.readouterr().err), (C, "")):
        log = engine._messages(made.root, places[name])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
        os.utime(log, (0, 0))
    outcome = engine._outcome(made, made.units, notes / "none", 1)
    log = engine._messages(made.root, places[A])
    assert outcome.failed[A] == f"no such luck; see {log}"
    assert outcome.failed[C].startswith("its process was killed (often too little memory")
    assert outcome.blocked == [B, D]


@contextmanager
def no_place(path):
    raise SpkitError("cannot write: the disk is full")
    yield


def script(notes):
    """A process of its own that runs the plan."""
    code = (
        "from pathlib import Path\n"
        "from spkit.workflow import engine\n"
        "from spkit.workflow.plan import Plan\n"
        f"root = Path({str(notes / 'root')!r})\n"
        "engine.run(Plan.of(root, 'x', 'work_of_units:planned', {}), cores=2)\n"
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **quiet)


def within(seconds, condition):
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def is_gone(process):
    """No such process, or one that has ended and is only not asked about."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks into /proc")
def test_an_interrupted_run_takes_its_units_with_it(notes):
    (notes / "b.wait").touch()
    process = script(notes)
    try:
        assert within(90, (notes / "b.waits").exists)
        worker = int((notes / "b.waits").read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        assert within(20, lambda: is_gone(worker))
    finally:
        process.kill()
        process.wait()
    assert not is_done(plan(notes).places[B])


def test_killed_at_any_moment_it_ends_right(notes):
    """All processes at once, at random moments. `make test-kills` does so to an experiment."""
    seconds = random.Random(0)
    for _ in range(3):
        process = script(notes)
        time.sleep(seconds.uniform(0.5, 5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = engine.run(plan(notes), cores=2)
    assert outcome.complete
    assert (outcome.places[D] / "text").read_text() == "abcd"
    assert not rest(notes / "root")


def test_a_folder_without_its_last_file_is_made_again(notes):
    """Snakemake deletes what it thinks a lost job has left."""
    made = plan(notes)
    units, places = {unit.name: unit for unit in made.units}, made.places
    job.do(units[A], places)
    (places[A] / "unit.json").unlink()
    (places[A] / "old").touch()
    with pytest.raises(SpkitError, match=f"^{B} needs {A}, which is not done$"):
        job.do(units[B], places)
    job.do(units[A], places)
    assert sorted(path.name for path in places[A].iterdir()) == ["text", "unit.json"]
    before = (places[A] / "unit.json").stat().st_mtime_ns
    job.do(units[A], places)  # it is done
    assert (places[A] / "unit.json").stat().st_mtime_ns == before and logged(notes) == ["a", "a"]


def test_a_job_says_why_it_cannot_run(notes, capsys):
    file = plan(notes).write()
    assert unit_of(file, A)[0].name == A
    assert job.main(str(file), "one/x") == 1
    assert f"one/x failed: {file} has no unit 'one/x'" in capsys.readouterr().err
    whole = json.loads(file.read_text())
    whole["given"] = {"texts": {A: "changed"}}
    file.write_text(json.dumps(whole))
    assert job.main(str(file), A) == 1
    why = "the code or an input file was changed after the run began; start it again"
    assert job.failure_note(notes / "root", A).read_text() == f"{A}: {why}\n"
    assert f"{A} failed" in capsys.readouterr().err
