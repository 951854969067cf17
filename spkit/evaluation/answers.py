"""Evaluation: what a model answers to held-out prompts, what each answer counts as, and how often.

Three objectives: harmful prompts (lower harm is better), over-safety prompts (fewer refusals),
utility (more correct answers). Two scores are in every results.csv, and every short table shows
the broken text by which they differ:

    the paper's  harmful rate, false-refusal rate, utility;
    the strict   the same, but broken text is a failure on harmful and harmless prompts alike.

Answers are decoded greedily, whatever a checkpoint's own generation_config asks for, and can be
stored as they come. Nothing here knows of patches: a model comes in, a tidy data frame goes out.
The judges (judges/) decide on a verdict.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation.greedy import GREEDY, continued
from spkit.evaluation.thoughts import as_answer, opened_thought
from spkit.examples import EvalPrompt
from spkit.models.chat import prompt_ids, special_ids, turn_end
from spkit.models.lengths import check_lengths, context_of
from spkit.models.prompt_checks import check_rendered
from spkit.system import store as files
from spkit.system.out_of_memory import explained

GENERATED = "generated_tokens"  # in a frame's attrs


def decoding(config: Config) -> dict[str, bool | int]:
    """How the answers are decoded, to be recorded beside them."""
    return _decoding(config.evaluation.max_new_tokens, config.evaluation.batch_size)


def _decoding(max_new_tokens: int, batch_size: int) -> dict[str, bool | int]:
    greedy = {key: GREEDY[key] for key in ("do_sample", "num_beams")}
    return {**greedy, "max_new_tokens": max_new_tokens, "batch_size": batch_size}


def end_tokens(model, tokenizer, *, chat: bool = True) -> list[int]:
    """All ids that end an answer: the model's own, the tokenizer's, and what ends a chat turn.

    LLaMA-3's tokenizer, for one, ends a text with <|end_of_text|>, but a turn with <|eot_id|>.
    """
    own = model.generation_config.eos_token_id
    ends = list(own) if isinstance(own, list | tuple) else [own]
    special = special_ids(tokenizer)
    ends += [tokenizer.eos_token_id]
    ends += [token for token in turn_end(tokenizer) if token in special] if chat else []
    return [end for end in dict.fromkeys(ends) if end is not None]


def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str = "generate",
    told: Callable[[int], object] = lambda tokens: None,
) -> list[str]:
    """Greedy answers in the prompts' order, special tokens removed.

    Prompts are sorted by length and batched. At the end of the model's context an answer is cut.
    told: called with the number of tokens of each batch. SpkitError as in `check_prompts`, for
    prompts that leave no room for any answer.
    """
    answers = [""] * len(prompts)
    encoded = check_prompts(tokenizer, prompts, 1)
    batches = _batches(encoded, batch_size)
    for batch, tokens in _answered(model, tokenizer, batches, max_new_tokens, label):
        told(tokens)
        for i, answer in batch.items():
            answers[i] = answer
    return answers


def check_prompts(
    tokenizer, prompts: Sequence, max_new_tokens: int, names: Sequence[str] = ()
) -> list[list[int]]:
    """The prompts' token ids; it needs no model. names: of the prompts, for a message.

    SpkitError where the first prompts are not found in what their ids say (prompt_checks.py), and
    where one leaves no room in the model's context for an answer of `max_new_tokens`.
    """
    check_rendered(tokenizer, prompts)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    check_lengths(encoded, context_of(tokenizer), max_new_tokens, names)
    return encoded


def _batches(encoded: Sequence[list[int]], batch_size: int) -> list[dict[int, list[int]]]:
    """{number of the prompt: its token ids} of each batch, short prompts first."""
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    starts = range(0, len(by_length), batch_size)
    return [{i: encoded[i] for i in by_length[start : start + batch_size]} for start in starts]


def _answered(
    model,
    tokenizer,
    batches: Sequence[dict[int, list[int]]],
    max_new_tokens: int,
    label: str,
    done: int = 0,
) -> Iterator[tuple[dict[int, str], int]]:
    """({number of the prompt: answer}, tokens generated) of each batch after the first `done`."""
    ends = end_tokens(model, tokenizer)
    options = {"pad": tokenizer.pad_token_id, "ends": ends}
    context = context_of(tokenizer) or 2**30
    text = as_answer(tokenizer)
    progress = {"desc": label, "unit": "batch", "initial": done, "total": len(batches)}
    quiet = len(batches) == 1  # a few questions need no bar
    for batch in tqdm(batches[done:], leave=False, disable=quiet, **progress):
        room = context - max(len(ids) for ids in batch.values())
        at_most = min(max_new_tokens, room)
        output = continued(model, list(batch.values()), max_new_tokens=at_most, **options)
        answers = dict(zip(batch, map(text, output), strict=True))
        yield answers, sum(_length(ids, ends) for ids in output)


def _length(ids: torch.Tensor, ends: Sequence[int]) -> int:
    """How many of a row's tokens were generated: up to the first that ends it, and not padding."""
    return next((n for n, token in enumerate(ids.tolist(), start=1) if token in ends), len(ids))


