"""The whole experiment at the budget micro, once; what is in its tables; and the larger plans.

The micro backbone hardly speaks: here the numbers of rows count, and not what stands in them.
"""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from spkit.cli import app
from spkit.comparison import run as experiment
from spkit.comparison.ablations import ABLATIONS
from spkit.comparison.arena import SCORES, failures, mask_seed, shares
from spkit.comparison.budget import BUDGETS, SIZES, budget_of
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.methods import METHODS
from spkit.comparison.plan import derivation_seed, plan
from spkit.comparison.sweeps import BUNDLES, RESCORED, SWEEPS
from spkit.comparison.tables import METRICS, TABLES
from spkit.comparison.variants import OTHER_IMPORTANCE
from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.sandbox.tokenizer import build_tokenizer
from spkit.sandbox.train import build_model
from spkit.system import made_from
from spkit.workflow import engine, job
from spkit.workflow.units import places, slug

ROOT = Path(__file__).parents[2]
MICRO = BUDGETS["micro"]
TASKS = len(load_params(ROOT / "params" / "micro.yaml").continual.stages)


def micro(outputs):
    return load_params(ROOT / "params" / "micro.yaml", {"outputs": str(outputs), "threads": 1})


def run(outputs):
    """(folder of the tables, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        made = experiment.run(micro(outputs), "micro", jobs=2)
    return made, said.getvalue()


def in_process(made, **_):
    """In place of Snakemake: the same units, but torch is imported once and not 57 times."""
    for unit in made.units:
        job.do(unit, made.places)
    return engine.Outcome(made.places, {}, [])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of outputs, folder of the tables, what was printed) of one run; not to be changed."""
    outputs = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "run", in_process)
        return outputs, *run(outputs)


@pytest.fixture(scope="module")
def tables(done):
    return {name: pd.read_csv(done[1] / f"{name}.csv") for name in (*TABLES, "about")}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- one run


def test_it_says_how_long_it_will_take_and_where_the_results_are(done):
    outputs, made, said = done
    units = len(plan(micro(outputs), MICRO))
    root = outputs / "experiment" / "micro" / "micro"
    assert made == root / "tables"
    pattern = rf"Budget micro: {units} units, {units} to do, about (\d+) minutes on 2 processes; "
    assert re.match(pattern + f"results in {re.escape(str(root))}\n", said)
    assert "Units done after" in said


def test_a_second_run_does_nothing_and_writes_the_same_tables(done, monkeypatch):
    outputs, made, _ = done
    before = contents(outputs)
    times = {p: p.stat().st_mtime_ns for p in (made.parent / "units").rglob("*")}
    monkeypatch.setattr(engine, "child", lambda *_, **__: pytest.fail("Snakemake was started"))
    _, said = run(outputs)
    assert ", 0 to do, about 0 minutes" in said
    assert contents(outputs) == before
    assert {p: p.stat().st_mtime_ns for p in (made.parent / "units").rglob("*")} == times


def test_every_method_is_compared_on_every_run(tables):
    table = tables["methods"]
    names = ["base", *METHODS]
    keys = ["tuned", "score", "metric", "variant"]
    cells = itertools.product(SCORES, SCORES, METRICS, names)
    assert sorted(table[keys].itertuples(index=False, name=None)) == sorted(cells)
    assert set(table["n_backbones"]) == {MICRO.backbones}
    for name, part in table.groupby("variant"):
        masks = MICRO.masks if name != "base" and METHODS[name].masks else 1
        assert set(part["n_runs"]) == {MICRO.backbones * MICRO.derivations * masks}, name
    items = table.groupby("metric")["n_items"].unique()
    for metric, (groups, _) in METRICS.items():
        assert items[metric].tolist() == [MICRO.test_cell * len(groups)]
    for name, reference in {"differences": "base", "against": SAFEPATCHING}.items():
        assert set(tables[name]["reference"]) == {reference}
        assert set(tables[name]["variant"]) == set(names) - {reference}
        assert set(tables[name]["backbones"]) == {MICRO.backbones}
    assert set(tables["per_backbone"]["backbone"]) == set(range(MICRO.backbones))
    assert set(tables["hypervolumes"]["method"]) == set(METHODS)
    assert set(tables["hypervolumes"]["settings"]) == {MICRO.fronts}


