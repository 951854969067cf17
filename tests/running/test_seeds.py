"""Means over seeds, paired differences, intervals by hand; the shipped backbone and its maker."""

import math
from pathlib import Path

import pytest

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.evaluation.rates import COLUMNS
from spkit.running import seeds
from spkit.running.runs import stage_folder
from spkit.sandbox import backbone
from spkit.sandbox.backbone import sandbox_recipe
from spkit.sandbox.ship import ship

PARAMS = Path(__file__).parents[2] / "params"
T_3 = 4.302652729696142  # Student's 97.5 % quantile with 2 degrees of freedom, from a table
CELLS = (
    ("seen", "harmful"),
    ("unseen", "harmful"),
    ("harmless", "refusal"),
    ("utility", "utility"),
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three seeds: base is harmful in 40, 50 and 60 %, SafePatching in 10, 30 and 20 %."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("run_name: three\n")
    rates = {"base": (40, 50, 60), "SafePatching": (10, 30, 20)}
    for seed in range(3):
        for notebook, model in zip(seeds.NOTEBOOKS, rates, strict=True):
            put(seed, notebook, [(model, rates[model][seed])])
        put(seed, "04_continual_psa", [("GA", 99)])  # another kind of run: not to be mixed in
    return "p.yaml"


def put(seed, notebook, models):
    folder = stage_folder(Config(run_name="three", seed=seed), notebook)
    folder.mkdir(parents=True)
    lines = [",".join(COLUMNS)]
    for model, k in models:
        for group, metric in (
            *CELLS,
            ("seen", "broken"),
            ("unseen", "broken"),
            ("harmless", "broken"),
        ):
            objective = {"harmless": "over_safety", "utility": "utility"}.get(group, "harmful")
            count = k if metric == "harmful" else 5
            where = f"three,{model},{seed},test,{objective},{group},all,{metric}"
            lines.append(f"{where},100,{count},{count / 100},0,1")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    (folder / "record.json").write_text("{}")


def cell(table, model, kind, metric="harmful seen %"):
    (row,) = table[
        (table["model"] == model) & (table["kind"] == kind) & (table["metric"] == metric)
    ].to_dict("records")
    return row


def test_means_and_intervals_by_hand(runs):
    path, table, _ = seeds.write(runs, [0, 1, 2])
    assert path.is_file() and path.parent.name == "three"
    base = cell(table, "base", "rate")
    half = T_3 * 10 / math.sqrt(3)  # the standard deviation of 40, 50, 60 is 10
    assert (base["n"], base["mean"]) == (3, 50)
    assert base["low"] == pytest.approx(50 - half) and base["high"] == pytest.approx(50 + half)
    assert "GA" not in set(table["model"])


def test_differences_are_paired_by_seed(runs):
    _, table, _ = seeds.write(runs, [0, 1, 2])
    gap = cell(table, "SafePatching", "minus base")
    assert gap["mean"] == pytest.approx(-30)  # -30, -20 and -40
    assert gap["high"] == pytest.approx(-30 + T_3 * 10 / math.sqrt(3))
    assert cell(table, "base", "minus base")["mean"] == 0


def test_the_tables_show_mean_and_half_the_interval(runs):
    said = seeds.report(runs, [0, 1, 2], {"patching.balance": None})
    assert "| base         | 50.0 ± 24.8" in said and "| SafePatching | 20.0 ± 24.8" in said
    assert "-30.0 ± 24.8" in said
    difference = said.split("Paired difference")[1]
    assert "| base" not in difference
    # where alpha is found, the method is called so; the files keep its one name
    said = seeds.report(runs, [0, 1, 2])
    assert "| SafePatching, balanced | 20.0 ± 24.8" in said
    assert "balanced" not in Path("outputs/three/seeds.csv").read_text()


def test_what_is_missing_is_said(runs):
    with pytest.raises(SpkitError, match="seed-7 holds no results"):
        seeds.write(runs, [0, 7])
    with pytest.raises(SpkitError, match="two seeds at least; there is 1"):
        seeds.write(runs, [0])
    put(3, seeds.NOTEBOOKS[0], [("base", 1)])
    with pytest.raises(SpkitError, match="seed 3 has other models than seed 0"):
        seeds.write(runs, [0, 3])


def test_a_shipped_backbone_is_used_for_its_own_recipe_only(tmp_path, monkeypatch):
    micro = PARAMS / "micro.yaml"
    ship(micro, tmp_path / "weights")
    monkeypatch.setattr(backbone, "SHIPPED", tmp_path / "weights")
    config = load_params(micro, {"sandbox.weights": "shipped"})
    assert backbone._shipped_recipe() == sandbox_recipe(config)
    copied = backbone.prepare_backbone(config, tmp_path / "copy")
    same = (tmp_path / "weights" / "model.safetensors").read_bytes()
    assert (copied / "model.safetensors").read_bytes() == same
    assert not (copied / "recipe.json").exists()
    other = load_params(micro, {"sandbox.weights": "shipped", "seed": 1})
    trained = backbone.prepare_backbone(other, tmp_path / "other")
    assert (trained / "model.safetensors").read_bytes() != same


def test_the_shipped_backbone_is_that_of_the_params_file():
    assert backbone._shipped_recipe() == sandbox_recipe(load_params(PARAMS / "sandbox.yaml"))
    weights = backbone.SHIPPED / "model.safetensors"
    assert weights.stat().st_size < 16 * 2**20
    assert {path.suffix for path in backbone.SHIPPED.iterdir()} == {
        ".safetensors",
        ".json",
        ".jinja",
    }


def test_another_backbone_cannot_be_shipped(tmp_path):
    (tmp_path / "p.yaml").write_text("backbone: {source: some/model}\n")
    with pytest.raises(SpkitError, match="backbone.source is 'some/model', not 'sandbox'"):
        ship(tmp_path / "p.yaml", tmp_path / "weights")
