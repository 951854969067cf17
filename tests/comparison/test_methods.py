"""Every baseline on a case worked out by hand, its interface, and the bundle they all work on."""

import ast
import copy
import math
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from spkit.comparison.methods import METHODS, Bundle, balanced, npo
from spkit.comparison.methods.balanced import balanced_deltas
from spkit.comparison.methods.bundle import load_bundle, make_bundle, save_bundle, with_backbone
from spkit.comparison.methods.npo import answer_nll, derive_npo, npo_loss
from spkit.config import Config, PatchingConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.method import importance
from spkit.method.balancing import HIGHEST, LOWEST, balance
from spkit.method.derivation import derive
from spkit.method.patch import Factors
from spkit.method.patching import retention_mask
from spkit.method.training import TrainingSet, add_lora
from spkit.models.chat import encode_pair
from spkit.models.patched import patched

PAIRS = [HarmfulPair(str(i), x, y, "boats") for i, (x, y) in enumerate(tiny.PAIRS)]
TOKENIZER = tiny.tokenizer()
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

STRENGTHS = {"beta": ("log", 0.05, 4.0), "alpha": ("ratio", "beta", 0.25, 8.0)}
STRENGTH = {"strength": ("log", 0.02, 2.0)}
TOP_SETS = {
    "retention_rate": ("choice", 0.3, 0.6, 0.9),
    "top_rate_se": ("log", 0.02, 0.8),
    "top_rate_osm": ("log", 0.02, 0.8),
    **STRENGTHS,
}
TARGET = {"target": ("log", 0.3, 4.0)}
SPACES = {
    "SafePatching": TOP_SETS,
    "SafePatching, balanced": {k: v for k, v in TOP_SETS.items() if k != "alpha"} | TARGET,
    "Joint top sets": TOP_SETS,
    "Task Arithmetic": STRENGTHS,
    "Task Arithmetic, balanced": {"beta": STRENGTHS["beta"], **TARGET},
    "TIES": {"density": ("log", 0.02, 1.0), **STRENGTHS},
    "DARE": {"keep_rate": ("choice", 0.1, 0.3, 0.6, 0.9), **STRENGTHS},
    "Weight averaging": {"weight": ("uniform", 0.0, 1.0)},
    "GA": STRENGTH,
    "NPO": STRENGTH,
}


def row_patch(name, **rows):
    """A patch whose delta of the tensor `v` is the 1 x n matrix rows["v"]."""
    factors = {t: (torch.tensor([values]) / 2, torch.ones(1, 1)) for t, values in rows.items()}
    return Factors(name, factors, 2.0)


def row_bundle(se, osm, scores=(), **patching):
    """One 1 x n matrix `w` for each patch, or {tensor: row} for several."""
    rows = [r if isinstance(r, dict) else {"w": r} for r in (se, osm)]
    patches = {n: row_patch(n, **r) for n, r in zip(("se", "osm"), rows, strict=True)}
    named = zip(("se", "osm"), scores, strict=False)
    return Bundle(
        patches, {n: {"w": torch.tensor([s])} for n, s in named}, PatchingConfig(**patching)
    )


def random_bundle(names=("se", "osm", "npo")):
    generator = torch.Generator().manual_seed(0)
    shapes = {"v": (12, 20), "w": (20, 16)}
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    patches = {
        n: Factors(n, {t: (draw(2, c), draw(r, 2)) for t, (r, c) in shapes.items()}, 2.0)
        for n in ("se", "osm", "npo")
    }
    scores = {n: {t: draw(r, c).abs() for t, (r, c) in shapes.items()} for n in ("se", "osm")}
    return Bundle(
        {n: patches[n] for n in names}, scores, PatchingConfig(), losses_of(patches["se"])
    )


def losses_of(se):
    """As if every nat of loss were 1 % of the SE patch's direction in the deltas."""
    size = sum(se.delta(t).square().sum() for t in se.factors)

    def losses(deltas):
        along = sum((deltas[t] * se.delta(t)).sum() for t in se.factors) / size
        return along.clamp(min=0) * torch.tensor([100.0, 150.0, 200.0])

    return losses


