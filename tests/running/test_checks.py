"""Whether a run can end is known before it begins: every case that was found late, found early."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from transformers import LlamaConfig, LlamaForSequenceClassification

from spkit.config import Config, load_params
from spkit.errors import SpkitError
from spkit.models.checkpoint_check import CAUSAL, CLASSIFIER
from spkit.running import checks
from spkit.running.checks import evaluation, place
from spkit.running.notebook import start
from spkit.system import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, nothing checked before, and outputs of the test's own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.delenv(checks.CHECKED, raising=False)


def config_of(tmp_path, **changes):
    over = {key.replace("__", "."): value for key, value in changes.items()}
    return load_params("params/micro.yaml", {"outputs": str(tmp_path / "outputs"), **over})


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def test_all_is_well_on_the_sandbox_and_nothing_is_written(tmp_path):
    found = checks.findings(config_of(tmp_path))
    assert checks.problems(found) == [] and {each.ok for each in found} == {True}
    assert not (tmp_path / "outputs").exists()
    assert "192 pairs" in checks.table(checks.findings(Config()))


def test_a_7b_file_without_a_network_names_all_that_is_missing_at_once():
    config = load_params("params/llama2-7b-chat.yaml")
    found = checks.findings(config)
    said = "\n".join(checks.problems(found))
    for name in (
        *("meta-llama/Llama-2-7b-chat-hf", "PKU-Alignment/BeaverTails", "walledai/AdvBench"),
        *("walledai/XSTest", "NeelNanda/pile-10k", "LibrAI/longformer-harmful-ro"),
        *("cais/mmlu", "Rowan/hellaswag", "openai/gsm8k", "EleutherAI/hendrycks_math"),
    ):
        assert name in said
    assert said.count("hub cannot be reached") >= 12
    with pytest.raises(SpkitError, match=r"\d\d things are in the way, so nothing was begun"):
        checks.require(config)


CASES = {
    "a task": ({"utility__tasks": ["helaswag"]}, "no task 'helaswag', did you mean hellaswag"),
    "a folder of tasks": (
        {"utility__tasks": ["piqa"], "utility__include_path": "gone"},
        "utility.include_path is 'gone', which is no folder",
    ),
    "a judge": (
        {"judges__harmful": ["classifier"], "judges__classifier__model": "no/such-judge"},
        "judges.classifier.model: 'no/such-judge' is not on this machine",
    ),
    "a judge's folder": (
        {"judges__harmful": ["generative"], "judges__generative__model": "params"},
        "judges.generative.model is 'params', which has no config.json",
    ),
    "a judge's objective": (
        {"judges__over_safety": ["generative"], "judges__generative__model": "params"},
        "judges.generative.prompt is 'harmbench', which asks about harm only",
    ),
    "a data file": ({"data__harmful": "gone.jsonl"}, "data.harmful is 'gone.jsonl': no such file"),
    "a category": (
        {"continual__stages": [["colouring"], ["teasing"]]},
        "'teasing'",
    ),
    "braces": ({"outputs": "params/a{b}"}, "must be without braces: Snakemake fills them"),
    "a long name": ({"outputs": "params/" + "a" * 300}, "cannot be: File name too long"),
    "a mirror": ({"mirror": "/no/such/mount"}, "mirror"),
    "a prompt file": (
        {"utility__mt_bench__prompts": "params/micro.yaml"},
        "params/micro.yaml: unknown suffix",
    ),
    "a device": ({"backbone__device": "cuda:7"}, "cuda:7"),
    "a backbone": (
        {"backbone__source": "no/such-model", "judges__harmful": ["keywords"]},
        "backbone.source: 'no/such-model' is not on this machine",
    ),
    "the template's": (
        {"backbone__source": "your-name/your-model", "judges__harmful": ["keywords"]},
        "name your own model",
    ),
}


@pytest.mark.parametrize(("changes", "said"), CASES.values(), ids=list(CASES))
def test_what_would_end_a_run_late_is_told_first(changes, said, tmp_path):
    config = config_of(tmp_path, **changes)
    assert any(said in sentence for sentence in checks.problems(checks.findings(config)))
    values = config.model_dump(mode="json")
    with pytest.raises(SpkitError, match=".") as error:
        start("00_backbone", values)
    assert said in str(error.value) and not (tmp_path / "outputs").exists()


def test_a_column_that_is_not_there(tmp_path):
    path = rows(tmp_path / "texts.jsonl", {"txt": "the scarf is red"})
    config = config_of(tmp_path, utility__perplexity=path)
    (said,) = checks.problems(checks.findings(config))
    assert "the column 'text' is missing" in said and path in said


def test_several_problems_are_told_together_and_one_cause_once(tmp_path):
    config = config_of(
        tmp_path, utility__tasks=["helaswag"], data__harmful="gone.jsonl", backbone__device="cuda:7"
    )
    with pytest.raises(SpkitError, match="things are in the way") as error:
        checks.require(config)
    lines = str(error.value).splitlines()
    assert len([line for line in lines if line.startswith("* ")]) == len(set(lines)) - 1 >= 3


def test_a_file_in_the_place_of_the_run_folder(tmp_path):
    (tmp_path / "outputs").write_text("")
    (said,) = checks.problems(checks.findings(config_of(tmp_path)))
    assert "is a file, must be a folder" in said


def test_too_little_disk(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10, used=10, free=0)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage)
    (said,) = checks.problems(checks.findings(config_of(tmp_path)))
    assert "GiB to be written, 0.0 GiB are free" in said


def test_the_class_of_a_judge_that_it_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    (found,) = evaluation._label(str(tmp_path), None, 2)
    assert found.ok is False and "2 classes (0 to 1)" in found.said
    assert list(evaluation._label(str(tmp_path), None, 1)) == []


def a_classifier(folder):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(**sizes, vocab_size=32, num_labels=2, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_judge_is_looked_at_like_a_backbone(tmp_path, checkpoints):
    """Each of these ended notebook 00 behind all its answers."""

    def said(maker, folder):
        return evaluation._model("judges.x.model", str(folder), None, maker)

    judge = a_classifier(tmp_path / "judge")
    assert said(CLASSIFIER, judge).ok and said(CAUSAL, checkpoints["llama"]).ok
    assert "lacks the tensor 'score.weight'" in said(CLASSIFIER, checkpoints["llama"]).said
    assert "lacks the tensor 'lm_head.weight'" in said(CAUSAL, judge).said
    tiny.tokenizer(extra=20).save_pretrained(judge)
    assert "it belongs to another model" in said(CLASSIFIER, judge).said
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (judge / name).unlink()
    assert "No tokenizer can be loaded" in said(CLASSIFIER, judge).said
    stored = {"quant_method": "gptq", "bits": 4}
    (judge / "config.json").write_text(
        json.dumps({**LlamaConfig().to_dict(), "quantization_config": stored})
    )
    assert "requires optimum" in said(CAUSAL, judge).said


def test_a_notebook_looks_at_its_own_parameters_alone(tmp_path):
    config = config_of(tmp_path, utility__tasks=["helaswag"])
    keys = {each.key for each in checks.findings(config, stage="02_importance_analysis")}
    assert "utility.tasks" not in keys and "data.harmful (D_h)" in keys
    assert {e.key for e in checks.findings(config, stage="05_comparison")} == {"outputs"}


def test_what_was_checked_is_not_looked_at_again(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    checks.require(config)
    monkeypatch.setattr(checks, "findings", lambda *a, **k: pytest.fail("looked again"))
    checks.require(config, "00_backbone")
    with pytest.raises(pytest.fail.Exception):
        checks.require(config_of(tmp_path, patching__beta=2.0))


# ---- the hub -------------------------------------------------------------------------------------


def test_what_the_hub_says_becomes_a_sentence(monkeypatch):
    import httpx
    from huggingface_hub import HfApi, errors

    monkeypatch.setattr(hub, "reachable", lambda: True)
    answer = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    said = {
        errors.RepositoryNotFoundError: "has no model of this name",
        errors.RevisionNotFoundError: "no revision 'abc'",
        errors.GatedRepoError: "it is gated",
    }
    for kind, words in said.items():

        def fail(self, *a, kind=kind, **k):
            raise kind("told", response=answer)

        monkeypatch.setattr(HfApi, "repo_info", fail)
        assert words in hub.problem("a/b", "model", "abc")
    monkeypatch.setattr(HfApi, "repo_info", lambda *a, **k: None)
    monkeypatch.setattr(HfApi, "auth_check", lambda *a, **k: None)
    assert hub.problem("a/b", "model") is None


def test_a_hub_that_falls_silent_is_asked_once(monkeypatch):
    """It answered the first question; a proxy that hangs now would cost seconds for every name."""
    from huggingface_hub import HfApi

    class TooLate(Exception):
        """Not an OSError, as the session's own."""

    asked = []

    def silent(self, name, **options):
        asked.append(name)
        raise TooLate

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "_SILENT", [])
    monkeypatch.setattr(HfApi, "repo_info", silent)
    for name in ("a/b", "c/d"):
        assert hub.problem(name, "model").endswith("and the hub cannot be reached from here")
    assert asked == ["a/b"]


def test_an_offline_machine_is_not_asked(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.undo()
    hub.reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    try:
        assert hub.reachable() is False
    finally:
        hub.reachable.cache_clear()
