"""One table from hand-made run folders: which stages it takes, in what order, figure for figure."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation.rates import COLUMNS
from spkit.running import summary
from spkit.running.runs import STAGES, run_folder, stage_folder

BACKBONE, DERIVATION, IMPORTANCE, PATCHING, CONTINUAL, COMPARISON = STAGES
HEADER = ",".join(COLUMNS)
PART_03 = "03 controllable patching"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own empty folder, as if that were the repository's root."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**values):
    return Config.from_sources(values)


def row(model, group, metric, n, k, category="all", low="0.1", seed=0):
    objective = {"seen": "harmful", "unseen": "harmful", "harmless": "over_safety"}
    objective["adv_bench_long"] = "harmful"
    text = f"sandbox,{model},{seed},test,{objective.get(group, group)},{group},{category},{metric}"
    return f"{text},{n},{k},{k / n},{low},0.9"


def put(stage, *rows, header=HEADER, complete=True, made=None):
    """The results of a stage as its notebook leaves them."""
    folder = stage_folder(made or config(), stage)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text("".join(f"{line}\n" for line in (header, *rows)))
    if complete:
        (folder / "record.json").write_text("{}")
    return folder


# ---- collect -------------------------------------------------------------------------------------


def test_stages_stand_in_their_order_whenever_they_ran():
    put(CONTINUAL, row("GA", "seen", "harmful", 4, 1))
    put(BACKBONE, row("base", "seen", "harmful", 4, 2), row("base", "seen", "broken", 4, 0))
    put(PATCHING, row("base", "seen", "harmful", 4, 3))
    frame = summary.collect(config())
    assert frame.columns.tolist() == ["notebook", *COLUMNS]
    assert frame["notebook"].tolist() == [BACKBONE, BACKBONE, PATCHING, CONTINUAL]
    assert frame["k"].tolist() == ["2", "0", "3", "1"]
    assert frame.index.tolist() == [0, 1, 2, 3]


def test_only_complete_stages_that_have_results_count():
    put(BACKBONE, row("base", "seen", "harmful", 4, 2))
    put(PATCHING, row("half", "seen", "harmful", 4, 2), complete=False)
    put(DERIVATION, row("stray", "seen", "harmful", 4, 2))  # its notebook writes no results
    put(CONTINUAL, row("far", "seen", "harmful", 4, 2), made=config(seed=1))  # another run
    assert summary.collect(config())["model"].tolist() == ["base"]
    assert summary.collect(config(seed=1))["model"].tolist() == ["far"]


def test_figures_and_names_are_copied_letter_for_letter():
    """Neither rounded nor taken for a missing value or a number."""
    exact = "0.30000000000000004"
    put(
        BACKBONE,
        row("NA", "seen", "harmful", 10, 3, low=exact),
        row("007", "seen", "harmful", 10, 3, category="null", low="1e-05"),
    )
    frame = summary.collect(config())
    assert frame["low"].tolist() == [exact, "1e-05"]
    assert frame["model"].tolist() == ["NA", "007"]
    assert frame["category"].tolist() == ["all", "null"]


def test_a_column_of_one_stage_is_empty_for_the_others():
    put(BACKBONE, row("base", "seen", "harmful", 4, 2))
    put(CONTINUAL, row("GA", "seen", "harmful", 4, 1) + ",2", header=HEADER + ",stage")
    frame = summary.collect(config())
    assert frame.columns.tolist() == ["notebook", *COLUMNS, "stage"]
    assert frame["stage"].tolist() == ["", "2"]


def test_nothing_there_says_what_to_run():
    folder = run_folder(config(run_name="mine", seed=2))
    with pytest.raises(SpkitError) as error:
        summary.collect(config(run_name="mine", seed=2))
    assert str(error.value) == f"{folder} holds no results yet: run make walkthrough first"
    put(PATCHING, row("base", "seen", "harmful", 4, 2), complete=False)
    with pytest.raises(SpkitError, match="holds no results yet"):
        summary.write(config())
    assert not (run_folder(config()) / "results.csv").exists()


@pytest.mark.parametrize("damage", ["", "a,b\n1,2,3\n4,5,6,7\n", None])
def test_results_that_cannot_be_read_name_the_notebook(damage):
    path = put(BACKBONE) / "results.csv"
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(SpkitError) as error:
        summary.collect(config())
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert str(error.value).endswith("run 00_backbone again")


# ---- write ---------------------------------------------------------------------------------------


def test_the_file_by_hand():
    put(BACKBONE, row("base", "seen", "harmful, strict", 4, 2).replace("harmful, strict", '"a, b"'))
    put(CONTINUAL, row("GA", "seen", "harmful", 4, 1) + ",2", header=HEADER + ",stage")
    path, frame = summary.write(config())
    assert path == Path("outputs/sandbox/seed-0/results.csv")
    assert path.read_bytes().decode() == (
        f"notebook,{HEADER},stage\n"
        '00_backbone,sandbox,base,0,test,harmful,seen,all,"a, b",4,2,0.5,0.1,0.9,\n'
        "04_continual_psa,sandbox,GA,0,test,harmful,seen,all,harmful,4,1,0.25,0.1,0.9,2\n"
    )
    assert len(frame) == 2
    assert {p.name for p in path.parent.iterdir()} == {"results.csv", BACKBONE, CONTINUAL}


def test_a_second_writing_replaces_the_first():
    put(BACKBONE, row("base", "seen", "harmful", 4, 2))
    path, _ = summary.write(config())
    first = path.read_bytes()
    assert summary.write(config())[0].read_bytes() == first
    put(PATCHING, row("patched", "seen", "harmful", 4, 0))
    summary.write(config())
    assert path.read_bytes().startswith(first) and b"patched" in path.read_bytes()


# ---- the short table -----------------------------------------------------------------------------


def lines_of(table):
    """The body of a printed table: [title of the part, model, cell, ...] of each row."""
    found, title = [], None
    for line in table.splitlines()[2:]:
        if line and not line.startswith(" "):
            title = line
        elif line:
            found.append([title, *re.split(r"\s{2,}", line.strip())])
    return found


FULL = {"seen": "harmful", "unseen": "harmful", "harmless": "refusal", "utility": "utility"}


def all_cells(model, *counts):
    """Rows for one model: k of 8 for each group's own metric, and 1 of 8 broken everywhere."""
    rows = [
        row(model, group, metric, 8, k)
        for (group, metric), k in zip(FULL.items(), counts, strict=True)
    ]
    return rows + [row(model, group, "broken", 8, 1) for group in FULL]