def middle(space):
    """A setting from inside of a space."""
    found = {}
    for key, (kind, *values) in space.items():
        low, high = values[-2:]
        middle = values[0] if kind == "choice" else math.sqrt(max(low, 0.01) * high)
        found[key] = middle * found[values[0]] if kind == "ratio" else middle
    return found


def row(name, bundle, setting, seed=0, tensor="w"):
    delta = METHODS[name].deltas(bundle, setting, seed)[tensor]
    assert delta.dtype == torch.float32 and delta.shape == bundle.patch("se").delta(tensor).shape
    return delta[0].tolist()


# ---- by hand -------------------------------------------------------------------------------------


def test_ga_is_the_se_patch_times_its_strength():
    bundle = row_bundle([1.0, -2.0, 0.0], [5.0, 5.0, 5.0])
    assert row("GA", bundle, {"strength": 1.0}) == [1.0, -2.0, 0.0]
    assert row("GA", bundle, {"strength": 0.25}) == [0.25, -0.5, 0.0]


def test_npo_is_the_npo_patch_times_its_strength():
    bundle = row_bundle([1.0, -2.0], [5.0, 5.0])
    bundle = Bundle({**bundle.patches, "npo": row_patch("npo", w=[4.0, -8.0])}, {}, bundle.patching)
    assert row("NPO", bundle, {"strength": 0.25}) == [1.0, -2.0]


def test_task_arithmetic_is_the_weighted_sum():
    bundle = row_bundle([1.0, -2.0, 0.0], [0.5, 1.0, -3.0])
    assert row("Task Arithmetic", bundle, {"alpha": 2.0, "beta": 4.0}) == [4.0, 0.0, -12.0]


def test_weight_averaging_at_a_half_is_the_mean():
    bundle = row_bundle([1.0, -2.0, 0.0], [0.5, 1.0, -3.0])
    assert row("Weight averaging", bundle, {"weight": 0.5}) == [0.75, -0.5, -1.5]
    assert row("Weight averaging", bundle, {"weight": 0.25}) == [0.625, 0.25, -2.25]
    assert row("Weight averaging", bundle, {"weight": 1.0}) == [1.0, -2.0, 0.0]  # SE's end


def test_ties_trims_elects_by_mass_and_averages_what_agrees():
    bundle = row_bundle(
        {"w": [4.0, -3.0, 1.0, 5.0, -2.0, 0.5, 7.0, 0.0], "v": [0.25, 0.125]},
        {"w": [-6.0, -1.0, 2.0, 3.0, 4.0, 0.25, -7.0, 0.0], "v": [0.125, -0.5]},
    )
    # density 1/2. SE keeps 4 -3 5 7, OSM keeps -6 3 4 -7; the sums -2 -3 0 8 4 0 0 0 elect a sign.
    # At the first weight OSM alone agrees, and though alpha = 2 would turn the weighted sum to +2:
    # the election is before the weights. At 5 and 3 both agree: their mean. 7 - 7 counts as +.
    expected = [-6.0, -6.0, 0.0, (2 * 5 + 3) / 2, 4.0, 0.0, 14.0, 0.0]
    half = {"density": 0.5, "alpha": 2.0, "beta": 1.0}
    assert row("TIES", bundle, half) == expected
    # the small values of the other matrix stay: trimming is per matrix
    assert row("TIES", bundle, half, tensor="v") == [0.5, -0.5]
    one = {"density": 0.125, "alpha": 1.0, "beta": 3.0}  # the 7 and the -7 alone
    assert row("TIES", bundle, one) == [0.0] * 6 + [7.0, 0.0]
    assert row("TIES", bundle, one | {"density": 0.25}) == [-18.0, 0, 0, 5.0, 0, 0, 7.0, 0.0]


