"""A derivation that was cut goes on to the same bits; micro batches; what fp16 needs."""

import json
import math

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spkit.comparison.methods import npo
from spkit.comparison.methods.npo import derive_npo
from spkit.config import Config, DerivationConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method import derivation, training
from spkit.method.derivation import derive
from spkit.method.training import OVERFLOWS_IN_A_ROW, Checkpoints, TrainingSet
from spkit.system import resume

PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
TOKENIZER = tiny.tokenizer()
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
DTYPES = ("float32", "bfloat16", "float16")
directions = pytest.mark.parametrize("direction", ["ascent", "descent"])


def settings(dropout=0.1, optimizer="adamw", r=4, checkpoint_steps=2, targets=None, **more):
    """Five steps in epochs of two batches; a checkpoint after the 2nd, the 4th and the last."""
    shared = dict(learning_rate=1e-2, max_steps=5, batch_size=2, warmup_steps=3, max_grad_norm=1.0)
    shared |= {key: more.pop(key) for key in list(shared) if key in more}
    shared["warmup_steps"] = min(shared["warmup_steps"], shared["max_steps"] - 1)
    held = dict(token_loss_clamp=100.0, stop_mean_loss=99.0, stop_window=1)
    held |= {key: more.pop(key) for key in list(held) if key in more}
    return DerivationConfig(
        quantization="none",
        optimizer=optimizer,
        checkpoint_steps=checkpoint_steps,
        lora=dict(r=r, alpha=2.0 * r, dropout=dropout, targets=targets or tiny.TARGETS),
        ascent=shared | held,
        descent=shared,
        **more,
    )


def backbone(dtype="float32"):
    return tiny.model("llama").to(getattr(torch, dtype))


def run(model, direction="descent", folder=None, saved=None, seed=0, pairs=PAIRS, **options):
    data = TrainingSet.of(TOKENIZER, pairs)
    return derive(model, data, direction, settings(**options), seed, checkpoints(folder, saved))


def checkpoints(folder, saved):
    if folder is None:
        return None
    return Checkpoints(folder) if saved is None else Checkpoints(folder, saved)