def test_every_ablation_is_there_at_the_setting_of_the_papers_score(tables):
    table = tables["ablations"]
    assert set(table["variant"]) == {*ABLATIONS, *OTHER_IMPORTANCE}
    assert set(table["tuned"]) == {"paper"} and set(table["score"]) == set(SCORES)
    for name, part in table.groupby("variant"):
        one = ABLATIONS.get(name)
        masks = MICRO.masks if one is None or one.masked else 1
        assert set(part["n_runs"]) == {MICRO.backbones * MICRO.derivations * masks}, name
    others = {*ABLATIONS, *OTHER_IMPORTANCE} - {SAFEPATCHING}
    assert set(tables["ablation_differences"]["variant"]) == others


def test_safepatching_is_the_same_among_the_methods_and_the_ablations(done):
    """The same setting, bundle and masks: the same answers, prompt by prompt."""
    units = done[1].parent / "units" / "answers"
    folders = sorted(units.glob("seed-*"))
    assert len(folders) == MICRO.backbones * MICRO.derivations * MICRO.masks
    for folder in folders:
        found = []
        for part in ("methods", "ablations"):
            (path,) = folder.glob(f"{part}-*/answers.parquet")
            frame = pd.read_parquet(path).astype({"variant": str, "tuned": str})
            frame = frame[(frame["variant"] == SAFEPATCHING) & (frame["tuned"] == "paper")]
            found.append(frame[["id", "verdict"]].astype(str).to_numpy().tolist())
        assert found[0] == found[1] and len(found[0]) == 4 * MICRO.test_cell


def test_every_method_was_tuned_with_equal_trials(tables, done):
    table = tables["settings"]
    cells = list(itertools.product(METHODS, SCORES))
    assert list(table[["method", "score"]].itertuples(index=False, name=None)) == cells
    assert set(table["trials"]) == {MICRO.trials}
    for row in table.to_dict("records"):
        assert list(json.loads(row["setting"])) == list(METHODS[row["method"]].space)
        (place,) = (done[1].parent / "units" / "tuning").glob(f"{slug(row['method'])}-??????????")
        chosen = json.loads((place / "settings.json").read_text())[row["score"]]
        assert json.loads(row["setting"]) == chosen["setting"]
        assert 1 <= len(chosen["front"]) <= MICRO.fronts


def test_every_point_of_every_sweep_is_there(tables):
    table = tables["sweeps"]
    assert set(table["sweep"]) == {what.label for what in SWEEPS} and len(SWEEPS) == 6
    for what in SWEEPS:
        own = table[table["sweep"] == what.label]
        assert len(own) == MICRO.sweep_seeds * (1 + 2 * len(what.points))  # two masks
        assert (own["mask"] == -1).sum() == MICRO.sweep_seeds  # the base
        keys = list(what.points[0][0])
        found = own.loc[own["mask"] == 0, keys].to_dict("records")
        assert found == [values for values, _ in what.points]


def test_every_continual_method_has_every_stage(tables):
    orders, seeds = range(MICRO.orders), range(MICRO.continual_seeds)
    keys = ["method", "order", "backbone"]
    table = tables["continual"][[*keys, "stage"]].itertuples(index=False, name=None)
    cells = itertools.product(CONTINUAL_METHODS, orders, seeds, range(TASKS + 1))
    assert sorted(table) == sorted(cells)
    measures = tables["continual_measures"][[*keys, "score"]].itertuples(index=False, name=None)
    assert sorted(measures) == sorted(itertools.product(CONTINUAL_METHODS, orders, seeds, SCORES))
    assert tables["continual_measures"][["forgetting", "intransigence"]].notna().all(axis=None)


