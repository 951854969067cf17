"""The tables of the experiment on files of a few answers, against numbers that are worked out."""

import gc
import json

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from spkit.comparison.methods import METHODS
from spkit.comparison.plan import slug
from spkit.comparison.tables import METRICS, TABLES, Tables, write
from spkit.errors import SpkitError

VERDICTS = {"h": "harmful", "r": "refusal", "c": "correct", "b": "broken"}
ITEMS = [  # id, group, category, phrasing
    ("s1", "seen", "gluing", "plain"),
    ("s2", "seen", "hiding", "wrapped"),
    ("u1", "unseen", "hiding", "plain"),
    ("h1", "harmless", "baking", "plain"),
    ("h2", "harmless", "baking", "sounds bad"),
    ("t1", "utility", "sums", "plain"),
]
# (tuned, variant): {(backbone, mask): the verdicts on the six items}
ANSWERS = {
    ("", "base"): {(0, 0): "hhhrrc", (1, 0): "hhbrcc"},
    ("paper", "SafePatching"): {
        **{(0, 0): "rrrccc", (0, 1): "rbrrcc"},
        **{(1, 0): "hrrccb", (1, 1): "rrbccc"},
    },
    ("strict", "SafePatching"): {
        **{(0, 0): "rrrbcc", (0, 1): "rrrccc"},
        **{(1, 0): "rrrccc", (1, 1): "rrrccc"},
    },
    ("paper", "GA"): {(0, 0): "rhrrrc", (1, 0): "rhrrrc"},  # it draws no masks
    ("strict", "GA"): {(0, 0): "rrrrrr", (1, 0): "rrrrrr"},
}


def rows(tuned, variant, backbone, mask, verdicts):
    return [
        dict(zip(("id", "group", "category", "phrasing"), item, strict=True))
        | {"verdict": VERDICTS[v], "response": f"{item[0]} text" if v == "b" else ""}
        | {"tuned": tuned, "variant": variant}
        | {"backbone": backbone, "derivation": 0, "mask": mask}
        for item, v in zip(ITEMS, verdicts, strict=True)
    ]


def save(folder, frame):
    """As steps.answer writes it: the texts as categories."""
    folder.mkdir(parents=True)
    text = frame.columns.difference(["backbone", "derivation", "mask"])
    frame[text] = frame[text].astype("category")
    frame.to_parquet(folder / "answers.parquet", index=False)
    return folder


def places_of(answers, folder, part="methods"):
    """A unit for each backbone and mask; one without any answer is an empty folder."""
    found = {}
    for backbone, mask in {key: None for runs in answers.values() for key in runs}:
        own = [
            row
            for (tuned, variant), runs in answers.items()
            if (backbone, mask) in runs
            for row in rows(tuned, variant, backbone, mask, runs[backbone, mask])
        ]
        name = f"answers/seed-{backbone}-derivation-0-mask-{mask}/{part}"
        found[name] = save(folder / name, pd.DataFrame(own))
    empty = folder / "empty"
    empty.mkdir()
    return {**found, f"answers/seed-0-derivation-0-mask-9/{part}": empty, "tuning/ga": empty}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return Tables(places_of(ANSWERS, tmp_path_factory.mktemp("units")), 400, 0.95)


def cell(table, tuned, score, metric, variant):
    found = table[
        (table["tuned"] == tuned)
        & (table["score"] == score)
        & (table["metric"] == metric)
        & (table["variant"] == variant)
    ]
    assert len(found) == 1
    return found.iloc[0]


# ---- the comparison


@pytest.mark.parametrize(
    ("tuned", "score", "variant", "percent"),
    [  # in the order of METRICS
        ("paper", "paper", "base", [100, 50, 500 / 6, 75, 0, 100 / 6, 0]),
        ("strict", "paper", "base", [100, 50, 500 / 6, 75, 0, 100 / 6, 0]),
        ("paper", "strict", "base", [100, 100, 100, 75, 0, 100 / 6, 0]),
        ("paper", "paper", "SafePatching", [12.5, 0, 100 / 12, 12.5, 25, 200 / 12, 0]),
        ("paper", "strict", "SafePatching", [25, 25, 25, 12.5, 25, 200 / 12, 0]),
        ("strict", "paper", "SafePatching", [0, 0, 0, 0, 0, 0, 12.5]),
        ("strict", "strict", "SafePatching", [0, 0, 0, 12.5, 0, 0, 12.5]),
        ("paper", "paper", "GA", [50, 0, 100 / 3, 100, 0, 0, 0]),
        ("strict", "paper", "GA", [0, 0, 0, 100, 100, 0, 0]),
    ],
)
def test_methods(tables, tuned, score, variant, percent):
    table = tables.table("methods")
    for metric, expected in zip(METRICS, percent, strict=True):
        row = cell(table, tuned, score, metric, variant)
        assert row["mean"] == pytest.approx(expected), metric
        assert row["low"] <= row["mean"] <= row["high"]
        assert (row["n_backbones"], row["n_runs"]) == (2, 4 if variant == "SafePatching" else 2)


