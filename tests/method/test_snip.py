"""SNIP against autograd, sample by sample, on dense effective weights; and its bookkeeping."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from spkit.errors import SpkitError
from spkit.method import importance
from spkit.method import snip as scoring
from spkit.method.snip import snip, snip_windows
from spkit.models import chat
from spkit.models.loading import load
from spkit.models.weights import decoder_layers, effective_weight, target_weights
from spkit.system import tensors

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
    model.model.unused = nn.Linear(2, 2)
    with pytest.raises(SpkitError, match="'model.unused.weight' got gradients of 0 of 3 samples"):
        snip(model, tiny.batches(TOKENIZER), ["unused"])


# ---- some layers at a time


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """{architecture: folder} of checkpoints with three layers."""
    root = tmp_path_factory.mktemp("deep")
    return {name: tiny.save(root / name, name, layers=3) for name in tiny.ARCHITECTURES}


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else None


class Interrupted(Exception):
    pass


class Batches(list):
    """Breaks off before the second batch of one of the passes."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.passes, self.at = 0, at

    def __iter__(self):
        self.passes += 1
        first, *others = list.__iter__(self)
        yield first
        if self.passes == self.at:
            raise Interrupted
        yield from others


def whole_state(model):
    return state(model), [m.__dict__.get("forward") for m in model.modules()]


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_windows_are_snip_bit_for_bit(architecture, quantization, lora, deep):
    """Of one layer, two, all three and more; batches are padded."""
    model, _ = load(deep[architecture], quantization=quantization, device="cpu")
    model = with_lora(model, dropout=0.1).train() if lora else model
    batches = tiny.batches(TOKENIZER)
    assert not batches[0]["attention_mask"].all()
    expected = snip(model, batches, tiny.TARGETS)
    before = whole_state(model)
    for size, windows in ((1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]])):
        found = []
        for window in snip_windows(model, batches, tiny.TARGETS, size):
            assert whole_state(model) == before
            found.append(window)
        assert [sorted({layer_of(name) for name in window}) for window in found] == windows
        assert [name for window in found for name in window] == list(expected)
        for window in found:
            for name, score in window.items():
                assert score.dtype == torch.float32 and torch.equal(score, expected[name]), name
    (more,) = snip_windows(model, batches, tiny.TARGETS, 99)
    assert all(torch.equal(more[name], score) for name, score in expected.items())
    assert whole_state(model) == before


def test_windows_in_bfloat16(deep):
    model, _ = load(deep["llama"], dtype="bfloat16", device="cpu")
    expected = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    for window in snip_windows(model, tiny.batches(TOKENIZER), tiny.TARGETS, 1):
        assert all(torch.equal(score, expected[name]) for name, score in window.items())


def test_the_layers_below_a_window_are_not_run_again():
    model, runs = tiny.model("llama", layers=3), [0, 0, 0]

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(count(index))
    list(snip_windows(model, tiny.batches(TOKENIZER, (1, 1, 1)), tiny.TARGETS, 1))
    assert runs == [3, 6, 9]  # three batches, in one, two and three passes
    runs[:] = [0, 0, 0]
    list(snip_windows(model, tiny.batches(TOKENIZER, (2, 1)), tiny.TARGETS, 2))
    assert runs == [2, 2, 4]


def test_the_backward_pass_ends_where_the_window_begins():
    model, passes = tiny.model("llama", layers=3), []
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: passes.append(0))
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: passes.append(1))
    windows = snip_windows(model, tiny.batches(TOKENIZER, (3,)), tiny.TARGETS, 1)
    for expected in ([1, 0], [1], []):
        passes.clear()
        next(windows)
        assert passes == expected


