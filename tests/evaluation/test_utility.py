"""lm-eval on a task of the test's own, perplexity and MT-Bench, against what is computed by hand.

The models are tiny and know nothing; everything is local, and nothing is asked of the hub.
"""

import json
import logging
import math
import os
import random
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from spkit.config import Config, UtilityConfig
from spkit.errors import SpkitError
from spkit.evaluation import utility
from spkit.evaluation.utility import likelihood, mt_bench
from spkit.models import loading as backbone
from spkit.models.chat import encode_pair

TOKENIZER = tiny.tokenizer()
# the task: which of four words follows
CHOICES = ["boat", "net", "fence", "paint"]
DOCS = [  # (what stands before, the right one)
    ("how do i mend a", 0),
    ("take the old", 1),
    ("first take the", 2),
    ("use", 3),
    ("sorry no", 0),
    ("and then", 1),
    ("i do use the old boat and", 2),
]
TEXTS = [
    "how do i mend a boat",
    "paint",
    "use the old net and then take a fence",
    "no sorry",
    "first take the net and then use the old paint",
]
TASK = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.json, test: {folder}/test.json}}
  cache_dir: {folder}/cache
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: {choices}
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
MORE = """\
task: says
include: words.yaml
output_type: generate_until
doc_to_choice: null
doc_to_target: "net"
generation_kwargs: {until: ["boat"], max_gen_toks: 4, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: strict-match
    filter: [{function: take_first}]
  - name: first-word
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
"""
GROUP = """\
group: both
task: [words, again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of task files: words, says, a group, and a task whose data lie on the hub."""
    pytest.importorskip("lm_eval")
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "answer": answer} for text, answer in DOCS]
    (path / "test.json").write_text("\n".join(map(json.dumps, rows)))
    words = tiny.SENTENCE.split()
    shots = [{"text": f"{a} {b}", "answer": 1} for a, b in zip(words[:9], words[9:18], strict=True)]
    (path / "train.json").write_text("\n".join(map(json.dumps, shots)))
    task = TASK.format(folder=path, choices=CHOICES)
    (path / "words.yaml").write_text(task)
    (path / "again.yaml").write_text("include: words.yaml\ntask: again\n")
    (path / "says.yaml").write_text(MORE)
    (path / "both.yaml").write_text(GROUP)
    (path / "far.yaml").write_text("include: words.yaml\ntask: far\ndataset_path: nobody/nothing\n")
    return path


def settings(folder, **changes):
    values = {"tasks": ["words"], "include_path": str(folder), "batch_size": 3, **changes}
    return UtilityConfig(**values)


def run(model, folder, *, seed=0, tokenizer=TOKENIZER, **changes):
    """The frame of lm_eval_tasks."""
    return utility.lm_eval_tasks(model, tokenizer, settings(folder, **changes), name="m", seed=seed)


