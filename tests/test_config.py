"""Parameters: the sandbox's file equals the defaults, and every mistake is one clear sentence."""

from pathlib import Path

import pytest
import yaml

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.validation import dotted_keys, read_value

PARAMS = Path(__file__).parents[1] / "params"


def test_sandbox_file_names_every_key_with_its_default():
    values = yaml.safe_load((PARAMS / "sandbox.yaml").read_text(encoding="utf-8"))
    assert values == Config().model_dump(mode="json")


@pytest.mark.parametrize("name", ["sandbox", "micro"])
def test_shipped_files_are_valid(name):
    assert load_params(PARAMS / f"{name}.yaml").run_name == name


def test_empty_section_means_defaults():
    assert Config.from_sources({"patching": {}, "data": None}) == Config()


def test_partial_section_keeps_other_defaults():
    config = Config.from_sources({"derivation": {"ascent": {"max_steps": 7}}})
    assert config.derivation.ascent.max_steps == 7
    assert config.derivation.ascent.stop_mean_loss == Config().derivation.ascent.stop_mean_loss
    assert config.derivation.lora.r == 8


def test_a_number_that_yaml_takes_for_text_is_a_number():
    # PyYAML reads 1e-4, without a dot, as text
    config = Config.from_sources({"derivation": {"ascent": {"learning_rate": "1e-4"}}})
    assert config.derivation.ascent.learning_rate == 1e-4


def test_every_field_is_explained():
    def fields(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)
            else:
                yield name, field

    assert all(field.description for _, field in fields(Config))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"derivaton": {}}, "unknown key derivaton (value {}), did you mean derivation?"),
        (
            {"patching": {"retention_rat": 0.5}},
            "unknown key patching.retention_rat (value 0.5), did you mean patching.retention_rate?",
        ),
        (
            {"derivation": {"lora": {"rank_of_it": 4}}},
            "unknown key derivation.lora.rank_of_it (value 4), allowed: r, alpha, dropout, targets",
        ),
        (
            {"patching": {"retention_rate": 1.5}},
            "patching.retention_rate is 1.5, allowed: a number above 0 and at most 1",
        ),
        (
            {"evaluation": {"confidence": 1}},
            "evaluation.confidence is 1, allowed: a number above 0 and below 1",
        ),
        (
            {"data": {"pairs": 0}},
            "data.pairs is 0, allowed: a whole number at least 1 or null",
        ),
        (
            {"data": {"pairs": True}},
            "data.pairs is True, allowed: a whole number at least 1 or null",
        ),
        (
            {"patching": {"scope": "matrx"}},
            "patching.scope is 'matrx', allowed: one of 'matrix', 'global'",
        ),
        (
            {"patching": {"rescale": "perhaps"}},
            "patching.rescale is 'perhaps', allowed: true or false",
        ),
        (
            {"importance": 3},
            "importance is 3, allowed: a section with the keys "
            "samples, batch_size, layers_per_pass, save, scored_model, loss_on",
        ),
        ({"seed": -1}, "seed is -1, allowed: a whole number at least 0 and at most 4294967295"),
        (
            {"run_name": "../elsewhere"},
            "run_name is '../elsewhere', allowed: a text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        ),
        ({"outputs": ""}, "outputs is '', allowed: a text that is not empty"),
        (
            {"continual": {"stages": [["a"], []]}},
            "continual.stages.1 is [], "
            "allowed: a list, not empty, whose entries are each a text that is not empty",
        ),
        (
            {"data": {"categories": [3]}},
            "data.categories.0 is 3, allowed: a text that is not empty",
        ),
        (
            {"continual": {"stages": [["a", "b"], ["b"]]}},
            "continual.stages is [['a', 'b'], ['b']], must be disjoint, "
            "but 'b' stands in stages 1 and 2",
        ),
        (
            {"data": {"categories": ["a"]}, "continual": {"stages": [["b"]]}},
            "continual.stages is [['b']], but 'b' is not among data.categories = ['a']",
        ),
        (
            {"derivation": {"ascent": {"stop_mean_loss": 12}}},
            "derivation.ascent.stop_mean_loss is 12.0, "
            "must be below token_loss_clamp = 10.0, or it may never stop",
        ),
        (
            {"derivation": {"descent": {"warmup_steps": 60}}},
            "derivation.descent.warmup_steps is 60, must be below max_steps = 60",
        ),
        (
            {"sandbox": {"heads": 5}},
            "sandbox.hidden_size is 192, must be a multiple of 2 x heads = 10 (rotary halves)",
        ),
        (
            {"backbone": {"revision": "main"}},
            "backbone.revision is 'main', must be null where source is 'sandbox'",
        ),
        (
            {"judges": {"thought_marks": ["<think>"]}},
            "judges.thought_marks.1 is missing, allowed: a text that is not empty",
        ),
        (
            {"judges": {"thought_marks": "<think>"}},
            "judges.thought_marks is '<think>', allowed: a list of a text that is not empty and a",
        ),
        (
            {"align": {"harmful_window": [1, 2, 3]}},
            "align.harmful_window is [1, 2, 3], allowed: a list of a number at least 0 and at most",
        ),
        (
            {"backbone": {"system_prompt": "None"}},
            "backbone.system_prompt is 'None', a text; where nothing is meant, write null",
        ),
        ({"run_name": "a" * 101}, "._-]*$ and of at most 100 characters"),
        ({"mirror": "none"}, "mirror is 'none', a text; where nothing is meant, write null"),
        ({3: 4}, "unknown key 3, allowed: run_name, seed, threads, outputs, "),
        ({"seed": -1, "threads": 0}, "at most 4294967295; threads is 0, allowed: "),
    ],
)
def test_a_mistake_is_one_sentence(values, sentence):
    with pytest.raises(SpkitError) as error:
        Config.from_sources(values)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_is_no_number():
    with pytest.raises(SpkitError, match="patching.alpha is nan"):
        Config.from_sources({"patching": {"alpha": float("nan")}})


