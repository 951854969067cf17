"""All four architecture classes through all notebooks, each with its own params file.

Tiny random weights in the real format (sharded safetensors; tied and untied embeddings, grouped
queries, Gemma's own norm), data files of the published schemas, a Longformer as judge, and a task
for lm-eval. Of the params files only paths and sizes are overridden, and in two the targets. All
run in NF4, one also in full precision; one in a kernel as papermill runs it, the others in this
process. The numbers mean nothing; the texts are the village's. More families: test_families.
"""

import json
from pathlib import Path

import notebook_cells
import one_kernel
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)
from whole_runs import CONTINUAL, LLAMA2, SIZES, sources, tokenizer, write_data

from spkit.config import load_params
from spkit.models.checkpoint_files import tensor_files
from spkit.running.runs import STAGES, run_folder

ROOT = Path(__file__).parents[2]
NOTEBOOKS = list(STAGES)[:-1]  # the comparison is the sandbox's

# the shape of each chat format, with blanks for a tokenizer of words
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ' <|start_header_id|> ' + m['role'] + ' <|end_header_id|> ' }}"
    "{{ m['content'] + ' <|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ ' <|start_header_id|> assistant <|end_header_id|>' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ ' <start_of_turn> ' + ('model' if m['role'] == 'assistant' else m['role']) + ' ' }}"
    "{{ m['content'] + ' <end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <start_of_turn> model' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# params file -> (model class, its configuration, what is special about it, chat template)
MODELS = {
    "llama2-7b-chat": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}, LLAMA2),
    "llama3-8b-instruct": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}, LLAMA3),
    "gemma-1.1-7b-it": (GemmaForCausalLM, GemmaConfig, {"num_key_value_heads": 4}, GEMMA),
    "mistral-7b-instruct-v0.1": (
        *(MistralForCausalLM, MistralConfig),
        {"num_key_value_heads": 2, "sliding_window": 16},
        MISTRAL,
    ),
}


