"""What goes into a training and what steers it: data, task, checkpoints, start, progress bar."""

import pytest
import tiny
import torch

from spkit.config import DerivationConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair, fingerprint
from spkit.method import training
from spkit.method.derivation import ceiling_reached, derive, descent_loss
from spkit.method.training import Checkpoints, Task, TrainingSet, lora_seed, train_lora
from spkit.models.chat import encode_pair

PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
TOKENIZER = tiny.tokenizer()
DATA = TrainingSet.of(TOKENIZER, PAIRS)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def settings(max_steps=3, stop_mean_loss=99.0, **more):
    shared = dict(learning_rate=1e-2, max_steps=max_steps, batch_size=3, warmup_steps=0)
    held = dict(token_loss_clamp=100.0, stop_mean_loss=stop_mean_loss, stop_window=1)
    lora = dict(r=4, alpha=8.0, targets=["q_proj", "down_proj"])
    return DerivationConfig(
        quantization="none", lora=lora, ascent=shared | held, descent=shared, **more
    )


def run(direction="descent", seed=0, checkpoints=None, **options):
    return derive(tiny.model("llama"), DATA, direction, settings(**options), seed, checkpoints)


def same(one, other):
    return one.factors.keys() == other.factors.keys() and all(
        torch.equal(x, y)
        for name in one.factors
        for x, y in zip(one.factors[name], other.factors[name], strict=True)
    )


# ---- D_h as the loop reads it


def test_a_training_set_is_the_encoded_pairs_and_their_fingerprint():
    data = TrainingSet.of(TOKENIZER, PAIRS, max_tokens=16)
    assert data.encoded == [
        encode_pair(TOKENIZER, p.prompt, p.response, max_tokens=16) for p in PAIRS
    ]
    assert (data.pad_id, data.max_tokens) == (TOKENIZER.pad_token_id, 16)
    assert data.fingerprint == fingerprint(PAIRS) == DATA.fingerprint  # of the text, not the tokens
    assert DATA.max_tokens is None and max(len(ids) for ids, _ in DATA.encoded) > 12
    cut = TrainingSet.of(TOKENIZER, PAIRS, max_tokens=12)
    assert max(len(ids) for ids, _ in cut.encoded) == 12


def test_an_empty_training_set():
    with pytest.raises(SpkitError, match=r"^D_h is empty; deriving a patch needs at least one"):
        TrainingSet.of(TOKENIZER, [])


def test_another_limit_on_tokens_is_another_training(tmp_path):
    """The curve and the checkpoint are of the tokens that were read."""
    made = []
    for data in (DATA, DATA, TrainingSet.of(TOKENIZER, PAIRS, max_tokens=12)):
        steps = []
        where = Checkpoints(tmp_path, lambda steps=steps: steps.append(1))
        config = settings(checkpoint_steps=1)
        _, curve = derive(tiny.model("llama"), data, "descent", config, 0, where)
        made.append((len(steps), curve["loss"].tolist()))
    assert [steps > 0 for steps, _ in made] == [True, False, True]
    assert made[0][1] == made[1][1] != made[2][1]


# ---- the task


def test_a_task_of_ones_own_trains_a_patch_of_its_name():
    """Its objective sees losses and mask of the pairs it is told, its stop the means so far."""
    seen, asked = [], []

    def objective(losses, mask, indices):
        assert losses.dtype == torch.float32 and mask.dtype == torch.bool
        assert losses.shape == mask.shape and len(losses) == len(indices)
        seen.append(sorted(indices))
        return 2.0 * descent_loss(losses, mask)

    def stop(means):
        asked.append(list(means))
        return len(means) == 3

    config = settings(max_steps=9)
    task = Task("mine", "walk", objective, config.descent, stop)
    patch, curve = train_lora(tiny.model("llama"), DATA, task, config, 0)
    assert patch.name == "mine" and patch.manifest["direction"] == "walk"
    assert curve["patch"].tolist() == ["mine"] * 3
    assert seen == [[0, 1, 2]] * 3
    assert asked == [curve["loss"].tolist()[:n] for n in (1, 2, 3)]
    assert patch.manifest["stop"] == "mean loss reached" and patch.manifest["steps"] == 2


def test_the_ceiling_by_hand():
    window = settings().ascent.model_copy(update={"stop_window": 2, "stop_mean_loss": 3.0})
    assert not ceiling_reached([5.9], window)  # batches before the first count as 0
    assert ceiling_reached([6.0], window)
    assert not ceiling_reached([99.0, 2.0, 3.9], window)
    assert ceiling_reached([0.0, 2.0, 4.0], window)


# ---- checkpoints


