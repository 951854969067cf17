"""Utility beyond the evaluation prompts: what a patch costs in skills that it should not touch.

    measure         perplexity always, the first token's KL divergence where `utility.kl` names
                    prompts, lm-eval's tasks where `utility.tasks` names some
    first_tokens    what that divergence is taken from: the backbone's are kept by notebook 00
    open_answers    MT-Bench answers, where `utility.mt_bench.prompts` is set
    graded          those answers with a judge's grades, where `utility.mt_bench.judge` is set
    rating_rows     the grades as rows of measure's frame
    short_table     one row a model

A model comes in, a tidy frame goes out; nothing here knows of patches or run folders, and only
`graded` loads a model.
"""

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from torch import Tensor

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation.utility.first_token import (
    first_tokens,
    kl_divergences,
    kl_prompts,
    load_first_tokens,
    save_first_tokens,
)
from spkit.evaluation.utility.likelihood import perplexity, perplexity_texts
from spkit.evaluation.utility.mt_bench import (
    ANSWERS,
    mt_bench_answers,
    mt_bench_questions,
    mt_bench_scores,
)
from spkit.evaluation.utility.task_files import check_sources
from spkit.evaluation.utility.task_index import check_tasks
from spkit.evaluation.utility.tasks import COLUMNS, MISSING, lm_eval_tasks
from spkit.models.loading import load

KL = "KL of the first token"

__all__ = [
    *(
        "COLUMNS",
        "check_utility",
        "first_tokens",
        "graded",
        "lm_eval_tasks",
        "measure",
        "mt_bench_answers",
        "mt_bench_questions",
    ),
    *("mt_bench_scores", "open_answers", "perplexity", "perplexity_texts", "rating_rows"),
    "load_first_tokens",
    "save_first_tokens",
    "short_table",
]


def check_utility(config: Config) -> None:
    """SpkitError where something of `utility` cannot work; worth calling before a model is loaded.

    lm-eval is needed and missing or has no such task, a file of `utility.sources` is no good,
    `utility.kl` has no prompts.
    """
    if config.utility.tasks:
        if find_spec("lm_eval") is None:
            raise SpkitError(MISSING)
        check_tasks(config.utility)
        check_sources(config.utility)
    if config.utility.kl is not None:
        kl_prompts(config)


def measure(
    model, tokenizer, config: Config, *, name: str, base_logprobs: Tensor | None = None
) -> pd.DataFrame:
    """Tidy rows of one model (COLUMNS): its perplexity, its KL divergence, then lm-eval's tasks.

    kind: "perplexity", "kl" or "lm-eval". task of a perplexity: the name of its texts; n: their
    number. num_fewshot, limit and chat_template are lm-eval's and empty elsewhere.
    base_logprobs: `first_tokens` of the backbone, fp32 [n, vocabulary]; with its own, its KL is 0.
    SpkitError where `utility.kl` is set and they are missing.
    """
    utility = config.utility
    found = perplexity(
        model,
        tokenizer,
        perplexity_texts(config),
        batch_size=utility.batch_size,
        label=f"perplexity of {name}",
    )
    own = _row(name, "perplexity", utility.perplexity, "perplexity", found["value"], found["texts"])
    tasks = lm_eval_tasks(model, tokenizer, utility, name=name, seed=config.seed)
    moved = _kl_rows(model, tokenizer, config, name, base_logprobs)
    return pd.DataFrame([own, *moved, *tasks.to_dict("records")], columns=COLUMNS)


