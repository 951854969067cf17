"""Harmful pairs (D_h) and evaluation prompts of a run: from the sandbox, data sets or own files.

The readers (data/readers) say what the rows of a data set are. Here a run's choices are made: which
categories, which split and group, how many, and that no evaluation prompt is one of D_h.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from spkit.config import DataConfig, EvaluationConfig, SourceConfig
from spkit.data.readers import own, read
from spkit.data.readers.record import Record
from spkit.data.readers.source import is_local, resolve
from spkit.data.readers.texts import normalised, split_of
from spkit.data.readers.wrappers import read_wrappers, wrapped
from spkit.errors import SpkitError
from spkit.examples import GROUPS, EvalPrompt, HarmfulPair, digest, sample
from spkit.sandbox import world
from spkit.validation import nearest


def load_harmful_pairs(
    data: DataConfig, *, seed: int, categories: Sequence[str] | None = None
) -> list[HarmfulPair]:
    """D_h: at most `data.pairs` pairs of the wanted categories, a pure function of the arguments.

    A pair with several categories counts in the first wanted one, so it may be in two stages of
    continual patching. categories: instead of `data.categories`, for one such stage.
    Raises SpkitError for a bad file or row, a source without responses, a category that the source
    does not have, an empty D_h, and a pair for which `data.responses` has no response.
    """
    wanted = data.categories if categories is None else categories
    if data.harmful == "sandbox":
        return _sandbox_pairs(data, wanted, data.pairs, seed)
    return sample(_source_pairs(data, wanted), data.pairs, seed)


def load_eval_prompts(data: DataConfig, evaluation: EvaluationConfig) -> list[EvalPrompt]:
    """The held-out prompts of `evaluation.split`, at most `prompts_per_cell` of each group.

    Behind each harmful prompt come its copies in `data.wrappers`, which do not count in the cell.
    Of all but the sandbox's prompts (which are disjoint by construction), those that D_h's source
    holds in the kept categories are left out, and so are second copies; a line says how many.
    The same prompts for every seed, so that runs can be compared. Raises SpkitError for a bad file
    or row, a source of which nothing is held out, and where the split is empty.
    """
    cell, split = evaluation.prompts_per_cell, evaluation.split
    templates = read_wrappers(data.wrappers)
    names = evaluation_names(data)
    prompts = []
    if "sandbox" in names:
        at_most = {} if cell is None else {"per_cell": cell}
        prompts += world.eval_prompts(split, **at_most)
    if names != ["sandbox"]:
        prompts = _unique_ids(prompts + _source_prompts(data, names, split))
        groups: dict[str, list[EvalPrompt]] = {}
        for prompt in prompts:
            groups.setdefault(prompt.group, []).append(prompt)
        prompts = [prompt for group in groups.values() for prompt in sample(group, cell, seed=0)]
    if not prompts:
        raise SpkitError(f"{', '.join(names)}: no prompt of the split {split!r} (evaluation.split)")
    return _unique_ids(wrapped(prompts, templates)) if templates else prompts


def what_is_y(data: DataConfig) -> str:
    """One sentence on the harmful responses that D_h uses, for notebook 01."""
    if data.responses is not None:
        return f"y: the responses in {data.responses} (data.responses)"
    reader = "" if data.harmful == "sandbox" else resolve(data, data.harmful, "data.harmful").reader
    if reader == "advbench":
        return (
            "y: the opening alone (AdvBench's `target`), for the source has no whole responses; "
            "data.responses takes a file of them"
        )
    return "y: the source's own responses"


def source_fingerprint(source: SourceConfig, role: str = "evaluation") -> str:
    """SHA-256 in hex of the text of all rows that are read from a source in this role.

    role: "D_h" or "evaluation", as which it is read. SpkitError for a bad file or row.
    """
    return digest([r.prompt, r.response, *r.categories] for r in read(source, role))


def describe(data: DataConfig, evaluation: EvaluationConfig) -> pd.DataFrame:
    """One row per source for the run's record, without any text of it.

    Columns: role ("D_h" or "evaluation"), source (as the parameters name it), reader, revision
    ("latest" where none is named, "" where there are none), rows, fingerprint: of all that is read
    from the source, before categories, split and number are chosen.
    """
    used = [("D_h", "data.harmful", data.harmful)]
    used += [("evaluation", "data.evaluation", name) for name in evaluation_names(data)]
    rows = []
    for role, key, name in used:
        if name == "sandbox":
            if role == "D_h":
                found = world.harmful_pairs(count=None)
                texts = [[pair.prompt, pair.response, pair.category] for pair in found]
            else:
                found = world.eval_prompts(evaluation.split)
                texts = [[prompt.prompt, "", prompt.category] for prompt in found]
            rows.append((role, name, "sandbox", "", len(texts), digest(texts)))
        else:
            source = resolve(data, name, key)
            revision = source.revision or ("" if is_local(source.path) else "latest")
            count, named = len(read(source, role)), source_fingerprint(source, role)
            rows.append((role, name, source.reader, revision, count, named))
    return pd.DataFrame(rows, columns="role source reader revision rows fingerprint".split())


# ---- from records to the pairs and prompts of a run ----------------------------------------------


def _sandbox_pairs(data, wanted, count: int | None, seed: int) -> list[HarmfulPair]:
    known = list(world.SEEN_CATEGORIES)
    _check_categories(wanted, known, "the sandbox")
    if data.responses is not None:
        raise SpkitError(
            f"data.responses is {data.responses!r}, must be null where data.harmful is 'sandbox': "
            f"its pairs have responses"
        )
    return world.harmful_pairs(tuple(wanted or known), count, seed)


def _source_pairs(data: DataConfig, wanted: Sequence[str] | None) -> list[HarmfulPair]:
    """All pairs of D_h's source in the wanted categories."""
    records = read(resolve(data, data.harmful, "data.harmful"), "D_h")
    known = {category for record in records for category in record.categories}
    _check_categories(wanted, sorted(known), data.harmful)
    before = f"{data.harmful}-" if data.harmful in data.sources else ""
    pairs = []
    for record in records:
        category = next((c for c in record.categories if wanted is None or c in wanted), None)
        if category is not None:
            pair = HarmfulPair(before + record.id, record.prompt, record.response, category)
            pairs.append(pair)
    if data.responses is None:
        return pairs
    found = own.responses(resolve(data, data.responses, "data.responses"))
    for pair in pairs:
        if normalised(pair.prompt) not in found:
            raise SpkitError(
                f"{data.responses} (data.responses): no response for the prompt of {pair.id!r} in "
                f"{data.harmful}, each pair of D_h needs one"
            )
    return [replace(pair, response=found[normalised(pair.prompt)]) for pair in pairs]


