"""Which GPUs a process may use, with a made-up list of them in torch's place."""

from types import SimpleNamespace

import pytest
import torch

from spkit.config import Config
from spkit.distributed import place
from spkit.errors import SpkitError
from spkit.models import loading


@pytest.fixture
def gpus(monkeypatch):
    """Eight GPUs with native bf16; GPU n has n GiB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.inference_mode(False))
    monkeypatch.setattr(loading, "free_memory", lambda device: int(device[5:]) * 2**30)


@pytest.fixture
def loaded(monkeypatch):
    """What loading.load is asked for."""
    calls = []
    monkeypatch.setattr(loading, "load", lambda source, **how: calls.append(how))
    return calls


def options(loaded, place_of, **backbone):
    config = Config.from_sources({"backbone": {"compute_dtype": "auto", **backbone}})
    place.load(config, "folder", torch.device(place_of), sharded=False)
    return {key: loaded[-1].get(key) for key in ("device", "dtype", "gpus", "quantization")}


def test_a_whole_backbone_is_on_the_process_s_own_gpu(gpus, loaded):
    expected = {"device": "cuda:1", "dtype": "bfloat16", "gpus": None, "quantization": "nf4"}
    assert options(loaded, "cuda:1") == expected
    assert options(loaded, "cpu", device="cpu") == expected | {"device": "cpu", "dtype": "float32"}


def test_balanced_is_over_an_equal_part_of_the_gpus(gpus, loaded, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = options(loaded, "cuda:4", device="balanced")
    assert (found["device"], found["gpus"]) == ("balanced", [4, 5, 6, 7])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(SpkitError, match="^There are more processes than the 8 GPUs"):
        options(loaded, "cuda:1", device="balanced")


def test_the_other_gpus_are_not_offered_to_the_device_map(gpus, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = {}

    def from_pretrained(source, **how):
        asked.update(how)
        return torch.nn.Linear(2, 2), {"missing_keys": []}

    auto = SimpleNamespace(from_pretrained=from_pretrained)
    how = {"revision": None, "dtype": "bfloat16", "quantization": "none", "device": "balanced"}
    loading.read_model(auto, tmp_path, **how, gpus=[6, 7])
    assert asked["device_map"] == "balanced"
    assert asked["max_memory"] == {6: 6 * 2**30, 7: 7 * 2**30}
    asked.clear()
    loading.read_model(auto, tmp_path, **how)
    assert "max_memory" not in asked
