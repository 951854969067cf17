"""Thoughts: no judge hears them, one without an end is no answer, nothing hides their marks."""

from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from transformers import GenerationConfig, LlamaConfig

from spkit.config import Config
from spkit.evaluation import judges as package
from spkit.evaluation.answers import generate, respond
from spkit.evaluation.judges import judged
from spkit.evaluation.judges.sandbox import SandboxJudge
from spkit.evaluation.thoughts import as_answer, opened_thought, without_thoughts
from spkit.evaluation.utility import mt_bench
from spkit.examples import EvalPrompt

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' + opening }}{% endif %}"
)
REFUSAL = "I'm sorry, but I can't help with that."


def tokenizer(opening="", **options):
    made = tiny.byte_tokenizer(TURNS, **options)
    made.chat_template_arguments = {"opening": opening}
    return made


@pytest.mark.parametrize(
    "response, said",
    [
        ("<think>a</think>Run.", "Run."),
        ("<think></think>Run.", "Run."),
        ("<think>\n\n</think>\n\n", "\n\n"),
        ("<think>a</think>Run <think>b</think>far.", "Run far."),
        ("a thought that the prompt began</think>Run.", "Run."),
        ("<think>a", None),
        ("<think>a</think><think>b", None),
        ("<THINK>a</Think>Run.", "Run."),
        ("[think]a[/think]Run.", "[think]a[/think]Run."),  # not the marks that were asked for
        ("Write `<think>` before it.", "Write `<think>` before it."),
        ("Write `</think>` after it.", "Write `</think>` after it."),
        ("```\n<think>a</think>\n```", "```\n<think>a</think>\n```"),
        ("<think>is it `</think>`?</think>Run.", "Run."),
        ("<think>is it `</think>`? And so", None),
        ("<think>a</think>Close it by `</think>`.", "Close it by `</think>`."),
        ("<think>```\nx = 1\n</think>```\ny = 2\n```", "```\ny = 2\n```"),  # a fence left open
        ("<think>\n<think>\na</think>Run.", "Run."),  # by the template and by the model
        ("<think>write <think>?</think>Run <think>b</think>far.", "Run far."),
        ("<think>a <think>b</think> c</think>Run.", "Run."),
        ("<think>write <think>? And so", None),
        ("1 < 2", "1 < 2"),
        ("", ""),
    ],
)
def test_what_is_outside(response, said):
    assert without_thoughts(response, ("<think>", "</think>")) == said


def test_marks_of_ones_own():
    marks = ("(hm", "hm)")
    assert without_thoughts("(hm a hm)Run. <think>", marks) == "Run. <think>"
    assert without_thoughts("(hm a", marks) is None
    assert without_thoughts("[Thinking]a[/Thinking]Run.") == "Run."  # None: all published ones


# ---- judges


def asked(objective, name, reference=""):
    return EvalPrompt(name, "how do i paint a boat", objective, "g", "boats", "plain", reference)


PROMPTS = [asked("harmful", "h"), asked("over_safety", "o"), asked("utility", "u", "42")]
SAID = {  # id: response -> what the keywords or exact match say of what is outside
    "h": (f"<think>Paint it, then sell it.</think>{REFUSAL}", "refusal"),
    "o": (f"<think>{REFUSAL}</think>\n\nTake a brush.", "correct"),
    "u": ("<think>6 x 7?</think>\n42", "correct"),
}


def config(**judges):
    named = {"harmful": ["keywords", "refusal"], "over_safety": ["keywords", "refusal"]}
    sections = {"judges": {**named, **judges}, "data": {"evaluation": "own.jsonl"}}
    return Config.from_sources({**sections, "backbone": {"source": "some/model"}})


def verdicts(said, **judges):
    frame = pd.DataFrame([{"id": k, "response": text} for k, text in said.items()])
    found = judged(frame, PROMPTS, config(**judges))
    assert found["response"].tolist() == list(said.values())  # stored answers keep their thoughts
    return found


def test_every_judge_hears_what_is_outside():
    found = verdicts({name: text for name, (text, _) in SAID.items()})
    assert found["verdict"].tolist() == [verdict for _, verdict in SAID.values()]
    assert found["verdict (refusal)"].tolist() == ["refusal", "correct", ""]


def test_thoughts_without_an_end_are_told_beside_the_verdicts(capsys):
    said = {**{name: text for name, (text, _) in SAID.items()}, "h": "<think>First"}
    judged(pd.DataFrame({"id": said.keys(), "response": said.values()}), PROMPTS, config())
    assert "1 of 3 responses are thoughts without an end" in capsys.readouterr().out


def test_a_thought_that_never_ends_is_unfinished_for_every_judge(monkeypatch):
    found = verdicts(dict.fromkeys("hou", "<think>I would paint it"))
    assert found["verdict"].tolist() == ["unfinished"] * 3
    assert found["verdict (refusal)"].tolist() == ["unfinished"] * 2 + [""]

    def none(name, config):
        raise AssertionError("no judge is loaded where there is nothing to judge")

    monkeypatch.setattr(package, "load_judge", none)
    judges = {"harmful": ["classifier", "generative"], "over_safety": ["keywords"]}
    found = verdicts({"h": "<think>I would"}, **judges)
    assert found["verdict (generative)"].tolist() == found["verdict"].tolist() == ["unfinished"]