def evaluation_names(data: DataConfig) -> list[str]:
    """The sources of the evaluation prompts; SpkitError where one is named twice."""
    names = [data.evaluation] if isinstance(data.evaluation, str) else list(data.evaluation)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpkitError(f"data.evaluation: {twice!r} stands twice, names must differ")
    return names


def _source_prompts(data: DataConfig, names: Sequence[str], split: str) -> list[EvalPrompt]:
    """The prompts of one split of all names but 'sandbox', without those of D_h and second ones."""
    if data.harmful == "sandbox":
        pairs = _sandbox_pairs(data, data.categories, None, 0)
    else:
        pairs = _source_pairs(data, data.categories)
    learnt = {normalised(pair.prompt) for pair in pairs}
    seen_categories = {pair.category for pair in pairs}
    kept, met, in_learnt, twice = [], set(), 0, 0
    for name in names:
        if name == "sandbox":
            continue
        records = read(resolve(data, name, "data.evaluation"), "evaluation")
        held_out = [r for r in records if normalised(r.prompt) not in learnt]
        if not held_out:
            raise SpkitError(
                f"data.evaluation: every prompt of {name!r} is in D_h ({data.harmful}), so none is "
                f"held out; name another source, or fewer data.categories"
            )
        in_learnt += len(records) - len(held_out)
        for record in held_out:
            text = normalised(record.prompt)
            twice += text in met
            if text not in met:
                met.add(text)
                kept.append(_placed(record, name, data, seen_categories, alone=len(names) == 1))
    print(
        f"Evaluation prompts: {len(kept)}, after {in_learnt} that are in D_h and {twice} that "
        f"stand twice were left out."
    )
    return [prompt for place, prompt in kept if place == split]


def _placed(
    record: Record, name: str, data: DataConfig, seen: set[str], *, alone: bool
) -> tuple[str, EvalPrompt]:
    """(split, prompt): what the record leaves open, decided.

    In a named source the split is a hash of the text, and a harmful prompt's group "seen" where one
    of its categories is D_h's. A file without a name says "test" and "seen" by saying nothing.
    """
    groups, named = GROUPS[record.objective], name in data.sources
    category = next((c for c in record.categories if c in seen), record.categories[0])
    group, split = groups[0], "test"
    if named:
        group = groups[-1] if category not in seen else groups[0]
        split = split_of(record.prompt, data.dev_share)
    before = f"{name}-" if named else "" if alone else f"{Path(name).stem}-"
    return record.split or split, EvalPrompt(
        id=before + record.id,
        prompt=record.prompt,
        objective=record.objective,
        group=record.group or group,
        category=category,
        phrasing=record.phrasing,
        reference=record.reference,
        forbidden=record.forbidden,
    )


# ---- choosing ------------------------------------------------------------------------------------


def _check_categories(wanted: Sequence[str] | None, known: list[str], source: str) -> None:
    if wanted is not None and not wanted:
        raise SpkitError(f"no category of {source} is chosen, allowed: {', '.join(known)}")
    for category in wanted or ():
        if category not in known:
            raise SpkitError(f"no category {category!r} in {source}{nearest(category, known)}")


def _unique_ids(prompts: list[EvalPrompt]) -> list[EvalPrompt]:
    met = set()
    for prompt in prompts:
        if prompt.id in met:
            raise SpkitError(f"evaluation prompts: the id {prompt.id!r} stands twice, must differ")
        met.add(prompt.id)
    return prompts
