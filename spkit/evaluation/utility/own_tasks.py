"""Task files of one's own (`utility.include_path`), tried before any work and without a model.

lm-eval tells a mistake in a task's file only when it builds the task, and a notebook does that
after all answers: a `!function` that is not there, a column that the documents lack, a split
without rows, a metric of no meaning. So each such task is built here, and its first prompts are
written. A task whose documents lie on a hub is left alone, for nothing is fetched.

A YAML with `!function` runs the Python beside it, now as in the notebook: trust the folder.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spkit.config import UtilityConfig
from spkit.errors import SpkitError
from spkit.validation import nearest

TRIED = 100  # documents of a task whose prompts are written; one file rarely has two kinds of rows
# data sets that are built into `datasets`, and no names on the hub
BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


def check_own_tasks(utility: UtilityConfig, known: set[str]) -> None:
    """SpkitError, in one sentence, for the first task of the folder that lm-eval could not run.

    known: names of all tasks, lm-eval's own among them.
    """
    if utility.include_path is None:
        return
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=utility.include_path, include_defaults=False)
    own = manager.task_index
    with _quiet():
        for name in _leaves(own, [t for t in utility.tasks if t not in utility.sources], known):
            if _is_local((own[name].cfg or {}).get("dataset_path")):
                _try(manager, name, utility)


def unreadable(folder: str | Path) -> str:
    """What is wrong with the first task file of a folder that lm-eval skips unsaid; or ""."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(folder).rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML's, a missing include, a cycle: all are skipped alike
            return f"; {path} cannot be read: {_brief(error)}"
    return ""


def _leaves(own: dict, names: list[str], known: set[str]) -> list[str]:
    """The folder's tasks among `names` and in its groups; SpkitError for a part there is not."""
    found: dict[str, None] = {}
    todo = list(names)
    while todo:
        name = todo.pop(0)
        if name not in own or name in found:
            continue
        entry = own[name]
        listed = (entry.cfg or {}).get("task")
        parts = [part for part in listed if isinstance(part, str)] if type(listed) is list else []
        missing = next((p for p in parts if p not in known and "*" not in p), None)
        if missing is not None:
            hint = nearest(missing, sorted(known), otherwise="the tasks that there are")
            raise SpkitError(
                f"utility.tasks: the group {name!r} names {missing!r}, and there is no such "
                f"task{hint}"
            )
        todo += [*parts, *(sorted(entry.tags) if entry.kind.name == "TAG" else ())]
        if entry.kind.name in ("TASK", "PY_TASK"):
            found[name] = None
    return list(found)


def _is_local(path: str | None) -> bool:
    return path is None or path in BUILDERS or Path(path).exists()


def _try(manager, name: str, utility: UtilityConfig) -> None:
    """Build one task as the harness does, and write its first prompts."""
    try:
        for task in manager.load([name])["tasks"].values():
            if utility.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=utility.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
            task.build_all_requests(limit=min(utility.limit or TRIED, TRIED))
            _check_metrics(task)
    except SpkitError:
        raise
    except Exception as error:  # a task's file is code, and lm-eval's own errors are of any kind
        raise SpkitError(
            f"utility.tasks: lm-eval cannot build {name!r} of {utility.include_path}: "
            f"{_brief(error)}"
        ) from error


def _check_metrics(task: Any) -> None:
    """lm-eval only logs a metric that it does not know, and then has no figure."""
    if getattr(task.config, "process_results", None) is not None:
        return
    unknown = [name for name, how in getattr(task, "_metric_fn_list", {}).items() if how is None]
    if unknown:
        raise SpkitError(
            f"utility.tasks: the task {task.config.task!r} has the metric {unknown[0]!r}, which "
            "lm-eval does not know"
        )


def _brief(error: Exception) -> str:
    """Kind and words of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs what becomes one sentence here; `datasets` shows bars for its files."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.utils.logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
