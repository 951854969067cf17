"""What the manifest of a run's patch file tells of where the patches came from."""

import json
from datetime import date
from hashlib import sha256
from types import SimpleNamespace

from spkit.config import BackboneConfig, DerivationConfig
from spkit.method.patch import Factors
from spkit.running.patch_of_run import _chat, _derivation

ADAPTER = {"name": "npo", "sha256": "0" * 64, "base_model": "owner/model", "r": 8}


def told(config, **adapters):
    patches = {
        name: Factors(name, {}, 1.0, {"adapter": adapters[name]} if name in adapters else {})
        for name in ("se", "osm")
    }
    return _derivation(config, SimpleNamespace(**patches))


def test_an_adapter_is_told_by_name_and_hash_and_not_by_its_path():
    found = told(DerivationConfig(se="/home/somebody/npo", shared_init=False), se=ADAPTER)
    assert found["se"] == ADAPTER and "osm" not in found
    assert "somebody" not in json.dumps(found)
    assert "shared_init" not in found  # the adapter has a start of its own
    assert "ascent" not in found and found["descent"]  # nothing was trained by ascent
    assert told(DerivationConfig(se="a", osm="b"), se=ADAPTER, osm=ADAPTER).keys() == {"se", "osm"}


def test_without_adapters_nothing_is_added():
    """The same settings give the same file in every version of the kit."""
    usual = told(DerivationConfig())
    assert not {"se", "osm", "shared_init"} & set(usual)
    assert told(DerivationConfig(shared_init=False)) == {**usual, "shared_init": False}
    assert told(DerivationConfig(accelerate="/home/somebody/8-gpus.yaml")) == usual  # no path


def test_the_chat_format_is_told_where_it_is_not_the_checkpoint_s_own(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    arguments = {"enable_thinking": False, "day": date(2024, 7, 26), "tone": "a\nb"}
    found = _chat(BackboneConfig(chat_template=str(file), chat_template_arguments=arguments))
    said = found["chat_template_arguments"]
    assert json.loads(said) == {"enable_thinking": False, "day": "2024-07-26", "tone": "a\nb"}
    assert said.isprintable()  # as every text in a patch file must be
    assert found["chat_template_sha256"] == sha256(b"{{ messages }}").hexdigest()
    assert str(tmp_path) not in json.dumps(found)
    assert _chat(BackboneConfig()) == {}  # the file stays the same
