"""Several patches of one model, asked in turn: each answers as it should, and none stays."""

import pytest
import tiny
import torch

from spkit.errors import SpkitError
from spkit.evaluation.answers import generate
from spkit.evaluation.variants import respond_as
from spkit.examples import EvalPrompt
from spkit.models.patched import patched

NAME = "model.layers.0.mlp.up_proj.weight"
TOKENIZER = tiny.tokenizer()
PROMPTS = [
    EvalPrompt(str(i), prompt, "harmful", "seen", "any", "plain", "")
    for i, (prompt, _) in enumerate(tiny.PAIRS)
]
OPTIONS = {"max_new_tokens": 4, "batch_size": 2}


def deltas(size):
    model = tiny.model("llama")
    draw = torch.Generator().manual_seed(size)
    return {NAME: size * torch.randn(model.get_parameter(NAME).shape, generator=draw)}


def test_each_variant_answers_patched_and_the_model_is_as_before(tmp_path):
    model = tiny.model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    given, seen = {"small": deltas(1), "large": deltas(50)}, []
    for name, said in respond_as(
        model, TOKENIZER, given.items(), PROMPTS, folder=tmp_path, context="c", **OPTIONS
    ):
        changed = model.get_parameter(NAME) - before[NAME]
        assert torch.allclose(changed, given[name][NAME], atol=1e-4)  # until the loop goes on
        assert set(said["model"]) == {name}
        seen.append(said["response"].tolist())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    for said, delta in zip(seen, given.values(), strict=True):
        with patched(model, delta):
            assert said == generate(model, TOKENIZER, [p.prompt for p in PROMPTS], **OPTIONS)
    assert seen[0] != seen[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl"]


def test_the_model_is_as_before_after_an_error_too(tmp_path):
    model = tiny.model("llama")
    before = model.get_parameter(NAME).clone()
    with pytest.raises(SpkitError, match="no weight matrix"):
        list(
            respond_as(
                *(model, TOKENIZER, [("a", deltas(1)), ("b", {"nowhere": deltas(1)[NAME]})]),
                PROMPTS,
                folder=tmp_path,
                **OPTIONS,
            )
        )
    assert torch.equal(model.get_parameter(NAME), before)
