"""Seconds and peak memory of one method, from a loaded backbone to its deltas; one JSON line.

    python -m spkit.comparison.cost < question.json

A process of its own, because the peak of a process never falls. Evaluation is not in it: it is
the same for all methods. What is measured before anything is derived is given too.
"""

import json
import sys
import time

from spkit.comparison.methods import METHODS
from spkit.comparison.methods.bundle import make_bundle, with_backbone
from spkit.config import Config
from spkit.data.selection import load_harmful_pairs
from spkit.models.loading import load
from spkit.system.determinism import make_deterministic
from spkit.system.machine import peak_memory_mib


def measure(question: dict) -> dict:
    """question: model (folder), config (nested values), method, setting."""
    config = Config.from_sources(question["config"])
    method = METHODS[question["method"]]
    make_deterministic(config.seed, config.threads)
    pairs = load_harmful_pairs(config.data, seed=config.seed)
    quantization = config.derivation.quantization
    model, tokenizer = load(question["model"], quantization=quantization, **config.backbone.loading)
    before = peak_memory_mib().get("host", 0.0)
    started = time.perf_counter()
    bundle = make_bundle(model, tokenizer, pairs, config, seed=config.seed, needs=method.needs)
    derived = time.perf_counter()
    if "target" in method.space:  # balanced: it asks the unquantised backbone
        model, tokenizer = load(question["model"], **config.backbone.loading)
        bundle = with_backbone(bundle, model, tokenizer, pairs, config, seed=config.seed)
    method.deltas(bundle, question["setting"], config.seed)
    return {
        "method": method.name,
        "derive_seconds": round(derived - started, 2),
        "combine_seconds": round(time.perf_counter() - derived, 2),
        "peak_mib": peak_memory_mib().get("host"),
        "peak_mib_before": before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
