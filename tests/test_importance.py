"""SNIP against autograd, sample by sample, on dense effective weights; and its bookkeeping."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from spkit import chat, importance
from spkit.backbone import effective_weight, load, target_weights
from spkit.errors import SpkitError
from spkit.importance import snip

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TOKENIZER = tiny.tokenizer()


def with_lora(model, dropout=0.0):
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        init_lora_weights=False,  # B is not zero, so that the adapter matters
        target_modules=tiny.TARGETS,
    )
    return get_peft_model(model, config)


def by_autograd(dense, weights, loss_on="answer"):
    """mean over samples of |W * dL/dW|: the equation written out, one sample at a time."""
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for pair in tiny.PAIRS:
        ids, labels = chat.encode_pair(TOKENIZER, *pair, loss_on=loss_on)
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        logits = functional_call(dense, leaves, kwargs={"input_ids": torch.tensor([ids])}).logits
        chances = logits[0].log_softmax(-1)
        counted = [t for t in range(1, len(ids)) if labels[t] != chat.IGNORE]
        loss = torch.stack([-chances[t - 1, labels[t]] for t in counted]).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            scores[name] += (weight * gradient).abs() / len(tiny.PAIRS)
    return scores


def relative_error(scores, expected):
    assert list(scores) == list(expected)
    return max(float((scores[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_snip_is_autograd_per_sample(architecture, quantization, lora, checkpoints):
    """fp32: measured 5e-7 (bare) to 2.4e-6 (LoRA), so 1e-5 leaves no room for a wrong term."""
    dense, _ = load(checkpoints[architecture], device="cpu")
    model, _ = load(checkpoints[architecture], quantization=quantization, device="cpu")
    model = with_lora(model) if lora else model
    weights = {n: effective_weight(m) for n, m in target_weights(model, tiny.TARGETS).items()}
    scores = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    assert all(s.dtype == torch.float32 and s.shape == weights[n].shape for n, s in scores.items())
    assert relative_error(scores, by_autograd(dense, weights)) < 1e-5


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_snip_in_bfloat16(quantization, checkpoints):
    """bf16 activations have 8 bits: measured 2.2 to 2.9 % against fp32 autograd."""
    dense, _ = load(checkpoints["llama"], device="cpu")
    model, _ = load(checkpoints["llama"], dtype="bfloat16", quantization=quantization, device="cpu")
    weights = {n: effective_weight(m) for n, m in target_weights(model, tiny.TARGETS).items()}
    scores = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    assert relative_error(scores, by_autograd(dense, weights)) < 0.06


def test_snip_by_hand():
    """One 1x2 layer, two samples: |w * dL/dw| averaged, not the absolute value of the average."""

    class OneLayer(nn.Module):
        """Logits (0, w . x) for token ids 0 and 1, x looked up in a fixed table."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2, 2, _weight=torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
            self.proj = nn.Linear(2, 1, bias=False)
            self.proj.weight.data = torch.tensor([[0.0, 0.5]])

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, attention_mask, use_cache):
            score = self.proj(self.table(input_ids))
            return type("Out", (), {"logits": torch.cat([torch.zeros_like(score), score], -1)})

    # x = (1, 0): score 0, so p = 1/2; x = (1, 2): score 1, so p = sigmoid(1)
    p = float(torch.sigmoid(torch.tensor(1.0)))
    batch = chat.collate([([0, 1], [-100, 1]), ([1, 0], [-100, 0])], pad_id=0)
    # dL/dw is (p - 1) x for the target 1, and p x for the target 0
    scores = snip(OneLayer(), [batch], ["proj"])
    assert scores["proj.weight"].tolist() == [[0.0, pytest.approx(0.5 * p * 2 / 2)]]
    model = OneLayer()
    model.proj.weight.data = torch.tensor([[1.0, 0.0]])
    p = float(torch.sigmoid(torch.tensor(1.0)))  # both samples: score 1
    expected = 0.5 * ((1 - p) * 1 + p * 1)  # the plain mean would be |(p - 1) + p| / 2
    assert snip(model, [batch], ["proj"])["proj.weight"].tolist() == [[pytest.approx(expected), 0]]


def test_batching_and_padding_do_not_matter():
    model = tiny.model("llama")
    alone = snip(model, tiny.batches(TOKENIZER, (1, 1, 1)), tiny.TARGETS)
    together = snip(model, tiny.batches(TOKENIZER, (3,)), tiny.TARGETS)
    assert relative_error(together, alone) < 1e-5


