"""Which devices there are, and what a model needs that lies on several. No GPU is needed here."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import cpu_offload, dispatch_model

from spkit.config import Config, DerivationConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method.derivation import derive
from spkit.method.snip import snip, snip_windows
from spkit.method.training import TrainingSet
from spkit.models.chat import answer_loss
from spkit.models.devices import devices_of, is_gpu, one_device
from spkit.models.loading import load, read_model, resolve_device, resolve_dtype
from spkit.models.patched import patched
from spkit.running.memory import available, predict
from spkit.running.shape import shape_of
from spkit.system import machine, resume

GIB = 2**30
TOKENIZER = tiny.tokenizer()
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, bf16): as if torch saw n GPUs, the last of them with or without bfloat16."""

    def there(count, bf16=True, mps=False):
        current = []

        class On:
            def __init__(self, device):
                self.number = device if isinstance(device, int) else device.index or 0

            def __enter__(self):
                current.append(self.number)

            def __exit__(self, *_):
                current.pop()

        def is_bf16_supported(including_emulation):
            return bf16 or current[-1] < count - 1

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "device", On)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return there


# ---- which there are -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, device, found",
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cuda:1", "cuda:1"),
        (2, "balanced", "balanced"),
        (0, "cuda", "torch sees no GPU"),
        (0, "balanced", "torch sees no GPU"),
        (0, "mps", "torch sees no Apple GPU"),
        (1, "cuda:1", "device is 'cuda:1', but torch sees cuda:0 alone"),
        (3, "cuda:10", "but torch sees cuda:0 to cuda:2"),
        (1, "cuda:x", "allowed are auto, cpu, cuda, cuda:N, mps, balanced"),
    ],
)
def test_a_device_is_there_or_what_is_there_is_told(count, device, found, gpus):
    gpus(count)
    if " " not in found:
        assert resolve_device(device) == found
        return
    with pytest.raises(SpkitError, match=found):
        resolve_device(device)


def test_what_a_device_computes_in(gpus, checkpoints):
    gpus(2, bf16=False, mps=True)
    assert resolve_dtype("auto", "cuda:0") == resolve_dtype("auto", "cuda") == "bfloat16"
    assert resolve_dtype("auto", "cuda:1") == "float16"
    assert resolve_dtype("auto", "balanced") == "float16"  # what all of them have
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_device("mps") == "mps" and resolve_dtype("auto", "mps") == "float16"
    with pytest.raises(SpkitError, match="'mps' takes float32 or float16 only"):
        resolve_dtype("bfloat16", "mps")
    with pytest.raises(SpkitError, match="'nf4', which cannot be computed on 'mps'"):
        load(checkpoints["llama"], quantization="nf4", device="mps")
    assert [is_gpu(d) for d in ("cuda:3", "balanced", "cpu", "mps")] == [True, True, False, False]
    assert (one_device("balanced"), one_device("cuda:1")) == ("cuda", "cuda:1")


@pytest.mark.parametrize("outside", [None, "cpu", "disk"])
def test_balanced_is_accelerate_s_map_and_nothing_may_be_offloaded(outside, checkpoints):
    asked = {}

    def from_pretrained(source, **options):
        asked.update(options)
        model = tiny.model("llama")
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": outside or 1}
        return model, {"missing_keys": []}

    auto = SimpleNamespace(from_pretrained=from_pretrained)
    how = dict(revision=None, dtype="float32", quantization="none", device="balanced")
    if outside:
        with pytest.raises(SpkitError, match="does not fit on the GPUs together: 'model.layers.1'"):
            read_model(auto, checkpoints["llama"], **how)
    else:
        read_model(auto, checkpoints["llama"], **how)
    assert asked["device_map"] == "balanced"
    read_model(auto, checkpoints["llama"], **{**how, "device": "cuda:1"})
    assert asked["device_map"] == {"": "cuda:1"}


# ---- a model that accelerate has dispatched ------------------------------------------------------