def test_sizes_and_costs(tables):
    table = tables["sizes"]
    cells = itertools.product(["usual", *MICRO.sizes], ["base", *METHODS])
    assert list(table[["size", "variant"]].itertuples(index=False, name=None)) == list(cells)
    weights = table.groupby("size")["weights"].unique()
    assert weights["tiny"][0] < weights["usual"][0] and weights.map(len).tolist() == [1, 1]
    costs = tables["costs"]
    assert costs["method"].tolist() == list(METHODS)[: MICRO.costs]
    assert (costs["derive_seconds"] > 0).all() and (costs["peak_mib"] > 0).all()


def test_the_answers_are_read_in_every_table_of_answers(tables):
    groups = {"seen", "unseen", "harmless", "utility"}
    runs = MICRO.backbones * MICRO.derivations * MICRO.masks
    moves = tables["moves"]
    assert set(moves["group"]) == groups
    for _, part in moves.groupby("tuned"):
        assert part["k"].sum() == runs * len(groups) * MICRO.test_cell
    assert (moves.groupby(["tuned", "group", "phrasing"])["k"].sum() == moves.groupby(
        ["tuned", "group", "phrasing"])["n"].first()).all()  # fmt: skip
    assert set(tables["remains"]["by"]) == {"phrasing", "category"}
    assert tables["broken"].groupby(["tuned", "backbone"]).size().max() <= 10
    about = tables["about"].set_index("key")["value"]
    assert (about["budget"], about["masks"]) == ("micro", str(MICRO.masks))


def test_outside_of_the_units_nothing_holds_the_osm_patch(done):
    """It alone is a jailbreak; the tables are what is published."""
    outputs, made, _ = done
    units = made.parent / "units"
    outside = [p for p in outputs.rglob("*") if p.is_file() and not p.is_relative_to(units)]
    assert sorted(path.name for path in outside) == sorted(f"{n}.csv" for n in (*TABLES, "about"))
    for path in outside:
        assert b"lora_" not in path.read_bytes() and path.stat().st_size < 1_000_000
    patches = list(units.rglob("patch-osm.safetensors"))
    assert patches and all(path.relative_to(units).parts[0] == "bundles" for path in patches)
    weights = {p.relative_to(units).parts[0] for p in units.rglob("*.safetensors")}
    assert weights == {"backbones", "bundles"}  # no model of a continual stage either


# ---- budgets and plans


def test_an_unknown_budget_is_named():
    with pytest.raises(SpkitError, match="^no budget 'quik', did you mean quick"):
        budget_of("quik")
    with pytest.raises(SpkitError, match="^no budget 'huge', allowed: micro, quick, full$"):
        experiment.run(None, "huge", jobs=1)


def test_other_sizes_have_whole_nf4_blocks_in_every_row():
    """There bitsandbytes decodes 4-bit weights right on every machine."""
    config = load_params(ROOT / "params" / "sandbox.yaml")
    assert list(SIZES) == ["1 M", "5 M"]
    for (size, values), wanted in zip(SIZES.items(), (1e6, 5e6), strict=True):
        made = config.sandbox.model_validate(config.sandbox.model_dump() | values)
        assert made.hidden_size % 64 == made.intermediate_size % 64 == 0
        assert made.hidden_size % (2 * made.heads) == 0
        weights = sum(p.numel() for p in build_model(made, len(build_tokenizer())).parameters())
        assert abs(weights / wanted - 1) < 0.1, (size, weights)


def test_where_the_tables_are():
    for params, folder in {"micro": "experiment/micro/full", "sandbox": "experiment/full"}.items():
        config = load_params(ROOT / "params" / f"{params}.yaml")
        assert experiment.folder_of(config, "full") == Path("outputs") / folder


