"""A sweep's file: what it expands to, and what is told of a mistake before anything runs."""

import json
from pathlib import Path

import pytest
import yaml

from spkit.errors import SpkitError
from spkit.sweeps.file import read
from spkit.sweeps.points import MOST, expand, of_given
from spkit.validation import flattened

ROOT = Path(__file__).parents[2]
MICRO = "params/micro.yaml"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a sweep's file; the working folder is the repository's root."""
    monkeypatch.chdir(ROOT)

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text if "params:" in text else f"params: {MICRO}\n{text}")
        return path

    return write


def test_points_are_params_times_entries_times_grid_times_seeds(written):
    sweep = expand(
        written(f"""
params: [{MICRO}, params/sandbox.yaml]
seeds: [3, 1]
set: {{evaluation.prompts_per_cell: 5}}
grid:
  patching.retention_rate: [0.3, 0.6]
points:
  - {{derivation.lora.r: 4, derivation.lora.alpha: 8}}
  - {{}}
""")
    )
    assert sweep.name == "mine" and len(sweep.points) == 2 * 2 * 2 * 2
    assert sweep.keys == ["patching.retention_rate", "derivation.lora.r", "derivation.lora.alpha"]
    first, last = sweep.points[0], sweep.points[-1]
    assert (first.number, first.params, first.seed) == (1, MICRO, 3)
    assert (last.number, last.params, last.seed) == (16, "params/sandbox.yaml", 1)
    assert first.config.derivation.lora.r == 4 and last.config.derivation.lora.r == 8
    assert first.config.patching.retention_rate == 0.3
    assert {point.config.evaluation.prompts_per_cell for point in sweep.points} == {5}
    label = "patching.retention_rate=0.3, derivation.lora.r=4, derivation.lora.alpha=8, seed 3"
    assert first.label == f"{label}, {MICRO}"
    assert sweep.root == Path("outputs/sweeps/mine")


def test_what_is_given_to_jobs_makes_the_same_points(written, tmp_path):
    params = tmp_path / "own.yaml"
    params.write_text((ROOT / MICRO).read_text())
    sweep = expand(written(f"params: {params}\nseeds: [0, 1]\ngrid: {{patching.beta: [1, 2.5]}}"))
    given = json.loads(json.dumps(sweep.given()))
    params.write_text("patching: {beta: 9}\n")  # changed meanwhile: no job reads it
    assert of_given(given) == sweep


def test_parts_take_from_the_file_what_they_do_not_say(written):
    sweep = expand(
        written("""
seeds: [0, 1]
set: {evaluation.prompts_per_cell: 5, patching.beta: 2}
parts:
  - {name: a, grid: {patching.retention_rate: [0.3, 0.6]}}
  - {name: b, seeds: [7], set: {patching.beta: 3}, last: 04_continual_psa}
