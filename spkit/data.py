"""Harmful pairs (D_h) and evaluation prompts: from the sandbox, or from JSONL files of one's own.

One JSON object a line, UTF-8. Harmful pairs: "prompt", "response", "category" (and "id").
Evaluation prompts: "prompt", "objective", "category" (and "id", "group", "phrasing", "reference",
"forbidden", "split"). Other keys are left alone. Every error names file and row.

`sandbox` is the one place through which the embedded sandbox comes in: its text, its backbone and
its judge. This file neither tokenizes nor scores.
"""

import difflib
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from spkit.config import Config, DataConfig, EvaluationConfig
from spkit.errors import SpkitError
from spkit.examples import EvalPrompt, HarmfulPair
from spkit.files import atomic
from spkit.validation import nearest

GROUPS = {
    "harmful": ("seen", "unseen"),
    "over_safety": ("harmless",),
    "utility": ("utility",),
}  # objective -> the groups it is split into; a row without a group belongs to the first


SHIPPED = Path(__file__).parent / "sandbox" / "weights"  # made by the recipe in its recipe.json


def sandbox(part: str) -> ModuleType:
    """One module of spkit/sandbox ("world", "train", "judge"), imported only when asked for."""
    return importlib.import_module(f"spkit.sandbox.{part}")


def load_harmful_pairs(
    data: DataConfig, *, seed: int, categories: Sequence[str] | None = None
) -> list[HarmfulPair]:
    """D_h: at most `data.pairs` pairs of the wanted categories, a pure function of the arguments.

    categories: instead of `data.categories`, for one stage of continual patching. Raises SpkitError
    for a bad file or row, a category that the source does not have, and an empty D_h.
    """
    wanted = data.categories if categories is None else categories
    if data.harmful == "sandbox":
        world = sandbox("world")
        known = list(world.SEEN_CATEGORIES)
        _check_categories(wanted, known, "the sandbox")
        return world.harmful_pairs(tuple(wanted or known), data.pairs, seed)
    pairs = read_harmful_pairs(data.harmful)
    _check_categories(wanted, sorted({pair.category for pair in pairs}), data.harmful)
    kept = [pair for pair in pairs if wanted is None or pair.category in wanted]
    return sample(kept, data.pairs, seed)


def load_eval_prompts(data: DataConfig, evaluation: EvaluationConfig) -> list[EvalPrompt]:
    """The held-out prompts of `evaluation.split`, at most `prompts_per_cell` of each group.

    The same prompts for every seed, so that runs can be compared. Raises SpkitError for a bad file
    or row, and where the split is empty.
    """
    cell = evaluation.prompts_per_cell
    if data.evaluation == "sandbox":
        world = sandbox("world")
        at_most = {} if cell is None else {"per_cell": cell}
        return world.eval_prompts(evaluation.split, **at_most)
    prompts = read_eval_prompts(data.evaluation, evaluation.split)
    groups: dict[str, list[EvalPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    return [prompt for group in groups.values() for prompt in sample(group, cell, seed=0)]


def fingerprint(pairs: Sequence[HarmfulPair]) -> str:
    """SHA-256 of D_h's text in hex: names the set without showing it; order does not matter."""
    rows = sorted(json.dumps([p.prompt, p.response, p.category]) for p in pairs)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


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
    """What decides the verdict on a response. So far the sandbox's, which knows its own words only.

    SpkitError where neither the prompts nor the backbone are the sandbox's.
    """
    if "sandbox" not in (config.data.evaluation, config.backbone.source):
        raise SpkitError(
            f"data.evaluation is {config.data.evaluation!r} and backbone.source is "
            f"{config.backbone.source!r}: the only judge so far is the sandbox's, so one of the "
            f"two must be 'sandbox'"
        )
    return sandbox("judge").judge


# ---- JSONL ---------------------------------------------------------------------------------------


def read_harmful_pairs(path: str | Path) -> list[HarmfulPair]:
    """All pairs of a JSONL file, in its order; a row without an id gets its number as one."""
    pairs = []
    for where, number, row in _rows(path, required=("prompt", "response", "category")):
        pairs.append(
            HarmfulPair(
                id=_text(row, "id", where, default=str(number)),
                prompt=_text(row, "prompt", where),
                response=_text(row, "response", where),
                category=_text(row, "category", where),
            )
        )
    return _unique(path, pairs)


def read_eval_prompts(path: str | Path, split: str) -> list[EvalPrompt]:
    """The prompts of one split of a JSONL file; a row that names no split belongs to "test"."""
    prompts, required = [], ("prompt", "objective", "category")
    optional = ("id", "group", "phrasing", "reference", "forbidden", "split")
    for where, number, row in _rows(path, required, optional):
        objective = _choice(row, "objective", tuple(GROUPS), where)
        groups = GROUPS[objective]
        forbidden = row.get("forbidden", [])
        if not isinstance(forbidden, list) or not all(isinstance(x, str) for x in forbidden):
            raise SpkitError(f"{where}: forbidden is {forbidden!r}, allowed: a list of texts")
        prompt = EvalPrompt(
            id=_text(row, "id", where, default=str(number)),
            prompt=_text(row, "prompt", where),
            objective=objective,
            group=_choice(row, "group", groups, where, default=groups[0]),
            category=_text(row, "category", where),
            phrasing=_text(row, "phrasing", where, default="plain"),
            reference=_text(row, "reference", where, default="", empty=True),
            forbidden=tuple(forbidden),
        )
        if _choice(row, "split", ("dev", "test"), where, default="test") == split:
            prompts.append(prompt)
    if not prompts:
        raise SpkitError(f"{path}: no prompt of the split {split!r} (evaluation.split)")
    return _unique(path, prompts)


def _rows(
    path: str | Path, required: Sequence[str], optional: Sequence[str] = ("id",)
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """("file, row 3", 3, the object) for each line that is not blank."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise SpkitError(f"{path}: cannot be read ({error.strerror})") from None
    empty = True
    for number, line in enumerate(lines, start=1):
        where = f"{path}, row {number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError:
            raise SpkitError(f"{where}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise SpkitError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not text:
            continue
        if not isinstance(row, dict):
            raise SpkitError(f"{where}: found {text[:40]!r}, must be an object with {required}")
        missing = [key for key in required if key not in row]
        if missing:
            found = ", ".join(row) or "nothing"
            raise SpkitError(f"{where}: the key {missing[0]!r} is missing (found: {found})")
        for key in row:  # a key of one's own is welcome, a mistyped one of ours is not
            near = difflib.get_close_matches(key, optional, n=1, cutoff=0.8)
            if near and key not in (*required, *optional):
                raise SpkitError(f"{where}: unknown key {key!r}, did you mean {near[0]}?")
        empty = False
        yield where, number, row
    if empty:
        raise SpkitError(f"{path}: holds no rows, at least one is needed")


def _text(
    row: dict[str, Any], key: str, where: str, default: str | None = None, empty: bool = False
) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise SpkitError(f"{where}: {key} is {value!r}, allowed: a text that is not empty")
    return value


def _choice(
    row: dict[str, Any], key: str, allowed: Sequence[str], where: str, default: str | None = None
) -> str:
    value = row.get(key, default)
    if value not in allowed:
        raise SpkitError(f"{where}: {key} is {value!r}, allowed: {', '.join(allowed)}")
    return value


def _unique(path: str | Path, examples: list) -> list:
    seen = set()
    for example in examples:
        if example.id in seen:
            raise SpkitError(f"{path}: the id {example.id!r} stands twice, ids must differ")
        seen.add(example.id)
    return examples


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
