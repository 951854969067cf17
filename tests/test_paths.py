"""Where a path in the parameters leads, wherever one stands."""

import shutil
from pathlib import Path

import pytest

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.paths import at_root, expanded, repository_root

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "key", ["outputs", "mirror", "backbone.source", "data.harmful", "utility.include_path"]
)
def test_a_tilde_is_the_home_folder_in_every_path(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config.from_sources({}, {key: "~/x"})
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    assert value == str(tmp_path / "x")


def test_variables_are_expanded_and_an_unset_one_is_named(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    assert expanded("$DATA/x") == expanded("${DATA}/x") == "/data/x"
    assert expanded("{% if $x %}~") == "{% if $x %}~"  # a chat template
    assert expanded("/mnt/${DATA}/x") == "/mnt//data/x" and expanded("a{b}/$DATA") == "a{b}//data"
    with pytest.raises(SpkitError, match=r"mirror is '/a/\$\{B:-c\}', but of variables only"):
        Config.from_sources({"mirror": "/a/${B:-c}"})
    monkeypatch.delenv("DATA")
    with pytest.raises(SpkitError, match=r"outputs is '\$DATA/x', but the environment variable"):
        Config.from_sources({"outputs": "$DATA/x"})
    with pytest.raises(SpkitError, match="data.harmful is '~nobody-here/x', but there is no such"):
        Config.from_sources({"data": {"harmful": "~nobody-here/x"}})


def test_a_file_beside_the_params_file_is_found(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params/micro.yaml", tmp_path / "mine.yaml")
    (tmp_path / "pairs.jsonl").write_text("")
    monkeypatch.chdir("/")
    config = load_params(tmp_path / "mine.yaml", {"data.harmful": "pairs.jsonl"})
    assert config.data.harmful == str(tmp_path / "pairs.jsonl")
    assert config.data.evaluation == "sandbox" and config.backbone.source == "sandbox"


@pytest.mark.parametrize("text", ["{% if a %}" + "x" * 5000 + "{% endif %}", "y" * 5000, "a\0b"])
def test_a_text_in_the_place_of_a_path_may_be_long(text, tmp_path):
    values = {"backbone": {"source": "a/b", "chat_template": text}}
    assert Config.from_sources(values, {}, tmp_path / "mine.yaml").backbone.chat_template == text


def test_the_root_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repository_root() == tmp_path  # a notebook has no params file to go by
    assert repository_root(tmp_path / "x.yaml") == ROOT  # an editable installation
    assert at_root(ROOT / "params/micro.yaml") == Path("params/micro.yaml")
    assert Path.cwd() == ROOT
