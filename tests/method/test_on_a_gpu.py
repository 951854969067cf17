"""The ways through the kit that a GPU takes of its own, on the CPU and, where there is one, on it.

`pytest -m cuda` runs what is on a GPU alone. No test has an expectation of its own for a GPU:
each compares what a device computes with autograd, with the CPU, or with itself.
"""

import copy
import os
import warnings

import pytest
import tiny
import torch
from on_devices import cuda, on_devices, on_devices_with
from torch.func import functional_call

from spkit.config import DerivationConfig
from spkit.evaluation.answers import generate
from spkit.examples import HarmfulPair
from spkit.method.derivation import derive
from spkit.method.snip import snip, snip_windows
from spkit.method.training import Checkpoints, TrainingSet, attach
from spkit.models.chat import answer_loss, mean_per_sample
from spkit.models.deltas import add_delta
from spkit.models.loading import load, resolve_device, resolve_dtype
from spkit.models.nf4 import check_nf4, decoded
from spkit.models.patched import patched
from spkit.models.weights import effective_weight, guard_nf4, target_weights
from spkit.system import machine, resume

TOKENIZER = tiny.tokenizer()
PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
PAGED_RANK = 1024  # bitsandbytes keeps moments of 4,096 numbers in 8 bits, pages those of 100,000
QUANTIZATIONS = ("quantization", "nf4", "none")
# read by cuBLAS when it starts; see spkit/system/determinism.py
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def deterministic():
    """As in every notebook."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def on(device, checkpoints, quantization="none", dtype="float32"):
    return load(checkpoints["llama"], quantization=quantization, dtype=dtype, device=device)[0]


def settings(quantization="none", optimizer="adamw", dropout=0.0, r=4, batch_size=3, **more):
    """Few steps over all pairs: what a device draws for dropout is its own."""
    shared = dict(learning_rate=1e-2, max_steps=4, batch_size=batch_size, warmup_steps=0)
    held = dict(token_loss_clamp=100.0, stop_mean_loss=99.0, stop_window=1)
    lora = dict(r=r, alpha=8.0, dropout=dropout, targets=tiny.TARGETS)
    how = dict(quantization=quantization, optimizer=optimizer, lora=lora) | more
    return DerivationConfig(**how, ascent=shared | held, descent=shared)


def derived(model, config, direction="descent", folder=None, saved=lambda: None):
    kept = None if folder is None else Checkpoints(folder, saved)
    return derive(model, TrainingSet.of(TOKENIZER, PAIRS), direction, config, 0, kept)


def relative(found, right):
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    return float((found - right).norm() / right.norm())


# ---- 4-bit weights -------------------------------------------------------------------------------


@on_devices_with("dtype", torch.float32, torch.bfloat16, torch.float16)
def test_a_4_bit_layer_computes_with_the_weights_that_the_cpu_decodes(device, dtype):
    """The same codes on both devices: the layer's outputs and gradients are those of the CPU's
    decoding, whatever kernel runs; one token and several, in eval and in train mode."""
    bnb = pytest.importorskip("bitsandbytes")
    shapes = [(24, 64), (24, 432)]
    if device == "cuda":  # on a CPU bitsandbytes compiles for seconds
        shapes += [(33, 65), (512, 192), (11008, 4096)]
    for rows, width in shapes:
        source = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        layer = bnb.nn.Linear4bit(width, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(source, requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        guard_nf4(layer)
        state = copy.deepcopy(layer.weight.quant_state)
        state.to("cpu")
        packed = layer.weight.data.cpu().clone()
        packed.quant_state = state
        weight = decoded(packed)
        assert weight.dtype == dtype and relative(weight, source) < 0.12
        here = decoded(layer.weight)
        assert here.device.type == device and torch.equal(here.cpu(), weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a layer that it mends
            check_nf4(layer)
        rounding = 8 * max(torch.finfo(dtype).eps, 1e-6)
        for train in (False, True):
            layer.train(train)
            for tokens in (1, 5):
                x = torch.randn(1, tokens, width).to(device, dtype).requires_grad_(train)
                y = layer(x)
                right = x.detach().double().cpu() @ weight.double().T
                assert y.dtype == dtype and relative(y, right) < rounding, (rows, width, tokens)
                if train:
                    g = torch.randn(1, tokens, rows).to(device, dtype)
                    (grad,) = torch.autograd.grad(y, x, g)
                    assert relative(grad, g.double().cpu() @ weight.double()) < rounding


# ---- derivation ----------------------------------------------------------------------------------


@on_devices_with(
    "quantization, direction",
    *(("nf4", "ascent"), ("nf4", "descent"), ("none", "ascent"), ("none", "descent")),
)
def test_a_derivation_moves_its_loss_the_right_way_and_repeats(
    device, quantization, direction, checkpoints
):
    """With the optimiser and the checkpointing of the 7B's params file, twice to the same bits."""
    pytest.importorskip("bitsandbytes")
    how = {"optimizer": "paged_adamw_8bit", "gradient_checkpointing": True, "micro_batch_size": 1}
    config, found = settings(quantization, **how), []
    model = on(device, checkpoints, quantization)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        patch, curve = derived(model, config, direction)
        losses = curve["loss"].tolist()
        found.append(patch)
        assert (losses[-1] > losses[0]) == (direction == "ascent")
        assert all(t.device.type == "cpu" for pair in patch.factors.values() for t in pair)
    assert found[0].norm() > 0
    for name in found[0].factors:
        assert torch.equal(found[0].delta(name), found[1].delta(name)), name
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@on_devices_with("dtype", "float16", "bfloat16")
def test_a_derivation_in_16_bits_is_near_that_in_32(device, dtype, checkpoints):
    """fp16 scales its loss (GradScaler), which a T4 needs; a step of either is small."""
    steps = {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 3, "warmup_steps": 0}
    lora = {"r": 4, "alpha": 8.0, "targets": tiny.TARGETS}
    config = DerivationConfig(quantization="none", descent=steps, ascent=steps, lora=lora)
    losses = [
        derived(on(device, checkpoints, dtype=name), config)[1]["loss"].tolist()
        for name in (dtype, "float32")
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=0.03)


