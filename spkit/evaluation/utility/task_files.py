"""lm-eval's own tasks over documents of a local Arrow file: `utility.sources`, without the hub.

How a task asks, what the choices are and what is counted stays lm-eval's own: the file that is
written for it here includes lm-eval's, and says anew only where the documents lie. With
`utility.limit`, the documents are drawn by `utility.limit_seed` and are the same for every model.

Only tasks that compare the log-likelihoods of given choices are taken; nothing is generated. A
file holds no examples, so such a task is asked without any.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from spkit.config import FileConfig, UtilityConfig
from spkit.data.readers.rows import shown
from spkit.data.readers.source import local_file, need_columns
from spkit.errors import SpkitError
from spkit.system.pointers import refuse_pointer
from spkit.validation import nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow

# task: the columns that lm-eval reads; the first holds the answer
_ARC = ("answerKey", "question", "choices")
COLUMNS_OF = {
    "arc_challenge": _ARC,
    "arc_easy": _ARC,
    "boolq": ("answer", "question", "passage"),
    "commonsense_qa": _ARC,
    "hellaswag": ("label", "activity_label", "ctx_a", "ctx_b", "endings"),
    "openbookqa": ("answerKey", "question_stem", "choices"),
    "piqa": ("label", "goal", "sol1", "sol2"),
    "sciq": ("correct_answer", "question", "support", "distractor1", "distractor2", "distractor3"),
    "social_iqa": ("label", "context", "question", "answerA", "answerB", "answerC"),
    "winogrande": ("answer", "sentence", "option1", "option2"),
}
MMLU = ("answer", "question", "choices")  # each subject is a task: mmlu_anatomy, mmlu_virology, ...
NO_ANSWER = (None, "", -1)  # what data sets write where the answer is kept secret


def check_sources(utility: UtilityConfig) -> None:
    """SpkitError, in one sentence, for what `write_task_files` could not use; writes nothing.

    An unknown task, a file that is missing or no Arrow file, a column that is missing, a row
    without an answer, examples that are asked for. Reads every file; a few seconds for lm-eval's
    list of tasks, once a process.
    """
    for task, file in utility.sources.items():
        _columns(task)
        _own_file(task)
        _table(task, file)
    if utility.sources and utility.num_fewshot:
        raise SpkitError(
            f"utility.num_fewshot is {utility.num_fewshot}, must be null or 0 with "
            "utility.sources: a file has no documents besides those that are scored"
        )


def write_task_files(utility: UtilityConfig, folder: Path) -> None:
    """`<task>.yaml` and `<task>.arrow` of every task in `utility.sources`, written into `folder`.

    They refer to each other and to lm-eval's files by absolute paths. The Arrow file has the rows
    that are scored, in the file's order. SpkitError as for check_sources.
    """
    check_sources(utility)
    folder = folder.resolve()
    for task, file in utility.sources.items():
        table = _table(task, file)
        rows = drawn(table.num_rows, utility.limit, utility.limit_seed, task)
        _write_arrow(_as_lm_eval_reads(task, table.take(rows)), folder / f"{task}.arrow")
        settings = {
            "include": str(_own_file(task)),
            "task": task,
            "dataset_path": None,
            "dataset_name": None,
            "dataset_kwargs": {"path": str(folder / f"{task}.arrow")},
            "test_split": "test",
            **dict.fromkeys(("training_split", "validation_split", "fewshot_split")),
        }
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        # not dataset_path "arrow": to count its use, `datasets` would ask the hub's server
        text += f"custom_dataset: !function {__name__}.documents\n"
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def documents(path: str, **_) -> "dict[str, datasets.Dataset]":
    """What lm-eval calls for a written task's documents; it also hands over the task's metadata."""
    import datasets

    return {"test": datasets.Dataset(_arrow(Path(path)))}


def drawn(rows: int, limit: int | None, seed: int, task: str) -> list[int]:
    """Which of a file's rows are scored: at most `limit` numbers from 0 on, in ascending order.

    By a hash of seed, task and number, so that a smaller limit takes a part of a larger one's rows.
    """
    ranked = sorted(
        range(rows), key=lambda i: hashlib.sha256(f"{seed}|{task}|{i}".encode()).digest()
    )
    return sorted(ranked[:limit])


def _local(file: FileConfig, key: str) -> Path:
    """The file on this machine. SpkitError where it is none; key: the parameter that names it."""
    path = local_file(file, key)
    if not path.is_file():
        raise SpkitError(f"{key}.path is {file.path!r}: no such file")
    return path


def _columns(task: str) -> tuple[str, ...]:
    """What a file of this task needs, the answer's column first."""
    columns = MMLU if task.startswith("mmlu_") else COLUMNS_OF.get(task)
    if columns is None:
        hint = nearest(task, [*COLUMNS_OF, "mmlu_<subject>"])
        raise SpkitError(f"utility.sources: {task!r} cannot be read from a file{hint}")
    return columns


def _table(task: str, file: FileConfig) -> "pyarrow.Table":
    """The columns that the task needs, all rows; SpkitError as for check_sources."""
    columns = _columns(task)
    path = _local(file, f"utility.sources.{task}")
    table = _arrow(path)
    where = f"{path} (utility.sources.{task})"
    need_columns(where, table.column_names, columns)
    if not table.num_rows:
        raise SpkitError(f"{where}: holds no rows, at least one is needed")
    for number, answer in enumerate(table[columns[0]].to_pylist(), start=1):
        if answer in NO_ANSWER:
            raise SpkitError(
                f"{where}, row {number}: {columns[0]} is {shown(answer)}, so nothing can be scored "
                "there; a split with answers is needed"
            )
    return table.select(columns)


def _arrow(path: Path) -> "pyarrow.Table":
    """All of an Arrow file in either of its forms; `datasets` writes the stream."""
    import pyarrow
    from pyarrow import ipc

    refuse_pointer(path)
    for opened in (ipc.open_stream, ipc.open_file):
        try:
            return opened(pyarrow.memory_map(str(path))).read_all()
        except (OSError, pyarrow.ArrowException):
            continue
    raise SpkitError(f"{path}: is no Arrow file, or a damaged one")


def _as_lm_eval_reads(task: str, table: "pyarrow.Table") -> "pyarrow.Table":
    """BoolQ by itself has a truth value where lm-eval's copy, in SuperGLUE, has a label."""
    if task == "boolq":
        label = table["answer"].cast("int64")
        table = table.drop_columns("answer").append_column("label", label)
    return table.replace_schema_metadata(None)  # it described the columns of the whole file


def _write_arrow(table: "pyarrow.Table", path: Path) -> None:
    from pyarrow import ipc

    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def _own_file(task: str) -> Path:
    """lm-eval's file of the task; SpkitError where it has none that compares given choices."""
    found = _own_files()
    if task not in found:
        hint = nearest(task, list(found), otherwise="the names that `lm-eval ls tasks` lists")
        raise SpkitError(f"utility.sources: lm-eval has no task {task!r} with given choices{hint}")
    return found[task]


@cache
def _own_files() -> dict[str, Path]:
    """All of lm-eval's tasks with given choices; its 14,000 files are read once a process."""
    from lm_eval.tasks import TaskManager

    return {
        name: Path(entry.yaml_path)
        for name, entry in TaskManager().task_index.items()
        if (entry.cfg or {}).get("output_type") == "multiple_choice" and entry.yaml_path
    }
