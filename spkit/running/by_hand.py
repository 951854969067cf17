"""Alpha and beta by hand: what the village's model answers at strengths of one's own.

A grid for a page, and two sliders where somebody is there to move them. Only for the sandbox: its
model answers a few prompts in a fraction of a second, and what it says is fiction.
"""

import os
import sys
from collections.abc import Sequence

import pandas as pd

from spkit.evaluation.answers import end_tokens
from spkit.evaluation.greedy import continued
from spkit.examples import EvalPrompt, in_order
from spkit.method.balancing import parts
from spkit.method.safepatching import SafePatching
from spkit.method.sets import Lazy
from spkit.models.chat import encode_prompt
from spkit.models.deltas import SparseDelta
from spkit.models.patched import patched
from spkit.running.display import table
from spkit.sandbox.judge import judge

# objective -> the verdict of the base that one wants to see change, or that should stay
TELLING = {"harmful": "harmful", "over_safety": "refusal", "utility": "correct"}


def telling(prompts: Sequence[EvalPrompt], base: pd.DataFrame) -> list[EvalPrompt]:
    """A prompt of each group that the base fails on, and for utility one that it can do.

    base: the backbone's judged responses. Where there is none, the first of the group.
    """
    ids = []
    for objective, group in in_order(zip(base["objective"], base["group"], strict=True)):
        own = base[(base["objective"] == objective) & (base["group"] == group)]
        ids += list(pd.concat([own[own["verdict"] == TELLING[objective]], own])["id"][:1])
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[name] for name in ids]


class ByHand:
    """The backbone with SafePatching's two halves at any alpha and beta.

    alpha, beta: the parameters, which `scale` turns into strengths as in SafePatching.
    """

    def __init__(self, method: SafePatching, model, tokenizer, prompts: Sequence[EvalPrompt]):
        se, osm = parts(method.changed(beta=1.0))
        self.halves = {n: (SparseDelta.of(se[n]), SparseDelta.of(osm[n])) for n in se}
        self.method, self.model, self.tokenizer = method, model, tokenizer
        self.prompts = list(prompts)

    def answers(self, alpha: float, beta: float) -> pd.DataFrame:
        """prompt, alpha, beta, answer, verdict: a row a prompt."""

        def both(name: str):
            se, osm = self.halves[name]
            return alpha * se.dense() + beta * osm.dense()

        rows = [encode_prompt(self.tokenizer, p.prompt) for p in self.prompts]
        ends, pad = end_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id
        with patched(self.model, Lazy(self.halves, both)):
            output = continued(self.model, rows, pad=pad, ends=ends, max_new_tokens=16)
        said = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output]
        return pd.DataFrame(
            {
                "prompt": [p.prompt for p in self.prompts],
                "alpha": alpha,
                "beta": beta,
                "answer": said,
                "verdict": [judge(p, text) for p, text in zip(self.prompts, said, strict=True)],
            }
        )

    def grid(self, shares: Sequence[float] = (0, 0.5, 1, 1.5)) -> pd.DataFrame:
        """`answers` at these multiples of the method's own alpha and beta, all combinations."""
        config = self.method.config
        pairs = [(x * config.alpha, y * config.beta) for x in shares for y in shares]
        pairs = dict.fromkeys(pairs)  # an alpha of 0, found by balance, has no multiples
        return pd.concat([self.answers(*pair) for pair in pairs], ignore_index=True)

    def sliders(self):
        """Two sliders and the answers below them; None where nobody can move them."""
        if not attended():
            return None
        from ipywidgets import FloatSlider, Layout, interactive

        def slider(name: str, start: float) -> FloatSlider:
            look = {"layout": Layout(width="28em"), "continuous_update": False}
            end = 3 * start or 1.0
            return FloatSlider(value=start, min=0, max=end, step=end / 60, description=name, **look)

        def show(alpha: float, beta: float) -> None:
            from IPython.display import display

            display(table(self.answers(alpha, beta)[["prompt", "answer", "verdict"]]))

        config = self.method.config
        return interactive(
            show, alpha=slider("alpha", config.alpha), beta=slider("beta", config.beta)
        )


def attended() -> bool:
    """Whether a person can move a slider: in JupyterLab or Colab, and not in papermill's kernel."""
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules
