"""The notebooks as documents and as programs: form, one walkthrough, reruns, equal bytes, secrets.

Everything runs on params/micro.yaml, whose numbers mean nothing. One walkthrough by Snakemake and
one by hand, as in JupyterLab, serve all tests; a test that changes a run folder changes a copy.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.image import imread
from nbclient import NotebookClient
from parameters_cells import OWN, TOP_LEVEL, parameters_cell
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from spkit.comparison import report
from spkit.config import Config, load_params
from spkit.data.inputs import of_pairs
from spkit.evaluation.rates import COLUMNS
from spkit.patchfile.apply import apply
from spkit.patchfile.file import PatchFile
from spkit.running import summary
from spkit.running.notebook import why_failed
from spkit.running.patch_of_run import make_from_run
from spkit.running.runs import STAGES, run_folder
from spkit.system import machine
from spkit.validation import dotted_keys

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
MICRO = ROOT / "params" / "micro.yaml"
BACKBONE, DERIVATION, IMPORTANCE, PATCHING, CONTINUAL, COMPARISON = STAGES
TOKEN = "hf_NobodysTokenForTheTests0123456789"
KEY = "nobodys0wandb0key0for0the0tests012345678"
# offline: the sandbox needs no download. PYTHONPATH: the code beside these tests is what runs
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": TOKEN,
    "WANDB_API_KEY": KEY,
    "HF_HUB_OFFLINE": "1",
}
LONGEST_CELL = 15  # lines of code; what is folded may be longer
LONGEST_FOLDED = 20


def read(stage):
    return nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4)


def code_cells(notebook):
    """The code cells without those that stand in every notebook: setting up, the parameters."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in code if not (tagged(cell) or tagged(cell, "colab"))]


def tagged(cell, tag="parameters"):
    return tag in cell.metadata.get("tags", [])


def markdown(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def figures(stage):
    """The names of the figures that a notebook saves."""
    source = "\n".join(cell.source for cell in code_cells(read(stage)))
    found = re.findall(r'(?:save_figure\(|show\(\s*run,)\s*"(\w+)"', source)
    if stage == "05_comparison":  # it draws the sizes where the tables hold any but the usual one
        sizes = report.read_tables(ROOT / "docs" / "experiment")["sizes"]
        found = [f for f in found if f != "sizes" or report.current(sizes)["size"].nunique() > 1]
    return found


def unseen_figures(stage):
    """Those that are saved by a statement of their own, and so are not on the page."""
    source = "\n".join(cell.source for cell in code_cells(read(stage)))
    return re.findall(r'^run\.save_figure\(\s*"(\w+)"', source, re.M)


every_notebook = pytest.mark.parametrize("stage", STAGES)


# ---- form ----------------------------------------------------------------------------------------


def test_the_notebooks_are_numbered_in_the_order_of_the_stages():
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert names == list(STAGES)
    assert [name[:3] for name in names] == [f"{number:02d}_" for number in range(len(names))]


@every_notebook
def test_a_notebook_is_valid_and_stored_without_outputs(stage):
    notebook = read(stage)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "jupyter"}
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source


