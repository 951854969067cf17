"""A new setting in a search (`spkit tune`) against deriving and scoring again.

The sandbox is the real search of params/sandbox.yaml, with all its dev prompts. The larger size has
random weights, and as many prompts of as many tokens as the search of params/smollm2-135m.yaml:
what is searched means nothing there, what it costs does.
"""

import pandas as pd
import torch

from spkit.bench.bench import FIGURE, PEER, Bench
from spkit.bench.random_checkpoint import tokenizer
from spkit.bench.sizes import SANDBOX, Size, factors, pairs
from spkit.bench.stages.importance import TARGETS, batches
from spkit.bench.timing import Spread, seconds
from spkit.comparison.methods import Bundle
from spkit.config import PatchingConfig, load_params
from spkit.examples import EvalPrompt
from spkit.method.safepatching import NAME
from spkit.method.snip import snip
from spkit.paths import at_root
from spkit.tuning.candidates import Candidates
from spkit.tuning.ingredients import ingredients
from spkit.tuning.objective import Objective
from spkit.tuning.run import Tuning, made_of

SETTING = {"retention_rate": 0.5, "top_rate_se": 0.3, "top_rate_osm": 0.5}
SETTING |= {"alpha": 2.0, "beta": 1.0, "scale": "norm_matched"}
PROMPTS, INSTRUCTIONS, WORDS = 134, 85, 40


def measure(bench: Bench) -> None:
    """The sandbox, unless other sizes were asked for; and 135 M."""
    if bench.sizes is None or SANDBOX.name in bench.sizes:
        _sandbox(bench)
    for size in bench.of("135 M"):
        _random(bench, size)


def _sandbox(bench: Bench) -> None:
    given = {"outputs": str(bench.folder / "outputs"), "threads": bench.threads}
    config = load_params(at_root("params/sandbox.yaml"), given)
    tuning = Tuning(config, bench.folder / "tuning", made_of(config))
    tuning.prepare()
    again = [0]

    def derive() -> None:
        again[0] += 1
        ingredients(config, tuning.source, bench.folder / f"again-{again[0]}")

    first, second = tuning.measure(SETTING), tuning.measure(SETTING)
    bench.right("two measurements of one setting", first == second)
    peer = (PEER, derive, "")
    bench.compare(SANDBOX, lambda: tuning.measure(SETTING), {"deriving and scoring again": peer})
    _a_minute(bench, SANDBOX, lambda: tuning.measure(SETTING), ">= 30")


def _random(bench: Bench, size: Size) -> None:
    model = size.model(bench.device)
    scores = {name: score.cpu() for name, score in snip(model, batches(4, 4), TARGETS).items()}
    patches = {name: factors(model, name, TARGETS) for name in ("se", "osm")}
    bundle = Bundle(patches, dict.fromkeys(patches, scores), PatchingConfig())
    candidates = Candidates(NAME, [bundle], PatchingConfig(), seed=0)
    objective = Objective(model, tokenizer(), prompts(), texts(INSTRUCTIONS), batch_size=32)
    objective.openings(pd.DataFrame({"id": [""], "response": [""], "refused": [True]}))
    _, first_tokens = objective.look({})
    objective.learn([torch.tensor([-1.0, 1.0])], [torch.tensor([False, True])], first_tokens)

    def trial() -> dict[str, float]:
        return objective.measure(candidates.deltas(SETTING))

    bench.right("two measurements of one setting", trial() == trial())
    _a_minute(bench, size, trial, ">= 3")


def prompts() -> list[EvalPrompt]:
    """Half of them as if they were harmful, half as if they only sounded so."""
    kinds = ("harmful", "over_safety")
    return [
        EvalPrompt(str(i), text, kinds[i % 2], "words", "words", "plain", "")
        for i, text in enumerate(texts(PROMPTS))
    ]


def texts(count: int) -> list[str]:
    """Questions of WORDS words on average."""
    return [pair.prompt for pair in pairs(count, WORDS)]


def _a_minute(bench: Bench, size: Size, trial, goal: str) -> None:
    found = Spread.of([60 / seconds(trial, bench.finish) for _ in range(bench.rounds)])
    bench.add(size, "a new setting", FIGURE, "per minute", found, goal=goal)