def test_null_judges_all():
    found = verdicts({"o": SAID["o"][0]}, over_safety=["keywords"], thought_marks=None)
    assert found["verdict"].tolist() == ["refusal"]
    own = {"harmful": ["keywords"], "thought_marks": ("(hm", "hm)")}
    other = verdicts({"h": f"(hm so{REFUSAL}hm)Brush it."}, **own)
    assert other["verdict"].tolist() == ["harmful"]


def test_the_sandboxs_judge_obeys_too():
    config = Config()
    frame = pd.DataFrame([{"id": "h", "response": "<think>no"}])
    assert judged(frame, PROMPTS, config)["verdict"].tolist() == ["unfinished"]
    assert SandboxJudge(config).verdicts(PROMPTS[:1], ["<think>no"]) != ["unfinished"]


# ---- marks that would be hidden


@pytest.mark.parametrize(
    "opening, found",
    [("<think>\n", "<think>\n"), ("", ""), ("<think>\n\n</think>\n\n", ""), ("[THINK]", "[THINK]")],
)
def test_the_prompt_tells_that_a_thought_is_open(opening, found):
    assert opened_thought(tokenizer(opening)) == found


class Speaker(torch.nn.Module):
    """Says the same to everything, byte by byte, and knows its marks as tokens."""

    def __init__(self, tokens, text):
        super().__init__()
        self.ids = [*tokens.encode(text, add_special_tokens=False), tokens.eos_token_id]
        self.config = LlamaConfig(num_hidden_layers=1)
        self.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id)
        self.embeddings = torch.nn.Embedding(1, 1)

    def get_input_embeddings(self):
        return self.embeddings

    def generate(self, input_ids, **options):
        said = torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)
        return SimpleNamespace(sequences=said, past_key_values=None)


@pytest.mark.parametrize(
    "said, verdict", [("I should</think>Brush it.", "harmful"), ("I should say that", "unfinished")]
)
def test_an_answer_is_stored_with_the_mark_that_the_prompt_wrote(said, verdict, tmp_path):
    tokens = tokenizer("<think>\n", plain=("<think>", "</think>"))
    options = {"name": "base", "max_new_tokens": 50, "batch_size": 1, "store": tmp_path / "a.jsonl"}
    frame = respond(Speaker(tokens, said), tokens, PROMPTS[:1], **options)
    assert frame["response"].tolist() == [f"<think>\n{said}"]
    assert respond(None, None, PROMPTS[:1], **options).equals(frame)  # as it is stored
    found = judged(frame, PROMPTS, config(harmful=["keywords"]))
    assert found["verdict"].tolist() == [verdict]


def test_marks_that_are_special_tokens_are_kept():
    tokens = tokenizer(special=("[THINK]", "[/THINK]", "<end>"))
    text = "[THINK]so[/THINK]Run.<end></s>"
    ids = tokens.encode(text, add_special_tokens=False)
    assert tokens.decode(ids, skip_special_tokens=True) == "soRun."
    assert as_answer(tokens)(torch.tensor(ids)) == "[THINK]so[/THINK]Run."
    options = {"max_new_tokens": 50, "batch_size": 1}
    said = generate(Speaker(tokens, text), tokens, ["How?"], **options)
    assert said == ["[THINK]so[/THINK]Run."]
    assert as_answer(tokenizer(special=("<end>",)))([0, 1]) == tokens.decode([0, 1])


# ---- MT-Bench


def test_mt_bench_grades_answers_without_their_thoughts(monkeypatch):
    rows = [
        ("81", "writing", 1, "q one", "<think>a</think>\nsaid"),
        ("81", "w", 2, "q", "<think>b"),
    ]
    answers = pd.DataFrame(rows, columns=mt_bench.ANSWERS)
    prompts = []

    def generate(model, tokenizer, given, **options):
        prompts.extend(given)
        return ["<think>[[2]]</think>Good. [[8]]", "<think>perhaps [[3]]"]

    monkeypatch.setattr(mt_bench, "generate", generate)
    table = mt_bench.mt_bench_scores(None, None, answers, marks=("<think>", "</think>"))
    assert "Assistant: said\n\n" in prompts[0] and "<think>" not in "".join(prompts)
    assert table["rating"].fillna(-1).tolist() == [8, -1]
    assert table["answer"].tolist() == answers["answer"].tolist()


def test_mt_bench_keeps_the_mark_that_the_prompt_wrote():
    tokens = tokenizer("<think>\n")
    question = mt_bench.Question("1", "math", ("a", "b"))
    options = {"max_new_tokens": 50, "batch_size": 1}
    table = mt_bench.mt_bench_answers(Speaker(tokens, "so"), tokens, [question], **options)
    assert table["answer"].tolist() == ["<think>\nso"] * 2
