"""Who decides what an answer counts as: several judges behind one interface.

    judged(responses, prompts, config)   verdicts of all judges that config.judges names
    agreement(responses)                 how far two judges agree

Responses are generated first (evaluation.respond) and judged then, so that a judge that is a model
has the memory for itself, and stored responses can be judged again by others. Nothing here
generates the responses or turns verdicts into rates.
"""

import gc
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from statsmodels.stats.inter_rater import cohens_kappa

from spkit.config import Config, JudgesConfig
from spkit.errors import SpkitError
from spkit.evaluation.judges.classifier import ClassifierJudge
from spkit.evaluation.judges.exact import ExactMatch
from spkit.evaluation.judges.formats import FORMATS
from spkit.evaluation.judges.generative import GenerativeJudge
from spkit.evaluation.judges.judge import Judge
from spkit.evaluation.judges.keywords import KeywordJudge
from spkit.evaluation.judges.refusal import RefusalJudge
from spkit.evaluation.judges.sandbox import SandboxJudge, judge_for
from spkit.evaluation.thoughts import without_thoughts
from spkit.examples import EvalPrompt
from spkit.system.out_of_memory import empty_cache

MODELS = ("classifier", "generative")  # judges that load one
DECIDING = "verdict"  # the column of the first judge; those of the others are "verdict (<name>)"


def judges_of(judges: JudgesConfig) -> dict[str, list[str]]:
    """{objective: names of its judges}, each once; the first decides.

    Utility has no key in the parameters: the sandbox's judge where it decides on harm, else exact
    match with the reference.
    """
    utility = "sandbox" if judges.harmful[0] == "sandbox" else ExactMatch.name
    lists = {"harmful": judges.harmful, "over_safety": judges.over_safety, "utility": [utility]}
    return {objective: list(dict.fromkeys(names)) for objective, names in lists.items()}


def check_judges(config: Config) -> None:
    """SpkitError where a judge in config.judges cannot judge what it is named for.

    Costs nothing, so it is worth calling before anything is generated.
    """
    lists = judges_of(config.judges)
    if any("sandbox" in names for names in lists.values()):
        judge_for(config)
    form = config.judges.generative.prompt
    for objective, names in lists.items():
        if "generative" in names and objective not in FORMATS[form].objectives:
            able = [name for name, known in FORMATS.items() if objective in known.objectives]
            raise SpkitError(
                f"judges.{objective} names 'generative', but judges.generative.prompt is {form!r}, "
                f"which asks about harm only; allowed for it: {', '.join(able)}"
            )


def load_judge(name: str, config: Config) -> Judge:
    """One judge by its name, with its model where it is one."""
    judges, device = config.judges, config.backbone.device
    if name == "sandbox":
        return SandboxJudge(config)
    if name == "keywords":
        return KeywordJudge(judges.keywords)
    if name == "refusal":
        return RefusalJudge(thoughts=judges.thought_marks is not None)
    if name == "classifier":
        return ClassifierJudge(judges, device)
    if name == "generative":
        return GenerativeJudge(judges, device)
    return ExactMatch()


def judged(responses: pd.DataFrame, prompts: Sequence[EvalPrompt], config: Config) -> pd.DataFrame:
    """The responses with a column `verdict`, and `verdict (<judge>)` for every further judge.

    responses: columns id and response, and any others, of any number of models; verdicts that it
    already has are replaced. prompts: those that were asked, known by their ids. A further judge's
    column is "" for the objectives it was not named for. One model is in memory at a time, on
    config.backbone.device. All judges see only what is outside the thoughts that
    `judges.thought_marks` mark; where nothing is, all say "unfinished". SpkitError as in
    `check_judges`, and for an id that is not in `prompts`.
    """
    check_judges(config)
    lists = judges_of(config.judges)
    kept = [name for name in responses if name != DECIDING and not name.startswith("verdict (")]
    frame = responses[kept].copy()
    asked = _asked(frame, prompts)
    texts = [_answer(text, config.judges.thought_marks) for text in frame["response"]]
    first, further = [""] * len(frame), {}
    for name in dict.fromkeys(name for names in lists.values() for name in names):
        rows = [i for i, prompt in enumerate(asked) if name in lists[prompt.objective]]
        if not rows:
            continue
        for i, verdict in zip(rows, _verdicts(name, config, asked, texts, rows), strict=True):
            if lists[asked[i].objective][0] == name:
                first[i] = verdict
            else:
                further.setdefault(name, [""] * len(frame))[i] = verdict
    frame[DECIDING] = first
    if None in texts:  # in a table of harm and refusal they would look like safe answers
        print(
            f"{texts.count(None)} of {len(texts)} responses are thoughts without an end, neither "
            "harm nor refusal (the strict rates count them): raise evaluation.max_new_tokens, "
            "or switch thinking off by backbone.chat_template_arguments."
        )
    for name, verdicts in further.items():
        frame[f"{DECIDING} ({name})"] = verdicts
    return frame


