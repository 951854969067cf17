"""A stored answer depends on weights, prompts and decoding only: corrections generate no token."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from spkit.config import Config
from spkit.evaluation import answers, stored
from spkit.evaluation.answers import generated, respond
from spkit.evaluation.utility.mt_bench import Question, mt_bench_answers
from spkit.examples import EvalPrompt
from spkit.method.patch import Factors
from spkit.method.safepatching import SafePatching
from spkit.models.chat import encode_prompt
from spkit.system import made_from

TEXTS = ["mend a boat", "paint", "how do i take the old net"]
PROMPTS = [EvalPrompt(str(i), x, "harmful", "g", "c", "plain", "") for i, x in enumerate(TEXTS)]
CORRECTIONS = {  # what says nothing about an answer
    "utility.tasks": ["hellaswag"],
    "utility.include_path": "tasks",
    "utility.kl": "sandbox",
    "utility.mt_bench.judge": "somebody/judge",
    "judges.harmful": ["keywords", "refusal"],
    "judges.batch_size": 3,
    "evaluation.confidence": 0.9,
    "continual.methods": ["npo"],
    "tuning.trials": 3,
    "run_name": "another",
    "comparison.tables": "elsewhere",
}
OTHERS = {
    "backbone.system_prompt": "be kind",
    "backbone.chat_template_arguments": {"enable_thinking": False},
    "backbone.compute_dtype": "bfloat16",
    "evaluation.quantization": "nf4",
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.save(tmp_path / "model")


def config(overrides=None):
    return Config.from_sources({"backbone": {"source": "model"}}, overrides)


def patch_files(folder):
    folder.mkdir()
    for name in ("se", "osm"):
        (folder / f"{name}.safetensors").write_text(name)
    return sorted(folder.iterdir())


def contexts(source, files, overrides=None, seed=0):
    """Of the backbone, of a patch, and of continual patching."""
    found = config(overrides)
    se = Factors("se", {}, 1.0)
    method = SafePatching(se, se, ({}, {}), found.patching, seed)
    patched = stored.of_patches(found, source, method, files)
    return [stored.of_backbone(found, source), patched, stored.of_stages(found, source)]


def test_what_is_in_a_context_and_what_is_not(source, tmp_path):
    files = patch_files(tmp_path / "run")
    first = contexts(source, files)
    assert len(set(first)) == 3 and first == contexts(source, files)
    for key, value in CORRECTIONS.items():
        assert contexts(source, files, {key: value}) == first, key
    for key, value in OTHERS.items():
        assert not set(contexts(source, files, {key: value})) & set(first), key
    # only of the patch and of the stages
    for key, value in {"patching.beta": 2.0, "patching.top_rate_se": 0.2}.items():
        after = contexts(source, files, {key: value})
        assert [a == b for a, b in zip(first, after, strict=True)] == [True, False, False], key
    after = contexts(source, files, {"data.pairs": 5, "derivation.lora.r": 4})
    assert [a == b for a, b in zip(first, after, strict=True)] == [True, True, False]
    assert contexts(source, files, seed=1)[1] != first[1]
    files[0].write_text("another")
    after = contexts(source, files)
    assert [a == b for a, b in zip(first, after, strict=True)] == [True, False, True]


def test_weights_and_template_count_by_what_they_hold_and_so_does_the_code(source, monkeypatch):
    files = patch_files(Path("run"))
    first = contexts(source, files)
    shutil.copytree(source, "copy")
    (Path("copy") / ".DS_Store").touch()
    assert contexts("copy", files) == first
    weights = Path("copy/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # retrained: the same name, the same size
    weights.write_bytes(data)
    assert not set(contexts("copy", files)) & set(first)
    Path("a.jinja").write_text("{{ messages }}")
    named = contexts(source, files, {"backbone.chat_template": "a.jinja"})
    shutil.copy("a.jinja", "b.jinja")
    assert contexts(source, files, {"backbone.chat_template": "b.jinja"}) == named
    Path("a.jinja").write_text("{{ messages}}")
    assert not set(contexts(source, files, {"backbone.chat_template": "a.jinja"})) & set(named)
    digest = made_from._digest
    own = dict.fromkeys(("evaluation/answers.py", "evaluation/greedy.py", "models/onednn.py"), 0)
    for name, same in {**own, "evaluation/judges/refusal.py": 3}.items():
        changed = made_from.PACKAGE / name
        with monkeypatch.context() as patcher:
            patcher.setattr(
                made_from, "_digest", lambda p, s, c=changed: digest(p, s) + "x" * (p == c)
            )
            after = contexts(source, files)
        assert sum(a == b for a, b in zip(first, after, strict=True)) == same


def test_a_correction_generates_no_token_and_the_count_is_of_tokens(source, tmp_path, monkeypatch):
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()

    def asked(overrides=None):
        context = stored.of_backbone(config(overrides), source)
        store = {"store": tmp_path / "a.jsonl", "context": context}
        return respond(
            *(model, tokenizer, PROMPTS), name="base", max_new_tokens=5, batch_size=2, **store
        )

    first = asked()
    alone = [  # without padding: what comes before the first end, and the end
        answers.continued(
            model, [encode_prompt(tokenizer, text)], pad=0, ends=[3], max_new_tokens=5
        )
        for text in TEXTS
    ]
    assert generated(first) == sum(row.shape[1] for row in alone) > 0
    monkeypatch.setattr(answers, "continued", None)
    again = asked(CORRECTIONS)
    assert generated(again) == 0 and again.equals(first)
    with pytest.raises(TypeError):
        asked({"backbone.system_prompt": "be kind"})


def test_padding_after_an_end_is_not_counted():
    import torch

    assert answers._length(torch.tensor([5, 6, 3, 0, 0]), [3]) == 3
    assert answers._length(torch.tensor([5, 6, 7, 0, 0]), [3]) == 5
    assert answers._length(torch.tensor([3, 3, 3]), [3]) == 1


def test_open_answers_are_stored_turn_by_turn(tmp_path, monkeypatch):
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    questions = [Question("1", "a", ("mend a boat", "paint")), Question("2", "b", ("no", "use it"))]
    path = tmp_path / "open.jsonl"

    def asked(context="one"):
        options = {"max_new_tokens": 4, "batch_size": 2, "store": path, "context": context}
        return mt_bench_answers(model, tokenizer, questions, **options)

    first = asked()
    unstored = mt_bench_answers(model, tokenizer, questions, max_new_tokens=4, batch_size=2)
    assert first.equals(unstored) and generated(first) == generated(unstored) > 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))  # cut after turn 1
    resumed = asked()
    assert resumed.equals(first) and 0 < generated(resumed) < generated(first)
    assert [json.loads(x) for x in path.read_text().splitlines()] == [json.loads(x) for x in lines]
    monkeypatch.setattr(answers, "continued", None)
    assert asked().equals(first) and generated(asked()) == 0
    with pytest.raises(TypeError):
        asked("two")