class Cut:
    """Kills the run after its n-th checkpoint."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


def cut(at, *arguments, **options):
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, saved=Cut(at), **options)


def same(one, other):
    """The same factors bit for bit, the same manifest and the same curve."""
    (patch, curve), (expected, whole) = one, other
    assert patch.factors.keys() == expected.factors.keys()
    for name, pair in patch.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, expected.factors[name], strict=True))
    assert patch.manifest == expected.manifest
    assert list(curve.columns) == list(whole.columns)
    assert curve.equals(whole) and (curve.dtypes == whole.dtypes).all()


def bare(model):
    return not [name for name, _ in model.named_modules() if "lora" in name]


def state(folder):
    return json.loads((folder / resume.STATE).read_text())["state"]


# ---- cut and resumed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cut_derivation_goes_on_to_the_same_bits(optimizer, dtype, tmp_path):
    """Rank 64: bitsandbytes keeps the moments of fewer than 4096 numbers in 32 bit."""
    options = dict(optimizer=optimizer, r=64, targets=["q_proj", "down_proj"])
    whole = run(backbone(dtype), folder=tmp_path / "whole", **options)
    assert len(whole[1]) == 6 and whole[0].norm() > 0.01
    same(run(backbone(dtype), **options), whole)  # a checkpoint changes nothing
    for at, step in ((1, 2), (2, 4)):
        folder, model = tmp_path / str(at), backbone(dtype)
        cut(at, model, folder=folder, **options)
        assert bare(model) and state(folder)["counts"][0] == step
        torch.rand(7)  # whatever else happens to the random state
        same(run(backbone(dtype), folder=folder, **options), whole)
        files = [load_file(place / resume.TENSORS) for place in (folder, tmp_path / "whole")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
        assert state(folder) == state(tmp_path / "whole")
    moments = [v for k, v in files[0].items() if "moments/" in k and k.endswith(("state1", "avg"))]
    assert len(moments) == 8  # two factors each of four matrices
    expected = torch.float32 if optimizer == "adamw" else torch.uint8
    assert {moment.dtype for moment in moments} == {expected}


@directions
def test_cut_again_and_again(direction, tmp_path):
    options = dict(direction=direction, checkpoint_steps=1, micro_batch_size=1)
    whole = run(backbone(), **options)
    for _ in range(5):  # each run makes one step
        cut(1, backbone(), folder=tmp_path / "checkpoint", **options)
    same(run(backbone(), folder=tmp_path / "checkpoint", **options), whole)
    assert bool(whole[1]["grad_norm"].iloc[0] > 0)


def test_the_random_state_is_part_of_it(tmp_path):
    """Without it the dropout of the later steps would be another one."""
    whole = run(backbone())
    cut(1, backbone(), folder=tmp_path / "c")
    found = load_file(tmp_path / "c" / resume.TENSORS)
    found["/random/cpu"] = torch.manual_seed(12345).get_state()
    save_file(found, tmp_path / "c" / resume.TENSORS)
    patch, curve = run(backbone(), folder=tmp_path / "c")
    assert curve["loss"].tolist()[:2] == whole[1]["loss"].tolist()[:2]
    assert curve["loss"].tolist()[2] != whole[1]["loss"].tolist()[2]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"pairs": PAIRS[:2]},
        {"pairs": PAIRS[::-1]},
        {"learning_rate": 2e-2},
        {"max_steps": 3},
        {"batch_size": 1},
        {"warmup_steps": 0},
        {"dropout": 0.2},
        {"r": 2},
        {"targets": ["q_proj"]},
        {"optimizer": "adamw_8bit"},
        {"micro_batch_size": 1},
        {"direction": "ascent"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_trainings_checkpoint_is_ignored(change, tmp_path):
    folder = tmp_path / "c"
    run(backbone(), folder=folder)
    same(run(backbone(), folder=folder, **change), run(backbone(), **change))
    # and the checkpoint is now this one's
    assert state(folder)["reason"] == "step limit"
    made = []
    run(backbone(), folder=folder, saved=lambda: made.append(1), **change)
    assert made == []


def test_another_dtype_limit_or_system_prompt(tmp_path):
    folder, tokens, config = tmp_path / "c", tiny.tokenizer(), settings()

    def steps(dtype="float32", max_tokens=None):
        made = []
        data = TrainingSet.of(tokens, PAIRS, max_tokens)
        where = Checkpoints(folder, saved=lambda: made.append(1))
        derive(backbone(dtype), data, "descent", config, 0, where)
        return len(made)

    assert [steps(), steps()] == [3, 0]
    assert [steps("bfloat16"), steps("bfloat16")] == [3, 0]
    assert [steps("bfloat16", max_tokens=11), steps("bfloat16", max_tokens=11)] == [3, 0]
    tokens.system_prompt = "sorry no"
    assert [steps("bfloat16"), steps("bfloat16")] == [3, 0]


def test_how_often_is_no_setting(tmp_path):
    whole = run(backbone())
    cut(1, backbone(), folder=tmp_path / "c", checkpoint_steps=3)
    same(run(backbone(), folder=tmp_path / "c", checkpoint_steps=1), whole)


def test_a_finished_training_makes_no_step(tmp_path, monkeypatch):
    whole = run(backbone(), folder=tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    never = lambda *_, **__: pytest.fail("a step was made")  # noqa: E731
    monkeypatch.setattr(training, "answer_loss", never)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    model = backbone()
    model.model.embed_tokens.register_forward_hook(never)
    same(run(model, folder=tmp_path / "c", saved=never), whole)
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before


def test_a_training_that_stopped_by_itself_is_finished(tmp_path):
    options = dict(direction="ascent", stop_mean_loss=0.5)
    whole = run(backbone(), folder=tmp_path / "c", **options)
    assert whole[1]["stop"].tolist() == ["mean loss reached"]
    same(run(backbone(), folder=tmp_path / "c", saved=Cut(1), **options), whole)


def test_when_it_is_written(tmp_path):
    made = []

    def saved():
        made.append(state(tmp_path / "c")["counts"][0])

    run(backbone(), folder=tmp_path / "c", saved=saved, checkpoint_steps=2)
    assert made == [2, 4, 5]
    made.clear()
    run(backbone(), folder=tmp_path / "c", saved=saved, checkpoint_steps=5, seed=1)
    assert made == [5, 5]  # with the fifth step, and with the reason to end
    made.clear()
    run(backbone(), folder=tmp_path / "none", saved=saved, checkpoint_steps=None)
    assert made == [] and not (tmp_path / "none").exists()


def test_no_pickle(tmp_path):
    cut(1, backbone(), folder=tmp_path / "c", optimizer="adamw_8bit", r=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [resume.STATE, resume.TENSORS]
    with safe_open(tmp_path / "c" / resume.TENSORS, framework="pt") as file:
        assert len(list(file.keys())) > 28
    json.loads((tmp_path / "c" / resume.STATE).read_text())


def lose(key):
    def damage(folder):
        found = load_file(folder / resume.TENSORS)
        found.pop(next(name for name in found if key in name))
        save_file(found, folder / resume.TENSORS)

    return damage


def text(content):
    return lambda folder: (folder / resume.STATE).write_text(content)


def halve(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


DAMAGES = {
    "half of the state": halve(resume.STATE),
    "half of the tensors": halve(resume.TENSORS),
    "no tensors": lambda folder: (folder / resume.TENSORS).unlink(),
    "a weight lost": lose("/weights/3"),
    "a moment lost": lose("/moments/3"),
    "empty": text(""),
    "a list": text("[]"),
    "null": text("null"),
    "no identity": text("{}"),
    "a number": text("3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_backbone_left_alone(damage, tmp_path):
    folder, model = tmp_path / "c", backbone()
    cut(1, model, folder=folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    DAMAGES[damage](folder)
    with pytest.raises(SpkitError, match="is a damaged checkpoint .*; delete it") as caught:
        run(model, folder=folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    assert bare(model) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- the two files


def test_state_comes_back_as_it_was(tmp_path):
    values = {
        "a": {"x": torch.rand(3, 2), "deep": {"b": torch.arange(3, dtype=torch.uint8)}},
        "scalar": torch.tensor(2.5),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "turned": torch.rand(3, 4).T,
        "rows": [{"step": 0, "loss": 0.1 + 0.2, "stop": ""}, {"step": 1, "loss": math.inf}],
        "number": 1e-300,
        "none": None,
        "flag": True,
    }
    resume.save(tmp_path / "c", {"of": (1, 2)}, values)
    found = resume.load(tmp_path / "c", {"of": [1, 2]})
    assert list(found) == list(values)
    for name in ("scalar", "half", "turned"):
        assert torch.equal(found[name], values[name]) and found[name].dtype == values[name].dtype
    assert torch.equal(found["a"]["x"], values["a"]["x"])
    assert found["a"]["deep"]["b"].tolist() == [0, 1, 2]
    assert [found[k] for k in ("rows", "number", "none", "flag")] == [
        *(values[k] for k in ("rows", "number", "none", "flag")),
    ]
    assert list(found["rows"][0]) == ["step", "loss", "stop"]


def test_shared_tensors_and_later_changes(tmp_path):
    shared = torch.zeros(2)
    resume.save(tmp_path / "c", {}, {"a": shared, "b": shared, "part": shared[:1]})
    shared.fill_(1)
    found = resume.load(tmp_path / "c", {})
    assert [found[key].tolist() for key in ("a", "b", "part")] == [[0, 0], [0, 0], [0]]


def test_nothing_there_or_another_identity(tmp_path):
    assert resume.load(tmp_path / "c", {"a": 1}) is None
    resume.save(tmp_path / "c", {"a": 1}, {"x": 1})
    assert resume.load(tmp_path / "c", {"a": 2}) is None
    assert resume.load(tmp_path / "c", {"a": 1, "b": None}) is None
    assert resume.load(tmp_path / "c", {"a": 1}) == {"x": 1}


def test_an_interrupted_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    resume.save(tmp_path / "c", {}, {"x": torch.zeros(1)})

    def full(tensors, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(SpkitError, match="the disk is full"):
        resume.save(tmp_path / "c", {}, {"x": torch.ones(1)})
    assert resume.load(tmp_path / "c", {})["x"].tolist() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# ---- micro batches and gradient checkpointing


@pytest.fixture
def gradients(monkeypatch):
    """The whole gradient of every step, before it is clipped."""
    seen, own = [], torch.nn.utils.clip_grad_norm_

    def spy(weights, norm):
        seen.append(torch.cat([weight.grad.flatten().double() for weight in weights]))
        return own(weights, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return seen


def npo_run(size):
    shared = dict(learning_rate=1e-3, max_steps=3, batch_size=3, warmup_steps=0)
    config = Config(
        derivation=dict(
            quantization="none", lora=dict(r=4, alpha=8.0), micro_batch_size=size, descent=shared
        ),
        baselines={"npo": shared | {"beta": 0.5}},
    )
    return derive_npo(backbone(), TOKENIZER, PAIRS, config, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("direction", ["ascent", "descent", "npo"])
def test_a_micro_batch_gives_the_gradient_of_the_whole(direction, size, gradients):
    """fp32, per number some hundred roundings of 2**-24: about 1e-5 of the gradient's norm.

    The first steps have the same weights. Adam divides by the gradient, so numbers of the size of
    the rounding may go either way, and later steps are compared more loosely. A size of 2 divides
    three pairs unevenly: with equal shares the gradient would be off by a third of its norm.
    """

    def derived(micro):
        gradients.clear()
        if direction == "npo":
            patch, curve = npo_run(micro)
        else:
            patch, curve = run(
                backbone(),
                direction,
                dropout=0.0,
                batch_size=3,
                learning_rate=1e-3,
                max_steps=3,
                warmup_steps=0,
                token_loss_clamp=5.0,  # some tokens lie above
                stop_mean_loss=4.9,
                micro_batch_size=micro,
            )
        return patch, curve, list(gradients)

    patch, curve, found = derived(size)
    expected, whole, wanted = derived(None)
    assert len(found) == len(wanted) == 3
    for step, (gradient, other) in enumerate(zip(found, wanted, strict=True)):
        tolerance = 1e-5 if step == 0 else 1e-3
        assert (gradient - other).norm() < tolerance * other.norm()
    assert torch.equal(found[0], wanted[0]) is (size >= 3)
    for name in patch.factors:
        one, other = patch.delta(name), expected.delta(name)
        assert (one - other).norm() < 1e-2 * other.norm() and other.norm() > 0
    assert curve["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=1e-4)
    assert curve["step"].tolist() == [0, 1, 2, 3]


def test_so_many_pairs_are_in_memory_at_once(monkeypatch):
    widths, own = [], training.collate

    def spy(pairs, pad):
        widths.append(len(pairs))
        return own(pairs, pad)

    monkeypatch.setattr(training, "collate", spy)
    run(backbone(), batch_size=3, micro_batch_size=2, max_steps=1)
    assert widths == [2, 1, 2, 1]
    widths.clear()
    measured, own_npo = [], npo.collate
    monkeypatch.setattr(
        npo, "collate", lambda p, pad: (measured.append(len(p)), own_npo(p, pad))[1]
    )
    npo_run(1)
    assert set(widths) == set(measured) == {1}


def test_the_stop_rule_counts_whole_batches():
    options = dict(direction="ascent", dropout=0.0, batch_size=3, warmup_steps=0, max_steps=5)
    free = run(backbone(), micro_batch_size=1, **options)[1]["loss"].tolist()
    assert free == sorted(free) and len(free) == 6
    for window, ceiling, last in ((1, free[3], 3), (2, (free[2] + free[3]) / 2, 3)):
        options |= dict(stop_mean_loss=ceiling - 1e-4, stop_window=window)
        one, whole = (run(backbone(), micro_batch_size=m, **options)[1] for m in (1, None))
        assert one["step"].tolist() == whole["step"].tolist() == list(range(last + 1))
        assert one["stop"].tolist() == whole["stop"].tolist()
        assert one["stop"].iloc[-1] == "mean loss reached"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_memory_only(dtype):
    """The same bits, dropout included, from activations that are computed twice."""
    forwards = []

    def derived(on):
        model = backbone(dtype)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(on))
        made = run(model, max_steps=2, gradient_checkpointing=on)
        assert not model.is_gradient_checkpointing and not model.training and bare(model)
        return made

    (patch, curve), (expected, whole) = derived(True), derived(False)
    for name, pair in patch.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, expected.factors[name], strict=True))
    assert curve.equals(whole)
    # three losses, and each backward pass computes the layer again (also that of the last loss)
    assert (forwards.count(False), forwards.count(True)) == (3, 6)


# ---- fp16


def overflowing(monkeypatch, steps):
    """The objective's gradient is too large for a float at these calls."""
    calls, own = [], derivation.descent_loss

    def loss(losses, mask):
        calls.append(None)
        return own(losses, mask) * (1e38 if len(calls) - 1 in steps else 1.0)

    monkeypatch.setattr(derivation, "descent_loss", loss)


