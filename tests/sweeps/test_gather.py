"""The gathered tables of hand-made results, and what is drawn and printed of them."""

from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from spkit.evaluation.rates import COLUMNS
from spkit.sweeps import figures, gather, shown
from spkit.sweeps.points import expand
from spkit.sweeps.units import build
from spkit.sweeps.work import stage_of
from spkit.workflow.units import places

ROOT = Path(__file__).parents[2]
TEXT = """
name: made
params: params/micro.yaml
seeds: [0, 1, 2]
set: {outputs: OUT}
grid: {patching.retention_rate: [0.3, 1.0]}
points:
  - {derivation.lora.r: 4, derivation.lora.alpha: 8}
  - {}
"""
CELLS = [
    ("harmful", "seen", "harmful"),
    ("harmful", "unseen", "harmful"),
    ("over_safety", "harmless", "refusal"),
    ("utility", "utility", "utility"),
]


def results(model, seed, k):
    """A stage's results.csv: k of 10 in the first cell, less in the others."""
    rows = []
    for number, (objective, group, metric) in enumerate(CELLS):
        count = max(0, k - number)
        row = ["run", model, seed, "test", objective, group, "all", metric, 10, count]
        rows.append([*row, count / 10, 0.0, 1.0])
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(sweep, graph, places) of twelve points, their results on the disk."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "made.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "out")))
    sweep = expand(path)
    graph = build(sweep)
    where = places(graph.units, sweep.root / "units")
    for point, chain in zip(sweep.points, graph.chains, strict=True):
        rank = 1 if point.values.get("derivation.lora.r") else 0
        k = round(6 * point.values["patching.retention_rate"]) + point.seed + rank
        for stage, model, count in (
            ("00_backbone", "base", 9),
            ("03_controllable_patching", "SafePatching", k),
        ):
            folder = stage_of(where[chain[stage]], stage, point.seed)
            folder.mkdir(parents=True, exist_ok=True)
            results(model, point.seed, count).to_csv(folder / "results.csv", index=False)
    return sweep, graph, where


def test_results_have_a_row_for_each_point_model_and_metric(made):
    sweep, graph, where = made
    found = gather.collect(sweep, graph, where, range(12))
    keys = ["patching.retention_rate", "derivation.lora.r", "derivation.lora.alpha"]
    assert list(found)[:6] == ["point", "params", *keys, "seed"]
    assert len(found) == 12 * 2 * len(CELLS)
    # a point that leaves a key as it is has the params file's value
    values = found[["derivation.lora.r", "derivation.lora.alpha"]].drop_duplicates()
    assert values.to_numpy().tolist() == [[4, 8.0], [2, 4.0]]
    assert found[found["point"] == 12]["seed"].unique().tolist() == [2]


def test_the_table_is_over_seeds_with_students_interval(made):
    sweep, graph, where = made
    table = gather.summarise(gather.collect(sweep, graph, where, range(12)), sweep.keys)
    at = (table["patching.retention_rate"] == 0.3) & (table["derivation.lora.r"] == 2)
    row = table[at & (table["model"] == "SafePatching")].iloc[0]
    shares = [20.0, 30.0, 40.0]  # k = 2 + seed of 10
    low, high = stats.t.interval(0.95, 2, loc=30, scale=stats.sem(shares))
    assert (row["metric"], row["seeds"], row["mean"]) == ("harmful seen %", 3, 30.0)
    assert [row["low"], row["high"]] == pytest.approx([low, high], abs=1e-3)
    assert row["interval"] == "Student's t over seeds"


def test_one_seed_has_the_interval_over_prompts(made):
    sweep, graph, where = made
    table = gather.summarise(gather.collect(sweep, graph, where, [0, 3]), sweep.keys)
    rates = gather.collect(sweep, graph, where, [0]).assign(**{sweep.keys[0]: 1e-7})
    small = gather.summarise(rates, sweep.keys)  # a learning rate, say: it is not rounded
    assert small[sweep.keys[0]].unique().tolist() == [1e-7]
    row = table[table["model"] == "SafePatching"].iloc[0]
    assert (row["seeds"], row["mean"], row["interval"]) == (1, 30.0, "Wilson over prompts")
    assert (row["low"], row["high"]) == pytest.approx((10.779, 60.322), abs=1e-3)


def test_the_same_points_give_the_same_bytes_and_fit_a_terminal(made):
    sweep, graph, where = made
    said = gather.write(sweep, graph, where, range(12))
    files = ["results.csv", "table.csv", "figures/patching.retention_rate.svg"]
    files += ["figures/patching.retention_rate.png", "figures/derivation.lora.r.svg"]
    before = {name: (sweep.root / name).read_bytes() for name in files}
    assert gather.write(sweep, graph, where, range(12)) == said
    assert {name: (sweep.root / name).read_bytes() for name in files} == before
    for name in files[:2]:
        text = before[name].decode()
        assert str(sweep.root) not in text and "run," not in text.partition("\n")[0]
    lines = said.split("\n")
    assert max(map(len, lines[:-1])) <= 80
    table = "\n".join(lines)
    assert "mean of 3 seeds" in table and "retention_rate=0.3" in table and "base" in table
    # rank and alpha go together: neither is held while the other is drawn
    assert "alpha=8" in table


def test_values_that_go_together_are_drawn_together(made):
    sweep, graph, where = made
    table = gather.summarise(gather.collect(sweep, graph, where, range(12)), sweep.keys)
    drawn = dict(figures.drawn(table, sweep.keys))
    one, two = sweep.keys[:2]  # alpha goes along with the rank
    assert set(drawn) == {one, two, f"{one}-{two}"}
    (ax,) = drawn["derivation.lora.r"].axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "4"]
    assert ax.get_title() == "patching.retention_rate = 0.3"
    maps = drawn[f"{one}-{two}"]
    assert [ax.get_title() for ax in maps.axes] == list(dict.fromkeys(table["metric"]))
    assert [text.get_text() for text in maps.axes[0].texts] == ["30", "40", "70", "80"]


def test_a_long_table_is_cut_and_says_so(made):
    sweep, graph, where = made
    table = gather.summarise(gather.collect(sweep, graph, where, range(12)), sweep.keys)
    many = pd.concat([table.assign(**{"patching.beta": float(n)}) for n in range(30)])
    said = shown.short(many, [*sweep.keys, "patching.beta"])
    assert len(said.split("\n")) < 60 and "rows more" in said.split("\n")[-1]


def test_params_files_of_one_name_have_figures_of_their_own():
    files = ["a/llama.yaml", "b/llama.yaml", "b/sandbox.yaml"]
    names = {"a/llama.yaml": "a-llama", "b/llama.yaml": "b-llama", "b/sandbox.yaml": "sandbox"}
    assert figures._names(files) == names
