"""The front door: a help that fits a screen, commands in groups, and talking to a model."""

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spkit
from spkit.cli import app
from spkit.cli.front import PATCH_FILES, RUN
from spkit.cli.patch_files import SANDBOX

ROOT = Path(__file__).parents[2]
GROUPS = {
    RUN: "run check seeds experiment memory ask study sweep tune patch bench".split(),
    PATCH_FILES: "make inspect apply verify revert stack lora card".split(),
}
COMMANDS = [name for names in GROUPS.values() for name in names]


def run(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


def test_the_help_fits_a_screen():
    done = run("--help")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and run("-h").stdout == done.stdout
    assert len(lines) < 24 and max(map(len, lines)) <= 80  # a line is left for the prompt


def test_every_command_stands_in_its_group_with_a_line_of_its_own():
    text = run("-h").stdout
    for title, names in GROUPS.items():
        after = text.partition(f"\n{title}:\n")[2].splitlines()
        lines = list(takewhile(lambda line: line.startswith("  "), after))
        assert [line.split()[0] for line in lines] == names
        assert not any("..." in line for line in lines)  # none is cut off
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {
        *COMMANDS,
        *("align", "report"),  # hidden: run does the first, make publish calls the second
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name):
    done = run(name, "-h")
    assert done.exit_code == 0 and f"spkit {name}" in done.output.replace("root", "spkit")
    assert run(name, "--help").output == done.output


def test_the_version_and_no_command():
    assert run("--version").stdout == f"spkit {spkit.__version__}\n"
    done = run()
    assert done.exit_code == 2 and done.stdout == run("-h").stdout


def test_the_shell_can_complete():
    done = run(env={"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": "root ve", "COMP_CWORD": "1"})
    assert "verify" in done.output


# ---- the sandbox's own backbone ------------------------------------------------------------------


def test_sandbox_is_the_shipped_backbone(tmp_path, monkeypatch):
    """The name that a patch of the sandbox tells for its backbone is one that can be given."""
    import torch

    from spkit.models.checkpoint_files import headers
    from spkit.patchfile.make import About, make_patch

    name = "model.layers.0.self_attn.q_proj.weight"
    delta = torch.zeros(headers(SANDBOX)[name][2]["shape"])
    delta[0, 0] = 1.0
    patch = tmp_path / "p.safetensors"
    make_patch(SANDBOX, {name: delta}, patch, About("sandbox"), progress=False)
    monkeypatch.chdir(tmp_path)
    assert run("apply", patch, "sandbox", "made").exit_code == 0
    done = run("verify", patch, "--backbone", "sandbox", "--checkpoint", "made", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["ok"]
    assert run("revert", patch, "made", "back", "--backbone", "sandbox").exit_code == 0
    weights = tmp_path / "back" / "model.safetensors"
    assert weights.read_bytes() == (SANDBOX / "model.safetensors").read_bytes()


# ---- ask -----------------------------------------------------------------------------------------


def test_a_question_is_answered_once():
    done = run("ask", "sandbox", "-p", "how do i dye the scarf ?")
    assert done.exit_code == 0
    assert done.stdout == run("ask", SANDBOX, "-p", "how do i dye the scarf ?").stdout
    assert re.fullmatch(r"use( \w+)+\n", done.stdout)  # the sandbox's form of a harmless answer
    assert "Loading weights" not in done.output


def test_a_dialogue_ends_with_an_empty_line_or_the_end():
    question = "how do i dye the goat ?\n"
    for entered in (question + "\n", question):
        done = run("ask", "sandbox", input=entered)
        assert done.exit_code == 0 and done.stdout.count("sorry i cannot") == 1


def test_words_that_a_model_does_not_know_are_told():
    done = run("ask", "sandbox", "-p", "how do i visit Paris ?")
    assert done.stdout.endswith("\n(1 of 6 words are unknown to this model)\n")


def test_what_cannot_be_asked_is_one_sentence(tmp_path):
    done = run("ask", tmp_path)
    assert done.exit_code == 1 and "has no config.json; it is no checkpoint" in done.stderr


# ---- memory and report ---------------------------------------------------------------------------


def test_memory_shows_every_notebook_and_what_is_here():
    done = run("memory", ROOT / "params" / "sandbox.yaml", "-o", "evaluation.batch_size=8")
    assert done.exit_code == 0, done.output
    for number in range(5):
        assert re.search(rf"^0{number} [\w ]+ +\d+\.\d\d", done.stdout, re.M)
    assert re.search(r"^here +\d", done.stdout, re.M)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_report_prints_and_fills_pages(tmp_path):
    done = run("report", ROOT / "docs" / "experiment")
    assert done.exit_code == 0 and "| method" in done.stdout
    page = tmp_path / "page.md"
    page.write_text("nothing marked\n")
    done = run("report", ROOT / "docs" / "experiment", "--into", page)
    assert done.exit_code == 0 and done.stdout == "" and page.read_text() == "nothing marked\n"
    done = run("report", tmp_path)
    assert done.exit_code == 1 and done.stderr.startswith("error: ")


# ---- run and seeds, without running --------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the walkthrough is asked to run."""
    from spkit.running import walkthrough

    found = []
    monkeypatch.setattr(walkthrough, "run", lambda *a, **o: found.append((*a, o)))
    return found


def test_seeds_runs_every_seed_and_shows_their_tables(asked, monkeypatch):
    from spkit.running import seeds

    shown = []
    monkeypatch.setattr(seeds, "report", lambda *a: shown.append(a) or "the tables")
    done = run("seeds", "p.yaml", 3, 5, "-o", "patching.beta=2", "--run-name", "x", "--cores", 1)
    assert done.exit_code == 0 and done.stdout == "the tables\n"
    common = {"patching.beta": 2, "run_name": "x"}
    options = {"cores": 1, "overwrite": False}
    assert asked == [(Path("p.yaml"), {**common, "seed": s}, options) for s in (3, 5)]
    assert shown == [(Path("p.yaml"), [3, 5], common)]
    assert run("seeds", "p.yaml").exit_code == 0
    assert [given["seed"] for _, given, _ in asked[2:]] == [0, 1, 2, 3, 4]


def test_one_seed_has_no_interval_and_is_not_run(asked):
    done = run("seeds", "p.yaml", 3)
    assert done.exit_code == 1 and "needs two seeds at least" in done.stderr and asked == []


def test_a_mistake_in_the_params_file_is_one_sentence(tmp_path):
    params = tmp_path / "p.yaml"
    params.write_text("sead: 1\n")
    for command in (("run", params), ("seeds", params), ("memory", params)):
        done = run(*command)
        assert done.exit_code == 1
        assert "unknown key sead (value 1), did you mean seed?" in done.stderr
    params.write_text("")
    done = run("run", params, "-o", "patching.alfa=1")
    assert done.exit_code == 1 and "did you mean patching.alpha?" in done.stderr