def test_a_step_that_overflows_is_left_out(monkeypatch, tmp_path):
    options = dict(dropout=0.0, batch_size=3, warmup_steps=0, learning_rate=1e-3)
    one, _ = run(backbone("float16"), max_steps=1, **options)
    assert one.manifest["overflows"] == 0 and one.norm() > 0
    with monkeypatch.context() as patcher:
        overflowing(patcher, {1})
        two, curve = run(backbone("float16"), max_steps=2, folder=tmp_path / "c", **options)
    assert two.manifest["overflows"] == 1 and two.manifest["steps"] == 2
    assert all(torch.equal(one.delta(name), two.delta(name)) for name in one.factors)
    assert not math.isfinite(curve["grad_norm"][1]) and math.isfinite(curve["grad_norm"][0])
    assert curve["loss"][1] == curve["loss"][2] != curve["loss"][0]
    assert state(tmp_path / "c")["scaler"]["scale"] == 65536 / 2
    with monkeypatch.context() as patcher:
        overflowing(patcher, {0})
        none, _ = run(backbone("float16"), max_steps=1, **options)
    assert none.norm() == 0.0


def test_the_scale_survives_a_cut(monkeypatch, tmp_path):
    options = dict(dropout=0.1, warmup_steps=0)
    with monkeypatch.context() as patcher:
        overflowing(patcher, {1})
        whole = run(backbone("float16"), folder=tmp_path / "whole", **options)
    with monkeypatch.context() as patcher:
        overflowing(patcher, {1})
        cut(1, backbone("float16"), folder=tmp_path / "c", **options)
    resumed = run(backbone("float16"), folder=tmp_path / "c", **options)
    assert resumed[0].manifest["overflows"] == 1
    same(resumed, whole)
    assert state(tmp_path / "c") == state(tmp_path / "whole")
    assert state(tmp_path / "c")["scaler"]["scale"] == 65536 / 2


