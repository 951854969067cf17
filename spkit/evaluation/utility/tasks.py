"""Tasks of lm-eval (the Language Model Evaluation Harness) on a model that is already in memory.

What the harness does with a task (its documents, prompts, few-shot examples, answers and metrics)
is the harness's own; here its arguments are set, its errors become one sentence and its results a
tidy frame. A patched or 4-bit model is measured as it is, nothing is loaded anew.

A task in `utility.sources` reads its documents from a local file (task_files.py).

Task files are code: a YAML with `!function` runs the Python beside it. `include_path` must be a
folder that one trusts. Data sets are read without code of theirs.
"""

import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch

from spkit.config import UtilityConfig
from spkit.errors import SpkitError
from spkit.evaluation.utility.task_files import write_task_files
from spkit.models.devices import devices_of
from spkit.models.templates import arguments_of, has_system_role
from spkit.validation import nearest

MISSING = "utility.tasks needs lm-eval, which is not installed: pip install 'spkit[eval]'"
COLUMNS = "model kind task metric value stderr n num_fewshot limit chat_template".split()
# where a standard error has no formula: as many resamples, in this process
BOOTSTRAP = 1000
# what a task's file, its templates and its Python raise where they are wrong
TASK_ERRORS = (AssertionError, AttributeError, ImportError, LookupError, SyntaxError, TypeError)
TASK_ERRORS = (*TASK_ERRORS, ValueError, jinja2.TemplateError)