def test_overrides_set_single_values():
    values = {"patching": {"alpha": 1.0}}
    config = Config.from_sources(
        values, {"patching.alpha": 2.0, "derivation.lora.r": 4, "patching.beta": 0.5, "seed": 3}
    )
    assert (config.patching.alpha, config.patching.beta) == (2.0, 0.5)
    assert (config.derivation.lora.r, config.seed) == (4, 3)
    assert values == {"patching": {"alpha": 1.0}}  # the caller's own is left alone


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"patching.retentionrate": 1}, "key patching.retentionrate, did you mean patching.reten"),
        (
            {"retention_rate": 1},
            "unknown key retention_rate, did you mean patching.retention_rate?",
        ),
        ({"alpha": 1}, "unknown key alpha, did you mean derivation.lora.alpha or patching.alpha?"),
        ({"zzz": 1}, "unknown key zzz, allowed: a key such as "),
        ({"patching": {"alpha": 1}}, "patching is a section, name one value in it: patching.reten"),
        ({"patching.alpha": -1}, "patching.alpha is -1, allowed: a number at least 0"),
        (["patching.alpha"], "overrides is ['patching.alpha'], allowed: dotted keys with values"),
        ('{"patching.alpha": 2}', "with values; papermill takes them by -y 'overrides: {patching"),
    ],
)
def test_wrong_overrides(overrides, sentence):
    with pytest.raises(SpkitError) as error:
        Config.from_sources({}, overrides)
    assert sentence in str(error.value)


def test_override_below_something_that_is_no_section():
    with pytest.raises(SpkitError, match="patching is 3, allowed: a section"):
        Config.from_sources({"patching": 3}, {"patching.alpha": 1})