def test_too_many_overflows_in_a_row(monkeypatch):
    options = dict(dropout=0.0, batch_size=3, max_steps=2 * OVERFLOWS_IN_A_ROW + 5)
    always = set(range(1000))
    with monkeypatch.context() as patcher:
        overflowing(patcher, always)
        model = backbone("float16")
        with pytest.raises(
            SpkitError, match=rf"gradient is (nan|inf) at step {OVERFLOWS_IN_A_ROW};"
        ):
            run(model, **options)
        assert bare(model)
    with monkeypatch.context() as patcher:  # as many, but with one good step in between
        overflowing(patcher, always - {OVERFLOWS_IN_A_ROW} - set(range(2 * OVERFLOWS_IN_A_ROW, 99)))
        patch, _ = run(backbone("float16"), **options)
    assert patch.manifest["overflows"] == 2 * OVERFLOWS_IN_A_ROW - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_have_no_scale(dtype, monkeypatch):
    overflowing(monkeypatch, {1})
    with pytest.raises(SpkitError, match=r"^The descent gradient is (nan|inf) at step 1; lower"):
        run(backbone(dtype), warmup_steps=0)
    monkeypatch.undo()
    patch, _ = run(backbone(dtype), max_steps=1)
    assert "overflows" not in patch.manifest