def lm_eval_tasks(
    model, tokenizer, utility: UtilityConfig, *, name: str, seed: int
) -> pd.DataFrame:
    """A row per task of `utility.tasks` and metric (COLUMNS); no rows where there are no tasks.

    task: as asked for, such as "mmlu"; a tag or group without a figure of its own gives its parts.
    metric: the harness's name with its filter ("exact_match,strict-match"), in its unit (mostly a
    share of 1). stderr: the harness's, NaN where it has none. n: documents that were scored.
    num_fewshot: as used (a task that fixes it at 0 keeps 0). limit: of documents in a leaf task, so
    that a group of 57 subjects has up to 57 times as many; missing where there is none.
    The tokenizer's `system_prompt`, if there is one, comes before every document. Random numbers
    are drawn from `seed`, and the caller's generators are put back.

    SpkitError: lm-eval is not installed, a task is unknown, or a task cannot be loaded or run.
    """
    if not utility.tasks:
        return pd.DataFrame(columns=COLUMNS)
    with _as_before(model), _scratch() as scratch:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise SpkitError(MISSING) from None
        tasks = list(dict.fromkeys(utility.tasks))
        manager = _manager(TaskManager, tasks, _folders(utility, scratch))
        try:
            results = lm_eval.simple_evaluate(
                model=_harness(model, tokenizer, utility.batch_size),
                tasks=tasks,
                task_manager=manager,
                num_fewshot=utility.num_fewshot,
                limit=utility.limit,
                batch_size=utility.batch_size,
                apply_chat_template=utility.chat_template,
                fewshot_as_multiturn=utility.chat_template,
                system_instruction=_system(tokenizer, utility.chat_template),
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:  # so are a refused connection and an unknown data set
            raise SpkitError(
                f"lm-eval cannot load the data of {', '.join(tasks)} (utility.tasks): "
                f"{_first_line(error)}; a task of the hub needs the network once, or its cached "
                "data set"
            ) from error
        except TASK_ERRORS as error:
            raise SpkitError(
                f"lm-eval cannot run {', '.join(tasks)} (utility.tasks): {_first_line(error)}"
            ) from error
    return _tidy(results, tasks, utility, name)


def _scratch() -> TemporaryDirectory:
    """For task files and their documents, as long as the harness runs."""
    return TemporaryDirectory(prefix="spkit-", ignore_cleanup_errors=True)


def _folders(utility: UtilityConfig, scratch: str) -> list[str]:
    """Where task files of one's own are; a task of a later folder takes the place of an earlier."""
    folders = []
    if utility.include_path is not None:
        if not os.path.isdir(utility.include_path):
            raise SpkitError(
                f"utility.include_path is {utility.include_path!r}, which is no folder"
            )
        folders.append(utility.include_path)
    if utility.sources:
        write_task_files(utility, Path(scratch))
        folders.append(scratch)
    return folders


def _manager(task_manager, tasks: list[str], folders: list[str]):
    """The harness's index of tasks; its own 14,000 are read only where the folders' do not do."""
    if folders:
        own = task_manager(include_path=folders, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = task_manager(include_path=folders or None)
    for task in tasks:
        if task not in manager.all_tasks:
            listed = "the names that `lm-eval ls tasks` lists"
            hint = nearest(task, manager.all_tasks, otherwise=listed)
            raise SpkitError(f"utility.tasks: lm-eval has no task {task!r}{hint}")
    return manager


def _system(tokenizer, chat_template: bool) -> str | None:
    """The system prompt; in plain text the harness would write the document right after it."""
    system = getattr(tokenizer, "system_prompt", None)
    return f"{system}\n\n" if system and not chat_template else system


def _harness(model, tokenizer, batch_size: int):
    """The model as the harness takes it; its chat format is the kit's."""
    from lm_eval.models.huggingface import HFLM

    keeps = has_system_role(tokenizer)

    class Harness(HFLM):
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            """HFLM drops a system turn that the format refuses; by the kit's rule the user says it.

            So it is with a task's own description, which the harness makes a system turn.
            """
            system, *turns = chat_history
            if system["role"] == "system" and turns and not keeps:
                first = f"{system['content']}\n\n{turns[0]['content']}"
                chat_history = [{**turns[0], "content": first}, *turns[1:]]
            return super().apply_chat_template(chat_history, add_generation_prompt)

    return Harness(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        chat_template_args=arguments_of(tokenizer),
        trust_remote_code=False,
    )


@contextmanager
def _as_before(model) -> Iterator[None]:
    """Quiet the harness, keep it in this process, and put the random generators back after it."""
    logger, key = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, environment = logger.level, os.environ.get(key)
    states = random.getstate(), np.random.get_state()
    devices = [device for device in devices_of(model) if device.type == "cuda"]
    logger.setLevel(logging.ERROR)
    os.environ[key] = "1"  # a fork for the resamples is no good in a process that holds a GPU
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        logger.setLevel(level)
        if environment is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = environment


def _tidy(
    results: Mapping[str, Any], tasks: list[str], utility: UtilityConfig, name: str
) -> pd.DataFrame:
    rows, order = [], {task: number for number, task in enumerate(tasks)}
    for task in sorted(_outermost(results), key=lambda task: order.get(task, len(tasks))):
        figures = results["results"][task]
        scored = sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(results, task))
        for key, value in figures.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kept}")  # "N/A" where there is none
            rows.append(
                {
                    "model": name,
                    "kind": "lm-eval",
                    "task": task,
                    "metric": key,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else float("nan"),
                    "n": scored,
                    "num_fewshot": results["n-shot"].get(task, utility.num_fewshot),
                    "limit": utility.limit,
                    "chat_template": utility.chat_template,
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _outermost(results: Mapping[str, Any]) -> list[str]:
    """Tasks and groups that have figures and are in no group that has."""
    own = [task for task, row in results["results"].items() if any("," in key for key in row)]
    inside = {part for task in own for part in _parts(results, task)}
    return [task for task in own if task not in inside]


def _parts(results: Mapping[str, Any], group: str) -> Iterator[str]:
    """All that is in a group, at any depth; nothing for a task."""
    for part in results["group_subtasks"].get(group, ()):
        yield part
        yield from _parts(results, part)


def _leaves(results: Mapping[str, Any], task: str) -> set[str]:
    return {part for part in (task, *_parts(results, task)) if part in results["n-samples"]}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
