"""The two losses by hand, the stop rule, what a derivation leaves behind, and the patch file."""

import copy
import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from spkit.config import AscentConfig, DerivationConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair, fingerprint
from spkit.method import training
from spkit.method.derivation import ascent_loss, derive, descent_loss
from spkit.method.patch import Factors
from spkit.method.training import TrainingSet, attach
from spkit.models.chat import encode_pair
from spkit.models.loading import load
from spkit.models.weights import target_weights

PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
TOKENIZER = tiny.tokenizer()
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
# a window of one batch: the rule is then about one loss, which a test can read off the curve
WINDOW = {"stop_window": 1} if "stop_window" in AscentConfig.model_fields else {}
directions = pytest.mark.parametrize("direction", ["ascent", "descent"])


def settings(targets=tiny.TARGETS, dropout=0.0, quantization="none", **both):
    """Parameters with which a tiny random model moves in few steps, and no clamp in the way."""
    shared = dict(learning_rate=1e-2, max_steps=3, batch_size=3, warmup_steps=0, max_grad_norm=1.0)
    shared |= both
    held = dict(token_loss_clamp=100.0, stop_mean_loss=99.0) | WINDOW
    ascent = held | shared
    descent = {key: value for key, value in shared.items() if key not in held}
    return DerivationConfig(
        quantization=quantization,
        lora=dict(r=4, alpha=8.0, dropout=dropout, targets=targets),
        ascent=ascent,
        descent=descent,
    )


def run(model, direction="ascent", seed=0, pairs=PAIRS, **options):
    return derive(model, TrainingSet.of(TOKENIZER, pairs), direction, settings(**options), seed)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[2, 4, 9, 10, 5]])).logits