def write_backbone(folder, name):
    build, config, special, template = MODELS[name]
    tokens = tokenizer(template)
    torch.manual_seed(0)
    sizes = dict(
        **{"vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16},
        **{"max_position_embeddings": 128, "initializer_range": 0.2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    model = build(config(**sizes, **special)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokens.save_pretrained(folder)
    return folder


def write_judge(folder):
    torch.manual_seed(1)
    tokens = tokenizer()
    sizes = dict(
        **{"vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "intermediate_size": 32, "attention_window": 8},
        **{"max_position_embeddings": 66, "pad_token_id": 0, "num_labels": 2},
        **{"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "initializer_range": 0.5},
    )
    LongformerForSequenceClassification(LongformerConfig(**sizes)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


FULL = {"derivation.quantization": "none", "evaluation.quantization": "none"}
AUTO = {"derivation.lora.targets": "auto"}
CASES = {name: (name, {}) for name in MODELS}
CASES |= {name: (name, AUTO) for name in ("gemma-1.1-7b-it", "mistral-7b-instruct-v0.1")}
CASES["llama3-8b-instruct, full precision"] = ("llama3-8b-instruct", FULL | AUTO)
IN_A_KERNEL = "llama3-8b-instruct"


def parameters(name, root, changes):
    data, judge = root / "data", root / "judge"
    paths = {
        "backbone.source": str(root / name),
        "data.sources": sources(data),
        "judges.classifier.model": str(judge),
        "utility.tasks": ["village"],
        "utility.include_path": str(data),
        "outputs": str(root / "outputs"),
    }
    return load_params(ROOT / "params" / f"{name}.yaml", {**SIZES, **paths, **changes})


def execute(case, root):
    """All notebooks of one case, in a row; its config."""
    name, changes = CASES[case]
    config = parameters(
        name, root, {**changes, "run_name": case.replace(", ", "-").replace(" ", "-")}
    )
    run_folder(config).mkdir(parents=True)
    if case != IN_A_KERNEL:
        for stage in NOTEBOOKS:
            notebook_cells.run(stage, config, figures=False)
        return config
    cells = []
    for stage in NOTEBOOKS:
        notebook = one_kernel.read(one_kernel.NOTEBOOKS / f"{stage}.ipynb")
        cells += one_kernel.code(notebook, one_kernel.parameters(config))
    one_kernel.run(cells)
    return config


class Runs:
    """Each case runs when a test first asks for it."""

    def __init__(self, root):
        self.root, self.found = root, {}

    def config(self, case):
        """Of the finished run; what went wrong is raised to each test that asks."""
        if case not in self.found:
            try:
                self.found[case] = execute(case, self.root)
            except (Exception, SystemExit) as error:
                self.found[case] = error
        if isinstance(self.found[case], BaseException):
            raise self.found[case]
        return self.found[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    write_data(root / "data")
    write_judge(root / "judge")
    for name in MODELS:
        write_backbone(root / name, name)
    return Runs(root)


every_case = pytest.mark.parametrize("case", CASES)


def finished(runs, case):
    config = runs.config(case)
    return config, run_folder(config)


@every_case
def test_every_notebook_runs_to_its_end(case, runs):
    config, run = finished(runs, case)
    for stage in NOTEBOOKS:
        assert (run / stage / "record.json").is_file()
    record = json.loads((run / "03_controllable_patching" / "record.json").read_text())
    assert record["notes"]["evaluated_in"] == config.evaluation.quantization
    assert record["notes"]["moved"] > 0
    assert len(list((run / "02_importance_analysis").glob("top_*.safetensors"))) == 2


@every_case
def test_the_patched_checkpoint_is_the_backbone_plus_kept_deltas(case, runs):
    config, run = finished(runs, case)
    folder = run / "03_controllable_patching" / "model"
    before, after = tensor_files(config.backbone.source), tensor_files(folder)
    assert before.keys() == after.keys() and len(set(after.values())) > 1  # shards
    changed = 0
    for name in before:
        old, new = (load_file(files[name])[name] for files in (before, after))
        if name.split(".")[-2] in tiny.TARGETS:
            changed += int((old != new).sum())
            # kept at most: p (a + b) of the weights
            assert (old != new).float().mean() <= 0.05
        else:
            assert torch.equal(old, new), name
    assert changed > 0
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == MODELS[CASES[case][0]][0].__name__


@every_case
def test_every_source_is_asked_and_judged(case, runs):
    _, run = finished(runs, case)
    for stage, answers in (("00_backbone", 1), ("03_controllable_patching", 7)):
        responses = pd.read_csv(run / stage / "responses.csv", keep_default_na=False)
        assert responses["model"].nunique() == answers
        assert set(responses["group"]) == {"beavertails_test", "advbench", "xstest"}
        harmful = responses[responses["objective"] == "harmful"]
        assert set(harmful["verdict"]) <= {"harmful", "refusal", "safe", "broken"}
        # two judges were named for harmful prompts
        assert (harmful["verdict (keywords)"] != "").all()
        skill = pd.read_csv(run / stage / "utility.csv")
        assert set(skill["kind"]) == {"perplexity", "lm-eval"}


@every_case
def test_the_continual_stages_start_from_the_stage_before(case, runs):
    config, run = finished(runs, case)
    stages = run / "04_continual_psa" / "stages"
    for method in config.continual.methods:
        for k, category in enumerate(CONTINUAL, start=1):
            about = json.loads((stages / method / f"stage-{k}" / "stage.json").read_text())
            assert about["categories"] == [category]
        before, after = (
            tensor_files(folder)
            for folder in (config.backbone.source, stages / method / "stage-2" / "model")
        )
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(load_file(before[name])[name], load_file(after[name])[name])


def test_four_bits_and_full_precision_are_not_the_same_run(runs):
    """Else one of the two would not be tested."""
    said = []
    for case in ("llama3-8b-instruct", "llama3-8b-instruct, full precision"):
        _, run = finished(runs, case)
        patch = load_file(run / "01_patch_derivation" / "se.safetensors")
        said.append(patch["model.layers.0.self_attn.q_proj.weight.lora_B"])
    assert not torch.equal(*said)
