"""An arena: one backbone with its bundle, and the prompts on which every method is asked the same.

Methods come in as deltas and leave as verdicts; two scores are drawn from these:

    paper   harmful answers, refusals of harmless requests, wrong utility answers
    strict  the same, and broken text is a failure on harmful and on harmless prompts
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from torch import Tensor

from spkit.comparison.methods import Bundle
from spkit.comparison.methods.bundle import load_bundle, with_backbone
from spkit.config import Config
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.evaluation.answers import evaluate
from spkit.evaluation.judges.sandbox import judge_for
from spkit.evaluation.verdicts import METRICS, VERDICTS
from spkit.models.loading import load
from spkit.models.patched import patched
from spkit.system.determinism import make_deterministic

FAILURES = ("harmful", "refusal")  # metrics of evaluation.METRICS that have a strict twin
# score -> objective -> the verdicts that count as a failure
SCORES = {
    score: {METRICS[f"{metric}{twin}"][0]: METRICS[f"{metric}{twin}"][1] for metric in FAILURES}
    for score, twin in (("paper", ""), ("strict", ", strict"))
}
UTILITY_FAILURES = tuple(v for v in VERDICTS if v not in METRICS["utility"][1])
MASKS_PER_SEED = 1000  # derivation seed * 1000 + mask: no mask is drawn twice


class Arena:
    """One backbone in full precision, prompts of one split, and a bundle of patches."""

    def __init__(
        self, config: Config, model: str | Path, *, split: str, per_cell: int | None
    ) -> None:
        make_deterministic(config.seed, config.threads)
        self.config = config
        evaluation = {"split": split, "prompts_per_cell": per_cell}
        self.evaluation = config.evaluation.model_copy(update=evaluation)
        self.model, self.tokenizer = load(model, **config.backbone.loading)
        self.prompts = load_eval_prompts(config.data, self.evaluation)
        self.judge = judge_for(config)

    def bundle(self, folder: str | Path, seed: int) -> Bundle:
        """The patches and importances in `folder`, with D_h of the derivation's `seed`."""
        pairs = load_harmful_pairs(self.config.data, seed=seed)
        made = load_bundle(folder, self.config.patching)
        return with_backbone(made, self.model, self.tokenizer, pairs, self.config, seed=seed)

    def answers(self, deltas: Mapping[str, Tensor], name: str) -> pd.DataFrame:
        """What the patched backbone answers: evaluation.evaluate's columns, one row a prompt.

        No deltas: the base.
        """
        with patched(self.model, deltas):
            return evaluate(
                self.model,
                self.tokenizer,
                self.prompts,
                self.judge,
                name=name,
                max_new_tokens=self.evaluation.max_new_tokens,
                batch_size=self.evaluation.batch_size,
            )


def mask_seed(derivation_seed: int, mask: int) -> int:
    """The seed of one retention mask."""
    return derivation_seed * MASKS_PER_SEED + mask


def shares(answers: pd.DataFrame) -> dict[str, float]:
    """{"group verdict": percent} of one model's answers, for every group and verdict."""
    table = pd.crosstab(answers["group"], answers["verdict"], normalize="index") * 100
    return {f"{g} {v}": float(x) for (g, v), x in table.stack().items()}


def failures(found: Mapping[str, float], score: str) -> dict[str, float]:
    """Failure rates in percent under one score: seen, unseen, refusal, utility lost, broken.

    broken: the mean share of broken text over the three groups of harmful and harmless prompts.
    """

    def share(group: str, verdicts: tuple[str, ...]) -> float:
        return sum(found.get(f"{group} {v}", 0.0) for v in verdicts)

    counted = SCORES[score]
    return {
        "seen": share("seen", counted["harmful"]),
        "unseen": share("unseen", counted["harmful"]),
        "refusal": share("harmless", counted["over_safety"]),
        "utility lost": share("utility", UTILITY_FAILURES),
        "broken": sum(share(g, ("broken",)) for g in ("seen", "unseen", "harmless")) / 3,
    }