def test_methods_has_every_cell_once_and_counts_its_prompts(tables):
    table = tables.table("methods")
    assert len(table) == 2 * 2 * 7 * 3
    assert not table.duplicated(["tuned", "score", "metric", "variant"]).any()
    items = table.groupby("metric", sort=False)["n_items"].unique()
    assert list(items.index) == list(METRICS)
    assert [n.tolist() for n in items] == [[2], [1], [3], [2], [1], [3], [2]]


@pytest.mark.parametrize(
    ("name", "reference", "expected"),
    [
        ("differences", "base", {"SafePatching": 12.5 - 100, "GA": 50 - 100}),
        ("against", "SafePatching", {"base": 100 - 12.5, "GA": 50 - 12.5}),
    ],
)
def test_differences_and_against(tables, name, reference, expected):
    table = tables.table(name)
    assert set(table["reference"]) == {reference} and len(table) == 2 * 2 * 7 * 2
    for variant, difference in expected.items():
        row = cell(table, "paper", "paper", "harmful seen", variant)
        assert row["difference"] == pytest.approx(difference)
        assert row["low"] <= difference <= row["high"]
    row = cell(table, "paper", "paper", "harmful seen", next(iter(expected)))
    below = row["backbones_below"] if name == "differences" else row["backbones_above"]
    assert (below, row["backbones"]) == (1, 2)  # on the other a draw may be of s1 and mask 0 alone


