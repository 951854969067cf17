"""params/smollm2-135m.yaml from wheels to tables, on a tiny random model in the same format.

Its figures mean nothing. What is shown: every stage runs, resumes, and repeats nothing.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from registry import publish

from spkit.alignment import made
from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.running import aligned, walkthrough
from spkit.study import report, run

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params" / "smollm2-135m.yaml"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(params file, environment): the registry is this module's own."""
    patch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("real")
    folder = place / "registry"
    folder.mkdir()
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": "/dev/null",
        "XDG_CACHE_HOME": str(place / "cache"),
        "TQDM_DISABLE": "1",
    }.items():
        patch.setenv(key, value)
    patch.chdir(ROOT)
    given = publish(folder, place) | {"outputs": str(place / "outputs")}
    config = load_params(PARAMS, given)
    params = place / "tiny.yaml"
    params.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    yield params
    patch.undo()


@pytest.fixture(scope="module")
def finished_alignment(tiny):
    config = load_params(tiny)
    aligned.align(config)
    return config, aligned.align_folder(config)


def test_the_alignment_is_kept_with_its_checks(finished_alignment):
    config, folder = finished_alignment
    assert made.finished(config, folder)
    checks = pd.read_csv(folder / made.CHECKS)
    assert list(checks["step"]) == [0, 1]  # it ends at the first check in its windows
    assert (made.model_folder(config, folder) / "model.safetensors").is_file()
    assert not (folder / "checkpoint").exists()
    rows = [json.loads(line) for line in (folder / made.UNALIGNED).read_text().splitlines()]
    assert rows and set(rows[0]) == {"prompt", "response", "ends"}


def test_what_comes_after_names_the_files_of_the_alignment(finished_alignment):
    config, folder = finished_alignment
    after = aligned.after_alignment(config, make=False)
    assert after.backbone.source == str(made.model_folder(config, folder))
    assert after.data.responses == f"unaligned:{folder / made.UNALIGNED}"
    assert after.patching == config.patching


def test_a_second_alignment_does_nothing(finished_alignment):
    config, folder = finished_alignment
    before = (folder / made.RECORD).stat().st_mtime_ns
    aligned.align(config)
    assert (folder / made.RECORD).stat().st_mtime_ns == before


def test_another_parameter_is_another_alignment(finished_alignment):
    config, folder = finished_alignment
    other = Config.from_sources(config.model_dump(mode="json"), {"align.learning_rate": 1e-3})
    assert not made.finished(other, folder)
    with pytest.raises(SpkitError, match="run notebooks/00_backbone.ipynb"):
        aligned.after_alignment(other, make=False)


def test_all_notebooks_run_on_it(tiny, finished_alignment):
    config = walkthrough.run(tiny, {}, cores=2)
    results = pd.read_csv(Path(config.outputs) / "tiny" / "seed-0" / "results.csv")
    assert {"advbench", "over_safety", "rho"} <= set(results["group"])
    assert not {"seen", "unseen", "harmless"} & set(results["group"])


def test_a_study_has_its_tables_and_is_not_repeated(tiny, finished_alignment, capsys):
    config = load_params(tiny)
    folder = run.run(config, seeds=(0, 1), derivations=1)
    found = report.read(folder)
    table = report.main_table(found)
    assert list(table["model"])[0] == "base" and "harmful, AdvBench %" in table
    assert set(found["rates"]["n_backbones"]) == {2}
    assert {"kl", "acc,none"} <= set(found["skills"]["metric"])
    records = sorted(folder.parent.rglob("record.json"))
    before = [path.stat().st_mtime_ns for path in records]
    assert len(records) == 4
    run.run(config, seeds=(0, 1), derivations=1)
    assert [path.stat().st_mtime_ns for path in records] == before


def test_one_backbone_is_no_study(tiny):
    with pytest.raises(SpkitError, match="two backbones at least"):
        run.run(load_params(tiny), seeds=(0,))
