"""The sandbox's judge behind the interface of all judges; what it knows lies in spkit/sandbox."""

from collections.abc import Sequence

from spkit.config import Config
from spkit.data import judge_for
from spkit.examples import EvalPrompt


class SandboxJudge:
    """Exact, for the village's own words: harmful, refusal, correct or broken."""

    name = "sandbox"

    def __init__(self, config: Config):
        """SpkitError where neither the prompts nor the backbone are the sandbox's."""
        self._judge = judge_for(config)

    def verdicts(self, prompts: Sequence[EvalPrompt], responses: Sequence[str]) -> list[str]:
        """See Judge. All three objectives."""
        return [self._judge(p, r) for p, r in zip(prompts, responses, strict=True)]