def respond(
    model,
    tokenizer,
    prompts: Sequence[EvalPrompt],
    *,
    name: str,
    max_new_tokens: int,
    batch_size: int,
    store: Path | None = None,
    context: str = "",
) -> pd.DataFrame:
    """One row per prompt: model, the prompt's fields, response.

    store: a file that every finished batch is added to. A second call resumes after the last whole
    batch, with the batches that an uncut run forms, so that the responses are the same. A complete
    store is read, and then model and tokenizer may be None. It is begun anew where name, prompts,
    decoding or `context` (what the model is made from; see stored.py) are others. A response begins
    with the mark of a thought where the chat template opens one for the model.
    `frame.attrs["generated_tokens"]` is how many tokens this call generated, 0 where all were read.
    SpkitError if there are no prompts, the store cannot be written, or as in `check_prompts`.
    """
    if not prompts:
        raise SpkitError("There are no evaluation prompts: their file or its filter is empty.")
    header = {
        "name": name,
        "prompts": fingerprint(prompts),
        **_decoding(max_new_tokens, batch_size),
        "context": context,
    }
    kept = [] if store is None else files.stored(store, header)
    answers = {row.get("row"): row.get("response") for row in kept}
    tokens_so_far = 0
    if set(answers) != set(range(len(prompts))):
        names = [p.id for p in prompts]
        encoded = check_prompts(tokenizer, [p.prompt for p in prompts], max_new_tokens, names)
        batches = _batches(encoded, batch_size)
        kept = kept[: _whole([list(batch) for batch in batches], [row.get("row") for row in kept])]
        answers = {row["row"]: row["response"] for row in kept}
        done = sum(set(batch) <= set(answers) for batch in batches)
        if store is not None:
            files.begin(store, header, kept)
        label, opened = f"answers of {name}", opened_thought(tokenizer)
        lower = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        with explained(
            f"generating the {label}", {f"evaluation.{key}": value for key, value in lower.items()}
        ):
            for batch, tokens in _answered(model, tokenizer, batches, max_new_tokens, label, done):
                batch = {i: opened + said for i, said in batch.items()}
                answers |= batch
                tokens_so_far += tokens
                if store is not None:
                    rows = [
                        {"row": i, "id": prompts[i].id, "response": said}
                        for i, said in batch.items()
                    ]
                    files.append(store, rows)
    return counted(_table(name, prompts, answers), tokens_so_far)


def _table(name: str, prompts: Sequence[EvalPrompt], answers: Mapping[int, str]) -> pd.DataFrame:
    """One row per prompt. answers: {number of the prompt: its response}."""
    rows = [
        {
            "model": name,
            "id": p.id,
            "objective": p.objective,
            "group": p.group,
            "category": p.category,
            "phrasing": p.phrasing,
            "prompt": p.prompt,
            "response": answers[i],
        }
        for i, p in enumerate(prompts)
    ]
    return pd.DataFrame(rows)


def read_answers(path: str | Path) -> pd.DataFrame:
    """A table of answers as it was written: a text that is a number, or "nan", stays a text."""
    texts = dict.fromkeys(("id", "group", "category", "prompt", "response"), str)
    return pd.read_csv(path, dtype=texts, keep_default_na=False)


def counted(frame: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """The frame, which says how many tokens were generated for it (`generated`)."""
    frame.attrs[GENERATED] = int(tokens)
    return frame


def generated(*frames: pd.DataFrame) -> int:
    """How many tokens were generated for these answers; those that were read from a store took
    none."""
    return sum(frame.attrs.get(GENERATED, 0) for frame in frames)


def _whole(batches: Sequence[list[int]], found: list[int]) -> int:
    """How many of the stored rows are whole batches in the order of `batches`."""
    count = 0
    for batch in batches:
        if found[count : count + len(batch)] != batch:
            break
        count += len(batch)
    return count


def fingerprint(prompts: Sequence[EvalPrompt]) -> str:
    """SHA-256 in hex of the prompts' ids and texts in their order."""
    text = json.dumps([[p.id, p.prompt] for p in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def evaluate(
    model,
    tokenizer,
    prompts: Sequence[EvalPrompt],
    judge: Callable[[EvalPrompt, str], str],
    **settings,
) -> pd.DataFrame:
    """What `respond` gives, with a column verdict: what the judge says of each response.

    settings: those of `respond`. For judges that are models, respond first and then judge all
    responses together with `judges.judged`.
    """
    frame = respond(model, tokenizer, prompts, **settings)
    frame["verdict"] = [judge(p, r) for p, r in zip(prompts, frame["response"], strict=True)]
    return frame