def test_dare_divides_what_it_keeps_by_the_keep_rate():
    n = 20_000
    bundle = row_bundle([1.0] * n, [-3.0] * n)
    setting = {"keep_rate": 0.25, "alpha": 2.0, "beta": 0.5}
    delta = METHODS["DARE"].deltas(bundle, setting, 7)["w"]
    kept_se, kept_osm = (
        retention_mask((1, n), 0.25, seed=7, patch=name, tensor="w") for name in ("se", "osm")
    )
    # 2 * 1 / 0.25 = 8 and 0.5 * -3 / 0.25 = -6
    assert torch.equal(delta, 8.0 * kept_se - 6.0 * kept_osm)
    assert set(delta.unique().tolist()) == {-6.0, 0.0, 2.0, 8.0}  # two masks, not one
    alone = METHODS["DARE"].deltas(bundle, setting | {"beta": 0.0}, 7)["w"]
    assert alone.mean().item() == pytest.approx(2.0, rel=0.05)  # as without dropping


# |P_SE| = 85 and |P_OSM| = 10. S_SE = the first four weights, S_OSM = the third, fourth and last.
SE = [3.0, 4.0, 0.0, 12.0, 0.0, 0.0, 0.0, 0.0, 84.0, 0.0]
OSM = [8.0, 0.0, 2.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]
SCORES = ([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0], [0.0, 1, 8, 7, 2, 3, 4, 5, 6, 9])
WHOLE = {"retention_rate": 1.0, "top_rate_se": 0.4, "top_rate_osm": 0.3}


def test_safepatching_keeps_the_differences_at_matched_norms():
    bundle = row_bundle(SE, OSM, SCORES, scale="plain")  # the method's scale does not depend on it
    found = row("SafePatching", bundle, WHOLE | {"alpha": 1.0, "beta": 2.0})
    # kept: SE 3 and 4, norm 5, so times 85 / 5; OSM the last 4, so times 2 * 10 / 4
    assert found == pytest.approx([51.0, 68.0, 0, 0, 0, 0, 0, 0, 0, 20.0])


def test_joint_top_sets_subtract_nothing():
    bundle = row_bundle(SE, OSM, SCORES, scale="plain")
    found = row("Joint top sets", bundle, WHOLE | {"alpha": 1.3, "beta": 1.2})
    # kept: SE 3 4 0 12, norm 13, times 1.3 * 85 / 13 = 8.5; OSM 2 4 4, norm 6, times 1.2 * 10 / 6
    assert found == pytest.approx([25.5, 34.0, 4.0, 102 + 8.0, 0, 0, 0, 0, 0, 8.0])


@pytest.mark.parametrize("name", ["SafePatching", "Joint top sets"])
def test_top_set_methods_retain_at_random_and_match_the_norm(name):
    bundle = random_bundle()
    setting = {"retention_rate": 0.5, "top_rate_se": 0.6, "top_rate_osm": 0.1}
    delta = METHODS[name].deltas(bundle, setting | {"alpha": 3.0, "beta": 0.0}, 4)
    for tensor, part in delta.items():
        kept = retention_mask(part.shape, 0.5, seed=4, patch="se", tensor=tensor)
        assert (part[~kept] == 0).all() and 0.15 < (part != 0).float().mean() < 0.4
    norm = math.sqrt(sum(part.square().sum().item() for part in delta.values()))
    assert norm == pytest.approx(3.0 * bundle.patch("se").norm(), rel=1e-5)
    # what the setting does not name comes from the bundle
    ranked = Bundle(bundle.patches, bundle.scores, PatchingConfig(order="rank_retained"))
    other = METHODS[name].deltas(ranked, setting | {"alpha": 3.0, "beta": 0.0}, 4)
    assert any(((delta[t] != 0) != (other[t] != 0)).any() for t in delta)