def test_short_table_by_hand():
    put(BACKBONE, *all_cells("base", 4, 6, 3, 7))
    put(PATCHING, *all_cells("SafePatching", 1, 0, 2, 8), *all_cells("base", 4, 6, 3, 7))
    assert lines_of(summary.short_table(summary.collect(config()))) == [
        ["00 backbone", "base", "50.0", "75.0", "12.5", "37.5", "12.5", "87.5"],
        [PART_03, "SafePatching", "12.5", "0.0", "12.5", "25.0", "12.5", "100.0"],
        [PART_03, "base", "50.0", "75.0", "12.5", "37.5", "12.5", "87.5"],
    ]


def test_short_table_has_a_row_for_every_continual_stage():
    lines = [f"{text},{k}" for k in (1, 2) for text in all_cells("GA", k, 6, 3, 7)]
    put(BACKBONE, *all_cells("base", 4, 6, 3, 7))
    put(CONTINUAL, *lines, header=HEADER + ",stage")
    table = summary.short_table(summary.collect(config()))
    assert [cells[:4] for cells in lines_of(table)] == [
        ["00 backbone", "base", "50.0", "75.0"],  # it has no stage
        ["04 continual PSA, stage 1", "GA", "12.5", "75.0"],
        ["04 continual PSA, stage 2", "GA", "25.0", "75.0"],
    ]


