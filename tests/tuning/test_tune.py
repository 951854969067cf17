"""`spkit tune` as a whole, on the micro backbone: its files, its choice, and what is not redone."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from spkit.cli import app
from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.tuning import run as tuning
from spkit.tuning.objective import Objective
from spkit.validation import flattened

MICRO = Path(__file__).parents[2] / "params" / "micro.yaml"
GIVEN = {
    **{"tuning.trials": 6, "tuning.judged": 2, "tuning.prompts_per_cell": 1},
    **{"tuning.ascent_stops": [5.0], "evaluation.max_new_tokens": 2, "threads": 1},
    **{"derivation.quantization": "none", "patching.balance": 6.5, "tuning.max_kl": 5.0},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("tuned")
    table = tuning.tune(MICRO, GIVEN | {"outputs": str(outputs)})
    return outputs, table


def place(outputs):
    return outputs / "micro" / "seed-0" / "tuning"


def copied(done, tmp_path):
    """A copy without the record: as if it had been killed at the very end."""
    shutil.copytree(done[0], tmp_path / "o")
    (place(tmp_path / "o") / "record.json").unlink()
    return tmp_path / "o"


def test_all_files_are_there_and_say_the_same(done):
    outputs, table = done
    folder = place(outputs)
    trials = pd.read_csv(folder / "trials.csv")
    assert len(trials) == 6 and trials["setting"].nunique() == 6
    assert list(table["point"][:4]) == ["base", "OSM x 0.5", "SE x 0.25", "as set"]
    assert len(table) == 6 and table["chosen"].sum() == 1
    record = json.loads((folder / "record.json").read_text())
    assert record["chosen"]["method"] == "SafePatching" and record["stops"] == sorted(
        record["stops"]
    )
    assert all((folder / f"pareto.{kind}").stat().st_size > 10_000 for kind in ("png", "svg"))
    # trial 0 is the setting of the params file: the same deltas, so the same fast rates
    as_set = table[table["point"] == "as set"].iloc[0]
    assert trials.loc[0, "kl"] == as_set["kl"] and trials.loc[0, "harm"] == as_set["fast_harm"]
    assert table.loc[0, "kl"] == 0.0


def test_the_params_file_differs_only_where_it_is_tuned(done):
    outputs, table = done
    chosen = json.loads((place(outputs) / "record.json").read_text())["chosen"]["setting"]
    before = load_params(MICRO, GIVEN | {"outputs": str(outputs)})
    after = load_params(place(outputs) / "chosen.yaml")
    one, other = (flattened(c.model_dump(mode="json")) for c in (before, after))
    differing = {key for key in one if one[key] != other[key]}
    allowed = {f"patching.{key}" for key in chosen} | {"patching.balance"}
    assert differing <= allowed | {"derivation.ascent.stop_mean_loss"}
    assert after.patching.balance is None and after.patching.alpha == chosen["alpha"]


def test_a_finished_one_is_not_run_again(done, monkeypatch, capsys):
    outputs, table = done
    monkeypatch.setattr(tuning, "Tuning", None)  # would be called
    again = tuning.tune(MICRO, GIVEN | {"outputs": str(outputs)})
    assert again["harm"].tolist() == table["harm"].tolist()
    assert "Done already" in capsys.readouterr().out


def test_killed_in_the_middle_it_resumes_to_the_same_files(done, tmp_path, monkeypatch):
    outputs = copied(done, tmp_path)
    (trials,) = place(outputs).glob("work-*/trials.jsonl")
    trials.unlink()
    calls, measure = [], Objective.measure

    def killed(self, deltas):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, deltas)

    monkeypatch.setattr(Objective, "measure", killed)
    command = ["tune", str(MICRO), "-o", f"outputs={outputs}"]
    for key, value in GIVEN.items():
        command += ["-o", f"{key}={json.dumps(value)}"]
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130 and len(trials.read_text().splitlines()) == 1 + 3
    monkeypatch.setattr(Objective, "measure", measure)
    resumed = CliRunner().invoke(app, command)
    assert resumed.exit_code == 0, resumed.output
    assert "as set" in resumed.output and "Rank correlation" in resumed.output
    for name in ("trials.csv", "judged.csv", "chosen.yaml", "pareto.svg"):
        one, other = ((place(o) / name).read_text() for o in (done[0], outputs))
        assert one == other.replace(str(outputs), str(done[0])), name


def test_more_trials_keep_patches_and_trials(done, tmp_path, monkeypatch):
    outputs = copied(done, tmp_path)
    from spkit.tuning import ingredients

    monkeypatch.setattr(ingredients, "make_bundle", None)  # would be called
    measured, measure = [], Objective.measure
    monkeypatch.setattr(
        Objective, "measure", lambda self, d: measured.append(1) or measure(self, d)
    )
    tuning.tune(MICRO, GIVEN | {"outputs": str(outputs), "tuning.trials": 7, "tuning.judged": 1})
    one, other = (pd.read_csv(place(o) / "trials.csv") for o in (done[0], outputs))
    assert other.head(6).equals(one) and len(other) == 7
    assert len(measured) == 1 + 2  # the new trial; as set and the one that is judged


def test_wrong_parameters_are_told_before_anything_is_made(tmp_path):
    def said(**given):
        with pytest.raises(SpkitError) as error:
            tuning.tune(MICRO, {"outputs": str(tmp_path / "o"), **given})
        assert not (tmp_path / "o").exists()
        return str(error.value)

    assert "'SafePatchin', no method of the comparison, did you mean" in said(
        **{"tuning.method": "SafePatchin"}
    )
    assert "tuning.ascent_stops has 20.0, which must be below" in said(
        **{"tuning.ascent_stops": [20.0]}
    )
    harmful = {"objective": "harmful", "category": "hiding"}
    rows = [{"prompt": f"hide it {s}", "split": s, **harmful} for s in ("dev", "test")]
    file = tmp_path / "harmful.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert "has no harmless dev prompts" in said(**{"data.evaluation": str(file)})


def test_another_method_is_tuned(done, tmp_path):
    outputs = copied(done, tmp_path)
    given = {"outputs": str(outputs), "tuning.method": "GA", "tuning.trials": 2, "tuning.judged": 1}
    table = tuning.tune(MICRO, GIVEN | given)
    assert (
        "as set" in list(table["point"]) and not table["point"][table["chosen"]].eq("as set").any()
    )  # it is of another method
    strength = json.loads(table[table["chosen"]].iloc[0]["setting"])["strength"]
    made = load_params(place(outputs) / "chosen.yaml")
    assert made.continual.settings["ga"]["strength"] == strength
    assert made.patching == load_params(MICRO, GIVEN).patching
