"""Harmful pairs (D_h) and evaluation prompts of a run: from the sandbox, data sets or own files.

The readers (spkit/readers) say what the rows of a data set are. Here a run's choices are made:
which categories, which split and group, how many, and that no evaluation prompt is one of D_h.

`sandbox` is the one place through which the embedded sandbox comes in: its text, its backbone and
its judge. This file neither tokenizes nor scores.
"""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from spkit.config import Config, DataConfig, EvaluationConfig, SourceConfig
from spkit.errors import SpkitError
from spkit.examples import GROUPS, EvalPrompt, HarmfulPair
from spkit.files import atomic
from spkit.readers import own, read
from spkit.readers.record import Record
from spkit.readers.source import is_local, resolve
from spkit.readers.texts import digest, normalised, split_of
from spkit.readers.wrappers import read_wrappers, wrapped
from spkit.validation import nearest

SHIPPED = Path(__file__).parent / "sandbox" / "weights"  # made by the recipe in its recipe.json


def sandbox(part: str) -> ModuleType:
    """One module of spkit/sandbox ("world", "train", "judge"), imported only when asked for."""
    return importlib.import_module(f"spkit.sandbox.{part}")


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
    names = _evaluation_names(data)
    prompts = []
    if "sandbox" in names:
        at_most = {} if cell is None else {"per_cell": cell}
        prompts += sandbox("world").eval_prompts(split, **at_most)
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


def fingerprint(pairs: Sequence[HarmfulPair]) -> str:
    """SHA-256 of D_h's text in hex: names the set without showing it; order does not matter."""
    return digest([p.prompt, p.response, p.category] for p in pairs)


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
    used += [("evaluation", "data.evaluation", name) for name in _evaluation_names(data)]
    rows = []
    for role, key, name in used:
        if name == "sandbox":
            world = sandbox("world")
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
    world = sandbox("world")
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


def _evaluation_names(data: DataConfig) -> list[str]:
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


# ---- the sandbox's backbone and judge ------------------------------------------------------------


def prepare_backbone(config: Config, folder: str | Path) -> Path | str:
    """The folder or hub id of the backbone to load.

    The sandbox's backbone is written into `folder`: the shipped weights where they were made by
    this recipe and seed, else trained on the spot. Any other source is used in place.
    """
    if config.backbone.source != "sandbox":
        return config.backbone.source
    with atomic(folder) as temporary:
        if config.sandbox.weights == "shipped" and _shipped_recipe() == sandbox_recipe(config):
            shutil.copytree(SHIPPED, temporary, ignore=shutil.ignore_patterns("recipe.json"))
        else:
            print(f"No shipped weights for seed {config.seed} and this recipe: training them here.")
            sandbox("train").train_backbone(config.sandbox, config.seed, temporary)
    return Path(folder)


def backbone_source(config: Config, run) -> Path | str:
    """What notebook 00 prepared in this run: the folder or hub id to load the backbone from."""
    if config.backbone.source != "sandbox":
        return config.backbone.source
    return run.input("00_backbone", "model")


def public_name(config: Config) -> str:
    """The backbone's hub id, "sandbox", or the last part of its local path, and no more of that."""
    source = config.backbone.source
    return Path(source).resolve().name if Path(source).is_dir() else source


def sandbox_recipe(config: Config) -> dict[str, Any]:
    """All that decides the sandbox backbone's weights; recipe.json holds it beside shipped ones."""
    return {
        "seed": config.seed,
        "world_version": sandbox("world").WORLD_VERSION,
        "recipe": config.sandbox.model_dump(mode="json", exclude={"weights"}),
    }


def _shipped_recipe() -> dict[str, Any] | None:
    path = SHIPPED / "recipe.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def judge_for(config: Config) -> Callable[[EvalPrompt, str], str]:
    """The sandbox's judge, one response at a time; it knows the village's words only.

    The judges that `config.judges` names are in the package judges. SpkitError where neither the
    prompts nor the backbone are the sandbox's.
    """
    if config.backbone.source != "sandbox" and _evaluation_names(config.data) != ["sandbox"]:
        raise SpkitError(
            f"data.evaluation is {config.data.evaluation!r} and backbone.source is "
            f"{config.backbone.source!r}: for the judge 'sandbox' one of the two must be "
            f"'sandbox'; name other judges in judges.harmful and judges.over_safety"
        )
    return sandbox("judge").judge


# ---- single files of one's own -------------------------------------------------------------------


def read_harmful_pairs(path: str | Path) -> list[HarmfulPair]:
    """All pairs of a file of one's own, in its order; a row without an id gets its number as one.

    SpkitError for a bad file or row (readers/own.py).
    """
    records = own.pairs(SourceConfig(reader="own", path=str(path)))
    return [HarmfulPair(r.id, r.prompt, r.response, r.categories[0]) for r in records]


def read_eval_prompts(path: str | Path, split: str) -> list[EvalPrompt]:
    """The prompts of one split of a file of one's own; a row that names none belongs to "test".

    SpkitError for a bad file or row (readers/own.py), and where the split is empty.
    """
    records = own.prompts(SourceConfig(reader="own", path=str(path)))
    placed = [_placed(r, str(path), DataConfig(), set(), alone=True) for r in records]
    prompts = [prompt for place, prompt in placed if place == split]
    if not prompts:
        raise SpkitError(f"{path}: no prompt of the split {split!r} (evaluation.split)")
    return prompts


# ---- choosing ------------------------------------------------------------------------------------


def _check_categories(wanted: Sequence[str] | None, known: list[str], source: str) -> None:
    if wanted is not None and not wanted:
        raise SpkitError(f"no category of {source} is chosen, allowed: {', '.join(known)}")
    for category in wanted or ():
        if category not in known:
            raise SpkitError(f"no category {category!r} in {source}{nearest(category, known)}")


def sample(examples: list, count: int | None, seed: int) -> list:
    """At most `count` examples, in their order, chosen by a hash of seed and id."""
    if count is None or count >= len(examples):
        return examples

    def rank(example) -> bytes:
        return hashlib.sha256(f"{seed}|{example.id}".encode()).digest()

    chosen = {example.id for example in sorted(examples, key=rank)[:count]}
    return [example for example in examples if example.id in chosen]


def _unique_ids(prompts: list[EvalPrompt]) -> list[EvalPrompt]:
    met = set()
    for prompt in prompts:
        if prompt.id in met:
            raise SpkitError(f"evaluation prompts: the id {prompt.id!r} stands twice, must differ")
        met.add(prompt.id)
    return prompts