def test_without_checkpoints_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, _ = run(checkpoint_steps=1)
    assert list(tmp_path.iterdir()) == []
    kept, _ = run(checkpoint_steps=1, checkpoints=Checkpoints(tmp_path / "c"))
    assert same(kept, whole) and [path.name for path in tmp_path.iterdir()] == ["c"]


# ---- where the factors start


def start(patch_name, **options):
    """A of the first matrix before any step."""
    config = settings(**options)
    made = training.add_lora(
        tiny.model("llama"), config.lora, lora_seed(config, options.get("seed", 0), patch_name)
    )
    module = made.get_submodule("base_model.model." + Q_PROJ.removesuffix(".weight"))
    return module.lora_A["default"].weight.detach().clone()


def test_the_shared_start_is_the_runs_seed():
    shared, apart = settings(), settings(shared_init=False)
    assert DerivationConfig().shared_init is True
    assert [lora_seed(shared, seed, name) for seed in (0, 7) for name in ("se", "osm")] == [
        *(0, 0, 7, 7)
    ]
    drawn = [lora_seed(apart, seed, name) for seed in (0, 7) for name in ("se", "osm", "npo")]
    assert len(set(drawn)) == 6 and all(0 <= seed < 2**32 for seed in drawn)
    assert drawn == [lora_seed(apart, seed, n) for seed in (0, 7) for n in ("se", "osm", "npo")]


def test_se_and_osm_start_from_one_a_or_from_their_own():
    assert torch.equal(start("se"), start("osm"))
    assert not torch.equal(start("se", shared_init=False), start("osm", shared_init=False))
    assert not torch.equal(start("se", shared_init=False), start("se"))
    assert torch.equal(start("se", shared_init=False), start("se", shared_init=False))


def cosine(one, other):
    products = sum((one.delta(t).double() * other.delta(t).double()).sum() for t in one.factors)
    return float(products) / (one.norm() * other.norm())


def test_a_shared_start_makes_much_of_the_cosine():
    shared, apart = (
        cosine(run("ascent", shared_init=value)[0], run("descent", shared_init=value)[0])
        for value in (True, False)
    )
    assert shared < -0.5  # opposite gradients on the same A
    assert abs(apart) < abs(shared) / 2


def test_the_manifest_tells_of_a_start_of_its_own_only():
    """The default's manifest is that of every patch made before: its bytes must repeat."""
    shared, apart = run()[0], run(shared_init=False)[0]
    assert "shared_init" not in shared.manifest
    assert apart.manifest == shared.manifest | {"shared_init": False}
    assert not same(shared, apart)
    assert same(run(shared_init=True)[0], shared)


def test_another_start_does_not_resume(tmp_path):
    made = []
    where = Checkpoints(tmp_path, lambda: made.append(1))
    shared, _ = run(checkpoints=where, checkpoint_steps=1)
    written = len(made)
    apart, _ = run(checkpoints=where, checkpoint_steps=1, shared_init=False)
    assert len(made) == 2 * written > 0
    assert same(apart, run(shared_init=False)[0]) and not same(apart, shared)


# ---- the progress bar


class Bar:
    """What tqdm was told."""

    made = []

    def __init__(self, total, initial, desc, unit):
        self.total, self.n, self.desc, self.closed = total, initial, desc, False
        self.limit, self.text = total, ""
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def update(self):
        assert not self.closed
        self.n += 1

    def set_postfix(self, refresh=True, **values):
        self.text = str(values)

    def set_postfix_str(self, text):
        assert not self.closed  # a closed bar shows no text any more
        self.text = text


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    monkeypatch.setattr(training.progress, "_made", Bar)
    return Bar.made


def test_a_bar_that_ends_early_is_finished_and_says_why(bars):
    _, free = run("ascent", max_steps=5)
    _, curve = run("ascent", max_steps=5, stop_mean_loss=free["loss"][2])
    assert curve["step"].tolist() == [0, 1, 2]
    early = bars[1]
    assert (early.limit, early.total, early.n) == (5, 2, 2) and early.closed
    assert early.text == f"loss={curve['loss'][2]:.3f}, mean loss reached"


def test_a_bar_at_the_step_limit(bars):
    _, curve = run("descent", max_steps=3)
    (bar,) = bars
    assert (bar.desc, bar.limit, bar.total, bar.n) == ("descent", 3, 3, 3) and bar.closed
    assert bar.text == f"loss={curve['loss'][3]:.3f}, step limit"


def test_a_resumed_bar_begins_where_it_was(bars, tmp_path):
    run("descent", max_steps=3, checkpoints=Checkpoints(tmp_path), checkpoint_steps=1)
    run("descent", max_steps=3, checkpoints=Checkpoints(tmp_path), checkpoint_steps=1)
    assert [(bar.total, bar.n) for bar in bars] == [(3, 3), (3, 3)]
