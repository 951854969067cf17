"""How far each patch, whole or kept, tells harmful requests from harmless ones that only sound so.

    python benchmarks/real_separation.py params/smollm2-135m.yaml --seed 10
    python benchmarks/real_separation.py params/smollm2-135m.yaml -o data.response_tokens=64

For every variant: how much the margin (log-odds of refusing against helping, per token, see
docs/tuning.md) moves on harmful and on harmless dev prompts, their ratio, and the KL of the first
token. A patch that moves both alike (ratio 1) can only trade one for the other. So SafePatching
needs an SE with a ratio below that of OSM. Patches of `spkit tune` with the same parameters are
used again, others are derived.
"""

import argparse
import os

import pandas as pd

from spkit.comparison.ablations import ablated
from spkit.config import load_params
from spkit.running import walkthrough
from spkit.running.aligned import align
from spkit.running.notebook import repository_root
from spkit.running.runs import run_folder
from spkit.system.determinism import make_deterministic
from spkit.system.files import make_folder
from spkit.tuning.run import Tuning, made_of

RATES = ((0.03, 0.02), (0.2, 0.2))  # a, b
STRENGTH = 0.3


def variants(method):
    """(name, deltas): whole patches and their sums, then the kept part of each patch alone."""
    for name in ("SE", "OSM", "SE + OSM"):
        plain = ablated(method, {"SE": "SE only", "OSM": "OSM only"}.get(name, "plain sum"))
        yield f"{name}, whole, x {STRENGTH}", scaled(plain.deltas())
    for a, b in RATES:
        for name, alpha, beta in (("SE", 2 * STRENGTH, 0), ("OSM", 0, 2 * STRENGTH)):
            own = {"top_rate_se": a, "top_rate_osm": b, "alpha": alpha, "beta": beta}
            kept = method.changed(**own, retention_rate=0.9, scale="norm_matched", balance=None)
            yield f"{name}, kept, a {a}, b {b}", kept.deltas()


def scaled(deltas):
    return {name: STRENGTH * deltas[name] for name in deltas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("params")
    parser.add_argument("--seed", type=int)
    parser.add_argument("-o", "--override", action="append", default=[])
    given = parser.parse_args()
    over = walkthrough.overrides(given.override, seed=given.seed)
    config = load_params(given.params, over)
    os.chdir(repository_root())
    make_deterministic(config.seed, config.threads)
    align(config)
    tuning = Tuning(config, make_folder(run_folder(config) / "tuning"), made_of(config))
    tuning.prepare()
    objective = tuning.objective
    base, _ = objective.look({})
    harmful = objective.harmful
    rows = []
    for name, deltas in variants(tuning.candidates.safepatching({}, tuning.own)):
        margins, first = objective.look(tuning._given(deltas))
        moved = (margins - base)[harmful].mean().item(), (margins - base)[~harmful].mean().item()
        found = objective.of(margins, first)
        rows.append((name, *moved, moved[1] / moved[0], found["kl"]))
    columns = ["variant", "harmful", "harmless", "ratio", "KL"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