# ---- balanced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("strength", [0.03, 0.4, 1.0, 7.3, 19.0])
def test_balance_finds_the_strength_of_a_target_within_three_percent(strength, power):
    asked = []

    def loss_at(alpha):
        asked.append(alpha)
        return 2.0 * alpha**power

    target = 2.0 * strength**power
    found = balance(loss_at, target)
    assert strength <= found <= 1.03 * strength
    assert loss_at(found) >= target  # it is reached, and not only nearly
    assert len(asked) <= 10 and min(asked) > LOWEST and max(asked) == HIGHEST


def test_balance_at_its_ends():
    assert balance(lambda alpha: alpha, HIGHEST + 1) == HIGHEST == 20.0
    assert balance(lambda alpha: alpha, HIGHEST) <= HIGHEST
    assert LOWEST < balance(lambda alpha: alpha + 5.0, 1.0) <= 1.03 * LOWEST  # always reached
    steps = balance(lambda alpha: float(alpha >= 0.5), 0.7)
    assert 0.5 <= steps <= 1.03 * 0.5


def test_balancing_needs_the_losses_of_the_backbone():
    bundle = random_bundle()
    bare = Bundle(bundle.patches, bundle.scores, bundle.patching)
    for method in (balanced.METHOD, balanced.SUM):
        with pytest.raises(SpkitError, match="^Balancing needs a bundle with `first_token_losses`"):
            method.deltas(bare, middle(method.space), 0)


def test_balanced_sets_are_safepatchings_at_the_alpha_that_reaches_the_target():
    """All that is kept has one factor, its smallest (to 3 %) that reaches the target."""
    bundle = random_bundle()
    setting = middle(SPACES["SafePatching, balanced"])
    found = METHODS["SafePatching, balanced"].deltas(bundle, setting, 3)
    rates = {key: value for key, value in setting.items() if key != "target"}
    parts = [
        METHODS["SafePatching"].deltas(bundle, rates | {"alpha": alpha, "beta": beta}, 3)
        for alpha, beta in ((1.0, 0.0), (0.0, setting["beta"]))
    ]
    factors = torch.cat(
        [((found[t] - parts[1][t]) / part)[part != 0] for t, part in parts[0].items()]
    )
    alpha = factors.median().item()
    assert torch.allclose(factors, torch.full_like(factors, alpha), rtol=1e-3)

    def quantile(strength):
        at = {t: strength * part + parts[1][t] for t, part in parts[0].items()}
        return torch.quantile(bundle.first_token_losses(at), 0.05).item()

    assert quantile(alpha * 1.001) >= setting["target"] > quantile(alpha / 1.03)
    # whatever the bundle's own alpha and scale are
    other = Bundle(
        bundle.patches,
        bundle.scores,
        PatchingConfig(alpha=9.0, beta=5.0, scale="plain"),
        bundle.first_token_losses,
    )
    again = METHODS["SafePatching, balanced"].deltas(other, setting, 3)
    assert all(torch.equal(again[t], found[t]) for t in found)


def test_balanced_task_arithmetic_by_hand():
    bundle = row_bundle([1.0, 0.0], [-1.0, 4.0])
    losses = lambda deltas: deltas["w"][0, 0].clamp(min=0) * torch.ones(3)  # noqa: E731
    bundle = Bundle(bundle.patches, {}, bundle.patching, losses)
    one, two = row("Task Arithmetic, balanced", bundle, {"beta": 2.0, "target": 0.5})
    # alpha - 2 is to be 0.5
    assert 0.5 <= one <= 1.03 * 2.5 - 2 and two == 8.0
    high = row("Task Arithmetic, balanced", bundle, {"beta": 2.0, "target": 30.0})
    assert high == [HIGHEST - 2.0, 8.0]  # out of reach


def backed(made):
    """(model, the bundle of the fixture with the losses of that model)."""
    model = tiny.model("llama")
    return model, with_backbone(made, model, TOKENIZER, PAIRS, config(), seed=0)


