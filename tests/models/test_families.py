"""Every family through notebooks 00 to 03 by `targets: auto`, in this process and with tiny models.

LLaMA, Mistral and Gemma 1 do so in test_architectures, with all that a run needs besides: NF4,
judges, lm-eval and continual stages.
"""

import families
import notebook_cells
import one_kernel
import pytest
import tiny
import torch
import whole_runs
from transformers import AutoModelForCausalLM

from spkit.config import Config, load_params
from spkit.models.checkpoint_files import tensor_files
from spkit.models.deltas import add_delta
from spkit.patchfile.file import PatchFile
from spkit.running.patch_of_run import load_safepatching
from spkit.running.runs import STAGES, read_record, run_folder

NOTEBOOKS = list(STAGES)[:4]
ANSWERING = (NOTEBOOKS[0], NOTEBOOKS[3])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    whole_runs.write_data(root / "data")
    return root


def parameters(family, root):
    made = whole_runs.byte_pairs if family == "qwen2" else whole_runs.tokenizer
    tokens = made(whole_runs.LLAMA2)
    families.save(family, root / family, len(tokens))
    tokens.save_pretrained(root / family)
    own = {
        **{"backbone.source": str(root / family), "backbone.compute_dtype": "float32"},
        **{"derivation.quantization": "none", "evaluation.quantization": "none"},
        **{"derivation.lora.targets": "auto", "derivation.optimizer": "adamw"},
        **{"data.sources": whole_runs.sources(root / "data"), "utility.tasks": []},
        **{"data.evaluation": ["advbench", "xstest"], "judges.harmful": ["keywords"]},
        **{"evaluation.prompts_per_cell": 2, "outputs": str(root / "outputs"), "run_name": family},
    }
    own = {**whole_runs.SIZES, "importance.layers_per_pass": 1, **own}
    return load_params(one_kernel.ROOT / "params" / "llama2-7b-chat.yaml", own)


ELSEWHERE = {"llama", "mistral", "gemma"}


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in ELSEWHERE])
def test_a_family_runs_to_its_end_by_targets_auto(family, root):
    config = parameters(family, root)
    said = [notebook_cells.run(stage, config, figures=False) for stage in NOTEBOOKS]
    run = run_folder(config)
    method = load_safepatching(run / NOTEBOOKS[1], run / NOTEBOOKS[2], config)
    deltas, written = method.deltas(), run / NOTEBOOKS[3]

    names = {name.split(".")[-2] for name in deltas}
    assert names == families.LANGUAGE.get(family, set(tiny.TARGETS))
    with PatchFile(written / "patch.safetensors") as patch:
        stored = patch.manifest.tensors  # as the files call them
        assert set(stored) <= set(tensor_files(config.backbone.source))
        assert len(stored) == len(deltas) and not any("vision" in name for name in stored)
    assert ("experts" in said[1]) == (family == "mixtral")
    assert ("left out: model.multi_modal_projector, model.vision_tower" in said[1]) == (
        family == "gemma3"
    )

    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (config.backbone.source, written / "model")
    )
    assert before.keys() == after.keys() > set(deltas)
    for name, weight in before.items():
        expected = add_delta(weight, deltas[name]) if name in deltas else weight
        assert torch.equal(after[name], expected), name
    assert any(not torch.equal(before[name], after[name]) for name in deltas)


def test_a_correction_of_judges_or_utility_generates_no_token(root):
    """Stored answers depend on weights, prompts and decoding; a longer answer is another one."""
    config = parameters("olmo2", root)

    def tokens(changes, stages):
        made = Config.from_sources(config.model_dump(mode="json"), changes)
        for stage in stages:
            notebook_cells.run(stage, made, figures=False)
        return [read_record(made, stage)["notes"]["generated_tokens"] for stage in ANSWERING]

    if any(read_record(config, stage) is None for stage in NOTEBOOKS):
        tokens({}, NOTEBOOKS)
    first = [read_record(config, stage)["notes"]["generated_tokens"] for stage in ANSWERING]
    corrected = {
        **{"judges.harmful": ["refusal", "keywords"], "judges.keywords": "gcg"},
        **{"utility.perplexity_texts": 3, "evaluation.confidence": 0.9},
    }
    assert min(first) > 0 and tokens(corrected, ANSWERING) == [0, 0]
    longer = {"evaluation.max_new_tokens": config.evaluation.max_new_tokens + 1}
    assert min(tokens(longer, ANSWERING[:1])[:1]) > 0