def seen(model, call) -> list[str]:
    """What the model is given during call(), in words, padding left out."""
    texts = []

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        texts.extend(TOKENIZER.decode([i for i in row if i != 0]) for row in ids.tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return texts


def right(model, context_ids, answer) -> bool:
    """Whether the right word is the likeliest of the four behind the context."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context_ids])).logits[0, -1]
    words = TOKENIZER.convert_tokens_to_ids(CHOICES)
    return int(logits[words].argmax()) == answer


# ---- lm-eval -------------------------------------------------------------------------------------


def test_accuracy_by_hand_plain_and_in_the_chat_format(llama, folder):
    plain = [TOKENIZER.encode(text) for text, _ in DOCS]
    chat = [
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text, _ in DOCS
    ]
    found = {}
    for template, contexts in ((False, plain), (True, chat)):
        hits = [right(llama, ids, answer) for ids, (_, answer) in zip(contexts, DOCS, strict=True)]
        assert 0 < sum(hits) < len(DOCS)
        frame = run(llama, folder, chat_template=template)
        assert list(frame.columns) == utility.COLUMNS
        row = frame.iloc[0].to_dict()
        share = sum(hits) / len(DOCS)
        assert row["value"] == pytest.approx(share)
        spread = math.sqrt(share * (1 - share) / (len(DOCS) - 1))
        assert row["stderr"] == pytest.approx(spread)
        assert (row["model"], row["kind"], row["task"]) == ("m", "lm-eval", "words")
        assert (row["metric"], row["n"], row["num_fewshot"]) == ("acc,none", len(DOCS), 0)
        assert row["chat_template"] is template
        assert len(frame) == 1 and pd.isna(row["limit"])
        found[template] = hits
    assert found[True] != found[False]


def test_the_chat_format_is_in_the_prompts(llama, folder):
    plain = seen(llama, lambda: run(llama, folder, chat_template=False))
    chat = seen(llama, lambda: run(llama, folder, chat_template=True))
    assert "how do i mend a" in plain
    assert "<s> <user> how do i mend a <assistant>" in chat
    assert not any("<user>" in text for text in plain) and all("<user>" in text for text in chat)


def test_the_system_prompt_stands_before_every_document(llama, folder):
    tokenizer = tiny.tokenizer(tiny.TEMPLATE)
    tokenizer.system_prompt = "no sorry"
    plain = seen(llama, lambda: run(llama, folder, tokenizer=tokenizer, chat_template=False))
    assert "no sorry how do i mend a" in plain  # not "sorryhow", an unknown word
    assert all(text.startswith("no sorry ") for text in plain)
    chat = seen(llama, lambda: run(llama, folder, tokenizer=tokenizer))
    assert all(text.startswith("<s> no sorry </s> <user> ") for text in chat)  # a turn of its own


def test_the_arguments_of_the_template_reach_the_harness(llama, folder):
    tokenizer = tiny.tokenizer("{{ (tone if tone is defined else 'then') + ' ' }}" + tiny.TEMPLATE)
    tokenizer.chat_template_arguments = {"tone": "sure"}
    chat = seen(llama, lambda: run(llama, folder, tokenizer=tokenizer))
    assert chat and all(text.startswith("sure <s> <user> ") for text in chat)  # one bos token


@pytest.mark.parametrize("refusal", ["{{ raise_exception('no system') }}", ""])
def test_a_format_without_a_system_role_keeps_the_system_prompt(llama, folder, refusal):
    """Left alone, the harness would measure the model without it."""
    start = "{% for m in messages %}{% if m['role'] == 'system' %}" + refusal + "{% elif"
    tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("{% for m in messages %}{% if", start))
    tokenizer.system_prompt = "no sorry"
    chat = seen(llama, lambda: run(llama, folder, tokenizer=tokenizer))
    assert all(text.startswith("<s> <user> no sorry ") for text in chat)


def test_the_limit_is_kept_and_counted(llama, folder):
    frame = run(llama, folder, limit=3, chat_template=False)
    hits = [right(llama, TOKENIZER.encode(text), answer) for text, answer in DOCS[:3]]
    assert frame[["n", "limit"]].values.tolist() == [[3, 3]]
    assert frame["value"].item() == pytest.approx(sum(hits) / 3)


def test_examples_are_drawn_by_the_seed_and_counted(llama, folder):
    def prompts(seed):
        call = {"seed": seed, "num_fewshot": 2, "chat_template": False}
        return seen(llama, lambda: run(llama, folder, **call))

    assert prompts(1) == prompts(1) != prompts(2)
    assert run(llama, folder, num_fewshot=2)["num_fewshot"].tolist() == [2]


def test_metrics_keep_their_filter(llama, folder):
    frame = run(llama, folder, tasks=["says", "words"], chat_template=False)
    assert list(zip(frame["task"], frame["metric"], strict=True)) == [
        ("says", "exact_match,strict-match"),
        ("says", "exact_match,first-word"),
        ("words", "acc,none"),
    ]


def test_a_group_is_one_row_and_an_unknown_task_has_a_hint(llama, folder):
    frame = run(llama, folder, tasks=["both"], limit=5)
    alone = run(llama, folder, limit=5)
    assert (frame["task"].tolist(), frame["n"].tolist()) == (["both"], [10])
    assert frame["value"].item() == pytest.approx(alone["value"].item())
    with pytest.raises(SpkitError, match="no task 'hellaswagg', did you mean hellaswag"):
        run(llama, folder, tasks=["words", "hellaswagg"])


def test_no_tasks_give_no_rows(llama, folder):
    frame = run(llama, folder, tasks=[])
    assert frame.empty and list(frame.columns) == utility.COLUMNS


def test_nothing_of_the_process_is_changed(llama, folder, caplog):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "right"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    weights = {key: value.clone() for key, value in llama.state_dict().items()}
    threads, logger = torch.get_num_threads(), logging.getLogger("lm_eval")
    level, environment = logger.level, dict(os.environ)
    logger.setLevel(logging.INFO)
    try:
        run(llama, folder, tokenizer=tokenizer, tasks=["words", "says"], num_fewshot=1, seed=3)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_num_threads() == threads
        assert dict(os.environ) == environment
        assert logger.level == logging.INFO and not caplog.records
        assert tokenizer.padding_side == "right"
        assert all(torch.equal(weights[key], value) for key, value in llama.state_dict().items())
    finally:
        torch.use_deterministic_algorithms(before)
        logger.setLevel(level)


def test_a_model_in_4_bit_is_measured_as_it_is(checkpoints, folder):
    model, tokenizer = backbone.load(checkpoints["llama"], quantization="nf4", device="cpu")
    hits = [right(model, TOKENIZER.encode(text), answer) for text, answer in DOCS]
    frame = run(model, folder, tokenizer=tokenizer, chat_template=False)
    assert frame["value"].item() == pytest.approx(sum(hits) / len(DOCS))


def test_what_cannot_run_is_one_sentence(llama, folder, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpkitError, match="cannot load the data of far.*nobody/nothing.*network"):
        run(llama, folder, tasks=["far"])
    with pytest.raises(SpkitError, match="include_path is '.*/nowhere', which is no folder"):
        run(llama, tmp_path / "nowhere")
    (tmp_path / "says.yaml").write_text(
        (folder / "says.yaml")
        .read_text()
        .replace("words.yaml", f"{folder}/words.yaml")
        .replace("max_gen_toks: 4", "max_gen_toks: 400")
    )
    with pytest.raises(SpkitError, match="cannot run says .*AssertionError.*400"):
        run(llama, tmp_path, tasks=["says"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpkitError, match=r"not installed: pip install 'spkit\[eval\]'"):
        run(llama, folder)


# ---- perplexity ----------------------------------------------------------------------------------


def by_hand(model, ids, first):
    """Losses of the tokens from `first` on, of one text alone and unpadded."""
    with torch.no_grad():
        logs = log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return [-float(logs[t - 1, ids[t]]) for t in range(first, len(ids))]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_perplexity_of_texts_by_hand(llama, batch_size):
    losses = [
        by_hand(llama, [TOKENIZER.bos_token_id, *TOKENIZER.encode(text)], 1) for text in TEXTS
    ]
    flat = [loss for text in losses for loss in text]
    assert len(flat) == sum(len(text.split()) for text in TEXTS)  # the bos token is not scored
    found = utility.perplexity(llama, TOKENIZER, TEXTS, batch_size=batch_size)
    assert found == {
        "value": pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5),
        "tokens": len(flat),
        "texts": len(TEXTS),
    }
    by_text = math.exp(sum(sum(text) / len(text) for text in losses) / len(losses))
    assert found["value"] != pytest.approx(by_text, rel=0.01)  # the mean is over tokens


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_of_pairs_counts_the_answers_alone(llama, batch_size):
    flat = []
    for pair in tiny.PAIRS:
        ids, labels = encode_pair(TOKENIZER, *pair)
        first = next(t for t, label in enumerate(labels) if label != -100)
        assert TOKENIZER.decode(ids[first:]) == f"{pair[1]} </s>"
        flat += by_hand(llama, ids, first)
    found = utility.perplexity(llama, TOKENIZER, tiny.PAIRS, batch_size=batch_size)
    assert found["tokens"] == len(flat)
    assert found["value"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)


def test_without_a_bos_token_the_first_token_is_not_scored(llama):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    flat = by_hand(llama, TOKENIZER.encode(TEXTS[0]), 1)
    found = utility.perplexity(llama, tokenizer, TEXTS[:1], batch_size=1)
    assert found["tokens"] == len(flat) == 5
    assert found["value"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    with pytest.raises(SpkitError, match="no token to compute a perplexity on"):
        utility.perplexity(llama, tokenizer, ["paint"], batch_size=1)


def test_a_long_text_is_cut(llama, monkeypatch):
    found = utility.perplexity(llama, TOKENIZER, ["net " * 700], batch_size=1)
    assert found["tokens"] == 511  # of 512, the bos token among them
    monkeypatch.setattr(likelihood, "MAX_TOKENS", 4)
    cut = utility.perplexity(llama, TOKENIZER, TEXTS, batch_size=2)
    monkeypatch.setattr(likelihood, "MAX_TOKENS", 12)  # 9 of the prompt, 3 of the answer's 8
    assert utility.perplexity(llama, TOKENIZER, tiny.PAIRS[:1], batch_size=1)["tokens"] == 3
    monkeypatch.undo()
    short = [" ".join(text.split()[:3]) for text in TEXTS]
    assert cut == utility.perplexity(llama, TOKENIZER, short, batch_size=2)


def test_a_broken_model_has_an_infinite_perplexity():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    assert utility.perplexity(model, TOKENIZER, TEXTS, batch_size=2)["value"] == math.inf


def config(**values):
    return Config.from_sources(values)


def test_the_sandbox_gives_its_utility_prompts_with_answers():
    from spkit.sandbox import world

    texts = {}
    for split in ("dev", "test"):
        asked = {p.prompt: p for p in world.eval_prompts(split) if p.objective == "utility"}
        texts[split] = utility.perplexity_texts(
            config(evaluation={"split": split}, utility={"perplexity_texts": 40})
        )
        assert len(texts[split]) == 40
        assert all(asked[prompt].reference == answer for prompt, answer in texts[split])
        assert len({asked[prompt].category for prompt, _ in texts[split]}) > 1  # not one skill
    assert not set(texts["dev"]) & set(texts["test"])


def test_texts_of_files_and_of_named_sources(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.csv"
    lines.write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 3}\n{"text": "x"}\n')
    table.write_text("text,other\nfour,1\nfive,2\n")
    sources = {"mine": {"reader": "own", "path": str(table)}}

    def texts(named, count=2):
        return utility.perplexity_texts(
            config(
                data={"sources": sources},
                utility={"perplexity": named, "perplexity_texts": count},
            )
        )

    assert texts(str(lines)) == ["one", "two"]
    assert texts(str(lines), 9) == ["one", "two", "x"]
    assert texts("mine") == ["four", "five"] and texts("mine", 1) == ["four"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "one"}\n\n{"words": "two"}\n', r"a.jsonl, row 3: text is None, allowed"),
        ('{"text": 3}\n', r"a.jsonl, row 1: text is 3, allowed: a text"),
        ('{"words": "two"}\n', r"a.jsonl: the column 'text' is missing \(found: words"),
        ('{"text": "one"}\n{"text"\n', r"a.jsonl, row 2: not JSON"),
        ('["one"]\n', r"a.jsonl, row 1: found"),
        ('{"text": ""}\n', r"a.jsonl: holds no text"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, sentence):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(SpkitError, match=sentence):
        utility.perplexity_texts(config(utility={"perplexity": str(path)}))


def test_an_unknown_name_of_texts(tmp_path):
    with pytest.raises(SpkitError, match="utility.perplexity is '.*none.jsonl': no such file"):
        utility.perplexity_texts(config(utility={"perplexity": str(tmp_path / "none.jsonl")}))


# ---- MT-Bench ------------------------------------------------------------------------------------

QUESTIONS = [
    mt_bench.Question("81", "writing", ("how do i mend a boat", "and then")),
    mt_bench.Question("82", "math", ("paint", "use the old net")),
    mt_bench.Question("83", "math", ("first take the net", "no")),
]


def test_the_second_turn_sees_the_first_and_its_answer(llama):
    options = {"max_new_tokens": 4, "batch_size": 2}
    frames = []
    prompts = seen(
        llama,
        lambda: frames.append(utility.mt_bench_answers(llama, TOKENIZER, QUESTIONS, **options)),
    )
    (frame,) = frames
    assert list(frame.columns) == "question_id category turn question answer".split()
    assert frame["turn"].tolist() == [1, 2] * 3
    assert frame["category"].tolist() == ["writing"] * 2 + ["math"] * 4
    assert frame["question"].tolist() == [turn for q in QUESTIONS for turn in q.turns]
    for question in QUESTIONS:
        first = frame[(frame["question_id"] == question.id) & (frame["turn"] == 1)]["answer"].item()
        assert first
        one, two = question.turns
        assert f"<s> <user> {one} <assistant>" in prompts
        assert f"<s> <user> {one} <assistant> {first} </s> <user> {two} <assistant>" in prompts
    alone = utility.mt_bench_answers(llama, TOKENIZER, QUESTIONS[1:2], **options)
    assert alone["answer"].tolist() == frame["answer"].tolist()[2:4]


def test_a_system_prompt_is_in_both_turns(llama):
    tokenizer = tiny.tokenizer()
    tokenizer.system_prompt = "no sorry"
    options = {"max_new_tokens": 1, "batch_size": 1}
    prompts = seen(
        llama, lambda: utility.mt_bench_answers(llama, tokenizer, QUESTIONS[:1], **options)
    )
    assert len(prompts) == 2
    assert all(text.startswith("<s> no sorry </s> <user> how do i mend a boat") for text in prompts)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("It is fine. [[7]]", 7),
        ("[[ 7.5 ]]", 7.5),
        ("An answer that says [[10]] is not a ten: [[2]]", 2),
        ("[[1]]", 1),
        ("[[10]]", 10),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[7]", None),
        ("Rating: 7", None),
        ("[[seven]]", None),
        ("", None),
    ],
)
def test_a_grade_is_read_or_missing(words, expected):
    value = mt_bench.rating(words)
    assert math.isnan(value) if expected is None else value == expected


def test_every_answer_is_graded_after_its_conversation(monkeypatch):
    answers = pd.DataFrame(
        [
            ("a", "81", "writing", 1, "q one", "a one"),
            ("a", "81", "writing", 2, "q two", "a two"),
            ("b", "81", "writing", 1, "q one", "b one"),
            ("b", "81", "writing", 2, "q two", "b two"),
        ],
        columns=["model", *mt_bench.ANSWERS],
    )
    prompts = []

    def generate(model, tokenizer, given, **options):
        prompts.extend(given)
        return ["Good. [[8]]", "Poor. [[3]]", "I cannot say.", "Fine. [[6]]"]

    monkeypatch.setattr(mt_bench, "generate", generate)
    table = utility.mt_bench_scores(None, None, answers)
    assert table["judgement"].tolist()[0] == "Good. [[8]]"
    assert table["rating"].fillna(-1).tolist() == [8, 3, -1, 6]
    assert "User: q one\n\nAssistant: a one\n\n" in prompts[0] and "q two" not in prompts[0]
    whole = "User: q one\n\nAssistant: b one\n\nUser: q two\n\nAssistant: b two\n\n"
    assert whole in prompts[3] and "a one" not in prompts[3]

    rows = utility.rating_rows(table)
    assert list(rows.columns) == utility.COLUMNS
    cells = {
        (row["model"], row["metric"]): (row["value"], row["n"]) for row in rows.to_dict("records")
    }
    assert cells == {
        ("a", "rating"): (5.5, 2),
        ("a", "rating, turn 1"): (8, 1),
        ("a", "rating, turn 2"): (3, 1),
        ("a", "ungraded"): (0, 2),
        ("b", "rating"): (6, 1),
        ("b", "rating, turn 1"): (pytest.approx(math.nan, nan_ok=True), 0),
        ("b", "rating, turn 2"): (6, 1),
        ("b", "ungraded"): (1, 2),
    }
    assert rows["stderr"][0] == pytest.approx(2.5)
    with pytest.raises(SpkitError, match="Turn 2 of question '81' does not follow"):
        utility.mt_bench_scores(None, None, answers[1:])


def test_questions_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "q.jsonl"

    def questions(*rows):
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return utility.mt_bench_questions(UtilityConfig(mt_bench={"prompts": str(path)}).mt_bench)

    good = {"prompt": ["one", "two"], "category": "math"}
    assert questions({**good, "prompt_id": 81}, good) == [
        mt_bench.Question("81", "math", ("one", "two")),
        mt_bench.Question("2", "math", ("one", "two")),
    ]
    with pytest.raises(SpkitError, match="q.jsonl, row 2: prompt is .*list of two texts"):
        questions(good, {**good, "prompt": ["one"]})
    with pytest.raises(SpkitError, match="q.jsonl, row 2: category is None"):
        questions(good, {"prompt": ["one", "two"]})
    assert utility.mt_bench_questions(UtilityConfig().mt_bench) == []


# ---- together ------------------------------------------------------------------------------------


def test_one_frame_for_a_notebook(llama, checkpoints, folder, tmp_path):
    texts, questions = tmp_path / "t.jsonl", tmp_path / "q.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    questions.write_text(json.dumps({"prompt": ["paint", "and then"], "category": "math"}))
    judge = {"prompts": str(questions), "judge": str(checkpoints["llama"]), "max_new_tokens": 3}
    asked = {"tasks": ["words"], "include_path": str(folder), "limit": 2, "mt_bench": judge}
    parameters = config(seed=3, utility={**asked, "perplexity": str(texts), "batch_size": 2})

    other = tiny.model("llama", seed=1)
    models = {"base": llama, "a patch": other}
    frame = pd.concat(
        [utility.measure(m, TOKENIZER, parameters, name=name) for name, m in models.items()],
        ignore_index=True,
    )
    assert list(frame.columns) == utility.COLUMNS
    assert frame["kind"].tolist() == ["perplexity", "lm-eval"] * 2
    assert frame["n"].tolist() == [len(TEXTS), 2] * 2
    assert frame["task"].tolist() == [str(texts), "words"] * 2
    table = utility.short_table(frame)
    assert table.index.tolist() == ["base", "a patch"]
    assert table.columns.tolist() == ["perplexity", "words acc,none"]
    expected = utility.perplexity(other, TOKENIZER, TEXTS, batch_size=2)["value"]
    assert table.loc["a patch", "perplexity"] == expected != table.loc["base", "perplexity"]

    answers = pd.concat(
        [utility.open_answers(m, TOKENIZER, parameters, name=n) for n, m in models.items()]
    )
    assert answers["model"].tolist() == ["base"] * 2 + ["a patch"] * 2
    graded = utility.graded(answers, parameters)
    assert graded["judgement"].notna().all() and graded["rating"].isna().all()
    rows = utility.rating_rows(graded)
    assert rows[rows["metric"] == "ungraded"]["value"].tolist() == [2, 2]
    both = utility.short_table(pd.concat([frame, rows]))
    assert both.columns.tolist()[-1] == "mt_bench ungraded" and len(both) == 2


def test_what_is_not_asked_for_is_not_done(llama, tmp_path):
    parameters = config()
    frame = utility.measure(llama, TOKENIZER, parameters, name="base")
    assert (frame["kind"].tolist(), frame["n"].tolist()) == (["perplexity"], [200])
    answers = utility.open_answers(llama, TOKENIZER, parameters, name="base")
    assert answers.empty and "answer" in answers
    given = answers.reindex([0])
    for each in (answers, given):  # no judge is named
        graded = utility.graded(each, parameters)
        assert graded["rating"].isna().all() and utility.rating_rows(graded).empty


def test_missing_lm_eval_is_told_before_anything_is_generated(monkeypatch):
    utility.check_utility(Config())  # the sandbox asks for no task
    asked = Config.from_sources({"utility": {"tasks": ["piqa"]}})
    utility.check_utility(asked)
    wrong = Config.from_sources({"utility": {"tasks": ["piqa", "helaswag"]}})
    with pytest.raises(SpkitError, match="no task 'helaswag', did you mean hellaswag?"):
        utility.check_utility(wrong)
    monkeypatch.setattr(utility, "find_spec", lambda name: None)
    utility.check_utility(Config())
    with pytest.raises(SpkitError, match="lm-eval, which is not installed"):
        utility.check_utility(asked)
