"""A task file of one's own that lm-eval could not run is told before any work, in one sentence."""

import json
from importlib.metadata import version

import pytest

from spkit.config import UtilityConfig
from spkit.errors import SpkitError
from spkit.evaluation.utility import tasks as harness
from spkit.evaluation.utility.task_index import check_tasks

pytest.importorskip("lm_eval")

TASK = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.json}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FUNCTION = ("doc_to_text: text", "doc_to_text: !function own.asked")
RIGHT = "def asked(doc):\n    return doc['text']\n"
GROUP = "group: words\ntask: [{}]\naggregate_metric_list: [{{metric: acc}}]\n"

CASES = {
    "no file": (FUNCTION, None, "ImportError: Cannot import module 'own'"),
    "no function": (FUNCTION, "x = 1\n", "AttributeError: .*no function 'asked'"),
    "no Python": (FUNCTION, "def asked(doc) return\n", "SyntaxError"),
    "no package": (FUNCTION, "import no_such_package\n" + RIGHT, "named 'no_such_package'"),
    "a neighbour": (FUNCTION, "from . import other\n" + RIGHT, "relative import"),
    "no key": (FUNCTION, RIGHT.replace("'text'", "'question'"), "KeyError: 'question'"),
    "no column": (("_text: text", "_text: '{{question}}'"), None, "'question' is undefined"),
    "no split": (("test_split: test", "test_split: validation"), None, "KeyError: 'validation'"),
    "no documents": (("FOLDER/test.json", "FOLDER/gone.json"), None, "gone.json"),
    "no metric": (("metric: acc", "metric: acurracy"), None, "the metric 'acurracy', which lm-eva"),
    "no choice": (("doc_to_target: answer", "doc_to_target: 7"), None, "IndexError"),
    "no setting": (("output_type", "num_fewshots: 3\noutput_type"), None, "num_fewshots"),
    "no base": (("task: words", "include: base.yaml\ntask: words"), None, "base.yaml"),
    "no YAML": (("test_split", "\ttest_split"), None, "words.yaml cannot be read: ScannerError"),
}


def folder_of(path, change=("", ""), python=None):
    rows = [{"text": "use the old", "choices": ["net", "boat"], "answer": 1}] * 2
    (path / "test.json").write_text("\n".join(map(json.dumps, rows)))
    (path / "words.yaml").write_text(TASK.replace(*change).replace("FOLDER", str(path)))
    if python is not None:
        (path / "own.py").write_text(python)
    return UtilityConfig(tasks=["words"], include_path=str(path))


@pytest.fixture(autouse=True)
def no_long_list(monkeypatch, tmp_path):
    """lm-eval's own names are in the cache: reading its 14,000 files takes seconds."""
    monkeypatch.setattr("spkit.evaluation.utility.task_index.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("evaluate.load", lambda name: 1 / 0, raising=False)  # of the hub
    kept = tmp_path / "lm-eval"
    kept.mkdir()
    name = f"tasks-{version('lm_eval')}.json"
    (kept / name).write_text(json.dumps({"piqa": {"parts": [], "documents": "far/away"}}))


@pytest.mark.parametrize(("change", "python", "said"), CASES.values(), ids=list(CASES))
def test_a_task_that_cannot_run_is_told_first(change, python, said, tmp_path):
    with pytest.raises(SpkitError, match=said) as error:
        check_tasks(folder_of(tmp_path, change, python))
    assert "\n" not in str(error.value) and "utility.tasks" in str(error.value)


def test_tasks_that_can_run_and_those_of_a_hub_pass(tmp_path):
    check_tasks(folder_of(tmp_path, FUNCTION, RIGHT))
    far = TASK.replace("dataset_path: json", "dataset_path: no/such-data").replace("words", "far")
    (tmp_path / "far.yaml").write_text(far)
    (tmp_path / "all.yaml").write_text(GROUP.format("far, piqa").replace("words", "all"))
    check_tasks(UtilityConfig(tasks=["far", "words", "all"], include_path=str(tmp_path)))


def test_a_group_of_a_task_that_there_is_not(tmp_path):
    utility = folder_of(tmp_path)
    (tmp_path / "all.yaml").write_text(GROUP.format("wrods").replace("group: words", "group: all"))
    with pytest.raises(SpkitError, match="group 'all' names 'wrods'.*did you mean words"):
        check_tasks(utility.model_copy(update={"tasks": ["all"]}))


def test_what_the_harness_meets_later_is_one_sentence_too():
    import jinja2

    assert issubclass(jinja2.UndefinedError, harness.TASK_ERRORS)
    assert issubclass(IndexError, harness.TASK_ERRORS)
    assert not issubclass(MemoryError, harness.TASK_ERRORS)