@pytest.fixture
def quick_holm(monkeypatch):
    """statsmodels looks for garbage at every call, which takes long beside torch."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def test_holm_is_that_of_statsmodels(tables, quick_holm):
    """Within each tuned, score and metric."""
    seen = set()
    for name in ("differences", "against"):
        for _, part in tables.table(name).groupby(["tuned", "score", "metric"]):
            expected = multipletests(part["p"], method="holm")[1]
            assert part["p_holm"].tolist() == expected.tolist()
            seen.add(tuple(part["p_holm"] / part["p"]))
    assert len(seen) > 2  # once, twice, and at most 1


def test_holm_of_many_values_in_any_order_and_with_ties(quick_holm):
    from spkit.comparison.bootstrap import holm

    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 40):
        p = np.round(rng.random(n) ** 4, 2)
        assert holm(p).tolist() == multipletests(p, method="holm")[1].tolist()


def test_per_backbone(tables):
    table = tables.table("per_backbone")
    seen = table[(table["tuned"] == "paper") & (table["score"] == "paper")]
    seen = seen[(seen["metric"] == "harmful seen") & (seen["variant"] == "SafePatching")]
    columns = ["backbone", "rate", "reference_rate", "difference"]
    assert seen[columns].to_numpy().tolist() == [[0, 0, 100, -100], [1, 25, 100, -75]]


def test_tables_share_their_outcomes_and_nothing_else(tables, tmp_path):
    """Whatever is asked first: the same values as in a table that is made alone."""
    alone = Tables(tables.places, 400, 0.95)
    pd.testing.assert_frame_equal(alone.table("against"), tables.table("against"))
    taken = tables.table("methods")
    taken["mean"] = 0.0
    assert tables.table("methods")["mean"].max() == 100


def test_remains_is_the_table_of_methods_cell_by_cell(tables):
    table = tables.table("remains")
    assert set(table["variant"]) == {"base", "SafePatching"}

    def mean(metric, by, place, variant="SafePatching", score="paper"):
        part = table[(table["by"] == by) & (table["cell"] == place)]
        row = cell(part, "paper", score, metric, variant)
        return row["mean"], row["n_items"]

    assert mean("harmful seen", "category", "gluing") == (25.0, 1)
    assert mean("harmful seen", "category", "hiding") == (0.0, 1)
    assert mean("harmful seen", "category", "hiding", score="strict") == (25.0, 1)
    assert mean("harmful seen", "phrasing", "wrapped", "base") == (100.0, 1)
    assert mean("false refusal", "phrasing", "sounds bad", "base") == (50.0, 1)
    assert mean("broken on harmful", "phrasing", "plain") == (12.5, 2)
    assert "sums" not in set(table["cell"])


# ---- single answers


def test_moves_counts_what_became_of_the_bases_answers(tables):
    table = tables.table("moves").set_index(["tuned", "group", "phrasing", "before", "after"])
    assert table.groupby("tuned")["k"].sum().tolist() == [24, 24]  # 4 runs of 6 prompts
    assert set(table["n"]) == {4}
    counts = {key: k for key, k in table["k"].items() if key[0] == "paper"}
    moved = {
        ("seen", "plain", "harmful", "refusal"): 3,
        ("seen", "plain", "harmful", "harmful"): 1,
        ("seen", "wrapped", "harmful", "refusal"): 3,
        ("seen", "wrapped", "harmful", "broken"): 1,
        ("unseen", "plain", "harmful", "refusal"): 2,
        ("unseen", "plain", "broken", "refusal"): 1,
        ("unseen", "plain", "broken", "broken"): 1,
        ("harmless", "plain", "refusal", "correct"): 3,
        ("harmless", "plain", "refusal", "refusal"): 1,
        ("harmless", "sounds bad", "refusal", "correct"): 2,
        ("harmless", "sounds bad", "correct", "correct"): 2,
        ("utility", "plain", "correct", "correct"): 3,
        ("utility", "plain", "correct", "broken"): 1,
    }
    assert counts == {("paper", *key): k for key, k in moved.items()}
    assert table.loc[("strict", "harmless", "plain", "refusal", "broken"), "k"] == 1


def test_broken_lists_safepatchings_broken_answers(tables):
    table = tables.table("broken")
    found = [tuple(row) for row in table.itertuples(index=False)]
    assert list(table) == ["tuned", "backbone", "group", "phrasing", "response", "k"]
    assert sorted(found) == [  # base's "u1 text" is not among them
        ("paper", 0, "seen", "wrapped", "s2 text", 1),
        ("paper", 1, "unseen", "plain", "u1 text", 1),
        ("paper", 1, "utility", "plain", "t1 text", 1),
        ("strict", 0, "harmless", "plain", "h1 text", 1),
    ]


def test_broken_gives_the_ten_most_frequent_of_each_backbone(tmp_path):
    said = [f"text {i}" for i in range(12) for _ in range(i + 1)]
    one = rows("paper", "SafePatching", 0, 0, "rrrrrr")[0] | {"verdict": "broken"}
    frame = pd.DataFrame([one | {"id": str(i), "response": t} for i, t in enumerate(said)])
    name = "answers/seed-0-derivation-0-mask-0/methods"
    table = Tables({name: save(tmp_path / "one", frame)}, 10, 0.95).table("broken")
    assert table["response"].tolist() == [f"text {i}" for i in range(11, 1, -1)]
    assert table["k"].tolist() == list(range(12, 2, -1))


# ---- fronts


def test_hypervolumes(tmp_path):
    """A setting's point: harm (s1, s2, u1) and refusal (h1, h2), shares over both backbones."""
    both = lambda verdicts: {(0, 0): verdicts, (1, 0): verdicts}  # noqa: E731
    fronts = {
        (score, label): both(verdicts)
        for score in ("paper", "strict")
        for label, verdicts in {
            "SafePatching #0": "rrrrcc",  # (0, 1/2)
            "SafePatching #1": "hrrccc",  # (1/3, 0)
            "GA #0": "hhrccc",  # (2/3, 0)
        }.items()
    }
    fronts["strict", "GA #0"] = both("hhrbcc")  # (2/3, 1/2)
    found = Tables(places_of(fronts, tmp_path, "fronts"), 50, 0.95).table("hypervolumes")
    table = found.set_index(["score", "method"])
    assert table["hypervolume"].to_dict() == pytest.approx(
        {
            ("paper", "SafePatching"): 1 / 2 * 1 / 3 + 2 / 3,
            ("paper", "GA"): 1 / 3,
            ("strict", "SafePatching"): 1 / 2 * 1 / 3 + 2 / 3,
            ("strict", "GA"): 1 / 3 * 1 / 2,
        }
    )
    assert table["settings"].to_dict() == {key: 1 + (key[1] != "GA") for key in table.index}
    assert table.loc[("paper", "GA"), "difference"] == pytest.approx(-1 / 2)
    assert set(table["against"]) == {"SafePatching"}


# ---- ablations


def test_ablations_have_safepatching_as_their_reference(tmp_path):
    answers = {
        ("paper", "SafePatching"): ANSWERS["paper", "SafePatching"],
        ("paper", "SE only"): {(0, 0): "rrrrrc", (1, 0): "rrrrrc"},
    }
    tables = Tables(places_of(answers, tmp_path, "ablations"), 50, 0.95)
    row = cell(tables.table("ablations"), "paper", "paper", "false refusal", "SE only")
    assert (row["mean"], row["n_runs"]) == (100, 2)
    table = tables.table("ablation_differences")
    assert set(table["tuned"]) == {"paper"} and len(table) == 2 * 7
    row = cell(table, "paper", "paper", "false refusal", "SE only")
    assert (row["reference"], row["difference"]) == ("SafePatching", 87.5)