def anatomy(model):
    """All that could change: names, classes, bits of every tensor, and the mode."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return [(n, type(m).__name__, m.training) for n, m in model.named_modules()], tensors


def assert_same(model, before):
    modules, tensors = anatomy(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, value in tensors.items():
        assert torch.equal(value, before[1][name]), name


# ---- the losses


def test_losses_by_hand():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # the samples' means are 1.5 and 4; over all tokens together it would be 7/3
    assert descent_loss(losses, mask).item() == 2.75
    # the 4 is clamped at 3: minus the mean of 1.5 and 3
    assert ascent_loss(losses, mask, 3.0).item() == -2.25
    assert ascent_loss(losses, mask, 100.0).item() == -2.75


def test_a_token_above_the_clamp_has_no_gradient():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ascent_loss(losses, mask, 3.0).backward()
    assert losses.grad.tolist() == [[-0.25, -0.25, 0.0], [0.0, 0.0, 0.0]]


@directions
def test_the_curve_starts_at_the_loss_that_transformers_computes(direction):
    model = tiny.model("llama")
    expected = []
    for pair in PAIRS:  # one by one, so that nothing is padded
        ids, labels = encode_pair(TOKENIZER, pair.prompt, pair.response)
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        expected.append(out.loss.item())
    _, curve = run(model, direction, token_loss_clamp=2.0, stop_mean_loss=0.1)
    # unclamped, although the clamp lies below: the curve shows the loss itself
    assert curve["loss"][0] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert curve["loss"][0] > 2.0


# ---- steps and stops


def test_it_stops_where_the_mean_loss_reaches_the_ceiling_before_the_step():
    model = tiny.model("llama")
    _, free = run(model, max_steps=5)
    losses = free["loss"].tolist()
    assert losses == sorted(losses) and len(losses) == 6
    patch, curve = run(model, max_steps=5, stop_mean_loss=losses[3])  # reached, not exceeded
    assert curve["loss"].tolist() == losses[:4]
    assert curve["stop"].tolist() == ["", "", "", "mean loss reached"]
    assert curve["grad_norm"].tolist()[3] == 0.0 and (curve["grad_norm"][:3] > 0).all()
    assert (patch.manifest["steps"], patch.manifest["stop"]) == (3, "mean loss reached")
    three, _ = run(model, max_steps=3)
    assert all(torch.equal(patch.delta(t), three.delta(t)) for t in patch.factors)
    _, later = run(model, max_steps=5, stop_mean_loss=losses[3] + 1e-4)
    assert later["step"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not WINDOW, reason="the mean loss is that of one batch")
def test_the_ceiling_is_for_the_mean_of_the_last_batches():
    model = tiny.model("llama")
    losses = run(model, max_steps=5)[1]["loss"].tolist()
    ceiling = (losses[2] + losses[3]) / 2
    _, curve = run(model, max_steps=5, stop_mean_loss=ceiling - 1e-4, stop_window=2)
    assert curve["step"].tolist() == [0, 1, 2, 3]  # one batch would do at step 3 at the latest
    _, curve = run(model, max_steps=5, stop_mean_loss=ceiling + 1e-4, stop_window=2)
    assert curve["step"].tolist() == [0, 1, 2, 3, 4]
    _, curve = run(model, max_steps=5, stop_mean_loss=losses[0] - 0.1, stop_window=2)
    assert curve["step"].tolist() == [0, 1]  # at step 0 there is but one batch


def test_a_ceiling_that_is_already_reached_gives_an_empty_patch():
    patch, curve = run(tiny.model("llama"), stop_mean_loss=0.5)
    assert curve["step"].tolist() == [0]
    assert patch.norm() == 0.0


@directions
def test_the_step_limit_and_what_is_written_of_it(direction):
    patch, curve = run(tiny.model("llama"), direction, max_steps=2, seed=7)
    name = {"ascent": "se", "descent": "osm"}[direction]
    assert list(curve.columns) == ["patch", "step", "loss", "grad_norm", "stop"]
    assert curve["patch"].tolist() == [name] * 3
    assert curve["step"].tolist() == [0, 1, 2]  # two steps, and the loss after them
    assert curve["stop"].tolist() == ["", "", "step limit"]
    manifest = dict(patch.manifest)
    config = settings(max_steps=2)
    assert patch.name == name
    assert manifest.pop("settings") == getattr(config, direction).model_dump()
    assert manifest.pop("lora") == config.lora.model_dump()
    assert manifest == {
        "direction": direction,
        "steps": 2,
        "stop": "step limit",
        "seed": 7,
        "pairs": 3,
        "data_fingerprint": fingerprint(PAIRS),
        "quantization": "none",
    }


def test_descent_knows_no_ceiling():
    _, curve = run(tiny.model("llama"), "descent", stop_mean_loss=0.1, max_steps=2)
    assert curve["step"].tolist() == [0, 1, 2]


@directions
def test_the_steps_are_clipped_adamw_steps_with_clamp_and_warm_up(direction):
    """Against a loop without schedule, zero_grad, clip_grad_norm_ or the kit's losses."""
    rate, clip, clamp = 4e-3, 0.5, 6.0
    options = dict(warmup_steps=2, max_grad_norm=clip, learning_rate=rate, max_steps=4)
    patch, curve = run(
        tiny.model("llama"), direction, token_loss_clamp=clamp, stop_mean_loss=5.9, **options
    )
    assert len(curve) == 5 and curve["grad_norm"][0] > clip

    model = training.add_lora(tiny.model("llama"), settings().lora, seed=0)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    clamped = 0
    for step in range(4):
        total = 0.0
        for pair in PAIRS:
            ids, labels = (
                torch.tensor(x) for x in encode_pair(TOKENIZER, pair.prompt, pair.response)
            )
            chosen = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            losses = -chosen[torch.arange(len(ids) - 1), ids[1:]][labels[1:] != -100]
            clamped += int((losses > clamp).sum())
            if direction == "ascent":
                losses = -torch.where(losses > clamp, losses.detach(), losses)
            total = total + losses.mean() / len(PAIRS)
        gradients = torch.autograd.grad(total, weights)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert curve["grad_norm"][step] == pytest.approx(norm, rel=1e-3)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * min(1.0, clip / norm)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 2)  # transformers warms up from 0
        optimizer.step()
    assert clamped > 0
    for name, module in target_weights(model, tiny.TARGETS).items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        expected = 2 * (b @ a).detach()
        assert (patch.delta(name) - expected).norm() < 1e-2 * expected.norm(), name


def test_clipping_shrinks_a_step_below_the_epsilon_of_adamw():
    model = tiny.model("llama")
    free, curve = run(model)
    clipped, same = run(model, max_grad_norm=1e-12)
    assert clipped.norm() < 0.01 * free.norm()
    assert same["grad_norm"][0] == curve["grad_norm"][0]  # as it was before clipping