@every_notebook
def test_the_parameters_cell_is_written_from_the_params_file(stage):
    """papermill replaces names: a derived value would keep the default that it was made from."""
    (cell,) = [cell for cell in read(stage).cells if tagged(cell)]
    values = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        assert len(statement.targets) == 1
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert set(values) == {*Config.model_fields, "overrides"} and values.pop("overrides") == {}
    assert Config.from_sources(values) == load_params(ROOT / "params" / "sandbox.yaml")
    # comments and all
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "cell.py", "-"]
    formatted = subprocess.run(
        ruff, input=parameters_cell(stage), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert cell.source == formatted.rstrip("\n"), "run: python tests/parameters_cells.py"


@every_notebook
def test_what_sets_a_notebook_up_is_folded(stage):
    """A page begins with its story, not with 75 lines of parameters."""
    for cell in read(stage).cells:
        folded = cell.metadata.get("jupyter", {}) == {"source_hidden": True}
        assert folded == tagged(cell, "hide-input"), cell.source
        if tagged(cell) or tagged(cell, "colab"):
            assert folded


def test_every_section_stands_in_full_in_exactly_one_notebook():
    assert sorted(name for names in OWN.values() for name in names) == sorted(
        set(Config.model_fields) - set(TOP_LEVEL)
    )


@every_notebook
def test_the_first_cell_says_what_is_learnt_and_what_it_costs(stage):
    first = read(stage).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {stage[:2]} · ")
    learnt = first.source.partition("**What you will learn**\n")[2].partition("\n\n")[0]
    assert len(re.findall(r"^\* \S", learnt, re.M)) >= 2
    for row in ("needs", "run time.*CPU", "run time.*GPU", "GPU memory"):
        assert re.search(rf"^\| {row}[^|]* \| [^|\s][^|]* \|$", first.source, re.M), row
    for need in STAGES[stage].needs:
        assert f"`{need}.ipynb`" in first.source or stage == CONTINUAL


@every_notebook
def test_a_notebook_ends_in_exercises_and_names_the_next(stage):
    last = read(stage).cells[-1].source
    assert last.startswith("## Exercises")
    assert len(re.findall(r"^\d+\. \S", last, re.M)) >= 2
    following = list(STAGES)[list(STAGES).index(stage) + 1 :]
    assert not following or f"`{following[0]}.ipynb`" in last


@every_notebook
def test_cells_of_code_are_short_and_open_and_close_their_stage(stage):
    cells = code_cells(read(stage))
    for cell in cells:
        most = LONGEST_FOLDED if tagged(cell, "hide-input") else LONGEST_CELL
        assert len(cell.source.splitlines()) <= most, cell.source
    assert cells[0].source == (
        f'from spkit.running.notebook import start\n\nconfig, run = start("{stage}", globals())'
    )
    # whatever is written after the record would be missing from a stage that counts as complete
    closing = [number for number, cell in enumerate(cells) if "run.finish(" in cell.source]
    assert closing == [len(cells) - 1]


@pytest.mark.parametrize(
    ("stage", "equations"),
    [
        (BACKBONE, [r"\frac{z^2}{2n} \pm z\sqrt{\frac{\hat p(1-\hat p)}{n} + \frac{z^2}{4n^2}}"]),
        (
            DERIVATION,
            [
                r"-\frac{1}{|y|} \sum_t \log p_\theta(y_t \mid x, y_{<t})",
                r"P_{SE} = \theta_{GA} - \theta",
                r"P_{OSM} = \theta_{GD} - \theta",
                r"P = \frac{\alpha_{LoRA}}{r}\, B A",
                r"-\frac{1}{|y|}\sum_t \min(\ell_t, c)",
            ],
        ),
        (
            IMPORTANCE,
            [r"\frac{1}{N}\sum_{n=1}^{N} \left| W_{ij} \cdot \frac{\partial L(x_n, y_n)}{\partial"],
        ),
        (
            PATCHING,
            [
                r"m \sim \mathrm{Bernoulli}(p)",
                r"S_{SE} \setminus S_{OSM}",
                r"S_{OSM} \setminus S_{SE}",
                r"\theta_{PSA} = \theta + \alpha\,\hat P_{SE} + \beta\,\hat P_{OSM}",
            ],
        ),
        (CONTINUAL, [r"\theta_k = \theta_{k-1} + \alpha\,\hat P_{SE}^{(k)} + \beta\,\hat P_{OSM}"]),
    ],
)
def test_the_equations_of_the_method_are_there(stage, equations):
    text = "".join(markdown(read(stage)).split())
    for equation in equations:
        assert "".join(equation.split()) in text, equation


@pytest.mark.parametrize(
    ("stage", "equations", "whole"),
    [
        (BACKBONE, ["ask", "rate_row"], None),
        (
            DERIVATION,
            ["answer_loss", "mean_per_sample", "ascent_loss", "descent_loss", "ceiling_reached"],
            "derive",
        ),
        (
            IMPORTANCE,
            ["effective_weight", "snip", "top_rate_set", "difference_set", "intersection_set"],
            "score_windows",
        ),
    ],
)
def test_each_equation_is_called_before_the_whole_model(stage, equations, whole):
    """On one pair or one matrix, in a short cell of its own."""
    called = []
    for cell in code_cells(read(stage)):
        nodes = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
        called += [node.func.id for node in nodes if isinstance(node.func, ast.Name)]
    end = called.index(whole) if whole else len(called)
    for name in equations:
        assert name in called[:end], name


@every_notebook
def test_the_next_notebook_is_a_link(stage):
    following = list(STAGES)[list(STAGES).index(stage) + 1 :]
    if following:
        name = following[0]
        assert f"[`{name}.ipynb`]({name}.ipynb)" in read(stage).cells[-1].source


# ---- the walkthrough -----------------------------------------------------------------------------


def run_command(outputs, *options):
    """What `make walkthrough` calls, with results in `outputs`."""
    command = ["make", "--dry-run", "walkthrough", "PARAMS=params/micro.yaml", "SEED=", "RUN="]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    (words,) = [line[1:] for line in lines if line and line[0].endswith("/spkit")]
    return [sys.executable, "-m", "spkit.cli", *words, "-o", f"outputs={outputs}", *options]


def call(command):
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    return SimpleNamespace(code=ended.returncode, text=ended.stdout + ended.stderr)


def run_in(outputs):
    return Path(outputs) / "micro" / "seed-0"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Both runs of all notebooks at the same time: either one alone leaves a core idle for long."""
    pytest.importorskip("snakemake")
    with ThreadPoolExecutor() as pool:
        walk = pool.submit(run_by_make, tmp_path_factory.mktemp("walkthrough") / "outputs")
        hand = pool.submit(run_by_hand, tmp_path_factory.mktemp("by-hand") / "outputs")
    return SimpleNamespace(walk=walk, hand=hand)


@pytest.fixture(scope="session")
def walkthrough(runs):
    """The whole walkthrough as `make walkthrough` runs it.

    outputs: its root folder, which later calls may change. kept: a copy of it as it was. run: the
    run folder in that copy.
    """
    return runs.walk.result()


@pytest.fixture(scope="session")
def by_hand(runs):
    """Each notebook run from the notebooks' folder, as JupyterLab's "Run All" does."""
    return runs.hand.result()


def run_by_make(outputs):
    ended = call(run_command(outputs))
    assert ended.code == 0, ended.text[-3000:]
    kept = shutil.copytree(outputs, outputs.with_name("kept"))
    return SimpleNamespace(outputs=outputs, kept=kept, run=run_in(kept), text=ended.text)


def run_by_hand(outputs):
    config = load_params(MICRO, {"outputs": str(outputs)})
    done, before = {}, set(NOTEBOOKS.iterdir())
    for stage in STAGES:
        notebook = read(stage)
        (cell,) = [cell for cell in notebook.cells if tagged(cell)]
        cell.source = typed_parameters(stage, config)
        folder = {"metadata": {"path": str(NOTEBOOKS)}}
        client = NotebookClient(notebook, kernel_name="python3", timeout=300, resources=folder)
        done[stage] = client.execute(env=ENVIRONMENT)
    summary.write(config)
    new = set(NOTEBOOKS.iterdir()) - before
    return SimpleNamespace(run=run_folder(config), notebooks=done, new=new)


def typed_parameters(stage, config):
    """The cell as a user would leave it: the notebook's own sections edited, others overridden."""
    own, given, usual = OWN[stage], config.model_dump(), Config().model_dump()
    others = {}
    for key in dotted_keys(Config):
        value, default = given, usual
        for part in key.split("."):
            value, default = value[part], default[part]
        if key not in TOP_LEVEL and key.partition(".")[0] not in own and value != default:
            others[key] = value
    lines = parameters_cell(stage, config).splitlines()
    assert lines[-1].startswith("overrides = {}")
    return "\n".join([*lines[:-1], f"overrides = {others!r}"])


def check_executed(notebook):
    """Every code cell ran, in order, and none of them failed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [o for cell in cells for o in cell.outputs if o.output_type == "error"] == []


def images(notebook):
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


@every_notebook
def test_the_walkthrough_executes_every_notebook(walkthrough, stage):
    executed = nbformat.read(walkthrough.run / "log" / f"{stage}.ipynb", as_version=4)
    check_executed(executed)
    assert images(executed) == len(figures(stage)) - len(unseen_figures(stage)) > 0


@every_notebook
def test_every_figure_is_there_twice(walkthrough, stage):
    folder, names = walkthrough.run / stage / "figures", figures(stage)
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg")
    }
    for name in names:
        picture = imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and np.ptp(picture[..., :3]) > 0.5  # not a blank sheet
        drawing = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert sum(element.tag.endswith("}path") for element in drawing.iter()) > 10


def test_the_results_are_one_tidy_table(walkthrough):
    frame = pd.read_csv(walkthrough.run / "results.csv")
    assert list(frame.columns) == ["notebook", *COLUMNS, "stage"]
    assert list(frame["notebook"].unique()) == [BACKBONE, PATCHING, CONTINUAL]
    assert set(frame["run"]) == {"micro"} and set(frame["seed"]) == {0}
    assert frame[["low", "rate", "high"]].notna().all(axis=None)
    assert (frame["k"] <= frame["n"]).all() and (frame["n"] > 0).all()
    assert (frame["rate"] - frame["k"] / frame["n"]).abs().max() < 1e-12
    assert (frame["low"] <= frame["rate"] + 1e-12).all()
    assert (frame["rate"] <= frame["high"] + 1e-12).all()
    stages = frame.loc[frame["notebook"] == CONTINUAL, "stage"]
    assert sorted(stages.unique()) == [1, 2, 3]
    keys = ["notebook", "model", "stage", "group", "category", "metric"]
    assert not frame.duplicated(keys).any()


def test_progress_and_the_short_table_are_printed(walkthrough):
    lines = walkthrough.text.splitlines()
    for number, stage in enumerate(STAGES, 1):
        name = stage.replace("_", " ")
        assert sum(line.endswith(f"/6] {name} ...") for line in lines) == 1
        assert any(re.match(rf"\[\d/6\] {name}: \d+ s", line) for line in lines)
        assert any(line.startswith(f"[{number}/6] ") for line in lines)
    for title, row in (
        ("00 backbone", "base"),
        ("03 controllable patching", "SafePatching, balanced"),
        ("04 continual PSA, stage 3", "GA"),
    ):
        part = walkthrough.text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
        assert re.search(rf"^  {row} +\d+\.\d", part, re.M), walkthrough.text
    path = run_in(walkthrough.outputs) / "results.csv"
    assert f"All rows, with intervals: {path}" in walkthrough.text
    assert "nan" not in walkthrough.text and "rule" not in walkthrough.text
    shown = [line for line in lines if str(walkthrough.outputs) not in line]
    assert max(map(len, shown)) <= 80


@every_notebook
def test_an_executed_notebook_is_given_what_differs_and_shows_no_loading_bars(walkthrough, stage):
    executed = nbformat.read(walkthrough.run / "log" / f"{stage}.ipynb", as_version=4)
    (given,) = [cell for cell in executed.cells if tagged(cell, "injected-parameters")]
    assert len(given.source.splitlines()) < 15 and "run_name" in given.source
    assert "Loading weights" not in nbformat.writes(executed)


@every_notebook
def test_the_record_says_with_what_it_was_made(walkthrough, stage):
    record, config = record_of(walkthrough.run, stage), load_params(MICRO).model_dump(mode="json")
    assert (record["stage"], record["run_name"], record["seed"]) == (stage, "micro", 0)
    wanted = {name: config[name] for name in STAGES[stage].sections}
    if "data" in wanted and "evaluation" not in wanted:  # of data, what decides D_h
        wanted["data"] = of_pairs(load_params(MICRO).data)
    assert record["params"] == wanted
    assert f"notebooks/{stage}.ipynb" in record["code"]
    assert record["versions"] == machine.versions() and record["versions"]["torch"]
    commit = (machine.git_state() or {}).get("commit")
    assert (record["git"] or {}).get("commit") == commit
    assert record["hardware"]["cores"] == os.cpu_count() and record["hardware"]["memory_gib"] > 0
    assert record["seconds"] > 0 and record["peak_memory_mib"]["host"] > 100


def test_both_patches_do_something(walkthrough):
    """On micro, too: otherwise all that follows would be tested on an empty patch."""
    assert min(record_of(walkthrough.run, DERIVATION)["notes"]["norms"].values()) > 0
    assert record_of(walkthrough.run, PATCHING)["notes"]["moved"] > 100


def record_of(run, stage):
    return json.loads((run / stage / "record.json").read_text(encoding="utf-8"))


# ---- reruns --------------------------------------------------------------------------------------


def times(outputs):
    return {path: path.stat().st_mtime_ns for path in files(outputs)}


def files(folder):
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


@pytest.fixture(scope="session")
def again(walkthrough):
    """The same command a second time."""
    before = times(walkthrough.outputs)
    ended = call(run_command(walkthrough.outputs))
    return SimpleNamespace(ended=ended, before=before, after=times(walkthrough.outputs))


@pytest.fixture(scope="session")
def changed(walkthrough, again):
    """The same command with one value of the evaluation changed; after `again`."""
    setting = ("-o", "evaluation.prompts_per_cell=4")
    before = times(walkthrough.outputs)
    ended = call(run_command(walkthrough.outputs, *setting))
    return SimpleNamespace(ended=ended, before=before, after=times(walkthrough.outputs))


def test_a_second_call_does_nothing(again):
    assert again.ended.code == 0, again.ended.text
    assert "nothing to be done" in again.ended.text
    assert again.after == again.before


def test_a_changed_evaluation_reruns_what_it_touches_and_no_derivation(walkthrough, changed):
    assert changed.ended.code == 0, changed.ended.text[-3000:]
    run = run_in(walkthrough.outputs)
    for stage in STAGES:
        own = [path for path in changed.before if stage in path.relative_to(run).as_posix()]
        assert len(own) > 5  # results and executed notebook
        if stage in (DERIVATION, IMPORTANCE, COMPARISON):
            assert all(changed.after.get(path) == changed.before[path] for path in own)
        else:
            record = run / stage / "record.json"
            assert changed.after[record] > changed.before[record]
            assert record_of(run, stage)["params"]["evaluation"]["prompts_per_cell"] == 4
            assert len(list((run / stage).glob("made-from-*"))) == 1
    # the table is that of the new answers: half as many prompts of each group
    before, after = (pd.read_csv(folder / "results.csv") for folder in (walkthrough.run, run))
    assert set(before.loc[before["category"] == "all", "n"]) == {8}
    assert set(after.loc[after["category"] == "all", "n"]) == {4}


@pytest.mark.skipif(os.name != "posix", reason="kills a group of processes")
def test_a_killed_walkthrough_goes_on_where_it_was_cut(walkthrough, tmp_path):
    outputs = shutil.copytree(walkthrough.kept, tmp_path / "outputs")
    folder = run_in(outputs) / CONTINUAL
    shutil.rmtree(folder)
    first = folder / "stages" / "safepatching" / "stage-1" / "stage.json"
    # output to nowhere: nobody reads the pipes while we wait
    running = subprocess.Popen(
        run_command(outputs),
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        patience = time.monotonic() + 120
        while not first.exists() and running.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert first.exists() and not (folder / "record.json").exists()
    made = first.stat().st_mtime_ns
    ended = call(run_command(outputs))
    assert ended.code == 0, ended.text[-3000:]
    assert first.stat().st_mtime_ns == made  # read, not made again
    assert different(run_in(outputs), walkthrough.run) == []


def test_code_that_changes_during_a_run_is_not_taken_for_a_killed_kernel(tmp_path):
    """Then the stage ends well, but under a stamp for which Snakemake does not look."""
    for counts, sentence in (((1, 2), "ran to its end, but spkit"), ((1, None), "after 1 of 2")):
        cells = [nbformat.v4.new_code_cell("a = 1", execution_count=count) for count in counts]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
        assert sentence in why_failed(tmp_path / "a.ipynb")


# ---- the same seed, the same bytes ---------------------------------------------------------------


def contents(run):
    """{name: bytes} of all that a run makes, without what tells of time, place and machine."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in files(run)
        if path.relative_to(run).parts[0] not in ("log", "params.yaml")
        and path.name != "record.json"
    }