def test_loss_on_the_question():
    model = tiny.model("mistral")
    pairs = [chat.encode_pair(TOKENIZER, *pair, loss_on="question") for pair in tiny.PAIRS]
    scores = snip(model, [chat.collate(pairs, 0)], tiny.TARGETS)
    weights = {n: effective_weight(m) for n, m in target_weights(model, tiny.TARGETS).items()}
    assert relative_error(scores, by_autograd(model, weights, loss_on="question")) < 1e-5


def test_a_subset_scores_the_same():
    model = tiny.model("gemma")
    everything = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    some = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS, only=[Q_PROJ])
    assert list(some) == [Q_PROJ]
    assert torch.equal(some[Q_PROJ], everything[Q_PROJ])


def test_the_same_bits_twice():
    model = tiny.model("llama")
    first, second = (snip(model, tiny.batches(TOKENIZER), tiny.TARGETS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_off(checkpoints):
    model, _ = load(checkpoints["llama"])
    still = snip(with_lora(copy.deepcopy(model)), tiny.batches(TOKENIZER), tiny.TARGETS)
    dropping = with_lora(model, dropout=0.5).train()
    scores = snip(dropping, tiny.batches(TOKENIZER), tiny.TARGETS)
    assert all(torch.equal(scores[name], still[name]) for name in still)


def test_scoring_with_gradient_checkpointing_switched_on():
    model = tiny.model("llama")
    plain = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    model.gradient_checkpointing_enable()
    scores = snip(model.train(), tiny.batches(TOKENIZER), tiny.TARGETS)
    assert relative_error(scores, plain) < 1e-6


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails):
    model = with_lora(tiny.model("llama"), dropout=0.1).train()
    model.base_model.model.model.layers[1].eval()  # a mixture is kept too
    before, values = state(model), copy.deepcopy(model.state_dict())
    batches = tiny.batches(TOKENIZER)
    if fails:
        batches.append({})
        with pytest.raises(KeyError):
            snip(model, batches, tiny.TARGETS)
    else:
        snip(model, batches, tiny.TARGETS)
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_nothing_to_score_with():
    with pytest.raises(SpkitError, match="no calibration samples"):
        snip(tiny.model("llama"), [], tiny.TARGETS)


def test_unknown_names():
    with pytest.raises(SpkitError, match="'w_pack' is no linear layer"):
        snip(tiny.model("llama"), tiny.batches(TOKENIZER), ["w_pack"])
    with pytest.raises(SpkitError, match="'model.norm.weight' is not among the targets"):
        snip(tiny.model("llama"), [], tiny.TARGETS, only=["model.norm.weight"])


def test_a_loss_that_is_not_finite_names_the_sample():
    model = tiny.model("llama", tied=False)
    word = TOKENIZER.convert_tokens_to_ids("fence")  # only the second pair has it
    model.get_input_embeddings().weight.data[word] = float("nan")
    with pytest.raises(SpkitError, match="loss of calibration sample 1 is not finite"):
        snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)


def test_a_score_that_is_not_finite_names_the_tensor():
    model = tiny.model("llama")
    layer = target_weights(model, ["q_proj"])[Q_PROJ]
    layer.register_full_backward_pre_hook(lambda m, g: (g[0] * float("inf"),))
    with pytest.raises(SpkitError, match=f"importance of '{Q_PROJ}' is not finite"):
        snip(model, tiny.batches(TOKENIZER), ["q_proj"])


def test_a_layer_without_gradient_is_named():
    model = tiny.model("llama")
    model.unused = nn.Linear(2, 2)
    with pytest.raises(SpkitError, match="'unused.weight' got gradients of 0 of 3 samples"):
        snip(model, tiny.batches(TOKENIZER), ["unused"])


# ---- files


def test_scores_are_saved_to_the_same_bytes(tmp_path):
    scores = {"b": torch.rand(3, 4), "a": torch.rand(2, 2)}
    importance.save(scores, tmp_path / "one.safetensors", note="se")
    importance.save(dict(reversed(scores.items())), tmp_path / "two.safetensors", note="se")
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    loaded = importance.load(one)
    assert all(torch.equal(loaded[name], score) for name, score in scores.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    importance.save({"a": torch.zeros(2)}, path)
    old = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importance, "save_file", full)
    with pytest.raises(SpkitError, match="the disk is full"):
        importance.save({"a": torch.ones(2)}, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpkitError, match="There is no file"):
        importance.load(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(SpkitError, match="is no readable safetensors file"):
        importance.load(tmp_path / "bad.safetensors")
