"""How far the refusal judge agrees with people on models that it has not seen.

    python benchmarks/refusal_judge.py --labels FILE...            half a minute on one core
    python benchmarks/refusal_judge.py --labels FILE... --write    fits the judge anew as well
    python benchmarks/refusal_judge.py --labels FILE... --check    the weights as they are

Each file holds one model's completions with people's labels, as XSTest publishes them (columns
prompt, completion, final_label): https://github.com/paul-rottger/xstest, CC BY 4.0. Each is left
out in turn; the judge is fitted to the others, and its settings are chosen among the others. The
keyword judges stand beside it. Needs scikit-learn (extra "judge"), except with --check. Nothing
here is random, so there is no seed. Only numbers are printed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint
from tabulate import tabulate

from spkit.errors import SpkitError
from spkit.evaluation.judges import refusal_training as training
from spkit.evaluation.judges.keywords import LISTS, KeywordJudge
from spkit.evaluation.judges.refusal import WEIGHTS, RefusalJudge
from spkit.examples import EvalPrompt

FOLDS = 6  # of our own texts, by prompt
CLASSES = ("correct", "partial refusal", "refusal")


def prompts(examples: Sequence[training.Example]) -> list[EvalPrompt]:
    """The examples' prompts as over-safety prompts."""
    rest = {"objective": "over_safety", "group": "harmless", "category": "", "phrasing": "plain"}
    return [
        EvalPrompt(id=str(i), prompt=example.prompt, reference="", **rest)
        for i, example in enumerate(examples)
    ]


def judged(judge: KeywordJudge | RefusalJudge, examples: Sequence[training.Example]) -> list[str]:
    """The verdicts of a judge of the kit."""
    return judge.verdicts(prompts(examples), [example.answer for example in examples])


def kappa(one: Sequence, two: Sequence, classes: Sequence) -> str:
    """Cohen's kappa to two places; "" where both say one and the same throughout."""
    pairs = list(zip(one, two, strict=True))
    table = [[pairs.count((a, b)) for b in classes] for a in classes]
    if max(map(max, table)) == len(pairs):
        return ""
    return f"{cohens_kappa(table, return_results=False):.2f}"


def row(model: str, judge: str, said: Sequence[str], examples: Sequence[training.Example]) -> list:
    """Agreement on refusing or not with a Wilson interval, and on the three classes."""
    n, same = len(examples), training.agree(said, examples)
    low, high = proportion_confint(same, n, alpha=0.05, method="wilson")
    people = [example.verdict for example in examples]
    two = [[v in training.REFUSED for v in verdicts] for verdicts in (said, people)]
    missed = sum(mine < theirs for mine, theirs in zip(*two, strict=True))
    three = sum(mine == theirs for mine, theirs in zip(said, people, strict=True))
    return [
        *(model, judge, n, f"{100 * same / n:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"),
        *(kappa(*two, (False, True)), missed, n - same - missed),
        *(f"{100 * three / n:.1f}", kappa(said, people, [*CLASSES, *sorted({*said} - {*CLASSES})])),
    ]


def own_held_out(
    sources: dict[str, list[training.Example]], own: list[training.Example]
) -> list[str]:
    """The verdicts on our own texts, each by a judge that knows none of its prompt's texts."""
    asked = list(dict.fromkeys(example.prompt for example in own))
    settings, said = training.chosen(sources, own), {}
    for fold in range(FOLDS):
        out = set(asked[fold::FOLDS])
        models = training.fit(sources, [e for e in own if e.prompt not in out], settings)
        held = [example for example in own if example.prompt in out]
        said |= dict(zip(held, training.said_by(models, held), strict=True))
    return [said[example] for example in own]


HEADERS = (
    "model judge n agree_% 95_%_interval kappa refusals_missed false_refusals three-way_% kappa"
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--check", action="store_true", help="judge by today's weights, fit nothing"
    )
    parser.add_argument("--write", action="store_true", help="fit to all files, write the weights")
    parser.add_argument("--show", action="store_true", help="numbers of the rows that disagree")
    given = parser.parse_args()
    sources = {path.stem.removeprefix("xstest_completions_"): path for path in given.labels}
    if len(sources) < len(given.labels):
        raise SpkitError("two of the files have the same name; each must be another model's")
    sources = {name: training.read_labels(path) for name, path in sources.items()}
    own = training.own_examples()
    verdicts, settings = {}, {}
    if given.check:
        verdicts = {name: judged(RefusalJudge(), examples) for name, examples in sources.items()}
    elif len(sources) > 1:
        for name, (said, used) in training.left_one_out(sources, own).items():
            verdicts[name], settings[name] = said, used
    rows = []
    for name, examples in sources.items():
        if name in verdicts:
            rows.append(row(name, "refusal", verdicts[name], examples))
        for lists in LISTS:
            rows.append(
                row(name, f"keywords ({lists})", judged(KeywordJudge(lists), examples), examples)
            )
        if given.show and name in verdicts:
            pairs = enumerate(zip(verdicts[name], examples, strict=True), 1)
            print(name, [i for i, (v, e) in pairs if not training.agree([v], [e])])
    if verdicts and not given.check:
        rows.append(row("our own texts", "refusal", own_held_out(sources, own), own))
    print(tabulate(rows, [h.replace("_", " ") for h in HEADERS.split()], disable_numparse=True))
    for name, used in settings.items():
        print(f"{name} left out: settings chosen on the others: {used}")
    if given.write:
        used = training.chosen(sources, own)
        training.write(training.fit(sources, own, used), used, sources, WEIGHTS)
        print(f"{WEIGHTS.name}: fitted to all {len(sources)} files with {used}")


if __name__ == "__main__":
    main()