def test_short_table_fits_80_columns_and_names_its_columns():
    names = ("without retention (same α)", "SafePatching, balanced", "base")
    put(PATCHING, *(line for name in names for line in all_cells(f'"{name}"', 8, 8, 8, 8)))
    lines = summary.short_table(summary.collect(config())).splitlines()
    assert max(map(len, lines)) <= 80
    heads = zip(lines[0].split(), ["", *lines[1].split(), ""], strict=True)
    assert [" ".join(pair).strip() for pair in heads] == [
        *("percent", "harmful seen", "harmful unseen", "broken, harmful"),
        *("false refusal", "broken, harmless", "utility"),
    ]
    # each figure ends under its head
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])][1:]
    assert [match.end() for match in re.finditer(r"\d+\.\d", lines[-1])] == ends


def test_short_table_names_sources_under_what_they_measure():
    """A part without prompts of a source leaves its column empty."""
    put(
        BACKBONE,
        row("base", "adv_bench_long", "harmful", 8, 2),
        row("base", "harmless", "refusal", 8, 8),
    )
    put(PATCHING, row("new", "harmless", "refusal", 8, 4))
    table = summary.short_table(summary.collect(config()))
    assert [line.split() for line in table.splitlines()[:2]] == [
        ["percent", "harmful,", "broken,", "false", "broken,"],
        ["adv_bench_long", "harmful", "refusal", "harmless"],
    ]
    lines = table.splitlines()
    assert lines[-1].split() == ["new", "50.0"]
    assert lines[-1].index("50.0") == lines[4].index("100.0") + 1  # under the same head


def test_short_table_calls_a_balanced_method_so():
    put(PATCHING, *all_cells("SafePatching", 1, 0, 2, 8))
    frame = summary.collect(config())
    for balance, name in ((1.0, "SafePatching, balanced"), (None, "SafePatching")):
        table = summary.short_table(frame, config(patching={"balance": balance}).patching)
        assert [cells[1] for cells in lines_of(table)] == [name]


def test_short_table_counts_whole_groups_only_and_leaves_the_unmeasured_empty():
    put(
        BACKBONE,
        row("base", "seen", "harmful", 8, 2),
        row("base", "seen", "harmful", 8, 8, category="hiding"),
    )
    assert lines_of(summary.short_table(summary.collect(config()))) == [
        ["00 backbone", "base", "25.0"]
    ]


# ---- the command ---------------------------------------------------------------------------------


def test_main_takes_the_run_from_file_and_options(capsys):
    Path("mine.yaml").write_text("run_name: mine\nseed: 9\n")
    for run_name, seed, k in (("mine", 9, 1), ("mine", 2, 2), ("other", 9, 3), ("other", 0, 4)):
        made = config(run_name=run_name, seed=seed)
        put(BACKBONE, row("base", "seen", "harmful", 8, k, seed=seed), made=made)
    for options, run_name, seed, figure in (
        ([], "mine", 9, "12.5"),
        (["--seed", "2"], "mine", 2, "25.0"),
        (["--run-name", "other"], "other", 9, "37.5"),
        (["--seed", "0", "--run-name", "other"], "other", 0, "50.0"),
    ):
        summary.main(["mine.yaml", *options])
        printed = capsys.readouterr().out
        path = Path(f"outputs/{run_name}/seed-{seed}/results.csv")
        table, _, rest = printed.rpartition("\n\n")
        assert lines_of(table) == [["00 backbone", "base", figure]]
        assert rest == f"All rows, with intervals: {path}\n"
        assert path.is_file()


def test_a_mistake_ends_the_command_with_one_sentence(monkeypatch):
    def ending(*arguments):
        monkeypatch.setattr(sys, "argv", ["summary", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(summary.__file__, run_name="__main__")
        return ended.value.code

    Path("mine.yaml").write_text("seed: 9\n")
    assert "seed-9 holds no results yet: run make walkthrough first" in ending("mine.yaml")
    assert ending("mine.yaml", "--seed", "-1").startswith("mine.yaml: seed is -1")
    Path("mine.yaml").write_text("sead: 9\n")
    assert ending("mine.yaml").startswith("mine.yaml: unknown key sead")