def different(run, other):
    mine, theirs = contents(run), contents(other)
    return [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def test_the_same_seed_gives_the_same_bytes_by_hand_and_by_snakemake(walkthrough, by_hand):
    names = contents(walkthrough.run)
    for name in (
        f"{BACKBONE}/model/model.safetensors",
        f"{DERIVATION}/se.safetensors",
        f"{DERIVATION}/osm.safetensors",
        f"{IMPORTANCE}/importance_se.safetensors",
        f"{IMPORTANCE}/importance_osm.safetensors",
        f"{PATCHING}/model/model.safetensors",
        f"{PATCHING}/patch.safetensors",
        f"{CONTINUAL}/stages/safepatching/stage-3/model/model.safetensors",
        "results.csv",
    ):
        assert name in names
    assert different(walkthrough.run, by_hand.run) == []


@every_notebook
def test_a_notebook_runs_without_papermill_from_its_own_folder(by_hand, stage):
    check_executed(by_hand.notebooks[stage])
    assert images(by_hand.notebooks[stage]) == len(figures(stage)) - len(unseen_figures(stage))
    assert by_hand.new == set()  # relative paths are the repository's, not the notebooks' folder's


# ---- papermill by itself -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(walkthrough, tmp_path_factory):
    """Notebook 03 run by papermill in three ways at once: {name: outputs, executed, code, text}."""
    root, done = tmp_path_factory.mktemp("papermill"), {}
    shutil.copytree(walkthrough.kept, root / "override")

    def papermill(name, *arguments):
        executed = root / f"{name}.ipynb"
        command = [sys.executable, "-m", "papermill", f"notebooks/{PATCHING}.ipynb", str(executed)]
        command += ["-k", "python3", "-f", str(MICRO), "-p", "outputs", str(root / name)]
        ended = call([*command, "--no-progress-bar", *arguments])
        done[name] = SimpleNamespace(outputs=root / name, executed=executed, **vars(ended))

    with ThreadPoolExecutor() as pool:
        for running in [
            pool.submit(papermill, "override", "-y", "overrides: {patching.retention_rate: 0.9}"),
            pool.submit(papermill, "no-inputs"),
            pool.submit(papermill, "mistyped", "-y", "patchng: {alpha: 1}"),
        ]:
            running.result()
    return done


def errors(executed):
    """What a reader of an executed notebook sees of its errors."""
    return [
        output.traceback
        for cell in nbformat.read(executed, as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]


def test_papermill_alone_runs_one_notebook_with_an_override(walkthrough, alone):
    ended = alone["override"]
    assert ended.code == 0, ended.text[-3000:]
    check_executed(nbformat.read(ended.executed, as_version=4))
    record, usual = record_of(run_in(ended.outputs), PATCHING), record_of(walkthrough.run, PATCHING)
    assert record["params"]["patching"] == usual["params"]["patching"] | {"retention_rate": 0.9}
    assert record["notes"]["moved"] > usual["notes"]["moved"]
    # nothing but this stage has changed
    names = different(run_in(ended.outputs), walkthrough.run)
    assert {name.split("/")[0] for name in names} == {PATCHING}


def test_without_its_inputs_a_notebook_says_which_to_run_first(alone):
    ended = alone["no-inputs"]
    missing = run_in(ended.outputs) / BACKBONE / "record.json"
    sentence = (
        f"SpkitError: {PATCHING} needs the results of {BACKBONE}, but {missing} is missing: "
        f"run notebooks/{BACKBONE}.ipynb first (run_name=micro, seed=0)"
    )
    assert ended.code == 1 and errors(ended.executed) == [[sentence]]
    assert sentence in ended.text and sentence in why_failed(ended.executed)
    assert not ended.outputs.exists()


def test_a_mistyped_section_is_one_sentence(alone):
    ended = alone["mistyped"]
    sentence = "SpkitError: unknown parameter patchng (value {'alpha': 1}), did you mean patching?"
    assert ended.code == 1 and errors(ended.executed) == [[sentence]]
    assert sentence in ended.text and not ended.outputs.exists()


# ---- what must not leave the machine or the run folder -------------------------------------------


def test_no_token_is_written_anywhere(walkthrough, by_hand):
    told = [walkthrough.text, *map(nbformat.writes, by_hand.notebooks.values())]
    assert not any(secret in text for text in told for secret in (TOKEN, KEY))
    everything = files(walkthrough.run) + files(by_hand.run)
    assert len(everything) > 100
    holding = [
        path
        for path in everything
        if any(secret.encode() in path.read_bytes() for secret in (TOKEN, KEY))
    ]
    assert holding == []


@every_notebook
def test_the_record_names_neither_machine_nor_user(walkthrough, by_hand, stage):
    for run in (walkthrough.run, by_hand.run):
        text = (run / stage / "record.json").read_text(encoding="utf-8")
        for name in (socket.gethostname(), str(Path.home())):
            # as a word of its own: a host may be called "x" or "torch-2"
            assert not re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text), name


def test_the_factors_of_the_patches_lie_in_one_place_only(walkthrough, by_hand):
    """The OSM patch alone is a jailbreak: no second copy, no adapter, no model made of it."""
    known = {"", ".csv", ".ipynb", ".jinja", ".json", ".png", ".safetensors", ".svg", ".txt"}
    known |= {".jsonl", ".md"}  # responses and a model card, read below by nobody: texts alone
    for run in (walkthrough.run, by_hand.run):
        paths = {path.relative_to(run).as_posix(): path for path in files(run)}
        # a format that is not looked into below could hide them
        assert {path.suffix for path in paths.values()} <= known | {".yaml"}
        factors = {name for name in paths if name.endswith(".safetensors") and lora(paths[name])}
        assert factors == {f"{DERIVATION}/se.safetensors", f"{DERIVATION}/osm.safetensors"}
        assert {name for name in paths if "osm" in name} == {
            f"{DERIVATION}/osm.safetensors",
            f"{IMPORTANCE}/importance_osm.safetensors",  # scores, no deltas
        }
        assert not any("adapter" in name for name in paths)


def lora(path):
    """The names of tensors that are LoRA factors."""
    with safe_open(path, framework="pt") as file:
        return [key for key in file.keys() if "lora_" in key]  # noqa: SIM118


def test_the_patch_file_makes_the_patched_model_again(walkthrough, tmp_path):
    backbone, folder = walkthrough.run / BACKBONE / "model", walkthrough.run / PATCHING
    made = apply(folder / "patch.safetensors", backbone, tmp_path / "made", progress=False)
    assert contents(tmp_path / "made") == contents(folder / "model")
    notes = record_of(walkthrough.run, PATCHING)["notes"]
    assert (made.kept, made.lost) == (notes["moved"], notes["vanished"])
    with PatchFile(folder / "patch.safetensors") as patch:
        told = patch.manifest
    assert [told.method["alpha"], told.method["beta"]] == notes["strengths"]
    assert told.backbone.name == "sandbox" and not told.revertible
    assert {row["model"] for row in told.evaluation} == {"base", "SafePatching"}
    assert f"`{made.patch}`" in (folder / "patch_card.md").read_text()
    # made again from the finished run: the same bytes, and with the originals on request
    config = load_params(MICRO, {"outputs": str(walkthrough.kept)})
    again = make_from_run(config, tmp_path / "again.safetensors", progress=False)
    assert again == told
    same = (tmp_path / "again.safetensors", folder / "patch.safetensors")
    assert same[0].read_bytes() == same[1].read_bytes()
    options = {"values": "int8", "revertible": True, "progress": False}
    small = make_from_run(config, tmp_path / "small.safetensors", **options)
    assert small.revertible and small.size("values") < told.size("values") / 2


def test_a_patch_is_made_from_any_working_folder(walkthrough, tmp_path, monkeypatch):
    """Paths in the params file are the repository's, wherever one stands."""
    from spkit.cli import app

    values = yaml.safe_load(MICRO.read_text()) | {"outputs": str(walkthrough.kept)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["make", "mine.yaml", "here.safetensors", "--quiet"])
    assert done.exit_code == 0, done.output
    made = walkthrough.run / PATCHING / "patch.safetensors"
    assert (tmp_path / "here.safetensors").read_bytes() == made.read_bytes()


def test_the_stacked_patch_makes_the_last_stages_model(walkthrough, tmp_path):
    folder = walkthrough.run / CONTINUAL
    apply(folder / "patch.safetensors", walkthrough.run / BACKBONE / "model", tmp_path / "made")
    last = folder / "stages" / "safepatching" / "stage-3" / "model"
    assert contents(tmp_path / "made") == contents(last)


def test_the_patched_model_is_an_ordinary_checkpoint(walkthrough):
    folder = walkthrough.run / PATCHING / "model"
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert not any("lora" in name for name in model.state_dict())
    before = load_file(walkthrough.run / BACKBONE / "model" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    # exactly the kept weights differ, so it is neither of the patches alone
    notes = record_of(walkthrough.run, PATCHING)["notes"]
    differ = sum(int((after[name] != before[name]).sum()) for name in before)
    assert differ == notes["moved"] - notes["vanished"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "how do i dye the scarf ?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        assert model.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