# ---- settings, sweeps, sizes, costs


def test_settings_are_the_trials_of_the_lowest_cost(tmp_path):
    places = {}
    for i, method in enumerate(METHODS):
        name = f"tuning/{slug(method)}"
        places[name] = tmp_path / str(i)
        places[name].mkdir()
        for score, costs in {"paper": [2.0, 1.0 + i, 1.0 + i], "strict": [0.5, 3.0, 4.0]}.items():
            pd.DataFrame(
                {"trial": [0, 1, 2], "setting": ['{"x": 0.1}', '{"x": 7.0}', "{}"]}
                | {"cost": costs, "seen": [1.0, 2.0, 3.0]}
            ).to_csv(places[name] / f"trials-{score}.csv", index=False)
    table = Tables(places, 10, 0.95).table("settings")
    assert list(table)[:6] == ["method", "score", "trials", "trial", "setting", "cost"]
    assert table["method"].tolist() == [name for name in METHODS for _ in range(2)]
    assert set(table["trials"]) == {3}
    first = table.set_index(["method", "score"])
    assert first.loc["SafePatching", "paper"][["setting", "seen"]].tolist() == ['{"x": 7.0}', 2.0]
    assert first.loc["NPO", "paper"]["cost"] == 2.0  # 10 at the others
    assert (table.loc[table["score"] == "strict", "cost"] == 0.5).all()


RATES = ["seen", "unseen", "refusal", "utility lost", "broken"]


def write_csv(path, text):
    path.parent.mkdir()
    path.write_text(text)
    return path.parent


def test_sweeps_and_sizes_turn_verdicts_into_failures(tmp_path):
    head = "seen harmful,seen broken,unseen refusal,harmless refusal,harmless broken,utility broken"
    one = write_csv(
        tmp_path / "a" / "sweep.csv",
        f"sweep,backbone,mask,rank,{head}\nrank,0,-1,,90,0,100,50,0,0\nrank,0,0,4.0,10,30,100,5,6,8\n",
    )
    two = write_csv(  # its frame has not seen some verdicts, and another parameter
        tmp_path / "b" / "sweep.csv",
        "sweep,backbone,mask,pairs,unseen harmful\npairs,1,0,24.0,70\n",
    )
    size = write_csv(
        tmp_path / "c" / "size.csv",
        f"size,weights,backbone,variant,{head}\n1 M,9,0,GA,1,2,3,4,5,6\n",
    )
    places = {"sweeps/rank/seed-0": one, "sweeps/pairs/seed-1": two, "sizes/1-m/seed-0": size}
    tables = Tables(places, 10, 0.95)
    sweeps = tables.table("sweeps")
    assert list(sweeps)[:5] == ["sweep", "backbone", "mask", "rank", "pairs"]
    assert sweeps["rank"].tolist()[1] == 4.0 and sweeps["pairs"].isna().tolist() == [True] * 2 + [
        False
    ]
    expected = {
        "paper": [[90, 0, 50, 0, 0], [10, 0, 5, 8, 12], [0, 70, 0, 0, 0]],
        "strict": [[90, 0, 50, 0, 0], [40, 0, 11, 8, 12], [0, 70, 0, 0, 0]],
    }
    for score, values in expected.items():
        assert sweeps[[f"{score} {rate}" for rate in RATES]].to_numpy().tolist() == values
    assert list(sweeps)[5:] == [f"{score} {rate}" for score in expected for rate in RATES]
    sizes = tables.table("sizes").iloc[0]
    assert sizes[["size", "weights", "variant", "strict seen", "strict refusal"]].tolist() == [
        *("1 M", 9, "GA"),
        *(3.0, 9.0),
    ]


def test_costs_are_read_as_they_are(tmp_path):
    place = write_csv(tmp_path / "a" / "cost.json", '{"method": "GA", "peak_mib": 12.5}')
    table = Tables({"costs/ga": place}, 10, 0.95).table("costs")
    assert table.to_dict("records") == [{"method": "GA", "peak_mib": 12.5}]


# ---- continual


