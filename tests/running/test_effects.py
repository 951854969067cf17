"""What given parameters change, and which of them change nothing."""

import shutil
from pathlib import Path

import pytest

from spkit.config import Config, load_params
from spkit.running import effects

ROOT = Path(__file__).parents[2]
UNUSED = {"reader": "own", "path": str(ROOT / "README.md")}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"patching.alpha": 2.0}, "patching.balance is 0.959"),
        ({"sandbox.layers": 2}, "sandbox.weights is shipped"),
        ({"align.pairs": 8}, "align.harmful is null"),
        ({"judges.classifier.label": 0}, "no judge is 'classifier'"),
        ({"judges.generative.prompt": "wildguard"}, "no judge is 'generative'"),
        ({"utility.limit": 5}, "utility.tasks is empty"),
        ({"utility.kl_prompts": 5}, "utility.kl is null"),
        ({"utility.mt_bench.max_new_tokens": 5}, "utility.mt_bench.prompts is null"),
        ({"baselines.npo.beta": 0.2}, "continual.methods has no npo"),
        ({"continual.settings.npo.strength": 2.0}, "continual.methods has no npo"),
        ({"tuning.trials": 5}, "`spkit tune`"),
        ({"derivation.se": "x", "derivation.ascent.max_steps": 9}, "derivation.se is an adapter"),
        ({"backbone.source": "a/b", "sandbox.weights": "train"}, "the backbone is a/b"),
        ({"derivation.se": "x", "derivation.ascent.max_steps": 9}, "notebook 04 alone, which"),
        (
            {"derivation.se": "x", "derivation.osm": "y", "derivation.lora.r": 4},
            "both patches are adapters of one's own",
        ),
        (
            {
                "judges.harmful": ["classifier"],
                "judges.classifier.model": str(ROOT / "params"),
                "judges.classifier.revision": "abc",
            },
            "judges.classifier.model is a folder or a file",
        ),
        ({"data.sources.x": UNUSED}, "no parameter names the source x"),
        (
            {
                "data.harmful": "x",
                "data.sources.x": UNUSED,
                "data.sources.x.revision": "dev",
            },
            "its path is a local file",
        ),
        ({"data.response_tokens": 9}, "data.responses is not 'unaligned'"),
    ],
)
def test_an_override_without_effect_is_named_with_the_reason(given, why):
    (said,) = effects.without_effect(Config.from_sources({}, given), given)
    assert said.startswith(f"{list(given)[-1]} has no effect here: ") and why in said


@pytest.mark.parametrize(
    "given",
    [
        {"patching.balance": None, "patching.alpha": 2.0},
        {"patching.beta": 2.0},
        {"sandbox.weights": "train", "sandbox.layers": 2},
        {"judges.harmful": ["keywords"], "judges.keywords": "gcg"},
        {"utility.tasks": ["piqa"], "utility.limit": 5},
        {"continual.settings.ga.strength": 2.0},
        {"align.harmful": None},
    ],
)
def test_one_with_an_effect_is_not(given):
    assert effects.without_effect(Config.from_sources({}, given), given) == []


def test_every_rule_is_about_a_parameter_that_there_is():
    from spkit.validation import dotted_keys

    known = list(dotted_keys(Config))
    for name, *_ in effects.RULES:
        assert any(key.startswith(name) or name.startswith(f"{key}.") for key in known), name


def test_what_a_replaced_section_changes_is_told_against_the_params_file(monkeypatch):
    """papermill -f params/llama2-7b-chat.yaml -y 'patching: {beta: 2}' replaces the section."""
    monkeypatch.chdir(ROOT)
    values = load_params("params/llama2-7b-chat.yaml").model_dump(mode="json")
    config = Config.from_sources(values | {"patching": {"beta": 2}})
    table = effects.differences(config).splitlines()
    assert table[0].split() == ["parameter", "in", "params/llama2-7b-chat.yaml", "here"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert rows["patching.top_rate_se"] == ["0.03", "0.4"] and rows["patching.beta"][1] == "2.0"
    assert rows["patching.balance"] == ["null", "0.959"]
    assert effects.differences(Config.from_sources(values)) == ""


def test_a_file_is_found_by_its_run_name_unless_two_have_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    config = Config(run_name="mine")
    assert effects.file_of(config) is None
    shutil.copy(ROOT / "params/micro.yaml", "params/a.yaml")
    Path("params/b.yaml").write_text("run_name: mine\nseed: 3\n")
    assert effects.file_of(config) == Path("params/b.yaml")
    Path("params/c.yaml").write_text("run_name: mine\n")
    assert effects.file_of(config) is None
    assert effects.differences(config, Path("params/gone.yaml")) == ""


def test_what_a_real_backbone_s_notebook_leaves_to_the_sandbox_is_told(monkeypatch, tmp_path):
    """Without a params file that the run could be held against."""
    monkeypatch.chdir(tmp_path)
    given = {"backbone": {"source": "a/b"}, "patching": {"beta": 2}, "run_name": "mine"}
    config = Config.from_sources(given)
    derivation, importance, patching = effects.left_out(config, given)
    assert patching.startswith(
        "patching: as in the sandbox, for they are not named: retention_rate"
    )
    assert "beta" not in patching and "samples" in importance and "quantization" in derivation
    whole = {**given, **{s: getattr(config, s).model_dump() for s in effects.METHOD}}
    assert effects.left_out(config, whole) == effects.left_out(Config(), {}) == []


def test_the_file_that_spkit_run_was_given_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("run_name: mine\npatching: {beta: 3}\n")
    note = tmp_path / "outputs/mine/seed-0/log" / effects.OWNER
    note.parent.mkdir(parents=True)
    note.write_text("mine.yaml\n")
    config = Config(run_name="mine")
    assert effects.file_of(config) == Path("mine.yaml")
    assert effects.differences(config).splitlines()[1].split() == ["patching.beta", "3.0", "1.71"]
