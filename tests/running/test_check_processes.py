"""Accelerate files that this machine cannot follow are refused before anything is started."""

from pathlib import Path

import pytest
import torch
import yaml

from spkit.config import Config
from spkit.data.inputs import input_files
from spkit.running.checks import problems, processes

FILES = Path(__file__).parents[2] / "profiles" / "accelerate"
SECTIONS = {"derivation", "importance"}


def said(file, key="derivation", device="auto", sections=SECTIONS):
    """What is wrong, or else what was found."""
    config = Config.from_sources({key: {"accelerate": str(file)}, "backbone": {"device": device}})
    found = list(processes.asked(config, sections))
    return problems(found) or [each.said for each in found]


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_nothing_is_looked_at_where_no_file_is_named():
    assert list(processes.asked(Config(), SECTIONS)) == []
    assert said("gone.yaml", sections={"backbone"}) == []


def test_what_is_well(gpus):
    assert said(FILES / "2-gpus.yaml")[0].endswith("2 processes, the whole backbone each")
    assert said(FILES / "2-gpus.yaml", device="balanced", key="importance")[0].endswith("each")
    assert said(FILES / "2-processes-cpu.yaml", device="cpu")[0].endswith("each")


@pytest.mark.parametrize(
    "file, how, expected",
    [
        ("gone", {}, "which cannot be read"),
        ("8-gpus", {}, "which asks for 8 GPUs, but torch sees 2 here."),
        ("8-gpus-fsdp", {}, "which asks for 8 GPUs, but torch sees 2 here."),
        ("8-gpus-fsdp", {"key": "importance"}, "but importance needs whole matrices"),
        ("2-gpus", {"device": "cuda:1"}, "backbone.device is 'cuda:1'; use auto, cuda or balanced"),
        ("2-gpus", {"device": "cpu"}, "asks for 2 GPUs, but backbone.device comes to 'cpu' here."),
        ("2-processes-cpu", {}, "is for processes on a CPU, but backbone.device comes to 'cuda'"),
    ],
)
def test_what_is_refused(gpus, file, how, expected):
    (sentence,) = said(FILES / f"{file}.yaml", **how)
    assert expected in sentence
    assert sentence.startswith(f"{how.get('key', 'derivation')}.accelerate is ")


def test_without_a_gpu_and_on_other_machines(tmp_path):
    assert "comes to 'cpu' here" in said(FILES / "2-gpus.yaml", device="cpu")[0]
    path = tmp_path / "two.yaml"
    values = yaml.safe_load((FILES / "2-gpus.yaml").read_text()) | {"num_machines": 2}
    path.write_text(yaml.safe_dump(values))
    assert "num_machines is 2 there, but a notebook starts processes on its own" in said(path)[0]


def test_the_file_s_content_counts_in_the_stages_that_use_it(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("num_processes: 1\n")
    config = Config.from_sources({"derivation": {"accelerate": str(path)}})
    model = ("backbone", "sandbox", "data", "align")
    before = input_files(config, (*model, "derivation"))
    path.write_text("num_processes: 2\n")
    after = input_files(config, (*model, "derivation", "importance"))
    assert set(before) == set(after) == {"derivation.accelerate"} and before != after
    assert input_files(config, model) == {}
