"""The bench's own arithmetic and its stages at their smallest size. No time is judged here: only
that ways take turns, that a wrong result is not timed, and what is written."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from spkit.bench import bench as results
from spkit.bench import compare, figures, publish, run, stages, tables, timing
from spkit.bench.bench import GROWTH, LIMIT, PEER, Bench, Row
from spkit.bench.peers import Peers
from spkit.bench.stages import evaluation, growth, importance, top_sets
from spkit.cli import app
from spkit.errors import SpkitError

ROW = Row("importance", "1 M", 10**6, "plain", LIMIT, "ours / other", 1.0, 0.9, 1.1, 5)


def small(stage, folder, **more):
    return Bench(stage, folder, rounds=1, sizes=("1 M",), **more)


# ---- timing --------------------------------------------------------------------------------------


def test_ways_take_turns_and_the_first_round_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in ("ours", "peer")}
    found = timing.in_turn(ways, 3)
    assert calls == ["ours", "peer", "peer", "ours"] * 2
    assert {name: len(seconds) for name, seconds in found.items()} == {"ours": 3, "peer": 3}


def test_a_way_may_measure_itself():
    assert timing.seconds(lambda: timing.Own(42.0)) == 42.0
    assert timing.seconds(lambda: 42.0) < 42.0


def test_ratios_are_of_the_same_round():
    spread = timing.ratios([1.0, 4.0, 9.0], [2.0, 2.0, 3.0])
    assert (spread.median, spread.low, spread.high, spread.n) == (2.0, 0.5, 3.0, 3)


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (1.05, "<= 1.05", True),
        (1.06, "<= 1.05", False),
        (30.0, ">= 30", True),
        (29.0, ">= 30", False),
        (1.0, ">= 0.85 and <= 1.15", True),
        (1.2, ">= 0.85 and <= 1.15", False),
        (0.8, ">= 0.85 and <= 1.15", False),
        (5.0, "", None),
    ],
)
def test_goals(value, goal, met):
    assert results.meets(value, goal) is met
    assert replace(ROW, median=value, goal=goal).met is met


# ---- stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["importance", "top_sets", "derivation", "growth"])
def test_a_stage_gives_its_rows(stage, tmp_path):
    told = []
    bench = small(stage, tmp_path, told=lambda rows: told.append(len(rows)))
    stages.measure(bench)
    assert set(told) >= set(range(1, len(bench.rows) + 1)), "rows are kept as they come"
    assert {row.stage for row in bench.rows} == {stage}
    assert all(row.median > 0 for row in bench.rows)
    against = {row.against for row in bench.rows}
    assert (
        against
        == {
            "importance": {"forward + backward", "layer by layer"},
            "top_sets": {"torch.sort", "torch.kthvalue", "torch.topk", "reading it once"},
            "derivation": {"one patch (ours: both)"},
            "growth": {"importance", "derivation, 2 steps", "composition", "apply", "verify"},
        }[stage]
    )
    absent = ["derivation: TRL SFTTrainer, float32: not installed (without --peers)"]
    assert bench.notes == (absent if stage == "derivation" else [])
    assert not list(tmp_path.iterdir()), "what it wrote meanwhile is gone"


def test_scores_that_do_not_agree_are_not_timed(tmp_path, monkeypatch):
    usual = importance.snip
    monkeypatch.setattr(
        importance, "snip", lambda *given: {n: 1.01 * s for n, s in usual(*given).items()}
    )
    bench = small("importance", tmp_path)
    with pytest.raises(SpkitError, match=r"importance: scores of model\S+ do not agree"):
        stages.measure(bench)
    assert bench.rows == []


def test_sets_that_do_not_agree_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(top_sets, "by_kthvalue", lambda score, count: score > score.mean())
    with pytest.raises(SpkitError, match="the sets of ours and torch.kthvalue"):
        stages.measure(small("top_sets", tmp_path))


def test_extra_memory_is_seen():
    kept = [torch.ones(2**22) for _ in range(20)]  # 16 MiB each: freed, but not given back
    del kept
    found = []
    with results.peak_above(found):
        torch.ones(2**26).sum()  # 256 MiB
    assert 0.9 * 2**28 <= found[0] <= 1.2 * 2**28


def test_a_large_size_is_timed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "ENOUGH", 0.0)
    bench = replace(small("growth", tmp_path), rounds=5)
    runs = []
    growth._time(bench, next(bench.of("1 M")), "x", lambda: runs.append(1))
    assert len(runs) == 2 and bench.rows[0].n == 1


def test_answers_are_compared_with_those_of_one_prompt_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "PROMPTS", 4)
    bench = Bench("evaluation", tmp_path, rounds=1, sizes=("sandbox",))
    stages.measure(bench)
    share, alone, plain = bench.rows
    assert (share.median, share.met) == (1.0, True)
    assert (alone.against, plain.against) == ("one by one", "generate, batches of 64")

    monkeypatch.setattr(evaluation.Asked, "ours", lambda self: ["sorry"] * len(self.prompts))
    with pytest.raises(SpkitError, match="most texts do not agree"):
        stages.measure(Bench("evaluation", tmp_path, rounds=1, sizes=("sandbox",)))


# ---- peers ---------------------------------------------------------------------------------------


def test_a_peer_that_is_not_there_says_why(tmp_path, monkeypatch):
    with pytest.raises(SpkitError, match="without --peers"):
        Peers().module("trl==1.16.0", "trl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SpkitError, match="pip could not install no-such-peer==1"):
        Peers(tmp_path).module("no-such-peer==1", "no_such_peer")


# ---- what is written -----------------------------------------------------------------------------


def test_rows_are_read_back(tmp_path):
    results.write(tmp_path / "bench.json", [ROW], {"notes": ["one"]})
    assert results.read(tmp_path / "bench.json") == ([ROW], {"notes": ["one"]})
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SpkitError, match=r"other\.json is no bench\.json"):
        results.read(tmp_path / "other.json")


def test_all_stages_one_table(tmp_path, monkeypatch):
    """Two stages, of which one fails: its row and the other's are published, and it is named."""
    asked = run.Asked(("importance", "growth"), rounds=1)
    grown = [
        replace(ROW, stage="growth", against="apply", role=GROWTH, weights=w, median=w / 1e6)
        for w in (10**6, 10**7)
    ]

    usual = run.subprocess.run

    def process(command, **options):
        if "spkit.bench.stage" not in command:
            return usual(command, **options)
        stage, folder, given = command[3], tmp_path, json.loads(command[5])
        about = {"made_from": given["made_from"], "notes": [f"{stage} ran"], "finished": True}
        (folder / "stages").mkdir(exist_ok=True)
        rows = grown if stage == "growth" else [replace(ROW, goal="<= 0.5", role=PEER)]
        results.write(folder / "stages" / f"{stage}.json", rows, about)
        return type("Done", (), {"returncode": int(stage == "growth")})

    monkeypatch.setattr(run.subprocess, "run", process)
    monkeypatch.setattr(run, "git_state", lambda: {"commit": "abc", "changed": False})
    assert run.run(asked, tmp_path) == ["growth"]
    rows, about = results.read(tmp_path / "bench.json")
    assert len(rows) == 3 and about["notes"] == ["importance ran", "growth ran"]
    text = (tmp_path / "table.md").read_text()
    assert "| importance | 1 M" in text and "| no" in text
    assert "missed: importance, 1 M, plain: ours / other is 1, the goal <= 0.5" in text
    assert "growth of apply: seconds ~ weights^1.00 (1 to 10 million)" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"ratios.png", "growth.png"}

    done = []
    monkeypatch.setattr(run, "_measured", lambda stage, *given: done.append(stage) or True)
    run.run(replace(asked, rounds=2), tmp_path)
    assert done == ["importance", "growth"]