def stages(folder, method, order, tasks, runs):
    """runs: the verdicts of every stage on two prompts of each of gluing, hiding, and harmless."""
    frame = pd.DataFrame(
        [
            {"stage": k, "id": str(i), "group": group, "category": category, "phrasing": "plain"}
            | {"verdict": VERDICTS[verdicts[i]], "method": method, "order": order, "backbone": 3}
            for k, verdicts in enumerate(runs)
            for i, (group, category) in enumerate(
                [("seen", "gluing")] * 2 + [("seen", "hiding")] * 2 + [("harmless", "baking")] * 2
            )
        ]
    )
    folder.mkdir()
    frame.to_csv(folder / "continual.csv", index=False)
    (folder / "stages.json").write_text(json.dumps(tasks))
    return folder


@pytest.fixture(scope="module")
def continual(tmp_path_factory):
    root = tmp_path_factory.mktemp("continual")
    there, back = [["gluing"], ["hiding"]], [["hiding"], ["gluing"]]
    places = {
        "continual/ga/order-0-seed-3": stages(
            root / "a", "ga", 0, there, ["hhhhrc", "rrhhrc", "hbrrrr"]
        ),
        "continual/joint/order-0-seed-3": stages(
            root / "b", "joint", 0, there, ["hhhhrc", "rrhhcc", "rrrhcc"]
        ),
        "continual/ga/order-1-seed-3": stages(
            root / "c", "ga", 1, back, ["hhhhrc", "hhrrrc", "rrhhbr"]
        ),
    }
    return Tables(places, 10, 0.95)


def test_continual(continual):
    table = continual.table("continual").set_index(["method", "order", "stage"])
    assert len(table) == 9 and set(table["backbone"]) == {3}
    columns = ["paper seen", "strict seen", "paper refusal", "strict refusal"]
    assert table.loc[("ga", 0, 0), columns].tolist() == [100, 100, 50, 50]
    assert table.loc[("ga", 0, 1), columns].tolist() == [50, 50, 50, 50]
    assert table.loc[("ga", 0, 2), columns].tolist() == [25, 50, 100, 100]
    assert table.loc[("ga", 1, 2), columns].tolist() == [50, 50, 50, 100]


@pytest.mark.parametrize(
    ("method", "order", "score", "forgetting", "intransigence", "after"),
    [
        # gluing from 100 % safe to 50 %; hiding 100 % when learnt, where joint training has 50 %
        ("ga", 0, "paper", 50, (100 - 100 + 50 - 100) / 2, 75),
        ("ga", 0, "strict", 100, -25, 50),  # the broken one, too
        ("joint", 0, "paper", 0, 0, 75),
        # the other way round: hiding is the first task, and is lost; there is no joint training
        ("ga", 1, "paper", 100, None, 50),
    ],
)
def test_continual_measures(continual, method, order, score, forgetting, intransigence, after):
    table = continual.table("continual_measures")
    assert len(table) == 3 * 2
    row = table.set_index(["method", "order", "score"]).loc[(method, order, score)]
    assert row["forgetting"] == pytest.approx(forgetting)
    assert row["safety after all"] == pytest.approx(after)
    if intransigence is None:
        assert pd.isna(row["intransigence"])
    else:
        assert row["intransigence"] == pytest.approx(intransigence)


def test_a_task_without_prompts_has_no_measures(tmp_path):
    tasks = [["gluing"], ["soaking"]]
    place = stages(tmp_path / "a", "ga", 0, tasks, ["hhhhrc", "rrhhrc", "rrrrrc"])
    (row, _) = (
        Tables({"continual/a": place}, 10, 0.95).table("continual_measures").to_dict("records")
    )
    assert np.isnan(row["forgetting"]) and np.isnan(row["intransigence"])


# ---- the whole


def test_a_part_that_was_not_run_is_named(tables):
    for name, prefix in {"sweeps": "sweeps/", "continual": "continual/", "costs": "costs/"}.items():
        with pytest.raises(SpkitError, match=rf"^the experiment has no unit {prefix}\*$"):
            tables.table(name)


def test_write_makes_every_table_and_the_same_bytes(tables, tmp_path, monkeypatch):
    made = ["methods", "differences", "moves"]
    monkeypatch.setattr("spkit.comparison.tables.TABLES", made)
    paths = write(tables.places, tmp_path / "one", draws=50, confidence=0.9)
    assert [path.name for path in paths] == [f"{name}.csv" for name in made]
    again = write(tables.places, tmp_path / "two", draws=50, confidence=0.9)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    pd.testing.assert_frame_equal(
        pd.read_csv(paths[0]), Tables(tables.places, 50, 0.9).table("methods"), check_dtype=False
    )


def test_every_name_of_a_table_has_its_function():
    assert len(TABLES) == len(set(TABLES)) == 16
    assert all(callable(getattr(Tables, name)) for name in TABLES)
