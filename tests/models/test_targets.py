"""Which layers get a patch: by names, by rule, by a regular expression; and what is refused."""

from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from spkit.errors import SpkitError
from spkit.method.training import add_lora
from spkit.models.weights import left_out, target_weights


def empty(family):
    with torch.device("meta"):
        return families.model(family)


def leaves(model, targets):
    return {name.split(".")[-2] for name in target_weights(model, targets)}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_auto_takes_attention_and_mlp_of_the_language_model(family):
    model = empty(family)
    found = target_weights(model, "auto")
    assert leaves(model, "auto") == families.LANGUAGE.get(family, set(tiny.TARGETS))
    assert leaves(model, "all-linear") == leaves(model, "auto")
    assert not any("vision" in name or "lm_head" in name for name in found)
    assert list(found) == [
        f"{path}.weight" for path, m in model.named_modules() if m in found.values()
    ]


def test_routers_are_for_all_linear_and_experts_for_none():
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp.gate, layer.mlp.shared_expert_gate = nn.Linear(64, 4), nn.Linear(64, 1)
        layer.mlp.experts = nn.ModuleList([nn.Linear(64, 64)])
    usual = set(tiny.TARGETS)
    assert leaves(model, "auto") == usual
    assert leaves(model, "all-linear") == usual | {"gate", "shared_expert_gate"}
    assert left_out(empty("mixtral")) == [
        "The experts (model.layers.0.mlp.experts.gate_up_proj, ...) get no patch: they are "
        "stacked tensors, not linear layers."
    ]


def test_a_regular_expression_matches_the_whole_path():
    model = tiny.model("llama")
    found = target_weights(model, r"model\.layers\.1\..*(q|up)_proj")
    names = ["self_attn.q_proj", "mlp.up_proj"]
    assert list(found) == [f"model.layers.1.{name}.weight" for name in names]


def test_a_name_in_a_list_may_have_more_parts():
    model, bare = empty("llama"), empty("llama").model
    first = "model.layers.0.self_attn.q_proj"
    assert leaves(model, ["self_attn.q_proj", "up_proj"]) == {"q_proj", "up_proj"}
    assert list(target_weights(model, [first])) == [f"{first}.weight"]
    assert list(target_weights(model, ["0.self_attn.q_proj"])) == [f"{first}.weight"]
    assert list(target_weights(bare, ["layers.0.self_attn.q_proj"]))  # the whole of a path
    for part in ("attn.q_proj", "mlp.q_proj", "self_attn"):
        with pytest.raises(SpkitError, match=f"The target '{part}' is no linear layer"):
            target_weights(model, ["up_proj", part])


def test_a_vision_tower_s_q_proj_is_left_alone():
    model = families.model("gemma3")
    for targets in (["q_proj"], r".*\.q_proj", "auto"):
        lora = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": targets}
        wrapped = add_lora(model, SimpleNamespace(**lora), seed=0)
        trained = [name for name, weight in wrapped.named_parameters() if weight.requires_grad]
        assert trained and all(".language_model.layers." in name for name in trained)
        assert list(target_weights(wrapped, targets)) == list(target_weights(model, targets))
        model = wrapped.unload()


@pytest.mark.parametrize(
    "targets, said",
    [
        (
            ["q_proj", "c_attn", "x"],
            "'c_attn', 'x' are no linear layers of this model; it has q_pro",
        ),
        (["c_attn"], "'c_attn' is no linear layer of this model.*auto takes those"),
        ("(", "is '\\(', which is no regular expression: missing \\)"),
        ("q_proj", "matches no whole path of a linear layer.*'model.layers.0.self_attn.q_proj'"),
        ("all_linear", "matches no whole path"),
        (".*norm", "matches 'model.layers.0.input_layernorm', which is LlamaRMSNorm and gets no"),
        (".*(q_proj|embed_tokens)", "matches 'model.embed_tokens', which is Embedding"),
    ],
)
def test_what_hits_nothing_is_refused_with_what_there_is(targets, said):
    with pytest.raises(SpkitError, match=said):
        target_weights(empty("llama"), targets)


def test_transposed_layers_are_named():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    for targets in ("auto", "all-linear", ["c_attn"], ".*c_attn"):
        with pytest.raises(SpkitError, match="Conv1D"):
            target_weights(model, targets)


@pytest.mark.parametrize("names", [tiny.TARGETS, ["up_proj", "q_proj"]])
def test_a_list_gives_the_factors_that_peft_draws_for_these_names(names):
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": names}
    ours = add_lora(tiny.model("llama"), SimpleNamespace(**lora), seed=3)
    plain = LoraConfig(r=2, lora_alpha=4, target_modules=names, task_type="CAUSAL_LM")
    model = tiny.model("llama")
    torch.manual_seed(3)
    theirs = get_peft_model(model, plain).state_dict()
    assert list(ours.state_dict()) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
