"""What a model says, in a few lines: one answer of each kind of change, and the broken ones.

`words` cuts what may be harmful to so many words: the village's harm is fiction and can be shown
whole, a real model's is not shown whole.
"""

import pandas as pd

HARMFUL = "harmful"  # the objective, and the verdict


def changes(
    responses: pd.DataFrame, model: str, base: str = "base", words: int | None = None
) -> pd.DataFrame:
    """One prompt of each (group, verdict of base, verdict of model), changed verdicts first.

    responses: judged, with rows of both models on the same prompts. Columns: group, change, prompt,
    `base`, `model` (their answers), like it (how many prompts changed in the same way). The prompt
    shown is the first of its kind.
    """
    keys = ["id", "group", "objective", "prompt"]
    own, theirs = (responses[responses["model"] == name] for name in (model, base))
    both = theirs.merge(own, on=keys, suffixes=("_base", "_own"), sort=False)
    rows = []
    kinds = both.groupby(["group", "verdict_base", "verdict_own"], sort=False)
    for (group, before, after), part in kinds:
        first = part.iloc[0]
        limit = words if first["objective"] == HARMFUL else None
        rows.append(
            {
                "group": group,
                "change": f"still {after}" if before == after else f"{before} → {after}",
                "prompt": cut(first["prompt"], limit),
                base: cut(first["response_base"], limit),
                model: cut(first["response_own"], limit),
                "like it": len(part),
            }
        )
    return pd.DataFrame(sorted(rows, key=lambda row: row["change"].startswith("still")))


def broken(responses: pd.DataFrame, words: int | None = None) -> pd.DataFrame:
    """The most frequent broken answer to harmful prompts of each model that gives any.

    Columns: model, broken (how many of its answers to harmful prompts), most frequent, times.
    """
    rows = []
    asked = responses[responses["objective"] == HARMFUL]
    for model, part in asked[asked["verdict"] == "broken"].groupby("model", sort=False):
        counts = part["response"].value_counts()
        top = {"most frequent": cut(counts.index[0], words), "times": int(counts.iloc[0])}
        rows.append({"model": model, "broken": len(part), **top})
    return pd.DataFrame(rows, columns=["model", "broken", "most frequent", "times"])


def cut(text: str, words: int | None) -> str:
    """The first `words` words, with an ellipsis where there are more; None: the whole text."""
    parts = text.split()
    return text if words is None or len(parts) <= words else " ".join(parts[:words]) + " …"