class Cut(Exception):
    """What ends a derivation in the middle."""


@on_devices_with(
    "optimizer, r", ("paged_adamw_8bit", 4), ("adamw", 4), ("paged_adamw_8bit", PAGED_RANK)
)
def test_a_cut_derivation_resumes_to_the_same_bits(device, optimizer, r, checkpoints, tmp_path):
    """Factors, moments and the random state of dropout, which a GPU has of its own."""
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    few = {"dropout": 0.1, "batch_size": 2, "checkpoint_steps": 2}
    config = settings(optimizer=optimizer, r=r, **few)
    model, saves = on(device, checkpoints), []

    def cut():
        saves.append(len(saves))
        raise Cut

    whole, curve = derived(model, config)
    with pytest.raises(Cut):
        derived(model, config, folder=tmp_path, saved=cut)
    torch.manual_seed(123)  # a new process has another state
    resumed, again = derived(model, config, folder=tmp_path)
    assert saves == [0] and again["loss"].tolist() == curve["loss"].tolist()
    for name in whole.factors:
        assert torch.equal(resumed.delta(name), whole.delta(name)), name


@on_devices
def test_random_states_come_back(device):
    torch.manual_seed(1)
    states = resume.random_states()
    first = [torch.rand(3), torch.rand(3, device=device)]
    resume.set_random_states(states)
    assert torch.equal(torch.rand(3), first[0])
    assert torch.equal(torch.rand(3, device=device), first[1])


# ---- importance ----------------------------------------------------------------------------------


def by_autograd(dense, weights):
    """mean over samples of |W * dL/dW|, in fp32 on the CPU, one sample at a time."""
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in tiny.batches(TOKENIZER, (1, 1, 1)):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        logits = functional_call(dense, leaves, kwargs={"input_ids": batch["input_ids"]}).logits
        loss = mean_per_sample(*answer_loss(logits, batch["labels"])).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            scores[name] += (weight * gradient).abs() / len(PAIRS)
    return scores