def test_the_stored_inputs_are_on_the_host_and_no_longer_than_needed(monkeypatch):
    kept, own = [], scoring._storing

    def spy(layer, into):
        kept.append(into)
        return own(layer, into)

    monkeypatch.setattr(scoring, "_storing", spy)
    model = tiny.model("llama", layers=3).bfloat16()
    batches = tiny.batches(TOKENIZER)
    list(snip_windows(model, batches, ["q_proj"], 1))
    assert [len(stored) for stored in kept] == [2, 2, 0]  # nothing for a window after the last
    for stored in kept[:2]:
        shapes = [(*batch["input_ids"].shape, 64) for batch in batches]
        assert [tuple(hidden.shape) for hidden in stored] == shapes
        assert {(h.device.type, h.dtype, h.requires_grad) for h in stored} == {
            ("cpu", torch.bfloat16, False)
        }


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_in_a_window_leaves_the_model_as_it_was(at, lora):
    model = tiny.model("llama", layers=3)
    model = with_lora(model, dropout=0.1).train() if lora else model
    before, values = whole_state(model), copy.deepcopy(model.state_dict())
    windows = snip_windows(model, Batches(tiny.batches(TOKENIZER), at), tiny.TARGETS, 1)
    for _ in range(at - 1):
        next(windows)
    with pytest.raises(Interrupted):
        next(windows)
    assert whole_state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_abandoned_windows_leave_the_model_as_it_was():
    model = tiny.model("gemma", layers=3)
    before, batches = whole_state(model), tiny.batches(TOKENIZER)
    expected = snip(model, batches, tiny.TARGETS)
    windows = snip_windows(model, batches, tiny.TARGETS, 1)
    next(windows), next(windows)
    assert whole_state(model) == before
    windows.close()
    assert whole_state(model) == before
    again = snip(model, batches, tiny.TARGETS)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_forward_of_the_layers_own_is_put_back():
    """accelerate hangs its hooks on the instance."""
    model = tiny.model("llama", layers=3)
    expected = snip(model, tiny.batches(TOKENIZER), tiny.TARGETS)
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda *arguments, own=own, **options: own(*arguments, **options)
    before = whole_state(model)
    for window in snip_windows(model, tiny.batches(TOKENIZER), tiny.TARGETS, 1):
        assert whole_state(model) == before
        assert all(torch.equal(score, expected[name]) for name, score in window.items())


def test_a_matrix_outside_of_the_layers_comes_last():
    model = tiny.model("llama", layers=3, tied=False)
    for targets in (["lm_head", "up_proj"], ["lm_head"]):
        expected = snip(model, tiny.batches(TOKENIZER), targets)
        windows = list(snip_windows(model, tiny.batches(TOKENIZER), targets, 2))
        assert len(windows) == 2
        places = [[layer_of(name) for name in window] for window in windows]
        assert places == ([[0, 1], [2, None]] if "up_proj" in targets else [[], [None]])
        found = windows[0] | windows[1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_decoder_layers():
    model = tiny.model("llama", layers=3)
    assert decoder_layers(model) is model.model.layers
    assert decoder_layers(with_lora(model)) is model.model.layers
    odd = tiny.model("llama", layers=3)
    odd.config.num_hidden_layers = 7
    with pytest.raises(SpkitError, match="LlamaForCausalLM has no list of 7 decoder layers; set"):
        decoder_layers(odd)
    with pytest.raises(SpkitError, match="importance.layers_per_pass to null"):
        next(snip_windows(odd, tiny.batches(TOKENIZER), tiny.TARGETS, 1))


def test_windows_of_unknown_targets_and_of_no_samples():
    model = tiny.model("llama")
    with pytest.raises(SpkitError, match="'w_pack' is no linear layer"):
        next(snip_windows(model, tiny.batches(TOKENIZER), ["w_pack"], 1))
    with pytest.raises(SpkitError, match="no calibration samples"):
        next(snip_windows(model, [], tiny.TARGETS, 1))


# ---- files


def test_scores_are_saved_to_the_same_bytes(tmp_path):
    scores = {"b": torch.rand(3, 4), "a": torch.rand(2, 2)}
    importance.save(scores, tmp_path / "one.safetensors")
    importance.save(dict(reversed(scores.items())), tmp_path / "two.safetensors")
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    loaded = importance.load(one)
    assert all(torch.equal(loaded[name], score) for name, score in scores.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    importance.save({"a": torch.zeros(2)}, path)
    old = path.read_bytes()

    def full(found, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(SpkitError, match="the disk is full"):
        importance.save({"a": torch.ones(2)}, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        SpkitError, match="missing.safetensors cannot be read as importances: No such file"
    ):
        importance.load(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(SpkitError, match="bad.safetensors cannot be read as importances: "):
        importance.load(tmp_path / "bad.safetensors")