def dispatched(model=None):
    """Accelerate's hooks on every layer, as on several GPUs, but all of it on the CPU."""
    model = model or tiny.model("llama")
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places = dict.fromkeys((*parts, "model.rotary_emb"), "cpu")
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_patch_is_derived_on_a_dispatched_model_as_on_a_plain_one(quantization, checkpoints):
    steps = {"max_steps": 2, "batch_size": 3, "warmup_steps": 0, "learning_rate": 1e-2}
    both = {"ascent": steps, "descent": steps, "lora": {"r": 2, "targets": ["q_proj"]}}
    config = DerivationConfig(quantization=quantization, gradient_checkpointing=True, **both)
    pairs = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
    data, found, answers = TrainingSet.of(TOKENIZER, pairs), [], []
    for place in (lambda model: model, dispatched):
        model = place(load(checkpoints["llama"], quantization=quantization, device="cpu")[0])
        patch, _ = derive(model, data, "descent", config, 0)
        found.append(patch)
        with torch.no_grad(), patched(model, {DOWN: torch.full((64, 128), 0.1)}):
            answers.append(model(tiny.batches(TOKENIZER)[0]["input_ids"]).logits)
    assert found[0].norm() > 0 and torch.equal(*answers)
    assert all(torch.equal(found[0].delta(name), found[1].delta(name)) for name in found[0].factors)


def test_a_dispatched_model_is_scored_and_patched_as_a_plain_one():
    plain, model, batches = tiny.model("llama"), dispatched(), tiny.batches(TOKENIZER)
    assert hasattr(model.model.layers[0].self_attn.q_proj, "_hf_hook")
    expected = snip(plain, batches, tiny.TARGETS)
    windows = {}
    for window in snip_windows(model, batches, tiny.TARGETS, 1):
        windows |= window
    for found in (windows, snip(model, batches, tiny.TARGETS)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = batches[0]["input_ids"]
    delta = {DOWN: torch.full((64, 128), 0.1)}
    with torch.no_grad(), patched(plain, delta), patched(model, delta):
        after = plain(ids).logits
        assert torch.equal(after, model(ids).logits)
    with torch.no_grad():
        assert not torch.equal(after, plain(ids).logits)
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_offloaded_weights_are_refused_by_name():
    model = cpu_offload(tiny.model("llama"), "cpu")
    assert devices_of(model) == []
    delta, batches = {DOWN: torch.ones(64, 128)}, tiny.batches(TOKENIZER)
    for work in (lambda: snip(model, batches, tiny.TARGETS), patched(model, delta).__enter__):
        with pytest.raises(SpkitError, match="is not in memory but offloaded"):
            work()


def test_labels_follow_the_logits():
    """Logits may be on another device than the inputs; "meta" stands for it, and has no values."""
    losses, mask = answer_loss(torch.empty(2, 5, 9, device="meta"), torch.zeros(2, 5).long())
    assert losses.device.type == mask.device.type == "meta" and losses.shape == (2, 4)


# ---- memory and random states --------------------------------------------------------------------


def test_the_memory_of_one_gpu_and_of_all(gpus, monkeypatch):
    gpus(2)
    free = {"cuda:0": 3 * GIB, "cuda:1": 5 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 8 * GIB))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: GIB)
    assert machine.free_memory("cuda:1") == 5 * GIB and machine.free_memory("balanced") == 8 * GIB
    assert available("cuda:1")["GPU GiB"] == 5.5 and available("balanced")["GPU GiB"] == 8.5
    assert set(available("cpu")) == {"host GiB"}
    peaks = {0: 2 * GIB, 1: GIB}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.get)
    assert machine.peak_memory_mib()["gpu"] == 3072.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "T4")
    assert machine.hardware()["gpu"] == "2 x T4"


def test_every_gpu_is_predicted_alike():
    config = Config.from_sources({"backbone": {"compute_dtype": "auto"}})
    tables = [
        predict(config, shape_of(config), "derivation", device, GIB)
        for device in ("cuda", "cuda:1", "balanced")
    ]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert list(predict(config, shape_of(config), "derivation", "mps", GIB)) == ["host GiB"]


def test_random_states_of_every_gpu(gpus, monkeypatch):
    gpus(2)
    states, put = [torch.tensor([n], dtype=torch.uint8) for n in (7, 8)], {}
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, n: put.update({n: int(state)}))
    found = resume.random_states()
    assert set(found) == {"cpu", "cuda:0", "cuda:1"}
    resume.set_random_states(found)
    assert put == {0: 7, 1: 8}
    put.clear()
    gpus(1)  # the other one is gone
    resume.set_random_states(found)
    assert put == {0: 7}
