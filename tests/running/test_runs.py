"""Run folders: what is complete, what is outdated, and that no half-written file is left."""

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.evaluation.rates import COLUMNS
from spkit.models import counted
from spkit.running import summary
from spkit.running.notebook import repository_root, start, why_failed
from spkit.running.runs import (
    STAGES,
    Run,
    forget_other_weights,
    identity,
    read_record,
    require,
    require_free,
    require_made,
    run_folder,
    stage_folder,
    stamp,
)
from spkit.study.unit import Unit
from spkit.system import machine, made_from
from spkit.system.files import atomic, make_folder
from spkit.tuning import run as tuning

ROOT = Path(__file__).parents[2]
BACKBONE, DERIVATION, IMPORTANCE, PATCHING, CONTINUAL, COMPARISON = STAGES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own empty folder, as if that were the repository's root."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(overrides=None, **values):
    return Config.from_sources(values, overrides)


def complete(stages=STAGES, overrides=None):
    """Run the stages as notebooks would, without any computing."""
    for stage in stages:
        run = Run(config(overrides), stage)
        if STAGES[stage].results:
            run.save_frame("results.csv", RESULTS)
        run.finish()


RESULTS = pd.DataFrame(
    [
        ["sandbox", "base", 0, "test", "harmful", "seen", "all", "harmful", 10, 3, 0.3, 0.1, 0.5],
        ["sandbox", "base", 0, "test", "utility", "utility", "all", "utility", 8, 8, 1, 0.6, 1],
    ],
    columns=COLUMNS,
)


# ---- whole files ---------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(elsewhere):
    Path("a.txt").write_text("old")
    with pytest.raises(KeyError), atomic("a.txt") as path:
        path.write_text("half")
        raise KeyError
    assert [p.name for p in elsewhere.iterdir()] == ["a.txt"]
    assert Path("a.txt").read_text() == "old"


def test_a_folder_replaces_a_folder(elsewhere):
    for text in ("old", "new"):
        with atomic("deep/model") as path:
            path.mkdir()
            (path / f"{text}.txt").write_text(text)
    assert [p.relative_to(elsewhere).as_posix() for p in elsewhere.rglob("*.txt")] == [
        "deep/model/new.txt"
    ]