def open_answers(
    model,
    tokenizer,
    config: Config,
    *,
    name: str,
    folder: Path | None = None,
    context: str = "",
) -> pd.DataFrame:
    """One model's MT-Bench answers: model, question_id, category, turn, question, answer.

    folder: where they are stored, as open-<name>.jsonl; context: as in answers.respond. No rows
    where `utility.mt_bench.prompts` is null. The caller keeps them; `graded` wants the answers of
    all models in one frame, so that the judge is loaded once.
    """
    questions = mt_bench_questions(config.utility.mt_bench)
    if not questions:
        return pd.DataFrame(columns=["model", *ANSWERS])
    answers = mt_bench_answers(
        model,
        tokenizer,
        questions,
        max_new_tokens=config.utility.mt_bench.max_new_tokens,
        batch_size=config.utility.batch_size,
        store=None if folder is None else folder / f"open-{name}.jsonl",
        context=context,
    )
    answers.insert(0, "model", name)
    return answers


def graded(answers: pd.DataFrame, config: Config) -> pd.DataFrame:
    """`answers` with the columns judgement and rating of the judge in `utility.mt_bench.judge`.

    It is loaded as the evaluated models are (dtype, device, `evaluation.quantization`). Without a
    judge, or without answers, nothing is loaded and both columns are empty.
    """
    mt_bench = config.utility.mt_bench
    if mt_bench.judge is None or answers.empty:
        return answers.assign(judgement=None, rating=float("nan"))
    judge, tokenizer = load(
        mt_bench.judge,
        revision=mt_bench.judge_revision,
        dtype=config.backbone.compute_dtype,
        device=config.backbone.device,
        quantization=config.evaluation.quantization,
    )
    options = {"batch_size": config.utility.batch_size, "marks": config.judges.thought_marks}
    return mt_bench_scores(judge, tokenizer, answers, **options)


def rating_rows(answers: pd.DataFrame) -> pd.DataFrame:
    """Graded answers as rows of measure's frame, kind "mt-bench".

    Metrics for each model: "rating" (the mean over both turns, 1 to 10), "rating, turn 1", "rating,
    turn 2", each with the standard error of a mean and n the answers with a grade; "ungraded", the
    number of answers whose grade could not be read, n all answers. No rows where nothing is graded.
    """
    rows = []
    if answers["judgement"].isna().all():
        return pd.DataFrame(columns=COLUMNS)
    for name, part in answers.groupby("model", sort=False):
        cells = {"rating": part, **{f"rating, turn {t}": p for t, p in part.groupby("turn")}}
        for metric, cell in cells.items():
            grades = cell["rating"]
            row = _row(name, "mt-bench", "mt_bench", metric, grades.mean(), int(grades.count()))
            rows.append({**row, "stderr": grades.sem()})
        ungraded = int(part["rating"].isna().sum())
        rows.append(_row(name, "mt-bench", "mt_bench", "ungraded", float(ungraded), len(part)))
    return pd.DataFrame(rows, columns=COLUMNS)


def short_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model in order of appearance; columns "perplexity", KL and "<task> <metric>".

    Standard errors and settings are left in the tidy frame.
    """
    titles = frame["task"] + " " + frame["metric"]
    titles = titles.mask(frame["kind"] == "perplexity", frame["metric"])
    titles = titles.mask(frame["kind"] == "kl", frame["task"])
    wide = frame.assign(title=titles).pivot(index="model", columns="title", values="value")
    return wide.reindex(index=frame["model"].unique(), columns=titles.unique()).rename_axis(
        columns=None
    )


def _kl_rows(model, tokenizer, config: Config, name: str, base: Tensor | None) -> list[dict]:
    if config.utility.kl is None:
        return []
    if base is None:
        raise SpkitError(
            f"utility.kl is {config.utility.kl!r}: the backbone's log-probs are needed"
        )
    each = kl_divergences(base, first_tokens(model, tokenizer, config))
    row = _row(name, "kl", KL, "kl", float(each.mean()), len(each))
    return [{**row, "stderr": float(each.std() / len(each) ** 0.5)}]  # NaN of a single prompt


def _row(name: str, kind: str, task: str, metric: str, value: float, n: int) -> dict:
    nothing = {"stderr": float("nan"), "num_fewshot": None, "limit": None, "chat_template": None}
    return {"model": name, "kind": kind, "task": task, "metric": metric, "value": value, "n": n} | (
        nothing
    )
