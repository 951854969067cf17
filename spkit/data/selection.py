"""Harmful pairs (D_h) and evaluation prompts of a run: from the sandbox, data sets or own files.

The readers (data/readers) say what the rows of a data set are. Here a run's choices are made: which
categories, which split and group, how many, and that no evaluation prompt is one of D_h.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from spkit.config import AlignConfig, DataConfig, EvaluationConfig, SourceConfig
from spkit.data.questions import some_as_questions
from spkit.data.readers import own, read
from spkit.data.readers.record import Record
from spkit.data.readers.source import is_local, resolve
from spkit.data.readers.texts import instruction_share_of, normalised, share_of, split_of
from spkit.data.readers.wrappers import read_wrappers, wrapped
from spkit.errors import SpkitError
from spkit.examples import GROUPS, EvalPrompt, HarmfulPair, digest, sample
from spkit.sandbox import world
from spkit.validation import nearest

UNALIGNED = "unaligned"  # of data.responses; with ":" and a file behind it where that is known
SPLITS = ("dev", "test")
OPENINGS = {  # readers whose responses are openings of one
    "advbench": "AdvBench's `target`",
    "jailbreakbench": "JailbreakBench's `Target`",
}
INSTRUCTIONS_ALIGN = 0.2  # of a source of instructions, where data.shares says nothing


def load_harmful_pairs(
    data: DataConfig,
    *,
    seed: int,
    categories: Sequence[str] | None = None,
    unaligned: Path | None = None,
) -> list[HarmfulPair]:
    """D_h: at most `data.pairs` pairs of the wanted categories, a pure function of the arguments.

    A pair with several categories counts in the first wanted one, so it may be in two stages of
    continual patching. With `data.shares` only the share `harmful` of the source is D_h.
    categories: instead of `data.categories`, for one such stage. unaligned: for `data.responses:
    unaligned`, a JSONL file of {"prompt", "response"} with what the backbone answered before its
    alignment (where nothing is aligned, what the backbone itself answers); pairs that it has no
    response for are left out before the draw, and a line says how many.
    Raises SpkitError for a bad file or row, a source without responses, a category that the source
    does not have, an empty D_h, and a pair for which `data.responses` has no response.
    """
    wanted = data.categories if categories is None else categories
    if data.harmful == "sandbox":
        return _sandbox_pairs(data, wanted, data.pairs, seed)
    pairs = _as_questions(data, _source_pairs(data, wanted))
    return sample(_answered(data, pairs, unaligned), data.pairs, seed)


def load_harmful_prompts(data: DataConfig) -> list[str]:
    """What the unaligned backbone is asked for y: every prompt that can be in D_h, each once.

    Not limited by `data.pairs`, for a draw comes after refused ones are left out. In the source's
    order; SpkitError as load_harmful_pairs, but for responses.
    """
    first = {}
    for pair in _as_questions(data, _possible_pairs(data)):
        first.setdefault(normalised(pair.prompt), pair.prompt)
    return list(first.values())


def load_align_prompts(data: DataConfig, align: AlignConfig, seed: int) -> list[str]:
    """At most `align.pairs` harmful prompts of `align.harmful`, drawn by seed, each once.

    With `data.shares` they are of the share `align`. Prompts that D_h or the evaluation (both
    splits) have are left out. SpkitError for a bad file or row, and where no prompt is left.
    """
    records = read(resolve(data, align.harmful, "align.harmful"), "evaluation")
    records = [record for record in records if record.objective == "harmful"]
    if data.shares is not None:
        records = [r for r in records if share_of(r.prompt, data.shares) == "align"]
    free = _unused(data, records)
    if not free:
        raise SpkitError(
            f"align.harmful: no prompt of {align.harmful!r} is left that neither D_h nor the "
            f"evaluation has; set data.shares where they are of one source, or name another"
        )
    chosen = [record.prompt for record in sample(free, align.pairs, seed)]
    return some_as_questions(chosen, align.as_questions)


def load_instructions(data: DataConfig, name: str, count: int, seed: int) -> list[str]:
    """At most `count` harmless instructions for the alignment, drawn by seed, each once.

    They are those of instructions_of in the role "align", without what the sources of
    `data.evaluation` have; for `align.over_safety` add its names there. SpkitError as there, and
    where none is left.
    """
    free = _unused(data, instructions_of(data, name, "align"))
    if not free:
        raise SpkitError(
            f"align.instructions: every instruction of {name!r} for the alignment is an evaluation "
            f"prompt, too; name another source"
        )
    return [prompt.prompt for prompt in sample(free, count, seed)]


def instructions_of(data: DataConfig, name: str, role: str) -> list[EvalPrompt]:
    """The harmless instructions of a source that one role may read; no two roles share a text.

    role: "align" (the alignment learns the backbone's answers to them), "dev" or "test" (KL). By a
    hash of the text: first the share `align` (`data.shares.align`, INSTRUCTIONS_ALIGN without
    shares), of the rest `data.dev_share` are dev and the others test. A row that says its own split
    stays in it and is never in "align". SpkitError for a bad file or row, another role, a harmful
    prompt, and where the role has none.
    """
    if role not in ("align", *SPLITS):
        raise SpkitError(f"role is {role!r}, allowed: align, {', '.join(SPLITS)}")
    source = resolve(data, name, "align.instructions" if role == "align" else "utility.kl")
    align = INSTRUCTIONS_ALIGN if data.shares is None else data.shares.align
    first: dict[str, Record] = {}  # of two copies of a text the first says the split
    for record in read(source, "evaluation"):
        if record.objective == "harmful":
            raise SpkitError(f"{name}: the prompt {record.id!r} is harmful, must be harmless")
        first.setdefault(normalised(record.prompt), record)
    found = [
        _prompt(record, name, data, record.categories[0])
        for record in first.values()
        if role == (record.split or instruction_share_of(record.prompt, align, data.dev_share))
    ]
    if not found:
        raise SpkitError(f"{name}: no instruction for {role!r} among its prompts, one is needed")
    return found


def load_eval_prompts(data: DataConfig, evaluation: EvaluationConfig) -> list[EvalPrompt]:
    """The held-out prompts of `evaluation.split`, at most `prompts_per_cell` of each group.

    Behind each harmful prompt come its copies in `data.wrappers`, which do not count in the cell.
    Of all but the sandbox's prompts (which are disjoint by construction), those that D_h's source
    holds in the kept categories are left out, and so are second copies; a line says how many. With
    `data.shares`, what is in D_h's source is evaluated only where its share is dev or test.
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
        groups: dict[tuple[str, str], list[EvalPrompt]] = {}
        for prompt in prompts:
            groups.setdefault((prompt.objective, prompt.group), []).append(prompt)
        prompts = [prompt for group in groups.values() for prompt in sample(group, cell, seed=0)]
    if not prompts:
        raise SpkitError(f"{', '.join(names)}: no prompt of the split {split!r} (evaluation.split)")
    return _unique_ids(wrapped(prompts, templates)) if templates else prompts


def is_unaligned(data: DataConfig) -> bool:
    """Whether y is what the backbone said before its alignment."""
    return (data.responses or "").partition(":")[0] == UNALIGNED


def _file_of(responses: str) -> Path | None:
    name = responses.partition(":")[2]
    return Path(name) if name else None


def what_is_y(data: DataConfig) -> str:
    """One sentence on the harmful responses that D_h uses, for notebook 01."""
    if is_unaligned(data):
        return "y: what the backbone answered before its alignment (data.responses: unaligned)"
    if data.responses is not None:
        return f"y: the responses in {data.responses} (data.responses)"
    reader = "" if data.harmful == "sandbox" else resolve(data, data.harmful, "data.harmful").reader
    if reader in OPENINGS:
        return (
            f"y: the opening alone ({OPENINGS[reader]}), for the source has no whole responses; "
            f"data.responses takes a file of them"
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
    if data.shares is not None:
        raise SpkitError(
            "data.shares must be null where data.harmful is 'sandbox': its prompts are disjoint"
        )
    return world.harmful_pairs(tuple(wanted or known), count, seed)


def _source_pairs(data: DataConfig, wanted: Sequence[str] | None) -> list[HarmfulPair]:
    """All pairs of D_h's source in the wanted categories and D_h's share, as they are there."""
    records = read(resolve(data, data.harmful, "data.harmful"), "D_h")
    known = {category for record in records for category in record.categories}
    _check_categories(wanted, sorted(known), data.harmful)
    if data.shares is not None:
        records = [r for r in records if share_of(r.prompt, data.shares) == "harmful"]
    before = f"{data.harmful}-" if data.harmful in data.sources else ""
    pairs = []
    for record in records:
        category = next((c for c in record.categories if wanted is None or c in wanted), None)
        if category is not None:
            pair = HarmfulPair(before + record.id, record.prompt, record.response, category)
            pairs.append(pair)
    if not pairs:
        raise SpkitError(f"data.shares.harmful: no pair of {data.harmful} is in this share")
    return pairs


def _as_questions(data: DataConfig, pairs: list[HarmfulPair]) -> list[HarmfulPair]:
    """The pairs, a share of them put as questions."""
    asked = some_as_questions([pair.prompt for pair in pairs], data.as_questions)
    return [replace(pair, prompt=text) for pair, text in zip(pairs, asked, strict=True)]


def _possible_pairs(data: DataConfig) -> list[HarmfulPair]:
    """All pairs that can be in D_h, as they are in its source."""
    if data.harmful == "sandbox":
        return _sandbox_pairs(data, data.categories, None, 0)
    return _source_pairs(data, data.categories)


def _answered(data: DataConfig, pairs: list[HarmfulPair], unaligned: Path | None) -> list:
    """The pairs with the responses that `data.responses` says."""
    if data.responses is None:
        if any(not pair.response for pair in pairs):
            raise SpkitError(
                f"data.harmful: {data.harmful} has prompts without responses, so it can be D_h "
                f"only with data.responses: a file of them, or 'unaligned'"
            )
        return pairs
    if is_unaligned(data):
        return _on_policy(data, pairs, unaligned or _file_of(data.responses))
    found = own.responses(resolve(data, data.responses, "data.responses"))
    for pair in pairs:
        if normalised(pair.prompt) not in found:
            raise SpkitError(
                f"{data.responses} (data.responses): no response for the prompt of {pair.id!r} in "
                f"{data.harmful}, each pair of D_h needs one"
            )
    return [replace(pair, response=found[normalised(pair.prompt)]) for pair in pairs]


def _on_policy(data: DataConfig, pairs: list[HarmfulPair], unaligned: Path | None) -> list:
    """The pairs that the unaligned backbone answered, with its responses."""
    if unaligned is None or not Path(unaligned).is_file():
        raise SpkitError(
            "data.responses is 'unaligned', but the unaligned backbone has not answered yet: run "
            "the alignment (notebook 00) first"
        )
    source = SourceConfig(reader="own", path=str(unaligned))
    found, cut = own.responses(source), own.cut_responses(source)
    kept = [
        replace(
            pair,
            response=found[normalised(pair.prompt)],
            ends=normalised(pair.prompt) not in cut,
        )
        for pair in pairs
        if normalised(pair.prompt) in found
    ]
    if not kept:
        raise SpkitError(f"{unaligned}: has a response to no prompt of D_h ({data.harmful})")
    if len(kept) < len(pairs):
        print(
            f"D_h: {len(kept)} of {len(pairs)} pairs; to the others the unaligned backbone gave no "
            f"response."
        )
    return kept


def evaluation_names(data: DataConfig) -> list[str]:
    """The sources of the evaluation prompts.

    SpkitError where one is named twice, or as one of GROUPS.
    """
    names = [data.evaluation] if isinstance(data.evaluation, str) else list(data.evaluation)
    for name in names:
        if name in data.sources and name in [g for groups in GROUPS.values() for g in groups]:
            raise SpkitError(
                f"data.sources: {name!r} is what tables call prompts without a source, choose "
                f"another name"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpkitError(f"data.evaluation: {twice!r} stands twice, names must differ")
    return names


def _source_prompts(data: DataConfig, names: Sequence[str], split: str) -> list[EvalPrompt]:
    """The prompts of one split of all names but 'sandbox', without those of D_h and second ones."""
    if data.harmful != "sandbox" and not is_unaligned(data):
        _answered(data, _source_pairs(data, data.categories), None)  # an error as early as can be
    kept, in_learnt, twice = _held_out(data, names)
    taken = "in D_h" if data.shares is None else "in the shares of D_h and of the alignment"
    print(
        f"Evaluation prompts: {len(kept)}, after {in_learnt} that are {taken} and {twice} that "
        f"stand twice were left out."
    )
    return [prompt for place, prompt in kept if place == split]


def _held_out(
    data: DataConfig, names: Sequence[str]
) -> tuple[list[tuple[str, EvalPrompt]], int, int]:
    """([(split, prompt)], how many were in D_h, how many stood twice) of all names but 'sandbox'.

    In a named source the split is a hash of the text; for a text of D_h's source with `data.shares`
    it is its share. A file without a name says "test" by saying nothing.
    """
    learnt, shared, categories = _learnt(data)
    kept, met, in_learnt, twice = [], set(), 0, 0
    for name in names:
        if name == "sandbox":
            continue
        records = read(resolve(data, name, "data.evaluation"), "evaluation")
        held_out = [r for r in records if normalised(r.prompt) not in learnt]
        if not held_out:
            raise SpkitError(
                f"data.evaluation: every prompt of {name!r} is in D_h ({data.harmful}), so none is "
                f"held out; set data.shares, name another source, or fewer data.categories"
            )
        in_learnt += len(records) - len(held_out)
        for record in held_out:
            text = normalised(record.prompt)
            twice += text in met
            if text not in met:
                met.add(text)
                split = split_of(record.prompt, data.dev_share) if name in data.sources else "test"
                split = record.split or shared.get(text, split)
                first = next((c for c in record.categories if c in categories), None)
                prompt = _prompt(record, name, data, first or record.categories[0], len(names) == 1)
                kept.append((split, prompt))
    return kept, in_learnt, twice


def _learnt(data: DataConfig) -> tuple[set[str], dict[str, str], set[str]]:
    """Texts that may not be evaluated, {text: split} by shares, and D_h's categories."""
    if data.harmful == "sandbox":
        pairs = _sandbox_pairs(data, data.categories, None, 0)
    else:
        pairs = _source_pairs(data, data.categories)
    categories = {pair.category for pair in pairs}
    if data.shares is None:
        return {normalised(pair.prompt) for pair in pairs}, {}, categories
    texts = [r.prompt for r in read(resolve(data, data.harmful, "data.harmful"), "D_h")]
    shares = {normalised(text): share_of(text, data.shares) for text in texts}
    split = {text: share for text, share in shares.items() if share in SPLITS}
    return set(shares) - set(split), split, categories


def _unused(data: DataConfig, found: Sequence) -> list:
    """The records or prompts whose text is neither in D_h nor evaluated; a second copy is not."""
    kept, _, _ = _held_out(data, evaluation_names(data))
    used = {normalised(prompt.prompt) for _, prompt in kept}
    used |= {normalised(pair.prompt) for pair in _possible_pairs(data)}
    free = {}
    for one in found:
        free.setdefault(normalised(one.prompt), one)
    return [one for text, one in free.items() if text not in used]


def _prompt(
    record: Record, name: str, data: DataConfig, category: str, alone: bool = True
) -> EvalPrompt:
    """The record as a prompt; its group is its source's name, in a file without one of GROUPS.

    A row of a named source that says another group than the first is "<name>, <group>".
    """
    usual, named = GROUPS[record.objective][0], name in data.sources
    group = record.group or usual
    if named:
        group = name if group == usual else f"{name}, {group}"
    before = f"{name}-" if named else "" if alone else f"{Path(name).stem}-"
    return EvalPrompt(
        id=before + record.id,
        prompt=record.prompt,
        objective=record.objective,
        group=group,
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