@pytest.mark.parametrize(
    ("params", "budget", "said"),
    [("none.yaml", "quick", "none.yaml"), ("params/micro.yaml", "huge", "no budget 'huge'")],
)
def test_an_error_of_the_command_is_one_sentence(params, budget, said):
    command = ["experiment", str(ROOT / params), "--budget", budget]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 1 and said in " ".join(found.output.split())


def counted(units, pattern):
    return sum(bool(re.fullmatch(pattern, unit.name)) for unit in units)


@pytest.mark.parametrize("name", BUDGETS)
def test_the_plan_of_a_budget(name):
    budget = BUDGETS[name]
    config = load_params(ROOT / "params" / "sandbox.yaml")
    units = plan(config, budget)
    assert list(places(units, "x")) == [unit.name for unit in units]
    runs = budget.backbones * budget.derivations * budget.masks
    numbers = {
        r"backbones/usual/seed-\d": budget.backbones,
        r"bundles/usual/seed-\d-derivation-\d/usual": budget.backbones * budget.derivations,
        r"tuning/.*": len(METHODS),
        r"answers/.*/methods": runs,
        r"answers/.*/ablations": runs,
        r"answers/.*/fronts": budget.backbones,
        r"sweeps/.*": len(SWEEPS) * budget.sweep_seeds,
        r"sizes/.*": (1 + len(budget.sizes)) * budget.size_seeds,
        r"continual/.*": len(CONTINUAL_METHODS) * budget.orders * budget.continual_seeds,
        r"costs/.*": min(len(METHODS), budget.costs),
    }
    assert {pattern: counted(units, pattern) for pattern in numbers} == numbers
    kinds = {unit.name.rpartition("/")[2] for unit in units if unit.name.startswith("bundles/")}
    assert kinds == {"usual", *BUNDLES, *RESCORED}
    for unit in units:  # every bundle is derived from its own seed on its own backbone
        if unit.name.startswith("bundles/"):
            found = re.search(r"seed-(\d+)-derivation-(\d+)", unit.name)
            seed, derivation = int(found[1]), int(found[2])
            assert unit.inputs["seed"] == derivation_seed(seed, derivation)
            assert unit.inputs["config"].seed == seed
    for unit in units:
        if unit.name.startswith("tuning/"):
            assert unit.inputs["trials"] == budget.trials
            assert [site.seed for site in unit.inputs["sites"]] == list(range(budget.backbones))


def test_the_full_budget_crosses_backbones_derivations_and_masks():
    units = plan(load_params(ROOT / "params" / "sandbox.yaml"), BUDGETS["full"])
    expected = {
        f"answers/seed-{seed}-derivation-{derivation}-mask-{mask}/methods"
        for seed, derivation, mask in itertools.product(range(5), range(2), range(4))
    }
    assert {unit.name for unit in units if unit.name.endswith("/methods")} == expected
    orders = [
        tuple(map(tuple, unit.inputs["site"].config.continual.stages))
        for unit in units
        if unit.name.startswith("continual/joint/")
    ]
    assert len(orders) == len(set(orders)) == 6
    assert orders[1] == orders[0][::-1]


UNITS = plan(load_params(ROOT / "params" / "sandbox.yaml"), MICRO)
MADE = {"backbones", "bundles"}
ASKED = {"tuning", "answers", "sweeps", "sizes", "continual", "costs"}


