"""params/sweeps/paper.yaml: it says what there is, and its plan loads nothing."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

from spkit.comparison.methods import METHODS
from spkit.comparison.methods.balanced import METHOD as BALANCED
from spkit.comparison.methods.method import check_setting
from spkit.config import ContinualMethod, PatchingConfig
from spkit.sweeps.points import expand

ROOT = Path(__file__).parents[2]
FILE = ROOT / "params" / "sweeps" / "paper.yaml"
PLAN = f"""
import sys
from spkit.sweeps.run import forecast
print(forecast({str(FILE)!r}, {{}}, device="a100", cores=2))
print("loaded:", sorted({{"torch", "transformers", "huggingface_hub"}} & set(sys.modules)))
"""


def test_the_plan_prints_hours_of_four_backbones_and_loads_nothing():
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.splitlines()
    assert said[-1] == "loaded: []", done.stderr
    assert said[0].startswith("paper: ")
    heads = [line.partition(",")[0] for line in said if "billion weights" in line]
    names = "Llama-2-7b-chat-hf Meta-Llama-3-8B-Instruct gemma-1.1-7b-it Mistral-7B-Instruct-v0.1"
    assert heads == names.split()
    assert sum(line.startswith("  04 continual psa") for line in said) == 4
    hours = next(line for line in said if line.endswith("GPU-hours"))
    own = [float(line.split()[1]) for line in said if line.startswith("  all: ")]
    assert abs(float(hours.split()[1].replace(",", "")) - sum(own)) < 1


def test_all_methods_of_notebook_04_and_all_that_is_open_in_the_paper(monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = expand(FILE, {})
    points = {}
    for point in sweep.points:
        points.setdefault(point.part, []).append(point)
    (methods,) = {tuple(point.config.continual.methods) for point in points["continual"]}
    assert set(methods) == set(get_args(ContinualMethod))
    settings = points["continual"][0].config.continual.settings
    check_setting(BALANCED.name, BALANCED.space, settings["balanced"])
    rates = {point.config.patching.retention_rate for point in points["retention"]}
    assert rates == {n / 10 for n in range(1, 11)}
    varied = {key for point in points["choices"] for key in point.values}
    assert {
        f"patching.{key}" for key in ("order", "scope", "scale", "rescale", "balance")
    } <= varied
    assert {"importance.scored_model", "importance.loss_on", "derivation.shared_init"} <= varied
    assert all(point.seed in (0, 1, 2) for point in sweep.points)
    assert PatchingConfig().rescale is False  # the point that sets it changes something


def test_the_methods_that_it_says_are_reached_by_tune_are_methods():
    text = FILE.read_text(encoding="utf-8")
    for name in ("TIES", "DARE", "GA", "NPO", "Task Arithmetic"):
        assert name in METHODS and name in text
    for name in ("Weight averaging", "Joint top sets"):
        assert name in METHODS and name.lower() in text
    nowhere = text.partition("nowhere here")[2].partition("\n")[0]
    assert "SKU" in nowhere and not any(name in nowhere for name in METHODS if len(name) > 2)
