"""What `spkit run` is asked, plans and tells; that it runs is shown in test_notebooks.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.running import walkthrough
from spkit.running.effects import without_effect
from spkit.running.notebook import differing
from spkit.running.runs import STAGES, Run, stage_folder, stamp
from spkit.running.walkthrough import Planned, duration, overrides

ROOT = Path(__file__).parents[2]
BACKBONE, DERIVATION, IMPORTANCE, PATCHING, CONTINUAL, COMPARISON = STAGES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own empty folder, as if that were the repository's root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('name = "spkit"\n')
    return tmp_path


def complete(stages=STAGES, config=None, seconds=None):
    """Run the stages as notebooks would, without any computing."""
    for stage in stages:
        run = Run(config or Config(), stage)
        run.finish()
        path = run.folder / "record.json"
        if seconds is not None:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds[stage]}))


# ---- what is asked -------------------------------------------------------------------------------


def test_values_of_options_are_read_as_in_a_params_file():
    options = ["patching.beta=1.5", "patching.balance=null", "data.categories=[hiding, gluing]"]
    options += ["derivation.ascent.learning_rate=1e-4", "mirror=/a=b"]
    assert overrides(options, seed=3, run_name=None) == {
        "patching.beta": 1.5,
        "patching.balance": None,
        "data.categories": ["hiding", "gluing"],
        "derivation.ascent.learning_rate": 1e-4,
        "mirror": "/a=b",
        "seed": 3,
    }


@pytest.mark.parametrize("option", ["patching.beta", "=1", "a=[1"])
def test_an_option_that_is_none_is_one_sentence(option):
    with pytest.raises(SpkitError, match="^-o "):
        overrides([option])


def test_an_alpha_that_is_not_used_is_told():
    (said,) = without_effect(Config(), {"patching.alpha": 2})
    assert (
        said.startswith("patching.alpha has no effect here") and "patching.balance is 0.959" in said
    )
    fixed = Config.from_sources({"patching": {"balance": None}})
    assert without_effect(fixed, {"patching.alpha": 2}) == []
    other = Config.from_sources({"backbone": {"source": "some/model", "revision": "a"}})
    (said,) = without_effect(other, {"sandbox.layers": 2})
    assert said == "sandbox.layers has no effect here: the backbone is some/model"


def test_a_notebook_is_given_what_differs_and_no_more():
    assert differing(Config()) == {}
    given = {"seed": 2, "patching": {"alpha": 2.0}, "derivation": {"ascent": {"max_steps": 30}}}
    assert differing(Config.from_sources(given)) == given
    for path in sorted((ROOT / "params").glob("*.yaml")):
        config = load_params(path)
        plain = yaml.safe_load(yaml.safe_dump(differing(config)))
        assert Config.from_sources(plain) == config, path


# ---- what is planned -----------------------------------------------------------------------------


def test_what_is_missing_is_planned_and_said():
    planned = Planned(Config())
    assert planned.todo == list(STAGES)
    where = "p.yaml: outputs/sandbox/seed-0: "
    assert planned.opening("p.yaml", 1) == f"{where}6 of 6 notebooks to run, about 3 min left"
    complete()
    assert Planned(Config()).todo == []
    assert "nothing to be done, all 6 notebooks are there" in Planned(Config()).opening("p.yaml", 1)
    other = Config.from_sources({"patching": {"beta": 9.0}})
    assert Planned(other).todo == [PATCHING, CONTINUAL]


def test_times_are_those_of_the_last_run_of_another_seed_or_of_the_sandbox():
    assert Planned(Config()).seconds == walkthrough.SANDBOX_SECONDS
    complete(config=Config(seed=4), seconds=dict(zip(STAGES, range(100, 700, 100), strict=True)))
    assert list(Planned(Config()).seconds.values()) == [100, 200, 300, 400, 500, 600]
    complete([BACKBONE], seconds={BACKBONE: 7})
    (stage_folder(Config(), BACKBONE) / stamp(Config(), BACKBONE).name).unlink()
    assert Planned(Config()).seconds[BACKBONE] == 7
    unknown = Config.from_sources({"run_name": "new", "sandbox": {"layers": 2}})
    assert set(Planned(unknown).seconds.values()) == {None}
    assert Planned(unknown).left(2) == ""


def test_the_time_left_by_hand():
    """00 10 s, 01 35, 02 14, 03 25, 04 90, 05 18: 192 in all; on two cores 00 and 04 decide."""
    planned = Planned(Config())
    assert planned.left(1) == "about 3 min left"  # 192
    assert planned.left(2) == "about 2 min left"  # 100
    planned.done = [BACKBONE, CONTINUAL, COMPARISON]
    assert planned.left(2) == "about 75 s left"  # 35 + 14 + 25 come one after another
    planned.began[DERIVATION] = time.monotonic() - 30
    assert planned.left(2) == "about 45 s left"
    planned.done = list(STAGES)
    assert planned.left(2) == ""


def test_the_time_left_learns_from_the_notebooks_that_are_done():
    """00 took 20 s instead of 10, so the other 182 s are expected to take 364."""
    planned = Planned(Config())
    planned.done, planned.took = [BACKBONE], {BACKBONE: 20.0}
    assert planned.pace() == 2.0
    assert planned.left(1) == "about 6 min left"


def test_durations():
    assert [duration(x) for x in (0, 7, 88, 100, 3600, 9000)] == [
        *("5 s", "5 s", "90 s", "2 min", "60 min", "2.5 h")
    ]


# ---- whose results these are ---------------------------------------------------------------------


@pytest.fixture
def quiet_run(elsewhere, monkeypatch):
    """walkthrough.run without notebooks: what it would run counts as done."""
    (elsewhere / "Snakefile").touch()
    asked = []

    def pretend(planned, cores, together):
        asked.append(planned.todo)
        complete(planned.todo, planned.config)

    monkeypatch.setattr(walkthrough, "_run_snakemake", pretend)

    def run(name, given=None, **options):
        walkthrough.run(name, given or {}, **options)
        return asked[-1]

    return run


def test_another_file_with_the_same_run_name_does_not_replace_results(quiet_run):
    Path("a.yaml").write_text("")
    Path("b.yaml").write_text("patching: {beta: 9.0}")
    assert quiet_run("a.yaml") == list(STAGES)
    with pytest.raises(SpkitError) as error:
        quiet_run("b.yaml")
    assert str(error.value) == (
        "outputs/sandbox/seed-0 holds the results of a.yaml, and b.yaml would replace them: give "
        "it a run_name of its own, or replace them with --overwrite"
    )
    assert Planned(load_params("a.yaml")).todo == []
    assert quiet_run("b.yaml", {"run_name": "other"}) == list(STAGES)
    assert quiet_run("b.yaml", {"seed": 1}) == list(STAGES)
    assert quiet_run("b.yaml", overwrite=True) == [PATCHING, CONTINUAL]
    with pytest.raises(SpkitError, match="holds the results of b.yaml, and a.yaml would replace"):
        quiet_run("a.yaml")


def test_the_same_file_is_free_to_change_and_so_is_one_that_replaces_nothing(quiet_run):
    Path("a.yaml").write_text("")
    Path("same.yaml").write_text("# the same values\n")
    quiet_run("a.yaml")
    Path("a.yaml").write_text("patching: {beta: 9.0}")
    assert quiet_run("a.yaml") == [PATCHING, CONTINUAL]
    assert quiet_run("a.yaml", {"patching.beta": 8.0}) == [PATCHING, CONTINUAL]
    Path("same.yaml").write_text("patching: {beta: 8.0}")
    quiet_run("same.yaml")  # all of it is there
    # the run's own copy of its parameters is no other file
    copy = Path("outputs/sandbox/seed-0/params.yaml")
    copy.write_text("patching: {beta: 7.0}")
    assert quiet_run(copy) == [PATCHING, CONTINUAL]


def test_a_run_begun_elsewhere_in_the_clone_finds_its_root(quiet_run, elsewhere, monkeypatch):
    (elsewhere / "params").mkdir()
    (elsewhere / "params" / "a.yaml").write_text("")
    monkeypatch.chdir("params")
    quiet_run("a.yaml")
    assert Path.cwd() == elsewhere
    owner = Path("outputs/sandbox/seed-0/log/params_file.txt").read_text()
    assert owner == "params/a.yaml\n"


def test_outside_of_a_clone_it_says_so(elsewhere):
    Path("a.yaml").write_text("")
    with pytest.raises(SpkitError, match="no Snakefile here or above: change into a clone"):
        walkthrough.run("a.yaml", {})


def test_the_table_is_made_anew_after_a_stage_that_it_is_made_from(elsewhere):
    complete()
    assert not walkthrough._table_is_new(Config())
    Path("outputs/sandbox/seed-0/results.csv").touch()
    assert walkthrough._table_is_new(Config())
    complete([COMPARISON])  # no part of it, and often done last
    assert walkthrough._table_is_new(Config())
    complete([CONTINUAL])
    assert not walkthrough._table_is_new(Config())


# ---- what is told --------------------------------------------------------------------------------


class Child:
    """Snakemake as it looks from outside: each look is one more step of a script."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def poll(self):
        if not self.steps:
            return 0
        self.steps.pop(0)()
        return None if self.steps else 0