def test_what_a_killed_run_left_is_cleared():
    Path("stage/figures").mkdir(parents=True)
    Path("stage/.tmp-results.csv").touch()
    Path("stage/figures/.tmp-a.png").touch()
    Path("stage/.tmp-model").mkdir()
    Path("stage/kept.csv").touch()
    assert sorted(p.name for p in make_folder("stage").rglob("*")) == ["figures", "kept.csv"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission to write there"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_is_one_sentence(monkeypatch, code, reason):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SpkitError) as error, atomic("out/results.csv") as path:
        path.write_text("x")
    assert f"cannot write {Path('out/results.csv')}: {reason}; make room" in str(error.value)
    assert list(Path("out").iterdir()) == []


def test_full_disk_below_safetensors_is_the_same_sentence():
    with pytest.raises(SpkitError, match="the disk is full"), atomic("a.safetensors"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_folder():
    Path("outputs").mkdir(mode=0o555)
    with pytest.raises(SpkitError, match="no permission to write there"):
        Run(config(), BACKBONE)


def test_a_file_where_a_folder_should_be():
    Path("outputs").touch()
    with pytest.raises(SpkitError, match="a file stands where a folder should be"):
        Run(config(), BACKBONE)


# ---- a stage's life ------------------------------------------------------------------------------


def test_record_is_written_last_and_says_all():
    run = Run(config({"seed": 3}), BACKBONE)
    assert run.folder == Path("outputs/sandbox/seed-3/00_backbone")
    run.save_frame("results.csv", pd.DataFrame({"a": [0.1]}))
    assert read_record(run.config, BACKBONE) is None
    run.finish(fingerprint="abc")
    record = read_record(run.config, BACKBONE)
    assert record["params"] == {
        name: config().model_dump(mode="json")[name] for name in STAGES[BACKBONE].sections
    }
    assert (record["stage"], record["seed"], record["notes"]) == (
        BACKBONE,
        3,
        {"fingerprint": "abc"},
    )
    assert record["versions"]["torch"] and record["hardware"]["cores"]
    assert record["peak_memory_mib"]["host"] > 0 and record["seconds"] >= 0
    assert stamp(run.config, BACKBONE).exists()


def test_a_stage_that_starts_again_is_incomplete_until_it_finishes():
    complete([BACKBONE])
    run = Run(config(), BACKBONE)
    assert read_record(run.config, BACKBONE) is None
    assert not stamp(run.config, BACKBONE).exists()


def test_every_kind_of_output_and_equal_bytes():
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    seen = []
    for _ in range(2):
        run = Run(config(), BACKBONE)
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        png = run.save_figure("losses", figure)
        plt.close(figure)
        table = run.save_frame("a.csv", pd.DataFrame({"text": ["ä"], "x": [1 / 3]}))
        values = run.save_json("a.json", {"x": [1]})
        with run.write("model") as path:
            path.mkdir()
            (path / "config.json").write_text("{}")
        files = (png, png.with_suffix(".svg"), table, values, run.folder / "model/config.json")
        seen.append([path.read_bytes() for path in files])
    assert seen[0] == seen[1]
    assert seen[0][2] == "text,x\nä,0.3333333333333333\n".encode()


def test_upstream_files_are_found_and_missing_ones_name_the_notebook():
    complete([BACKBONE])
    run = Run(config(), DERIVATION)
    assert run.input(BACKBONE, "results.csv").is_file()
    with pytest.raises(
        SpkitError, match=r"00_backbone/model is missing: run notebooks/00_backbone"
    ):
        run.input(BACKBONE, "model")
    with pytest.raises(SpkitError, match="reads from '03_controllable_patching', allowed: 00_back"):
        run.input(PATCHING, "results.csv")


def test_missing_upstream_names_the_notebook():
    complete([BACKBONE])
    with pytest.raises(SpkitError) as error:
        Run(config(), IMPORTANCE)
    assert "run notebooks/01_patch_derivation.ipynb first (run_name=sandbox" in str(error.value)
    assert not stage_folder(config(), IMPORTANCE).exists()


def test_another_seed_is_another_run():
    complete([BACKBONE])
    with pytest.raises(SpkitError, match="seed-1/00_backbone/record.json is missing"):
        require(config({"seed": 1}), DERIVATION)


def test_outdated_upstream_names_the_key_and_keeps_the_old_record():
    complete([BACKBONE, DERIVATION, IMPORTANCE, PATCHING])
    with pytest.raises(SpkitError) as error:
        Run(config({"derivation.lora.r": 4}), PATCHING)
    assert "01_patch_derivation is outdated: derivation.lora.r is 8 there and 4 here" in str(
        error.value
    )
    assert "run notebooks/01_patch_derivation.ipynb again" in str(error.value)
    assert read_record(config(), PATCHING) is not None


def test_only_what_both_stages_depend_on_makes_one_outdated():
    complete([BACKBONE])
    require(config({"evaluation.max_new_tokens": 9}), DERIVATION)
    with pytest.raises(SpkitError, match="evaluation.max_new_tokens is 16 there and 9 here"):
        require(config({"evaluation.max_new_tokens": 9}), CONTINUAL)


def test_changed_code_upstream_is_a_warning(monkeypatch):
    Path("notebooks").mkdir()
    notebook("from spkit.models import chat", name=f"notebooks/{BACKBONE}.ipynb")
    complete([BACKBONE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require(config(), DERIVATION)
    # 01 has a notebook of its own; what it shares with 00 is compared
    notebook("from spkit.models import chat", name=f"notebooks/{DERIVATION}.ipynb")
    change_file(monkeypatch, "models/chat.py")
    with pytest.warns(UserWarning, match="made before a change in spkit/models/chat.py"):
        require(config(), DERIVATION)


def change_file(monkeypatch, name):
    """As if this file of the package had other contents now."""
    digest, changed = made_from._digest, made_from.PACKAGE / name
    assert changed.is_file()

    def other(path, stamp):
        return f"changed {digest(path, stamp)}" if path == changed else digest(path, stamp)

    monkeypatch.setattr(made_from, "_digest", other)


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("method/sets.py", list(STAGES)[1:]),  # whatever keeps a set of weights, or draws one
        ("models/patched.py", [PATCHING, CONTINUAL, COMPARISON]),
        ("evaluation/utility/__init__.py", [BACKBONE, PATCHING]),
        ("sandbox/weights/model.safetensors", list(STAGES)[:-1]),  # no old patch on new weights
        ("comparison/report.py", [COMPARISON]),
        # what cannot change a result reruns nothing
        ("cli/front.py", []),
        ("running/walkthrough.py", []),
        ("running/runs.py", []),
        ("errors.py", []),
    ],
)
def test_changed_code_reruns_the_notebooks_that_import_it(monkeypatch, file, stages):
    monkeypatch.chdir(ROOT)  # the real notebooks
    before = {stage: stamp(config(), stage).name for stage in STAGES}
    change_file(monkeypatch, file)
    after = {stage: stamp(config(), stage).name for stage in STAGES}
    assert [stage for stage in STAGES if before[stage] != after[stage]] == stages


def test_changed_input_file_makes_its_results_outdated():
    path = Path("mine.jsonl")
    path.write_text("{}")
    overrides = {"data.harmful": "mine.jsonl"}
    complete([BACKBONE], overrides)
    require(config(overrides), DERIVATION)
    path.write_text("{} ")
    with pytest.raises(SpkitError, match="data.harmful is a file that has changed since"):
        require(config(overrides), DERIVATION)
    path.unlink()
    with pytest.raises(SpkitError, match="data.harmful is 'mine.jsonl': no such file"):
        Run(config(overrides), BACKBONE)


def test_record_that_cannot_be_read():
    complete([BACKBONE])
    path = stage_folder(config(), BACKBONE) / "record.json"
    path.write_text('{"stage"')
    with pytest.raises(SpkitError, match="record.json: cannot be read .* delete it and run again"):
        require(config(), DERIVATION)


def test_unknown_stage():
    with pytest.raises(SpkitError, match="unknown stage '07_more', allowed: 00_backbone, "):
        stage_folder(config(), "07_more")


# ---- what a stage is made from -------------------------------------------------------------------


def changed_by(overrides):
    """The stages that are made from something else when these values change."""
    return [
        stage
        for stage in STAGES
        if stamp(config(), stage).name != stamp(config(overrides), stage).name
    ]


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("backbone.compute_dtype", "bfloat16", list(STAGES)[:-1]),
        ("data.pairs", 5, list(STAGES)[:-1]),
        ("derivation.lora.r", 4, [DERIVATION, IMPORTANCE, PATCHING, CONTINUAL]),
        ("importance.samples", 3, [IMPORTANCE, PATCHING, CONTINUAL]),
        ("patching.alpha", 1, [PATCHING, CONTINUAL]),
        ("evaluation.split", "dev", [BACKBONE, PATCHING, CONTINUAL]),
        ("continual.methods", ["ga"], [CONTINUAL]),
        ("threads", 2, []),
        ("outputs", "elsewhere", []),
        ("mirror", "elsewhere", []),
    ],
)
def test_a_parameter_changes_exactly_the_stages_that_depend_on_it(key, value, stages):
    assert changed_by({key: value}) == stages


