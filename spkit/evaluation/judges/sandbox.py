"""The sandbox's judge behind the interface of all judges; what it knows is in spkit/sandbox."""

from collections.abc import Callable, Sequence

from spkit.config import Config
from spkit.data.selection import evaluation_names
from spkit.errors import SpkitError
from spkit.examples import EvalPrompt
from spkit.sandbox.judge import judge


class SandboxJudge:
    """Exact, for the village's own words: harmful, refusal, correct or broken."""

    name = "sandbox"

    def __init__(self, config: Config):
        """SpkitError where neither the prompts nor the backbone are the sandbox's."""
        self._judge = judge_for(config)

    def verdicts(self, prompts: Sequence[EvalPrompt], responses: Sequence[str]) -> list[str]:
        """See Judge. All three objectives."""
        return [self._judge(p, r) for p, r in zip(prompts, responses, strict=True)]


def judge_for(config: Config) -> Callable[[EvalPrompt, str], str]:
    """The sandbox's judge, one response at a time; it knows the village's words only.

    The judges that `config.judges` names are in the package judges. SpkitError where neither the
    prompts nor the backbone are the sandbox's.
    """
    if config.backbone.source != "sandbox" and evaluation_names(config.data) != ["sandbox"]:
        raise SpkitError(
            f"data.evaluation is {config.data.evaluation!r} and backbone.source is "
            f"{config.backbone.source!r}: for the judge 'sandbox' one of the two must be "
            f"'sandbox'; name other judges in judges.harmful and judges.over_safety"
        )
    return judge