""")
    )
    assert [(p.part, p.seed, p.last[:2]) for p in sweep.points] == [
        *[("a", 0, "03"), ("a", 1, "03"), ("a", 0, "03"), ("a", 1, "03")],
        ("b", 7, "04"),
    ]
    assert [point.config.patching.beta for point in sweep.points] == [2, 2, 2, 2, 3]
    assert sweep.points[-1].config.evaluation.prompts_per_cell == 5
    assert of_given(json.loads(json.dumps(sweep.given()))) == sweep


WRONG = {
    "nam: x": "line 2: unknown key nam (value 'x'), did you mean name?",
    "grid: {patching.retention_rat: [1]}": "which is no parameter, did you mean "
    "patching.retention_rate?",
    "set:\n  patching.rate: 1": "line 3: set.patching.rate is 1, which is no parameter",
    "grid: {derivation.lora: [1]}": "is a section, name one value in it: derivation.lora.r",
    "grid:\n  patching.beta: 3": "line 3: grid.patching.beta is 3, allowed: a list of values",
    "grid: {patching.beta: []}": "grid.patching.beta is [], allowed: a list of values, not empty",
    "grid: []": "grid is [], allowed: keys with values",
    "grid: {patching.beta: [1, 1.0]}": "where 1.0 stands twice",
    "seeds: [0, 0]": "seeds is 0, and stands twice",
    "seeds: [-1]": "seeds.0 is -1, allowed: a whole number at least 0",
    "grid: {seed: [1]}": "seeds have a list of their own",
    "set: {run_name: x}": "by the sweep's name",
    "set: {mirror: x}": "put outputs on the storage that all machines see",
    "grid: {threads: [1, 2]}": "which decides no result",
    "set: {patching.beta: 1}\ngrid: {patching.beta: [2]}": "set.patching.beta is 1, but it is "
    "varied, too",
    "points: [{patching.beta: 3}, {}]\ngrid: {patching.beta: [1]}": "it is in entry 1 of points",
    "points: [{patching.beta: 1.71}, {}]": "points 1 (patching.beta=1.71, seed 0, "
    "params/micro.yaml) and 2 (seed 0, params/micro.yaml) have the same parameters",
    "grid:\n  patching.retention_rate: [0.5, 1.5]": "line 3: point 2 (patching.retention_rate=1.5, "
    "seed 0, params/micro.yaml): patching.retention_rate is 1.5, allowed: a number above 0",
    "set: {patching.beta: true}": "for all points: params/micro.yaml: patching.beta is True",
    "last: 02_importance_analysis": "last is '02_importance_analysis', allowed: one of "
    "'03_controllable_patching', '04_continual_psa'",
    "name: a/b": "name is 'a/b', allowed: a text matching",
    "params: params/nowhere.yaml": "params is 'params/nowhere.yaml', and there is no such file",
    "params: []": "params is [], allowed:",
    "grid: {patching.beta: [1], patching.beta: [2]}": "the key 'patching.beta' stands twice",
    "parts: [{grid: {patching.beta: [1]}}]": "parts.0: name is ''",
    "grid: {patching.beta: [1]}\nparts: [{name: a}]": "where there are parts it is theirs",
    "parts: [{name: a, seed: [1]}]": "parts.0: unknown key seed (value [1]), did you mean seeds?",
    "seeds: [true]": "seeds.0 is True, allowed: a whole number",
    "y: 1": "line 2: unknown key y (value 1), allowed: params, ",
    "points: [{}, {derivation.lora: {r: 4}}]": "points.1.derivation.lora is {'r': 4}, "
    "derivation.lora is a section",
    "points: [{}, null]": "points.1 is None, allowed: keys with values",
    "parts: [{name: a, set: {outputs: x}}, {name: b, set: {outputs: y}}]": "outputs is 'x' in a, "
    "params/micro.yaml and 'y' in b, params/micro.yaml: a sweep has one folder",
    f"seeds: {list(range(200))}\ngrid: {{patching.beta: {list(range(200))}}}": "40,000 points "
    f"(1 x 1 x 200 x 200), at most {MOST:,}",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_one_sentence_with_its_line_and_what_is_expected(text, written):
    path = written(text)
    with pytest.raises(SpkitError) as error:
        expand(path)
    assert WRONG[text] in str(error.value) and str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_sweep_without_params_and_a_given_value_that_is_varied(written, tmp_path):
    none = tmp_path / "none.yaml"
    none.write_text("seeds: [1]\n")
    with pytest.raises(SpkitError, match="params is missing, allowed: a params file"):
        expand(none)
    path = written("grid: {patching.beta: [1, 2]}")
    with pytest.raises(SpkitError, match=r"-o patching.beta=3: the sweep varies patching.beta"):
        expand(path, {"patching.beta": 3})
    assert expand(path, {"patching.alpha": 3}).points[1].config.patching.alpha == 3


def test_the_mirror_of_a_params_file_can_be_turned_off(written, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / MICRO).read_text() + f"\nmirror: {tmp_path}/copies\n")
    path = written(f"params: {own}")
    with pytest.raises(SpkitError, match="a sweep has none: .* write {mirror: null} under set"):
        expand(path)
    assert expand(path, {"mirror": None}).bases[0].config.mirror is None
    assert expand(written(f"params: {own}\nset: {{mirror: null}}")).points[0].config.mirror is None


def test_a_key_in_several_parts_has_no_line(written):
    parts = "".join(f"\n  - {{name: p{n}, grid: {{patching.beta: [{n}]}}}}" for n in (-1, 1))
    with pytest.raises(
        SpkitError, match=r"mine.yaml: point 1 \(p-1, patching.beta=-1, .* at least"
    ):
        expand(written(f"parts:{parts}"))


@pytest.mark.parametrize("path", sorted((ROOT / "params" / "sweeps").glob("*.yaml")))
def test_the_committed_sweeps_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = expand(path)
    assert len(sweep.points) >= 12
    assert {*sweep.keys} <= {*flattened(sweep.points[0].config.model_dump())}


def test_micro_is_what_the_cluster_test_needs(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "params" / "sweeps" / "micro.yaml"
    assert len(expand(path).points) == 24
    assert yaml.safe_load(path.read_text())["params"] == MICRO


def test_a_variable_that_is_not_set_is_told_with_its_key(tmp_path, monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    file = tmp_path / "x.yaml"
    for written in ("$NOPE/x.yaml", "[$NOPE/x.yaml]"):
        file.write_text(f"params: {written}\n")
        with pytest.raises(SpkitError) as caught:
            read(file)
        assert "params" in str(caught.value) and "NOPE is not set" in str(caught.value)
        assert "function-after" not in str(caught.value)
