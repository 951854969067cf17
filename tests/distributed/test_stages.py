"""Notebooks 01 and 02 with a config file: what they get back, with one process in its place.

What several processes give is in test_processes.py; that accelerate starts them, too.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch

from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.distributed import __main__ as entry
from spkit.distributed import launch, stages
from spkit.distributed.work import Work
from spkit.errors import SpkitError
from spkit.method.derivation import NAMES, derive
from spkit.method.importance import Calibration, gathered, score_windows
from spkit.method.training import TrainingSet
from spkit.models.loading import load
from spkit.system import progress

FILE = str(Path(__file__).parents[2] / "profiles" / "accelerate" / "2-processes-cpu.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A stage's folder; the processes are this one, and `told` is how they were called."""
    stage = SimpleNamespace(folder=tmp_path, pushed=[], told=[])
    stage.push = lambda: stage.pushed.append(1)
    stage.checkpoints = lambda: tmp_path / "checkpoints"

    def begin(cls, config, source, folder):
        return cls(config, source, folder, torch.device("cpu"))

    def heard(command, folder, threads):
        stage.told.append(command)
        news = []
        monkeypatch.setattr(entry, "tell", news.append)
        monkeypatch.setattr(sys, "argv", command[command.index("spkit.distributed") :])
        monkeypatch.setattr(entry, "_end_with_input", lambda: None)
        if entry.main():
            raise SpkitError(json.loads((folder / entry.FAILED).read_text())["sentence"])
        yield from (each for each in news if "bar" not in each and "warning" not in each)

    monkeypatch.setattr(Work, "begin", classmethod(begin))
    monkeypatch.setattr(launch, "heard", heard)
    monkeypatch.setattr(progress, "_made", progress.tqdm)
    monkeypatch.setattr(entry.warnings, "showwarning", entry.warnings.showwarning)
    return stage


def config_of(tmp_path, checkpoint, **importance):
    pairs = [{"prompt": x, "response": y, "category": "boats"} for x, y in tiny.PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    short = {"max_steps": 2, "batch_size": 2, "warmup_steps": 1}
    derivation = {"quantization": "none", "checkpoint_steps": 1, "accelerate": FILE}
    values = {
        "backbone": {"source": str(checkpoint), "device": "cpu"},
        "data": {"harmful": str(tmp_path / "pairs.jsonl"), "pairs": None},
        "derivation": {**derivation, "lora": {"r": 4}, "ascent": short, "descent": short},
        "importance": {"samples": 3, "accelerate": FILE, **importance},
    }
    return Config.from_sources(values)


def opened(config):
    model, tokenizer = load(config.backbone.source, device="cpu")
    return model, tokenizer, load_harmful_pairs(config.data, seed=config.seed)


def test_the_derivation_of_a_notebook(run, checkpoints):
    config = config_of(run.folder, checkpoints["llama"])
    model, tokenizer, pairs = opened(config)
    data = TrainingSet.of(tokenizer, pairs)
    alone = [derive(model, data, way, config.derivation, config.seed) for way in NAMES]
    source = config.backbone.source
    patches, curves = stages.derive_in_processes(config, model, source, run)
    assert list(patches) == ["se", "osm"]
    for (expected, _), found in zip(alone, patches.values(), strict=True):
        assert found.manifest == expected.manifest and found.scaling == expected.scaling
        for name, factors in expected.factors.items():
            assert all(map(torch.equal, factors, found.factors[name]))
    expected = pd.concat([curve for _, curve in alone], ignore_index=True)
    pd.testing.assert_frame_equal(curves, expected)
    assert len(run.pushed) == 2 * 3  # after two steps each, and at the end
    assert (run.folder / "checkpoints" / "descent" / "state.json").is_file()
    assert not (run.folder / stages.FOLDER).exists()  # no second copy of the OSM patch is left
    # the notebook's own model holds nothing any more
    assert sum(p.numel() for p in (*model.parameters(), *model.buffers())) == 0


@pytest.mark.parametrize("scored", ["patched", "backbone"])
def test_the_importance_of_a_notebook(run, checkpoints, scored):
    config = config_of(run.folder, checkpoints["llama"], scored_model=scored)
    model, tokenizer, pairs = opened(config)
    data = TrainingSet.of(tokenizer, pairs)
    patches = [derive(model, data, way, config.derivation, config.seed)[0] for way in NAMES]
    calibration = Calibration(pairs, config.importance, config.seed)
    (expected,) = score_windows(model, tokenizer, patches, calibration)
    windows = stages.score_in_processes(config, model, config.backbone.source, run, patches)
    found = gathered(windows)
    for name, scores in expected.items():
        assert list(found[name]) == list(scores)  # in the model's order
        assert all(torch.equal(found[name][tensor], scores[tensor]) for tensor in scores)
    assert not (run.folder / stages.FOLDER).exists()


def test_a_mistake_in_a_process_is_its_sentence(run, checkpoints):
    config = config_of(run.folder, checkpoints["llama"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"harmful": "gone"})})
    model, _ = load(config.backbone.source, device="cpu")
    with pytest.raises(SpkitError, match="^data.harmful is 'gone'"):
        stages.derive_in_processes(config, model, config.backbone.source, run)


def test_the_command_line_needs_the_sandbox_s_backbone(monkeypatch, tmp_path, capsys):
    params = str(Path(__file__).parents[2] / "params" / "sandbox.yaml")
    monkeypatch.setattr(sys, "argv", ["spkit.distributed", "derive", params, str(tmp_path)])
    assert entry.main() == 1
    assert "--backbone must be the folder that notebook 00 wrote" in capsys.readouterr().err