def test_a_line_where_a_notebook_begins_and_one_where_it_is_done(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(walkthrough, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setenv("COLUMNS", "80")
    planned, log = Planned(Config()), Path("outputs/sandbox/seed-0/log")
    log.mkdir(parents=True)
    for stage in (DERIVATION, PATCHING):  # of an earlier run
        (log / f"{stage}.txt").write_text("old")
    begin = [lambda s=s: (log / f"{s}.txt").write_text(f"new {s}") for s in STAGES]
    end = [lambda s=s: complete([s]) for s in STAGES]
    steps = (begin[0], end[0], begin[1], begin[4], end[4], end[1])
    walkthrough._watch(Child(*steps), planned, 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines == [
        "[1/6] 00 backbone ...",
        "[1/6] 00 backbone: 0 s, about 2 min left",
        "[2/6] 01 patch derivation ...",
        "[3/6] 04 continual psa ...",
        "[3/6] 04 continual psa: 0 s, about 75 s left",
        "[2/6] 01 patch derivation: 0 s, about 40 s left",
    ]


def test_why_it_failed_is_the_notebooks_sentence(elsewhere):
    planned, log = Planned(Config()), elsewhere / "snakemake.txt"
    log.write_text("Error in rule results:\n\nspkit: overrides: unknown key a\nExiting\n")
    assert walkthrough._why(planned, log) == f"overrides: unknown key a (see {log})"
    planned.began = {BACKBONE: 0.0, DERIVATION: 1.0}
    planned.done = [BACKBONE]
    (elsewhere / f"{DERIVATION}.txt").write_text("No such kernel named python3\n")
    said = walkthrough._why(planned, log)
    assert said.startswith(f"{DERIVATION} did not run: No such kernel named python3")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_one_line(elsewhere, sent):
    """Also where the signal is sent to this process alone, and not to the whole terminal."""
    pytest.importorskip("psutil")
    (elsewhere / "Snakefile").touch()
    (elsewhere / "a.yaml").write_text("")
    script = """
import os, sys
from pathlib import Path
from spkit.cli import app
from spkit.running import walkthrough
grandchild = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
start = walkthrough.child
def fake(command, file):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    return start([sys.executable, "-c", child], file)
walkthrough.child = fake
app(["run", "a.yaml"])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as running:
        patience = time.monotonic() + 60
        while not Path("pid").exists() and time.monotonic() < patience:
            time.sleep(0.05)
        time.sleep(0.1)
        running.send_signal(sent)
        _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    assert told == "interrupted; the same command resumes\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