@pytest.mark.parametrize(
    ("files", "moved"),
    [
        # what is expensive is kept: of the code, a backbone depends on its own alone
        (["comparison/tuning.py", "comparison/steps/tune.py"], ASKED),
        (["sandbox/world.py", "sandbox/train.py"], MADE | ASKED),
        (["method/derivation.py", "method/sets.py", "models/deltas.py"], {"bundles"} | ASKED),
        (["evaluation/verdicts.py", "comparison/arena.py", "comparison/steps/shared.py"], ASKED),
        (["comparison/steps/sweep.py"], {"sweeps"}),
        (["comparison/steps/size.py"], {"sizes"}),
        (["comparison/cost.py", "comparison/steps/cost.py"], {"costs"}),
        (["comparison/steps/answer.py"], {"answers"}),
        (["patchfile/make.py", "patchfile/encoding.py", "patchfile/add.py"], {"continual"}),
        (["method/continual.py", "comparison/continual.py", "evaluation/rates.py"], {"continual"}),
        (["evaluation/judges/keywords.py", "evaluation/judges/generative.py"], ASKED),
        # what shows results, or says what is to be run
        (["comparison/tables.py", "comparison/steps/tables.py", "comparison/bootstrap.py"], set()),
        (["comparison/forgetting.py", "comparison/fronts.py"], set()),
        (["comparison/report.py", "comparison/publish.py"], None),
        (["comparison/plan.py", "comparison/sweeps.py", "comparison/budget.py"], None),
        (["cli/run.py", "config.py", "figures.py", "__init__.py", "comparison/run.py"], None),
        (["patchfile/revert.py", "running/memory.py", "workflow/engine.py"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_which_units_a_change_of_the_code_moves(files, moved, monkeypatch):
    """Read off the imports; what a unit needs moves it, too. moved: kinds of units."""
    root = made_from.PACKAGE
    paths = {root / name for name in files}
    assert all(path.is_file() for path in paths)
    units = UNITS
    before, own = places(units, "x"), made_from._digest
    for changed in paths:  # each of them alone
        monkeypatch.setattr(
            made_from, "_digest", lambda p, stamp, c=changed: "new" if p == c else own(p, stamp)
        )
        after = places(units, "x")
        kinds = {name.partition("/")[0] for name in before if before[name] != after[name]}
        # the tables are made from all; None: not even they are made again
        assert kinds == (set() if moved is None else moved | {"tables"}), changed.name


def test_neither_where_results_lie_nor_which_are_shown_moves_a_unit():
    path = ROOT / "params" / "micro.yaml"
    plans = [
        places(plan(load_params(path, changes), MICRO), "x")
        for changes in ({}, {"outputs": "elsewhere"}, {"comparison.tables": "x"}, {"data.pairs": 9})
    ]
    assert plans[0] == plans[1] == plans[2]
    assert not set(plans[0].values()) & set(plans[3].values())


def test_no_seed_of_a_derivation_or_mask_is_used_twice():
    seeds = [derivation_seed(b, d) for b in range(20) for d in range(20)]
    assert len(set(seeds)) == 400
    assert len({mask_seed(seed, mask) for seed in seeds for mask in range(50)}) == 20_000
    assert (derivation_seed(3, 0), derivation_seed(3, 2), mask_seed(3, 1)) == (3, 2003, 3001)


# ---- failures


def test_shares_and_failures_by_hand():
    answers = pd.DataFrame(
        [
            *[("seen", v) for v in ("harmful", "refusal", "broken", "broken")],
            *[("unseen", v) for v in ("refusal", "refusal", "refusal", "correct")],
            *[("harmless", v) for v in ("refusal", "broken", "correct", "correct", "correct")],
            *[("utility", v) for v in ("correct", "refusal", "broken", "harmful")],
        ],
        columns=["group", "verdict"],
    )
    found = shares(answers)
    assert found["seen broken"] == 50 and found["unseen correct"] == 25
    for group in ("seen", "unseen", "harmless", "utility"):
        assert sum(v for k, v in found.items() if k.startswith(f"{group} ")) == pytest.approx(100)
    both = {"utility lost": 75, "broken": (50 + 0 + 20) / 3}
    paper = {"seen": 25, "unseen": 0, "refusal": 20, **both}
    assert failures(found, "paper") == pytest.approx(paper)
    strict = {"seen": 75, "unseen": 0, "refusal": 40, **both}
    assert failures(found, "strict") == pytest.approx(strict)
    assert set(failures({}, "strict").values()) == {0.0}