def _answer(response, marks: tuple[str, str] | None) -> str | None:
    """What is judged of a response; None where it never gets out of a thought."""
    if not isinstance(response, str):  # in a CSV file "" is NaN
        return ""
    said = response if marks is None else without_thoughts(response, marks)
    return said if said is None or said == response else said.strip()


def _asked(frame: pd.DataFrame, prompts: Sequence[EvalPrompt]) -> list[EvalPrompt]:
    """The prompt of each row."""
    by_id = {prompt.id: prompt for prompt in prompts}
    if len(by_id) < len(prompts):
        raise SpkitError("Two of the prompts have the same id; ids must differ to judge by them.")
    unknown = [name for name in frame["id"] if name not in by_id]
    if unknown:
        raise SpkitError(
            f"There is a response to the prompt {unknown[0]!r}, which is not among the "
            f"{len(prompts)} prompts; give the prompts that were asked."
        )
    return [by_id[name] for name in frame["id"]]


def _verdicts(
    name: str,
    config: Config,
    asked: Sequence[EvalPrompt],
    texts: Sequence[str | None],
    rows: Sequence[int],
) -> list[str]:
    """What one judge says of the given rows; its model is gone when this returns.

    It is not asked about a text that is None, an unfinished thought.
    """
    given = {i: texts[i] for i in rows if texts[i] is not None}
    if not given:
        return ["unfinished"] * len(rows)
    judge = load_judge(name, config)
    try:
        said = judge.verdicts([asked[i] for i in given], list(given.values()))
        verdicts = [dict(zip(given, said, strict=True)).get(i, "unfinished") for i in rows]
    finally:
        del judge
        if name in MODELS:  # nothing else holds memory that is worth a look at all objects
            gc.collect()
            empty_cache()
    unclear = verdicts.count("unclear")
    if unclear:
        print(f"The judge {name!r} gave no clear answer on {unclear} of {len(rows)} responses.")
    return verdicts


def agreement(responses: pd.DataFrame, judges: JudgesConfig | None = None) -> pd.DataFrame:
    """How far the judges agree: objective, one, two, n, agreement, kappa; a row a pair.

    responses: what `judged` gives, of any number of models. agreement: share of the n responses
    with the same verdict from both. kappa: Cohen's, over all verdicts; NaN where both judges gave
    one and the same verdict throughout. judges: names the first judge, which else is "verdict".
    """
    rows = []
    columns = [name for name in responses if name == DECIDING or name.startswith("verdict (")]
    for objective, part in responses.groupby("objective", sort=False):
        first = DECIDING if judges is None else judges_of(judges)[objective][0]
        names = {c: first if c == DECIDING else c.removeprefix("verdict (")[:-1] for c in columns}
        for one, two in combinations(columns, 2):
            both = part[[one, two]].replace("", np.nan).dropna()
            if len(both):
                row = {"objective": objective, "one": names[one], "two": names[two]}
                rows.append(row | {"n": len(both), **_agreement(both[one], both[two])})
    return pd.DataFrame(rows, columns=["objective", "one", "two", "n", "agreement", "kappa"])


def _agreement(one: pd.Series, two: pd.Series) -> dict[str, float]:
    known = sorted({*one, *two})
    table = pd.crosstab(one, two).reindex(index=known, columns=known, fill_value=0)
    kappa = cohens_kappa(table, return_results=False) if len(known) > 1 else np.nan
    return {"agreement": float((one == two).mean()), "kappa": float(kappa)}
