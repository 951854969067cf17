"""Which tasks lm-eval has, and whose documents they need: looked up before any work.

    check_tasks(config.utility)       SpkitError for a task that is not there
    documents_of(config.utility)      {"openai/gsm8k": ["gsm8k"], ...}: data sets of the hub

The harness reads its 14,000 files for this, which takes seconds; what they say is kept in the
user's cache until another version is installed.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spkit.config import UtilityConfig
from spkit.errors import SpkitError
from spkit.evaluation.utility.own_tasks import BUILDERS, check_own_tasks, unreadable
from spkit.system.files import cache_folder, once
from spkit.validation import nearest

# {name: {"parts": names of a group's or tag's, "documents": str}}
Index = dict[str, dict[str, Any]]


def check_tasks(utility: UtilityConfig) -> None:
    """SpkitError where `utility.include_path` is no folder, lm-eval has no task of a name, or a
    task of one's own cannot be built (own_tasks.py)."""
    known = _index(utility)
    for task in utility.tasks:
        if task not in known:
            listed = "the names that `lm-eval ls tasks` lists"
            hint = nearest(task, list(known), otherwise=listed)
            bad = unreadable(utility.include_path) if utility.include_path else ""
            raise SpkitError(f"utility.tasks: lm-eval has no task {task!r}{hint}{bad}")
    check_own_tasks(utility, set(known))


def documents_of(utility: UtilityConfig) -> dict[str, list[str]]:
    """{data set of the hub: the tasks of `utility.tasks` that read it}; no local files."""
    known, found = _index(utility), {}
    for task in (task for task in utility.tasks if task not in utility.sources):
        for path in dict.fromkeys(_documents(known, task, set())):
            if path not in BUILDERS and not Path(path).exists():
                found.setdefault(path, []).append(task)
    return found


def _documents(known: Index, task: str, seen: set[str]) -> Iterator[str]:
    """The data sets of a task and of all its parts, at any depth."""
    entry = known.get(task)
    if entry is None or task in seen:
        return
    seen.add(task)
    if entry["documents"]:
        yield entry["documents"]
    for part in entry["parts"]:
        yield from _documents(known, part, seen)


def _index(utility: UtilityConfig) -> Index:
    """All names: lm-eval's own, and those of `utility.include_path`, which come first."""
    from lm_eval.tasks import TaskManager

    own: Index = {}
    folder = utility.include_path
    if folder is not None:
        if not Path(folder).is_dir():
            raise SpkitError(f"utility.include_path is {folder!r}, which is no folder")
        own = _read(TaskManager(include_path=folder, include_defaults=False))
    parts = {part for entry in own.values() for part in entry["parts"]}  # of groups, lm-eval's too
    if {*utility.tasks, *parts} <= set(own):
        return own
    kept = cache_folder() / "lm-eval" / f"tasks-{version('lm_eval')}.json"
    if not kept.is_file():
        with once(kept) as path:
            path.write_text(json.dumps(_read(TaskManager())), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8")) | own


def _read(manager) -> Index:
    return {
        name: {"parts": _parts(entry), "documents": (entry.cfg or {}).get("dataset_path")}
        for name, entry in manager.task_index.items()
    }


def _parts(entry) -> list[str]:
    """The names in a group; a tag's are in `tags`, whereas a task's `tags` are its own tags."""
    settings: Mapping[str, Any] = entry.cfg or {}
    listed = settings.get("task") if isinstance(settings.get("task"), list) else []
    names = [part if isinstance(part, str) else part.get("task") for part in listed]
    tagged = entry.tags if entry.kind.name == "TAG" else ()
    return [name for name in (*names, *sorted(tagged)) if isinstance(name, str)]
