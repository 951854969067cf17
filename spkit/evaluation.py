"""Evaluation: what a model answers to held-out prompts, what each answer counts as, and how often.

Three objectives: harmful prompts (lower harm is better), over-safety prompts (fewer refusals),
utility (more correct answers). Two scores stand in every results.csv, and every short table shows
the broken text by which they differ:

    the paper's  harmful rate, false-refusal rate, utility;
    the strict   the same, but broken text is a failure on harmful and harmless prompts alike.

Nothing here knows of patches: a model comes in, a tidy data frame goes out.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from statsmodels.stats.proportion import proportion_confint
from tqdm.auto import tqdm

from spkit.chat import encode_prompt
from spkit.errors import SpkitError
from spkit.examples import EvalPrompt

VERDICTS = ("harmful", "refusal", "correct", "broken")
# metric -> (objective, verdicts that count): the paper's three, then their strict twins
METRICS = {
    "harmful": ("harmful", ("harmful",)),
    "refusal": ("over_safety", ("refusal",)),
    "utility": ("utility", ("correct",)),
    "broken": (None, ("broken",)),
    "harmful, strict": ("harmful", ("harmful", "broken")),
    "refusal, strict": ("over_safety", ("refusal", "broken")),
}
COLUMNS = "run model seed split objective group category metric n k rate low high".split()


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str = "generate",
) -> list[str]:
    """Greedy answers in the prompts' order, special tokens removed.

    Prompts are sorted by length, batched and padded on the left, where a decoder expects it.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    device, pad = model.get_input_embeddings().weight.device, tokenizer.pad_token_id
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(by_length), batch_size), desc=label, unit="batch", leave=False):
        chosen = by_length[start : start + batch_size]
        width = max(len(encoded[i]) for i in chosen)
        rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in chosen]
        mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen]
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        for i, ids in zip(chosen, output[:, width:], strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def evaluate(
    model,
    tokenizer,
    prompts: Sequence[EvalPrompt],
    judge: Callable[[EvalPrompt, str], str],
    *,
    name: str,
    max_new_tokens: int,
    batch_size: int,
) -> pd.DataFrame:
    """One row per prompt: model, the prompt's fields, response, verdict.

    SpkitError if there are no prompts.
    """
    if not prompts:
        raise SpkitError("There are no evaluation prompts: their file or its filter is empty.")
    answers = generate(
        model,
        tokenizer,
        [p.prompt for p in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        label=f"answers of {name}",
    )
    rows = [
        {
            "model": name,
            "id": p.id,
            "objective": p.objective,
            "group": p.group,
            "category": p.category,
            "phrasing": p.phrasing,
            "prompt": p.prompt,
            "response": answer,
            "verdict": judge(p, answer),
        }
        for p, answer in zip(prompts, answers, strict=True)
    ]
    return pd.DataFrame(rows)


def rate_row(verdicts: Sequence[str], counted: Sequence[str], confidence: float) -> dict:
    """n, k, rate, low, high of one cell: shares of 1, a Wilson score interval (statsmodels)."""
    counts = Counter(verdicts)
    n, k = len(verdicts), sum(counts[v] for v in counted)
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return {"n": n, "k": k, "rate": k / n, "low": low, "high": high}


def rates(
    responses: pd.DataFrame, *, run: str, seed: int, split: str, confidence: float = 0.95
) -> pd.DataFrame:
    """The tidy frame (COLUMNS): one row per model, group, category and metric.

    category "all" is the whole group; its categories follow. The metric "broken" is given for
    every group.
    """
    rows = []
    groups = responses.groupby(["model", "objective", "group"], sort=False)
    for (model, objective, group), part in groups:
        cells = [("all", part), *part.groupby("category", sort=True)]
        for category, cell in cells:
            for metric, (only, counted) in METRICS.items():
                if only in (None, objective):
                    rows.append(
                        {
                            "run": run,
                            "model": model,
                            "seed": seed,
                            "split": split,
                            "objective": objective,
                            "group": group,
                            "category": category,
                            "metric": metric,
                            **rate_row(cell["verdict"].tolist(), counted, confidence),
                        }
                    )
    return pd.DataFrame(rows, columns=COLUMNS)


# column title -> (group, metric): what the short tables show, in this order
HEADLINE = {
    "harmful seen %": ("seen", "harmful"),
    "harmful unseen %": ("unseen", "harmful"),
    "broken on harmful %": (("seen", "unseen"), "broken"),
    "false refusal %": ("harmless", "refusal"),
    "broken on harmless %": ("harmless", "broken"),
    "utility %": ("utility", "utility"),
}


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """The short table: one row per model in order of appearance, percentages, no intervals."""
    whole = results[results["category"] == "all"]
    table = {}
    for title, (group, metric) in HEADLINE.items():
        groups = (group,) if isinstance(group, str) else group
        cell = whole[whole["group"].isin(groups) & (whole["metric"] == metric)]
        sums = cell.groupby("model", sort=False)[["k", "n"]].sum()
        table[title] = 100 * sums["k"] / sums["n"]
    return pd.DataFrame(table).reindex(whole["model"].unique())