def first_losses(model):
    """-log p of each answer's first token, one unpadded pair at a time."""
    losses = []
    for pair in PAIRS:
        ids, labels = encode_pair(TOKENIZER, pair.prompt, pair.response)
        first = next(i for i, label in enumerate(labels) if label != -100)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:first]])).logits[0, -1]
        losses.append(F.cross_entropy(logits, torch.tensor(ids[first])).item())
    return losses


def test_first_token_losses_are_the_cross_entropy_of_the_first_answer_token(made):
    model, bundle = backed(made)
    before = copy.deepcopy(model.state_dict())
    # drawn in another order
    expected = sorted(first_losses(model))
    found = bundle.first_token_losses({})
    assert found.dtype == torch.float32 and found.shape == (3,)
    assert sorted(found.tolist()) == pytest.approx(expected, rel=1e-4)
    assert len({round(loss, 3) for loss in expected}) == 3
    deltas = {name: 3.0 * made.patch("se").delta(name) for name in made.patch("se").factors}
    moved = bundle.first_token_losses(deltas)
    with patched(model, deltas):
        expected = sorted(first_losses(model))
    assert sorted(moved.tolist()) == pytest.approx(expected, rel=1e-4)
    assert not torch.allclose(moved, found, rtol=1e-2)
    # the backbone has its bits back
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fewer = config().model_copy(update={"importance": config().importance.model_copy(
        update={"samples": 2})})  # fmt: skip
    assert (
        len(with_backbone(made, model, TOKENIZER, PAIRS, fewer, seed=0).first_token_losses({})) == 2
    )


def test_balanced_deltas_reach_the_target_quantile_on_a_model(made):
    model, bundle = backed(made)
    se, osm = made.patch("se"), made.patch("osm")
    parts = [{t: p.delta(t) for t in p.factors} for p in (se, osm)]

    def quantile(deltas):
        with patched(model, deltas):
            return torch.quantile(torch.tensor(first_losses(model)), 0.05).item()

    bare = quantile({t: LOWEST * parts[0][t] + parts[1][t] for t in parts[0]})
    target = bare + 0.5
    deltas = balanced_deltas(bundle, *parts, target)
    assert deltas.keys() == se.factors.keys()
    name = next(iter(deltas))
    alpha = ((deltas[name] - parts[1][name]) / parts[0][name]).median().item()
    assert LOWEST < alpha < HIGHEST
    assert quantile(deltas) > target - 1e-3
    less = {t: alpha / 1.03 * parts[0][t] + parts[1][t] for t in parts[0]}
    assert quantile(less) < target + 1e-3


# ---- the interface -------------------------------------------------------------------------------


def test_the_methods_in_the_tables_order_with_their_spaces():
    assert list(METHODS) == list(SPACES)
    for name, method in METHODS.items():
        assert (method.name, method.space) == (name, SPACES[name])


@every_method
def test_a_methods_file_is_short_and_cites_its_paper(method):
    path = Path(sys.modules[method.deltas.__module__].__file__)
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    head = " ".join(ast.get_docstring(ast.parse(text)).split())
    (cited,) = re.findall(r"arXiv (\d{4}\.\d{5})", method.paper)
    assert f"arXiv {cited}" in head
    # an extension of ours departs from its paper as a whole, and says so
    departs = (
        "An extension of ours, beyond" if "balanced" in method.name else "Departures from the p"
    )
    assert departs in head and method.paper.startswith("ours, on ") is ("balanced" in method.name)
    if method.name in ("SafePatching", "SafePatching, balanced", "Joint top sets"):
        assert cited == "2405.13820"


@every_method
def test_a_wrong_key_of_a_setting_is_named(method):
    good = middle(method.space)
    with pytest.raises(SpkitError, match=f"^{method.name} has no setting 'gamma'; it has "):
        method.deltas(random_bundle(), good | {"gamma": 1.0}, 0)
    for key in good:
        less = {k: v for k, v in good.items() if k != key}
        with pytest.raises(SpkitError, match=f"^{method.name} lacks the setting '{key}'"):
            method.deltas(random_bundle(), less, 0)