def test_sections_of_upstream_stages_are_included():
    for stage in STAGES.values():
        for upstream in stage.needs:
            # the evaluation's settings shape a stage's own scores and no later stage's input
            later = set(STAGES[upstream].sections) - {"evaluation", "judges", "utility"}
            assert later <= set(stage.sections)


def test_text_and_outputs_of_a_notebook_do_not_count_but_code_does():
    def digest(*cells):
        notebook = nbformat.v4.new_notebook(cells=list(cells))
        Path("notebooks").mkdir(exist_ok=True)
        nbformat.write(notebook, f"notebooks/{BACKBONE}.ipynb")
        return identity(config(), BACKBONE)["code"][f"notebooks/{BACKBONE}.ipynb"]

    code, markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    printed = code("a = 1", outputs=[nbformat.v4.new_output("stream", text="1")])
    parameters = code("seed = 0", metadata={"tags": ["parameters"]})
    setting_up = code("install()", metadata={"tags": ["colab"]})
    assert digest(code("a = 1")) == digest(markdown("text"), setting_up, parameters, printed)
    assert digest(code("a = 1")) != digest(code("a = 2"))


def test_local_backbone_counts_by_its_contents():
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    overrides = {"backbone.source": "model"}
    first = identity(config(overrides), BACKBONE)["files"]
    (folder / "config.json").write_text("[]")
    assert first != identity(config(overrides), BACKBONE)["files"]