def test_override_reaches_every_key():
    default = Config().model_dump()
    for key in dotted_keys(Config):
        value = default
        for part in key.split("."):
            value = value[part]
        assert Config.from_sources({}, {key: value}) == Config()


# ---- files ---------------------------------------------------------------------------------------


def params(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_with_overrides_and_overrides_on_top(tmp_path):
    path = params(tmp_path, "overrides: {patching.alpha: 2, patching.beta: 2}\nseed: 5\n")
    config = load_params(path, {"patching.beta": 4})
    assert (config.seed, config.patching.alpha, config.patching.beta) == (5, 2, 4)


def test_empty_file_means_the_sandbox(tmp_path):
    assert load_params(params(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("patching: {alpha: -1}", "mine.yaml: patching.alpha is -1, allowed: a number"),
        ("patching: {alpha: 1", "mine.yaml, line 1: not valid YAML: "),
        ("seed: 1\nseed: 2\n", "mine.yaml, line 2: not valid YAML: the key 'seed' stands twice"),
        ("data:\n  pairs: 1\n  pairs: 2\n", "line 3: not valid YAML: the key 'pairs' stands twice"),
        ("- a\n", "mine.yaml: found a list, must hold sections of keys"),
        ("overrides: 3\n", "mine.yaml: overrides is 3, allowed: dotted keys with values"),
        ("{a: 1}: 2\n", "line 1: not valid YAML: a key is a list or a mapping, must be a text"),
        ("? [1]\n: 2\n", "line 1: not valid YAML: a key is a list or a mapping"),
        ("patching: &p {beta: *p}\n", "not valid YAML: a value holds itself, or is too deep"),
        ("data: {pairs: 010}\n", "line 1: not valid YAML: 010 is 8 there, write what you mean"),
        ("data: {pairs: 1:30}\n", "line 1: not valid YAML: 1:30 is 90 there, write what"),
        ("patching:\n  <<: {beta: 1}\n  <<: {beta: 2}\n", "line 3: not valid YAML: the key '<<'"),
    ],
)
def test_wrong_file(tmp_path, text, sentence):
    with pytest.raises(SpkitError) as error:
        load_params(params(tmp_path, text))
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["2024_01", "1e5", "007", "1.50", "2024-01-02", "0x1f", "123e456"])
def test_a_name_is_what_is_written(tmp_path, name):
    """YAML makes numbers and dates of these, and another run folder of a number."""
    text = f"run_name: {name}\nbackbone: {{source: a/b, revision: {name}}}\n"
    config = load_params(params(tmp_path, text))
    assert config.backbone.revision == config.run_name == name
    assert read_value("backbone.revision", name) == read_value("run_name", name) == name
    assert read_value("backbone.revision", "null") is None
    assert read_value("derivation.lora.r", "4") == 4


def test_merge_keys_and_dates(tmp_path):
    text = """
derivation:
  ascent: &common {learning_rate: 1e-2, max_steps: 1e2}
  descent: {<<: *common, max_steps: 7}
backbone: {chat_template_arguments: {date_string: 2024-07-26}}
"""
    config = load_params(params(tmp_path, text))
    assert (
        config.derivation.descent.learning_rate == 0.01 and config.derivation.descent.max_steps == 7
    )
    assert config.derivation.ascent.max_steps == 100
    assert config.backbone.chat_template_arguments == {"date_string": "2024-07-26"}


def test_missing_or_binary_file(tmp_path):
    with pytest.raises(SpkitError, match="cannot read the params file .No such file"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpkitError, match="not UTF-8 text"):
        load_params(tmp_path / "binary.yaml")


def test_a_renamed_parameter_is_told_by_its_new_name():
    with pytest.raises(SpkitError, match="backbone.dtype .* is called backbone.compute_dtype now"):
        Config.from_sources({"backbone": {"dtype": "float32"}})
    with pytest.raises(SpkitError, match="overrides: backbone.dtype is called backbone.compute_d"):
        Config.from_sources({}, {"backbone.dtype": "float32"})