def test_a_value_out_of_range_is_one_sentence():
    setting = middle(TOP_SETS) | {"top_rate_se": 1.5}
    for name in ("SafePatching", "Joint top sets"):
        with pytest.raises(SpkitError, match="^top_rate_se is 1.5, allowed"):
            METHODS[name].deltas(random_bundle(), setting, 0)


@every_method
def test_needs_and_masks_are_what_they_say(method):
    setting, bundle = middle(method.space), random_bundle(method.needs)
    first, again, other = (method.deltas(bundle, setting, seed) for seed in (0, 0, 1))
    assert set(first) == {"v", "w"}
    assert all(part.dtype == torch.float32 and part.any() for part in first.values())
    assert all(torch.equal(first[t], again[t]) for t in first)
    assert all(torch.equal(first[t], other[t]) is not method.masks for t in first)
    for name in method.needs:
        rest = [other for other in ("se", "osm", "npo") if other != name]
        with pytest.raises(SpkitError, match=f"^The bundle has no patch '{name}'; it has "):
            method.deltas(random_bundle(rest), setting, 0)


# ---- deriving NPO --------------------------------------------------------------------------------


def test_npo_loss_by_hand():
    nll = torch.tensor([5.0, 2.0], requires_grad=True)
    loss = npo_loss(nll, torch.tensor([3.0, 4.0]), 0.5)
    # beta * (nll - reference) is 1 and -1: 2 / 0.5 * mean of ln(1 + e^-1) and ln(1 + e)
    assert loss.item() == pytest.approx(4 * (0.3132617 + 1.3132617) / 2, rel=1e-6)
    loss.backward()
    # minus: descending on the loss raises nll, less where it is above the reference already
    assert nll.grad.tolist() == pytest.approx([-0.2689414, -0.7310586], rel=1e-6)


def config(**changes):
    shared = dict(learning_rate=1e-2, max_steps=3, batch_size=3, warmup_steps=0)
    held = dict(token_loss_clamp=100.0, stop_mean_loss=99.0)
    return Config(
        derivation=dict(
            quantization="none",
            lora=dict(r=4, alpha=8.0),
            ascent=shared | held,
            descent=shared,
        ),
        importance=dict(samples=3, batch_size=2),
        baselines={"npo": shared | changes},
    )


def mean_summed_nll(model):
    """As transformers computes it, one pair at a time: the mean times the number of tokens."""
    nlls = []
    for pair in PAIRS:
        ids, labels = (
            torch.tensor([part]) for part in encode_pair(TOKENIZER, pair.prompt, pair.response)
        )
        nlls.append(model(input_ids=ids, labels=labels).loss * (labels != -100).sum())
    return torch.stack(nlls)


def test_the_reference_is_the_summed_nll_of_the_backbone():
    model = tiny.model("llama").train()
    with torch.no_grad():
        expected = mean_summed_nll(model)
    assert torch.allclose(answer_nll(model, TOKENIZER, PAIRS, 2), expected, rtol=1e-4)
    assert model.training


def test_derive_npo_raises_the_loss_and_gives_the_backbone_back():
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    patch, curve = derive_npo(model, TOKENIZER, PAIRS, config(), 0)
    assert curve["loss"].iloc[-1] > curve["loss"][0] + 0.5
    assert list(curve) == ["patch", "step", "loss", "grad_norm", "stop"] and len(curve) == 4
    assert (patch.name, patch.manifest["direction"]) == ("npo", "npo")
    assert patch.manifest["settings"]["beta"] == 0.1 and patch.norm() > 0.1
    assert model.state_dict().keys() == before.keys() and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # the first step is that of ascent on the summed NLL, whatever beta is
    wrapped = add_lora(tiny.model("llama"), config().derivation.lora, 0)
    mean_summed_nll(wrapped).mean().backward()
    squares = [w.grad.square().sum() for w in wrapped.parameters() if w.grad is not None]
    assert curve["grad_norm"][0] == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_every_sample_is_compared_with_its_own_reference(monkeypatch):
    seen = []

    def spy(nll, reference, beta):
        seen.append((nll.detach().clone(), reference, beta))
        return npo_loss(nll, reference, beta)

    monkeypatch.setattr(npo, "npo_loss", spy)
    still = config(batch_size=1, learning_rate=1e-9, beta=0.7)
    derive_npo(tiny.model("llama"), TOKENIZER, PAIRS, still, 0)
    assert len({round(nll.item(), 3) for nll, _, _ in seen}) == 3
    for nll, reference, beta in seen:
        assert torch.allclose(nll, reference, rtol=1e-4) and beta == 0.7


