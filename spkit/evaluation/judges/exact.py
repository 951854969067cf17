"""Utility answers of real text: correct where they are the reference, word for word.

A strict rule: it needs prompts that ask for a short answer. Skill at long answers is
measured elsewhere (utility/). This file does not judge harm or refusals.
"""

from collections.abc import Sequence

from spkit.evaluation.judges.judge import check_objectives, degenerate
from spkit.examples import EvalPrompt


class ExactMatch:
    """correct, broken or wrong; unclear where a prompt has no reference to compare with."""

    name = "exact match"

    def verdicts(self, prompts: Sequence[EvalPrompt], responses: Sequence[str]) -> list[str]:
        """See Judge. Utility prompts only."""
        check_objectives(self.name, prompts, ("utility",))
        return [self._verdict(p, r) for p, r in zip(prompts, responses, strict=True)]

    def _verdict(self, prompt: EvalPrompt, response: str) -> str:
        if prompt.reference and response.strip() == prompt.reference.strip():
            return "correct"  # also "42", in which there is no letter
        if degenerate(response):
            return "broken"
        return "wrong" if prompt.reference else "unclear"