@on_devices_with(
    "quantization, dtype, bound",
    *(("nf4", "float32", 2e-5), ("none", "float32", 2e-5)),
    *(("nf4", "bfloat16", 0.06), ("none", "bfloat16", 0.06)),
)
def test_scores_are_those_of_autograd_on_the_cpu(device, quantization, dtype, bound, checkpoints):
    """Of the patched model, as the method scores it; bounds as on the CPU (test_snip.py), with a
    factor of two in fp32 for the order of another device's sums."""
    config = settings(quantization)
    model = on(device, checkpoints, quantization, dtype)
    patch, _ = derived(model, config)
    wrapped = attach(model, patch)
    layers = target_weights(wrapped, tiny.TARGETS)
    weights = {name: effective_weight(layer).cpu() for name, layer in layers.items()}
    scores = snip(wrapped, tiny.batches(TOKENIZER), tiny.TARGETS)
    assert all(score.device.type == device for score in scores.values())
    dense, _ = load(checkpoints["llama"], device="cpu")
    expected = by_autograd(dense, weights)
    assert scores.keys() == expected.keys()
    for name in expected:
        assert relative(scores[name], expected[name]) < bound, name


@on_devices_with(*QUANTIZATIONS)
def test_windows_score_as_one_pass(device, quantization, checkpoints):
    """The stored inputs travel to the host and back."""
    model = on(device, checkpoints, quantization)
    batches = tiny.batches(TOKENIZER)
    whole, windows = snip(model, batches, tiny.TARGETS), {}
    for window in snip_windows(model, batches, tiny.TARGETS, 1):
        windows |= window
    assert windows.keys() == whole.keys()
    assert all(torch.equal(windows[name], whole[name]) for name in whole)


# ---- patched models and their answers ------------------------------------------------------------


@on_devices_with(*QUANTIZATIONS)
def test_a_patched_model_answers_as_the_sum_and_is_as_before(device, quantization, checkpoints):
    """theta + delta of the CPU; afterwards every bit and every answer is what it was."""
    model = on(device, checkpoints, quantization)
    ids = tiny.batches(TOKENIZER)[0]["input_ids"]
    delta = torch.zeros(64, 64)
    delta[3, ::5] = 0.5
    dense, _ = load(checkpoints["llama"], device="cpu")
    for name, layer in target_weights(model, tiny.TARGETS).items():
        dense.get_submodule(name.removesuffix(".weight")).weight.data = effective_weight(
            layer
        ).cpu()
    with torch.no_grad():
        before = model(ids.to(device)).logits
        assert relative(before, dense(ids).logits) < 1e-4
        with patched(model, {Q_PROJ: delta}):
            during = model(ids.to(device)).logits
        weight = dense.get_submodule(Q_PROJ.removesuffix(".weight")).weight
        weight.data = add_delta(weight.data, delta)
        assert relative(during, dense(ids).logits) < 1e-4
        assert not torch.equal(during, before)
        assert torch.equal(model(ids.to(device)).logits, before)


@on_devices
def test_answers_in_a_batch_are_those_one_by_one_and_those_of_the_cpu(device, checkpoints):
    """Greedy, in fp32, where no two tokens of the random model are near each other."""
    prompts = [x for x, _ in tiny.PAIRS]
    found = {}
    for place in dict.fromkeys(("cpu", device)):
        model = on(place, checkpoints)
        for batch in (1, 3):
            how = {"max_new_tokens": 6, "batch_size": batch}
            found[place, batch] = generate(model, TOKENIZER, prompts, **how)
    first = found["cpu", 1]
    assert any(first) and all(answers == first for answers in found.values())


# ---- what only a GPU has -------------------------------------------------------------------------


@cuda
def test_auto_is_the_gpu_and_what_it_computes_in_natively(checkpoints):
    assert resolve_device("auto") == "cuda"
    native = torch.cuda.get_device_capability(0) >= (8, 0)
    assert resolve_dtype("auto", "cuda") == ("bfloat16" if native else "float16")
    model, _ = load(checkpoints["llama"], dtype="auto", device="auto")
    assert all(weight.device.type == "cuda" for weight in model.parameters())
    assert model.dtype == (torch.bfloat16 if native else torch.float16)


@cuda
def test_free_memory_falls_by_what_is_taken_and_the_peak_is_told():
    torch.cuda.empty_cache()
    before = machine.free_memory("cuda")
    taken = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    # other processes may share the GPU, so not to the byte
    assert 0.9 * 2**28 < before - machine.free_memory("cuda") < 4 * 2**28
    assert machine.peak_memory_mib()["gpu"] >= 256
    del taken
    assert machine.hardware()["gpu"]
