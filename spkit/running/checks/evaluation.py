"""What an evaluation needs besides prompts: judges, lm-eval's tasks, MT-Bench."""

import json
from collections.abc import Iterator
from pathlib import Path

from spkit.config import Config, UtilityConfig
from spkit.errors import SpkitError
from spkit.models.checkpoint_check import CAUSAL, CLASSIFIER, check_loads
from spkit.models.checkpoint_files import is_hub_id
from spkit.running.checks.finding import Finding, looked
from spkit.system import hub

WITHOUT = {  # what needs no such model, told where one cannot be had
    "judges": "judges that need no model are keywords and refusal",
    "utility": "with utility.mt_bench.judge null the answers are stored without grades",
}


def judges(config: Config) -> Iterator[Finding]:
    """Each judge can judge what it is named for, and its model can be had."""
    from spkit.evaluation.judges import check_judges, judges_of

    def look() -> str:
        check_judges(config)
        return ", ".join(f"{name} {', '.join(j)}" for name, j in judges_of(config.judges).items())

    yield looked("judges", look)
    named = {*config.judges.harmful, *config.judges.over_safety}
    for name, maker in (("classifier", CLASSIFIER), ("generative", CAUSAL)):
        own = getattr(config.judges, name)
        if name in named:
            yield _model(f"judges.{name}.model", own.model, own.revision, maker)
    if "classifier" in named:
        own = config.judges.classifier
        yield from _label(own.model, own.revision, own.label)


def _model(
    key: str, source: str, revision: str | None, maker: str = CAUSAL, chats: bool = False
) -> Finding:
    """Of a model that is loaded as it is: its files are here, or on a hub that can be reached.

    chats: whether it is spoken to in its chat format.
    """
    from spkit.models.loading import check_pair, load_tokenizer, read_tokenizer

    if not Path(source).exists() and not is_hub_id(source):
        said = f"{key} is {source!r}: there is no such folder, and it is no hub id (owner/name)"
        return Finding(key, said, ok=False)
    folder = Path(source) if Path(source).exists() else hub.in_cache(source, revision)
    if folder is None:
        said = hub.problem(source, "model", revision)
        if said is None:
            return Finding(key, f"{source}: to be downloaded", ok=None)
        return Finding(key, f"{said}; {WITHOUT[key.partition('.')[0]]}", ok=False)

    def look() -> str:
        if not (folder / "config.json").is_file():
            raise SpkitError(f"{key} is {source!r}, which has no config.json: it is no checkpoint")
        count = check_loads(folder, maker)
        check_pair(folder, (load_tokenizer if chats else read_tokenizer)(folder))
        return f"{source}: {count} tensors"

    return looked(key, look)


def _label(source: str, revision: str | None, label: int) -> Iterator[Finding]:
    """The class that means harmful, where the judge's configuration is on this machine."""
    folder = Path(source) if Path(source).exists() else hub.in_cache(source, revision)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return
    classes = len(found.get("id2label", {})) or int(found.get("num_labels", 2))
    if label >= classes:
        said = f"label is {label}, but {source!r} has {classes} classes (0 to {classes - 1})"
        yield Finding("judges.classifier.label", said, ok=False)


def utility(config: Config) -> Iterator[Finding]:
    """lm-eval has the tasks, their documents can be had, MT-Bench's prompts can be read."""
    from spkit.evaluation.utility import check_utility

    tasks = config.utility.tasks
    if tasks:
        checked = looked("utility.tasks", lambda: check_utility(config) or ", ".join(tasks))
        yield checked
        if checked.ok:
            yield from _documents(config.utility)
    yield from _mt_bench(config)


def _documents(utility: UtilityConfig) -> Iterator[Finding]:
    """Data sets of the hub that are not in the cache of `datasets` need the hub."""
    from datasets.config import HF_DATASETS_CACHE

    from spkit.evaluation.utility.task_index import documents_of

    for path, tasks in documents_of(utility).items():
        if (Path(HF_DATASETS_CACHE) / path.replace("/", "___").lower()).is_dir():
            continue
        if (Path(HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir():
            continue
        if said := hub.problem(path, "dataset"):
            said = (
                f"{', '.join(tasks)}: {said}; leave it out of utility.tasks, or see utility.sources"
            )
            yield Finding("utility.tasks", said, ok=False)


def _mt_bench(config: Config) -> Iterator[Finding]:
    from spkit.data.readers.source import is_local
    from spkit.evaluation.utility.mt_bench import mt_bench_questions

    own = config.utility.mt_bench
    if own.prompts is None:
        return
    key = "utility.mt_bench.prompts"
    away = not is_local(own.prompts) and hub.problem(own.prompts, "dataset", own.revision)
    if away:
        yield Finding(key, away, ok=False)
    else:
        yield looked(key, lambda: f"{len(mt_bench_questions(own))} questions")
    if own.judge is not None:
        yield _model("utility.mt_bench.judge", own.judge, own.judge_revision, chats=True)