def test_every_epoch_holds_every_pair_once_in_a_new_order():
    encoded = [encode_pair(TOKENIZER, p.prompt, p.response) for p in PAIRS * 4]
    endless = training._endless(encoded, 4, seed=0)
    epochs = [[next(endless) for _ in range(3)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_ascent_raises_and_descent_lowers_the_loss(architecture, quantization, checkpoints):
    model, tokenizer = load(checkpoints[architecture], quantization=quantization)
    before, curves = anatomy(model), {}
    for direction in ("ascent", "descent"):
        config = settings(quantization=quantization)
        patch, curve = derive(model, TrainingSet.of(tokenizer, PAIRS), direction, config, 0)
        assert list(patch.factors) == list(target_weights(model, tiny.TARGETS))
        assert patch.norm() > 0.1
        assert patch.manifest["quantization"] == quantization
        assert_same(model, before)
        curves[direction] = curve["loss"]
    assert curves["ascent"][0] == curves["descent"][0]
    assert curves["ascent"][3] > curves["ascent"][0] + 0.5
    assert curves["descent"][3] < curves["descent"][0] - 0.5


# ---- what goes wrong


def test_no_pairs_and_no_such_direction():
    with pytest.raises(SpkitError, match=r"^D_h is empty"):
        run(tiny.model("llama"), pairs=[])
    with pytest.raises(SpkitError, match=r"^direction is 'sideways'; allowed are ascent, descent"):
        run(tiny.model("llama"), "sideways")
    with pytest.raises(SpkitError, match=r"'z_proj' is no linear layer"):
        run(tiny.model("llama"), targets=["q_proj", "z_proj"])


def test_a_broken_backbone_is_named_at_step_0_and_left_as_it_was():
    model = tiny.model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = math.nan
    modules, _ = anatomy(model)
    with pytest.raises(SpkitError, match=r"^The ascent loss is nan at step 0; lower"):
        run(model)
    assert anatomy(model)[0] == modules


def test_divergence_names_the_step_and_leaves_the_backbone_as_it_was():
    model = tiny.model("llama")
    before, config = anatomy(model), settings()
    config.descent.__dict__["learning_rate"] = 1e30  # the parameters' range forbids it
    with pytest.raises(SpkitError, match=r"^The descent loss is (nan|inf) at step 1; lower"):
        derive(model, TrainingSet.of(TOKENIZER, PAIRS), "descent", config, 0)
    assert_same(model, before)


def test_a_gradient_that_is_no_number(monkeypatch):
    inf = lambda *_: torch.tensor(math.inf)  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", inf)
    with pytest.raises(SpkitError, match=r"^The ascent gradient is inf at step 0; lower"):
        run(tiny.model("llama"))


# ---- the patch


@pytest.fixture(scope="module")
def derived():
    """(backbone, patch, a copy of the model that was trained, before it was unwrapped)."""
    model, kept = tiny.model("llama"), {}
    own = training._factors

    def spy(wrapped, targets):
        kept["trained"] = copy.deepcopy(wrapped).eval()
        return own(wrapped, targets)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(training, "_factors", spy)
        patch, _ = run(model)
    return model, patch, kept["trained"]


def test_the_patch_is_what_peft_merges(derived):
    model, patch, trained = derived
    merged = copy.deepcopy(trained).merge_and_unload().state_dict()
    moved = 0
    for name, original in model.state_dict().items():
        if name in patch.factors:
            delta = merged[name] - original
            assert torch.allclose(patch.delta(name), delta, rtol=0, atol=1e-6)
            moved += delta.norm().item() > 0.01
        else:
            assert torch.equal(merged[name], original)
    assert moved == len(patch.factors) == 14
    assert patch.delta(Q_PROJ).dtype == torch.float32


def test_attach_gives_the_trained_model_and_unload_the_backbone(derived):
    model, patch, trained = derived
    before, plain = anatomy(model), logits(model)
    again = attach(model, patch)
    assert not any(module.training for module in again.modules())
    assert torch.equal(logits(again), logits(trained))
    assert not torch.allclose(logits(again), plain, atol=0.01)
    again.unload()
    assert_same(model, before)


def test_a_trained_dropout_is_off_after_attaching():
    model = tiny.model("llama")
    patch, _ = run(model, dropout=0.5)
    wrapped = attach(model, patch)
    assert patch.manifest["lora"]["dropout"] == 0.5
    assert not [m for m in wrapped.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]


def test_attach_names_what_does_not_fit(derived):
    model, patch, _ = derived
    deeper = tiny.model("llama", layers=3)
    before = anatomy(deeper)
    with pytest.raises(SpkitError, match=r"the patch has no 'model\.layers\.2\.self_attn\.q_proj"):
        attach(deeper, patch)
    with pytest.raises(SpkitError, match=r"backbone has no 'model\.layers\.1\.self_attn\.q_proj"):
        attach(tiny.model("llama", layers=1), patch)
    a, b = patch.factors[Q_PROJ]
    for factors in [(a[:, :-1], b), (a, b[:-1])]:
        bad = Factors("se", {**patch.factors, Q_PROJ: factors}, 2.0, patch.manifest)
        with pytest.raises(SpkitError, match=r"'se' does not fit 'model\.layers\.0.*takes \[4, 64"):
            attach(model, bad)
    assert_same(deeper, before)
    assert not [n for n, _ in model.named_modules() if "lora" in n]


def test_delta_and_norm_by_hand():
    a = torch.tensor([[1.0, 2.0, 0.0]])
    b = torch.tensor([[3.0], [-1.0]])
    patch = Factors("se", {"w": (a, b), "v": (torch.ones(1, 1), torch.ones(1, 1))}, 2.0)
    assert patch.delta("w").tolist() == [[6.0, 12.0, 0.0], [-2.0, -4.0, 0.0]]
    assert patch.norm() == math.sqrt(36 + 144 + 4 + 16 + 4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_same_seed_gives_the_same_bytes(quantization, checkpoints, tmp_path):
    model, _ = load(checkpoints["llama"], quantization=quantization)
    written = []
    for number, seed in enumerate([0, 0, 1]):
        patch, _ = run(model, seed=seed, dropout=0.1, quantization=quantization, batch_size=2)
        patch.save(tmp_path / f"{number}.safetensors")
        written.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]
    a, b = (load_file(tmp_path / f"{n}.safetensors")[f"{Q_PROJ}.lora_A"] for n in (0, 2))
    assert not torch.equal(a, b)  # not the manifest alone


def test_saved_and_loaded(derived, tmp_path):
    _, patch, _ = derived
    path = tmp_path / "run" / "se.safetensors"
    patch.save(path)
    read = Factors.load(path)
    assert (read.name, read.scaling, read.manifest) == ("se", 2.0, patch.manifest)
    assert read.factors.keys() == patch.factors.keys()
    for name, pair in patch.factors.items():
        for own, other in zip(pair, read.factors[name], strict=True):
            assert torch.equal(own, other) and other.dtype == torch.float32
    assert [p.name for p in path.parent.iterdir()] == ["se.safetensors"]


def write(path, tensors, header):
    save_file(tensors, path, metadata=header)
    return path


def test_broken_files_end_in_one_sentence(derived, tmp_path):
    _, patch, _ = derived
    whole = tmp_path / "se.safetensors"
    patch.save(whole)
    tensors = load_file(whole)
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[:-100])
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"this is no patch at all")
    good = {"format": 1, "name": "se", "scaling": 2.0}
    lacking = {key: value for key, value in tensors.items() if key != f"{Q_PROJ}.lora_B"}
    cases = {
        half: "cannot be read as a patch",
        junk: "cannot be read as a patch",
        tmp_path / "none.safetensors": "cannot be read as a patch",
        write(tmp_path / "plain.safetensors", tensors, None): "has patch format None",
        write(tmp_path / "list.safetensors", tensors, {"spkit": "[1]"}): "has patch format None",
        write(tmp_path / "text.safetensors", tensors, {"spkit": "{"}): "cannot be read as a patch",
        write(
            tmp_path / "other.safetensors", tensors, {"spkit": json.dumps({**good, "format": 2})}
        ): "has patch format 2, this kit reads 1",
        write(
            tmp_path / "lacking.safetensors", lacking, {"spkit": json.dumps(good)}
        ): f"lacks '{Q_PROJ}.lora_B'",
        write(
            tmp_path / "nameless.safetensors", tensors, {"spkit": '{"format": 1}'}
        ): "lacks 'name'",
    }
    for path, message in cases.items():
        with pytest.raises(SpkitError) as caught:
            Factors.load(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_to(derived, tmp_path):
    _, patch, _ = derived
    (tmp_path / "file").write_text("")
    with pytest.raises(SpkitError, match="cannot write"):
        patch.save(tmp_path / "file" / "se.safetensors")