def test_a_finished_stage_is_measured_again_only_where_something_else_is_asked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "git_state", lambda: {"commit": "abc", "changed": False})
    asked, file = run.Asked(("importance",)), tmp_path / "stages" / "importance.json"
    file.parent.mkdir()
    started = []
    monkeypatch.setattr(
        run.subprocess, "run", lambda *a, **k: started.append(1) or type("D", (), {"returncode": 0})
    )
    about = {"made_from": run._identity(asked), "notes": []}
    for finished, wanted, runs in (
        (True, asked, 0),
        (False, asked, 1),  # it was interrupted
        (True, replace(asked, rounds=2), 1),
        (True, replace(asked, stages=("importance", "growth")), 0),
    ):
        results.write(file, [ROW], about | {"finished": finished})
        started.clear()
        assert run._measured("importance", wanted, tmp_path) and len(started) == runs
    results.write(file, [ROW], about | {"finished": True})
    monkeypatch.setattr(run, "git_state", lambda: {"commit": "abc", "changed": True})
    started.clear()
    assert run._measured("importance", asked, tmp_path) and started, "the code may be other code"


def test_wrong_names_are_told():
    for asked, said in (
        (run.Asked(("importence",)), "no stage 'importence', did you mean importance"),
        (run.Asked(sizes=("7 B",)), "no size '7 B'"),
    ):
        with pytest.raises(SpkitError, match=said):
            run.check(asked)