def test_npo_without_pairs():
    with pytest.raises(SpkitError, match="^D_h is empty"):
        derive_npo(tiny.model("llama"), TOKENIZER, [], config(), 0)


# ---- the bundle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    needs = ("se", "osm", "npo")
    return make_bundle(tiny.model("llama"), TOKENIZER, PAIRS, config(), seed=0, needs=needs)


def assert_same_patch(one, other):
    assert (one.name, one.scaling, one.manifest) == (other.name, other.scaling, other.manifest)
    assert set(one.factors) == set(other.factors)
    assert all(torch.equal(one.delta(name), other.delta(name)) for name in one.factors)


def test_a_bundle_holds_what_each_derivation_gives(made):
    assert list(made.patches) == ["se", "osm", "npo"] and list(made.scores) == ["se", "osm"]
    assert made.patching == config().patching
    for name, direction in (("se", "ascent"), ("osm", "descent")):
        data = TrainingSet.of(TOKENIZER, PAIRS)
        patch, _ = derive(tiny.model("llama"), data, direction, config().derivation, 0)
        assert_same_patch(made.patches[name], patch)
        assert made.scores[name].keys() == patch.factors.keys()
    fewer = make_bundle(tiny.model("llama"), TOKENIZER, PAIRS, config(), seed=0, needs=("osm",))
    assert list(fewer.patches) == list(fewer.scores) == ["osm"]
    assert_same_patch(fewer.patches["osm"], made.patches["osm"])
    assert all(torch.equal(fewer.scores["osm"][t], s) for t, s in made.scores["osm"].items())


@every_method
def test_every_method_works_on_a_derived_bundle(method, made):
    deltas = method.deltas(backed(made)[1], middle(method.space), 0)
    assert deltas.keys() == made.patch("se").factors.keys()
    assert all(torch.isfinite(delta).all() for delta in deltas.values())


def test_an_unknown_patch_is_named():
    with pytest.raises(SpkitError, match="^There is no patch 'dpo'; allowed are se, osm, npo"):
        make_bundle(tiny.model("llama"), TOKENIZER, PAIRS, config(), seed=0, needs=("se", "dpo"))


def test_a_bundle_saved_and_loaded(made, tmp_path):
    folder = tmp_path / "run" / "bundle"
    save_bundle(Bundle({"npo": made.patches["npo"]}, {}, made.patching), folder)
    save_bundle(made, folder)  # over the first
    read = load_bundle(folder, PatchingConfig(alpha=3.0))
    assert read.patching.alpha == 3.0
    assert list(read.patches) == list(made.patches) and list(read.scores) == list(made.scores)
    for name, patch in made.patches.items():
        assert_same_patch(read.patches[name], patch)
    for name, scores in made.scores.items():
        assert read.scores[name].keys() == scores.keys()
        assert all(torch.equal(read.scores[name][t], score) for t, score in scores.items())
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_no_half_bundle_is_left_behind(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr(importance, "save", full)
    with pytest.raises(SpkitError, match="the disk is full"):
        save_bundle(made, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpkitError, match="^There is no bundle of patches in "):
        load_bundle(tmp_path / "bundle", made.patching)