def checkpoint(folder="model", **sizes):
    """A folder with a config and weights of so many bytes, all the same number."""
    Path(folder).mkdir(exist_ok=True)
    for name, text in {"config.json": "{}", "tokenizer.json": "{}"}.items():
        Path(folder, name).write_text(text)
    (Path(folder) / "model.safetensors").write_bytes(bytes(sizes.get("size", 9)))
    return {"backbone.source": folder}


def test_retrained_weights_of_the_same_name_and_size_are_others(monkeypatch):
    """Also in a large file, a byte in its middle, with its old date; and it is said which file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
    overrides = checkpoint(size=65 * 2**20)
    complete([BACKBONE, DERIVATION, IMPORTANCE, PATCHING], overrides)
    weights = Path("model/model.safetensors")
    before = [stamp(config(overrides), stage) for stage in STAGES]
    date = weights.stat()
    with weights.open("r+b") as file:
        file.seek(33 * 2**20)
        file.write(b"1")
    os.utime(weights, ns=(date.st_atime_ns, date.st_mtime_ns))
    after = [stamp(config(overrides), stage) for stage in STAGES]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * 5 + [True]
    said = (
        "00_backbone is outdated: the file model.safetensors of backbone.source has changed since"
    )
    for attempt in (
        lambda: Run(config(overrides), PATCHING),
        lambda: require_made(config(overrides), PATCHING),
    ):
        with pytest.raises(SpkitError, match=said):
            attempt()
    assert read_record(config(overrides), PATCHING) is not None


def test_by_hand_no_old_patch_meets_a_backbone_that_was_made_again():
    made = stage_folder(config(), BACKBONE) / "model"
    for weights in ("one", "two"):
        run = Run(config(), BACKBONE)
        made.mkdir(exist_ok=True)
        (made / "model.safetensors").write_text(weights)
        run.finish()
        if weights == "one":
            complete([DERIVATION, IMPORTANCE])
            require(config(), PATCHING)
    require(config(), CONTINUAL)  # it reads 00 alone
    said = "01_patch_derivation is outdated: it was made with other weights of the backbone; run"
    with pytest.raises(SpkitError, match=said):
        Run(config(), PATCHING)


def test_other_weights_that_no_parameter_tells_of_run_again():
    """Notebook 00 makes others, or somebody put others there: all that is behind runs again."""
    complete()
    made = stage_folder(config(), BACKBONE) / "model"
    made.mkdir()
    (made / "model.safetensors").write_text("one")
    complete()
    assert forget_other_weights(config()) == []
    before = Run(config(), DERIVATION).checkpoints()
    complete([DERIVATION])
    (made / "model.safetensors").write_text("two")
    stages = [stage for stage in STAGES if stage != COMPARISON]
    assert forget_other_weights(config()) == stages
    assert [s for s in STAGES if stamp(config(), s).exists()] == [COMPARISON]
    complete([BACKBONE])
    assert Run(config(), DERIVATION).checkpoints() != before


def hub_with(monkeypatch, commit):
    """A cache of the hub that holds this commit of owner/model as its main branch."""
    place = Path("hub/models--owner--model").resolve()
    (place / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (place / "snapshots" / commit / "config.json").write_text("{}")
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.parent))


def test_a_branch_of_the_hub_that_moved_on_is_another_backbone(monkeypatch):
    own = {"backbone.source": "owner/model"}
    hub_with(monkeypatch, "a" * 40)
    assert counted.on_the_hub("owner/model", None) == {"hub": "a" * 40}
    complete(overrides=own)
    assert forget_other_weights(config(own)) == []
    tuned, unit = tuning.made_of(config(own)), Unit(config(own), 0, 0, Path("unit"))
    bundle = unit.bundle_folder()
    hub_with(monkeypatch, "b" * 40)
    with pytest.raises(SpkitError, match="made with other weights of the backbone; run"):
        Run(config(own), PATCHING)
    assert forget_other_weights(config(own)) == [s for s in STAGES if s != COMPARISON]
    again = tuning.made_of(config(own))
    assert tuned["hub"] == "a" * 40 and again["hub"] == "b" * 40
    patches = {tuning._of_patches(config(own), each) for each in (tuned, again)}
    assert len(patches) == 2 and unit.bundle_folder() != bundle


def test_what_lies_beside_the_weights_makes_nothing_outdated():
    overrides = checkpoint() | {"utility.include_path": "tasks", "data.harmful": "rows.jsonl"}
    Path("tasks").mkdir()
    Path("tasks/a.yaml").write_text("task: a")
    Path("rows.jsonl").write_text("{}")
    before = {stage: stamp(config(overrides), stage) for stage in STAGES}
    for folder in ("model", "tasks"):
        for name in (".DS_Store", ".git/index", ".cache/x", "x.lock", "README.md", "__pycache__/a"):
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_text("noise")
    os.utime("rows.jsonl", ns=(1, 1))
    Path("rows.jsonl").rename("elsewhere.jsonl")
    Path("rows.jsonl").symlink_to("elsewhere.jsonl")
    assert {stage: stamp(config(overrides), stage) for stage in STAGES} == before
    Path("tasks/a.yaml").write_text("task: b")
    changed = [stage for stage in STAGES if stamp(config(overrides), stage) != before[stage]]
    assert changed == [BACKBONE, PATCHING]


@pytest.mark.parametrize(
    "spelling", ["./model", "model/", "{here}/model", "../{name}/model", "link", "{here}/up/model"]
)
def test_another_spelling_of_a_path_is_the_same_parameter(spelling, elsewhere):
    overrides = checkpoint() | {"data.harmful": "in/rows.jsonl"}
    Path("in").mkdir()
    Path("in/rows.jsonl").write_text("{}")
    before = [stamp(config(overrides), stage).name for stage in STAGES]
    Path("link").symlink_to("model")
    Path("up").symlink_to(".")
    named = spelling.format(here=elsewhere, name=elsewhere.name)
    again = overrides | {"backbone.source": named, "data.harmful": "./in/../in/rows.jsonl"}
    assert [stamp(config(again), stage).name for stage in STAGES] == before
    checkpoint("other")
    other = overrides | {"backbone.source": "other"}
    assert stamp(config(other), BACKBONE).name != before[0]


def test_adapters_template_and_judge_count_where_they_are_used():
    for folder in ("se", "osm", "judge"):
        checkpoint(folder)
        Path(folder, "adapter_config.json").write_text("{}")
        Path(folder, "adapter_model.safetensors").write_text("1")
    Path("a.jinja").write_text("{{ x }}")
    overrides = checkpoint() | {"derivation.se": "se", "derivation.osm": "osm"}
    overrides |= {"backbone.chat_template": "a.jinja", "judges.classifier.model": "judge"}
    overrides |= {"judges.harmful": ["classifier"]}
    for file, stages in {
        "se/adapter_model.safetensors": [DERIVATION, IMPORTANCE, PATCHING, CONTINUAL],
        "osm/adapter_config.json": [DERIVATION, IMPORTANCE, PATCHING, CONTINUAL],
        "se/tokenizer.json": [],
        "a.jinja": list(STAGES)[:-1],
        "judge/model.safetensors": [BACKBONE, PATCHING, CONTINUAL],
    }.items():
        before = {stage: stamp(config(overrides), stage) for stage in STAGES}
        Path(file).write_text("other")
        after = {stage: stamp(config(overrides), stage) for stage in STAGES}
        assert [stage for stage in STAGES if before[stage] != after[stage]] == stages, file


def test_another_evaluation_keeps_the_patches_and_another_alignment_does_not():
    for name in ("h.csv", "i.csv", "o.csv", "x.jsonl"):
        Path(name).write_text("{}")
    new = {"data.sources": {"x": {"reader": "own", "path": "x.jsonl"}}}
    assert changed_by(new | {"data.evaluation": ["sandbox", "x"]}) == [
        BACKBONE,
        PATCHING,
        CONTINUAL,
    ]
    assert changed_by(new) == []  # nobody names it
    assert changed_by({"judges.batch_size": 3}) == [BACKBONE, PATCHING, CONTINUAL]
    sources = {name: {"reader": "own", "path": f"{name}.csv"} for name in "hio"}
    aligned = {"data.sources": sources, "align.harmful": "h", "align.instructions": "i"}
    aligned |= {"align.over_safety": ["o"]}

    def changed(overrides):
        pair = [config(aligned | more) for more in ({}, overrides)]
        return [s for s in STAGES if stamp(pair[0], s).name != stamp(pair[1], s).name]

    # the judges say when the alignment ends, so another judge may be another backbone
    assert changed({"judges.batch_size": 3}) == list(STAGES)[:-1]
    assert changed({"utility.kl_prompts": 3}) == [BACKBONE, PATCHING]


# ---- two at once ---------------------------------------------------------------------------------

HOLD = """
import sys
from spkit.config import Config
from spkit.running.runs import Run
from spkit.system.lock import locked
with locked("outputs/sandbox/seed-1"):
    run = Run(Config(), "00_backbone")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_the_first_keeps_its_folder():
    """One that has opened notebook 00 of seed 0, and all of the run of seed 1."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=env, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        for seed, where in enumerate(("seed-0/00_backbone", "seed-1")):
            with pytest.raises(
                SpkitError, match=f"sandbox/{where} is in use by process {other.pid}"
            ):
                Run(config({"seed": seed}), BACKBONE)
        with pytest.raises(SpkitError, match="sandbox/seed-0/00_backbone is in use by process"):
            require_free(config())
        require_free(config(), [DERIVATION, CONTINUAL])
        Run(config({"seed": 2}), BACKBONE).finish()
        other.kill()
    Run(config(), BACKBONE).finish()
    Run(config(), BACKBONE)  # in the same kernel: the first cell once more
    Run(config(), BACKBONE).finish()
    assert not list(Path("outputs/sandbox/seed-0").glob(".*.lock"))


def test_a_stage_that_cannot_begin_is_not_held():
    with pytest.raises(SpkitError, match="run notebooks/00_backbone.ipynb first"):
        Run(config(), DERIVATION)
    assert not list(Path("outputs").rglob(".*.lock"))


def test_machine_without_git_or_a_library(monkeypatch):
    monkeypatch.setattr(machine, "LIBRARIES", ["no-such-library"])
    assert list(machine.versions()) == ["python"]

    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.git_state() is None


# ---- the first line of a notebook ----------------------------------------------------------------


def test_start_from_the_notebooks_folder(elsewhere, monkeypatch, capsys):
    Path("pyproject.toml").write_text('name = "spkit"\n')
    Path("notebooks").mkdir()
    monkeypatch.chdir("notebooks")
    cell = {"seed": 1, "overrides": {"patching.alpha": 2}, "_private": 3, "In": [], "Out": {}}
    made, run = start(BACKBONE, cell | {"patching": {}, "json": json})
    assert (made.seed, made.patching.alpha) == (1, 2)
    assert Path.cwd() == elsewhere == repository_root()
    assert run.folder.resolve() == elsewhere / "outputs/sandbox/seed-1/00_backbone"
    assert "00_backbone: seed 1, results in outputs" in capsys.readouterr().out
    assert torch.initial_seed() == 1
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("patchng", {}, "unknown parameter patchng (value {}), did you mean patching?"),
        ("derivaton", {"lora": {}}, "unknown parameter derivaton "),
        ("sead", 3, "unknown parameter sead (value 3), did you mean seed?"),
        ("zzz", [1], "unknown parameter zzz (value [1]), allowed: run_name, seed, "),
    ],
)
def test_injected_name_that_is_no_parameter(name, value, sentence):
    with pytest.raises(SpkitError) as error:
        start(BACKBONE, {"seed": 0, name: value})
    assert sentence in str(error.value)


def test_start_again_later_in_a_notebook():
    made, run = start(BACKBONE, {"seed": 0})
    later = {"seed": 0, "config": made, "run": run, "rows": [1], "seeds": [1, 2], "table": {}}
    start(BACKBONE, later)
    with pytest.raises(SpkitError, match="patchng"):
        start(BACKBONE, later | {"patchng": {}})
    torch.use_deterministic_algorithms(False)


def test_bad_value_and_bad_override_at_the_start():
    with pytest.raises(SpkitError, match="patching.alpha is -1"):
        start(PATCHING, {"patching": {"alpha": -1}})
    with pytest.raises(SpkitError, match="unknown key alpha, did you mean .*patching.alpha"):
        start(PATCHING, {"overrides": {"alpha": 1}})


def notebook(*cells, name="book.ipynb"):
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=kernel), name)


def test_in_a_kernel_the_error_is_one_sentence(monkeypatch):
    notebook(
        "patchng = {}", f"from spkit.running.notebook import start\nstart({BACKBONE!r}, globals())"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [
        sys.executable,
        "-m",
        "spkit.running.execute",
        "book.ipynb",
        "log.ipynb",
        "-k",
        "python3",
    ]
    ended = subprocess.run([*command, "--no-progress-bar"], capture_output=True, text=True)
    assert ended.returncode == 1
    errors = [
        output
        for cell in nbformat.read("log.ipynb", 4).cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    sentence = "SpkitError: unknown parameter patchng (value {}), did you mean patching?"
    assert [error["traceback"] for error in errors] == [[sentence]]
    assert sentence in why_failed("log.ipynb")


def test_why_a_notebook_ended_early():
    Path("log.txt").write_text("one\nNo such kernel named python3\n\n")
    assert "log did not run: No such kernel named python3 (see log.txt)" in why_failed("log.ipynb")
    notebook("a = 1", "b = 2", name="cut.ipynb")
    assert "cut was cut off after 0 of 2 code cells: its kernel was killed" in why_failed(
        "cut.ipynb"
    )


# ---- the table of a run --------------------------------------------------------------------------


def test_summary_of_the_stages_that_are_complete(capsys):
    Path("mine.yaml").write_text("seed: 9")
    with pytest.raises(SpkitError, match="holds no results yet"):
        summary.main(["mine.yaml", "--seed", "0"])
    complete()
    summary.main(["mine.yaml", "--seed", "0", "--run-name", "sandbox"])
    printed = capsys.readouterr().out
    path = run_folder(config()) / "results.csv"
    assert str(path) in printed and "03 controllable patching" in printed and "30.0" in printed
    frame = pd.read_csv(path)
    assert list(frame["notebook"].unique()) == [BACKBONE, PATCHING, CONTINUAL]
    assert list(frame.columns) == ["notebook", *COLUMNS]
    before = path.read_bytes()
    summary.write(config())
    assert path.read_bytes() == before


def test_summary_with_a_results_file_missing():
    complete([BACKBONE])
    (stage_folder(config(), BACKBONE) / "results.csv").unlink()
    with pytest.raises(SpkitError, match="results.csv: cannot be read"):
        summary.collect(config())


# ---- the graph -----------------------------------------------------------------------------------


@pytest.fixture
def graph(elsewhere, monkeypatch):
    """Ask Snakemake, without running anything, which notebooks it would run."""
    pytest.importorskip("snakemake")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for stage in STAGES:
        (elsewhere / "notebooks").mkdir(exist_ok=True)
        notebook("a = 1", name=f"notebooks/{stage}.ipynb")

    def ask(*settings):
        command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "2", "--snakefile"]
        command += [str(ROOT / "Snakefile"), "--directory", ".", "--config"]
        command += [f"params={ROOT / 'params/sandbox.yaml'}", *settings]
        ended = subprocess.run(command, capture_output=True, text=True)
        text = ended.stdout + ended.stderr
        return ended.returncode, text, [stage for stage in STAGES if f"notebook {stage}" in text]

    return ask


def test_graph_runs_what_is_missing_then_nothing_then_what_depends_on_a_change(graph):
    assert graph()[2] == list(STAGES)
    complete()
    summary.write(config())
    assert "Nothing to be done" in graph()[1]
    assert graph("overrides={evaluation.max_new_tokens: 9}")[2] == [BACKBONE, PATCHING, CONTINUAL]
    # a stage that ran by hand with other parameters is not taken for today's
    complete([PATCHING], {"patching.alpha": 1})
    assert graph()[2] == [PATCHING]


def test_graph_says_what_is_wrong_in_one_sentence(graph):
    code, text, _ = graph("overrides={patching.alfa: 1}")
    assert code != 0 and "overrides: unknown key patching.alfa, did you mean patching.alpha" in text
    code, text, _ = graph("sead=1")
    assert code != 0 and "--config: unknown key sead, did you mean seed?" in text
    code, text, _ = graph("overrides=patching.alpha")
    assert code != 0 and "--config: overrides is 'patching.alpha', expected {patching" in text


def test_sandbox_and_micro_have_their_own_run_folders():
    folders = {run_folder(load_params(ROOT / f"params/{n}.yaml")) for n in ("sandbox", "micro")}
    assert len(folders) == 2


def test_files_of_tasks_and_open_questions_decide_a_result(tmp_path):
    tasks, questions = tmp_path / "tasks", tmp_path / "questions.jsonl"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine")
    questions.write_text("one")
    values = {"include_path": str(tasks), "mt_bench": {"prompts": str(questions)}}

    def digest():
        return identity(Config.from_sources({"utility": values}), BACKBONE)["files"]

    first = digest()
    (tasks / "mine.yaml").write_text("task: other")
    second = digest()
    questions.write_text("two")
    third = digest()
    assert first["utility.include_path"] != second["utility.include_path"]
    assert second["utility.mt_bench.prompts"] != third["utility.mt_bench.prompts"]


def test_files_of_utility_sources_and_of_kl_decide_a_result(tmp_path):
    arrow, calm = tmp_path / "piqa.arrow", tmp_path / "calm.jsonl"
    arrow.write_text("one")
    calm.write_text("one")
    values = {
        "data": {"sources": {"calm": {"reader": "own", "path": str(calm)}}},
        "utility": {"kl": "calm", "sources": {"piqa": {"path": str(arrow)}}},
    }

    def digest():
        return identity(Config.from_sources(values), BACKBONE)["files"]

    first = digest()
    arrow.write_text("two")
    second = digest()
    calm.write_text("two")
    third = digest()
    changed = [
        {key for key in b if a[key] != b[key]} for a, b in ((first, second), (second, third))
    ]
    assert changed == [{"utility.sources.piqa"}, {"utility.kl"}]