def test_exponents_of_what_grows_as_fast_and_twice_as_fast():
    def rows(name, power):
        return [
            replace(ROW, against=name, role=GROWTH, weights=w, median=3 * (w / 1e6) ** power)
            for w in (10**7, 10**8, 10**9)
        ]

    found = figures.exponents(rows("a", 1.0) + rows("b", 2.0))
    assert found["a"][0] == pytest.approx(1.0) and found["b"][0] == pytest.approx(2.0)


def test_the_table_is_for_people():
    assert tables.figure(ROW) == "1 [0.9, 1.1]"
    assert tables.number(12345.6) == "12,346"


def test_the_page_shows_the_figures_of_a_file(tmp_path):
    about = {"made_from": run._identity(run.Asked()), "notes": ["a note"]}
    results.write(tmp_path / "bench.json", [ROW], about)
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- bench: table -->\nold\n<!-- end -->\nafter\n")
    publish.publish(tmp_path / "bench.json", [page])
    text = page.read_text()
    assert "| importance | 1 M" in text and "* a note" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")


# ---- compare -------------------------------------------------------------------------------------


def files(tmp_path, before, after):
    made = []
    for name, rows in (("a.json", before), ("b.json", after)):
        results.write(tmp_path / name, rows, {})
        made.append(tmp_path / name)
    return made


@pytest.mark.parametrize(
    ("change", "slower", "said"),
    [
        ({"median": 1.5, "low": 1.4, "high": 1.6}, True, "slower"),
        ({"median": 1.5, "low": 1.05, "high": 1.6}, False, ""),  # the spreads meet
        ({"median": 1.2, "low": 1.15, "high": 1.25}, False, ""),  # within the threshold
        ({"median": 0.5, "low": 0.4, "high": 0.6}, False, "faster"),
    ],
)
def test_what_has_become_slower(tmp_path, change, slower, said):
    table, found = compare.compare(*files(tmp_path, [ROW], [replace(ROW, **change)]), 0.25)
    assert found is slower
    assert table.splitlines()[-1].split()[-1] == (said or f"{change['median']:.2f}")


def test_more_a_minute_is_better(tmp_path):
    row = replace(ROW, what="per minute", median=40.0, low=39.0, high=41.0)
    less = replace(row, median=20.0, low=19.0, high=21.0)
    assert compare.compare(*files(tmp_path, [row], [less]), 0.25)[1]
    assert not compare.compare(*files(tmp_path, [less], [row]), 0.25)[1]


def test_compare_at_the_command_line(tmp_path):
    a, b = files(tmp_path, [ROW], [replace(ROW, median=3.0, low=2.9, high=3.1)])
    done = CliRunner().invoke(app, ["bench", "--compare", str(a), str(b)])
    assert done.exit_code == 3 and "slower" in done.output
    done = CliRunner().invoke(app, ["bench", "--compare", str(a), str(b), "--threshold", "5"])
    assert done.exit_code == 0
    done = CliRunner().invoke(app, ["bench", "--compare", str(a), str(tmp_path / "none.json")])
    assert done.exit_code == 1 and "there is no such file" in done.output


def test_new_and_gone_rows_are_said(tmp_path):
    table, slower = compare.compare(*files(tmp_path, [ROW], [replace(ROW, size="10 M")]), 0.25)
    assert not slower and "new" in table and "gone" in table
