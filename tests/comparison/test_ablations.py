"""Every variant of a patch against a computation in plain loops, and the analysis by hand."""

import itertools
import math
import weakref
from dataclasses import replace

import pytest
import torch
from loops import (
    SEED,
    SHAPES,
    config,
    factors,
    five_long,
    flat,
    four_weights,
    loop_delta,
    loop_norm,
    loop_retained,
    loop_top,
    scores,
)

from spkit.comparison import ablations
from spkit.comparison.ablations import ABLATIONS, IN_NOTEBOOK_03, ablated, random_set
from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.patch import Factors
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.method.safepatching import SafePatching

NO_RETENTION, NO_RETENTION_SCALED = "without retention (same α)", "without retention (α·p)"
NO_SUBTRACTION, RANDOM_SETS = "no subtraction", "random sets"


def safepatching(**changes):
    se, osm = Factors("se", factors(1), 0.5), Factors("osm", factors(2), 2.0)
    return SafePatching(se, osm, (scores(3), scores(4)), config(**changes), SEED)


# ---- the same in plain loops (loops.py)


# SafePatching with one parameter changed: what it is to be the same as
CHANGES = {
    "rescaled by 1/p": {"scale": "plain", "rescale": True},
    "global top rate": {"scope": "global"},
    "ranked after retention": {"order": "rank_retained"},
}


def with_config(both, **changes):
    """The same patches, importances and seed under other parameters."""
    return replace(both, config=PatchingConfig(**both.config.model_dump() | changes))


def loop_kept(variant, both):
    """({positions}, {positions}) of SE and OSM."""
    if variant in CHANGES:
        return loop_kept(SAFEPATCHING, with_config(both, **CHANGES[variant]))
    setting, score = both.config, [flat(scores) for scores in both.importance]
    everything = set(score[0])
    whole = {"SE only": "s", "OSM only": "o", "plain sum": "so"}
    if variant in whole:
        return tuple(everything if letter in whole[variant] else set() for letter in "so")
    retained = [loop_retained("se"), loop_retained("osm")]
    if "without retention" in variant:
        retained = [everything, everything]
    top_se = loop_top(score[0], setting.top_rate_se, retained[0], setting)
    top_osm = loop_top(score[1], setting.top_rate_osm, retained[1], setting)
    if variant == "intersection":
        return retained[0] & top_se & top_osm, retained[1] & top_se & top_osm
    if variant == NO_SUBTRACTION:
        return retained[0] & top_se, retained[1] & top_osm
    return retained[0] & (top_se - top_osm), retained[1] & (top_osm - top_se)


def loop_strengths(variant, both):
    if variant in CHANGES:
        return loop_strengths(SAFEPATCHING, with_config(both, **CHANGES[variant]))
    if variant in ("SE only", "OSM only", "plain sum"):
        return float(variant != "OSM only"), float(variant != "SE only")
    share = {NO_RETENTION_SCALED: 0.6}.get(variant, 1.0)
    values = [3.0 * share, 2.0 * share]
    if both.config.scale == "norm_matched":
        kept = loop_kept(SAFEPATCHING if "without" in variant else variant, both)
        deltas = [loop_delta(both.se), loop_delta(both.osm)]
        for i in range(2):
            values[i] *= loop_norm(deltas[i]) / loop_norm(deltas[i], kept[i])
    elif both.config.rescale:
        values = [value / 0.6 for value in values]
    return tuple(values)


SETTINGS = [
    dict(scope=scope, order=order, **strength)
    for scope in ("matrix", "global")
    for order in ("rank_all", "rank_retained")
    for strength in ({}, {"rescale": True}, {"scale": "norm_matched"})
]


IN_LOOPS = (*IN_NOTEBOOK_03, NO_SUBTRACTION, *CHANGES)


@pytest.mark.parametrize("variant", IN_LOOPS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_variant_is_what_the_loops_make_of_it(setting, variant):
    both = safepatching(**setting)
    kept = loop_kept(variant, both)
    for found, expected in zip(ablated(both, variant).kept(), kept, strict=True):
        assert {at for at, value in flat(found).items() if value} == expected
    strengths = loop_strengths(variant, both)
    assert ablated(both, variant).strengths() == pytest.approx(strengths, rel=1e-9)
    merged = dict.fromkeys(flat(both.importance[0]), 0.0)
    parts = zip((both.se, both.osm), kept, strengths, strict=True)
    for delta, keep, strength in [(loop_delta(patch), k, s) for patch, k, s in parts]:
        for at in keep:
            merged[at] += strength * delta[at]
    deltas = ablated(both, variant).deltas()
    assert list(deltas) == list(SHAPES)
    assert all(delta.dtype == torch.float32 for delta in deltas.values())
    assert flat(deltas) == pytest.approx(merged, rel=1e-6, abs=1e-5)


def test_the_settings_above_are_not_the_same_in_disguise():
    """Each parameter changes a kept set or a strength, or the loops would prove nothing."""
    for changes in SETTINGS:
        both = safepatching(**changes)
        for variant in ("intersection", NO_RETENTION, SAFEPATCHING):
            assert all(loop_kept(variant, both)), (changes, variant)
    kept = {
        (scope, order): loop_kept(SAFEPATCHING, safepatching(scope=scope, order=order))
        for scope in ("matrix", "global")
        for order in ("rank_all", "rank_retained")
    }
    assert all(a != b for a, b in itertools.combinations(kept.values(), 2))
    both = safepatching()
    made = {variant: str(loop_kept(variant, both)) for variant in IN_NOTEBOOK_03}
    made[NO_RETENTION_SCALED] += "at another strength"
    assert len(set(made.values())) == len(IN_NOTEBOOK_03)
    for variant in (NO_SUBTRACTION, "global top rate", "ranked after retention"):
        assert str(loop_kept(variant, both)) not in made.values()
    assert {*IN_LOOPS, RANDOM_SETS} == set(ABLATIONS)


def test_all_variants_by_hand():
    """One row of four weights, everything retained: S_SE = {0, 1}, S_OSM = {1, 2}."""
    both = four_weights()
    patched = [2, 0, 90, 0]
    assert {name: deltas["w"].tolist()[0] for name, deltas in ablations.ablations(both)} == {
        "SE only": [1, 2, 3, 4],
        "OSM only": [10, 20, 30, 40],
        "plain sum": [11, 22, 33, 44],
        "intersection": [0, 2 * 2 + 3 * 20, 0, 0],
        NO_RETENTION: patched,
        NO_RETENTION_SCALED: patched,  # p is 1
        SAFEPATCHING: patched,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("setting", SETTINGS[::3], ids=lambda s: "-".join(s.values()))
def test_the_kept_sets_are_disjoint_retained_and_important(setting, seed):
    both = safepatching(**setting)
    both = replace(both, importance=(scores(10 + seed), scores(20 + seed)), seed=seed)
    for variant in (SAFEPATCHING, NO_RETENTION, NO_RETENTION_SCALED):
        keep_se, keep_osm = ablated(both, variant).kept()
        assert not any((keep_se[name] & keep_osm[name]).any() for name in SHAPES)
    kept, masks, tops = ablated(both, SAFEPATCHING).kept(), both.retained, both.important()
    for keep, retained, top in zip(kept, masks, tops, strict=True):
        assert any(keep[name].any() for name in SHAPES)
        assert not any((keep[name] & ~(retained[name] & top[name])).any() for name in SHAPES)


# ---- what the comparison asks for beyond the seven


def same(one, other):
    assert list(one) == list(other) == list(SHAPES)
    return all(torch.equal(one[name], other[name]) for name in SHAPES)


def counts(sets):
    return {name: int(mask.sum()) for name, mask in sets.items()}


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=lambda s: "-".join(map(str, s.values())))
def test_random_sets_hold_as_many_weights_of_each_matrix(setting):
    both = safepatching(**setting)
    kept, drawn = ablated(both, SAFEPATCHING).kept(), ablated(both, RANDOM_SETS).kept()
    for own, other in zip(kept, drawn, strict=True):
        assert counts(own) == counts(other) and any(counts(own).values())
        assert not same(own, other)
    expected = [
        {name: random_set(mask, seed=SEED, patch=patch, tensor=name) for name, mask in own.items()}
        for patch, own in zip(("se", "osm"), kept, strict=True)
    ]
    assert all(map(same, drawn, expected))


def test_random_sets_depend_on_the_seed_the_patch_and_the_tensor_alone():
    like = torch.zeros(30, 20, dtype=torch.bool)
    like[:4] = True
    drawn = random_set(like, seed=0, patch="se", tensor="w")
    assert drawn.dtype == torch.bool and drawn.shape == like.shape and drawn.sum() == 80
    torch.manual_seed(
        1
    )  # no framework's random state, and not which weights are kept, but how many
    assert torch.equal(random_set(like.flip(0), seed=0, patch="se", tensor="w"), drawn)
    for other in ({"seed": 1}, {"patch": "osm"}, {"tensor": "v"}):
        key = {"seed": 0, "patch": "se", "tensor": "w"} | other
        assert not torch.equal(random_set(like, **key), drawn)
    assert abs(drawn[:4].float().mean() - 80 / 600) < 0.15  # they do not follow `like`
    assert random_set(torch.ones(3, 2), seed=0, patch="se", tensor="w").all()
    assert not random_set(torch.zeros(3, 2), seed=0, patch="se", tensor="w").any()
    one, two = (ablated(safepatching(), RANDOM_SETS).kept() for _ in range(2))
    assert all(map(same, one, two))
    both = safepatching()
    moved = replace(both, seed=SEED + 1)
    assert not any(map(same, one, ablated(moved, RANDOM_SETS).kept()))


def test_random_sets_move_the_weights_as_far():
    """At matched norms; else at SafePatching's own strengths."""
    both = safepatching(scale="norm_matched", beta=0.0)
    delta = ablated(both, RANDOM_SETS).deltas()
    norm = math.sqrt(sum(part.square().sum().item() for part in delta.values()))
    assert norm == pytest.approx(3.0 * both.se.norm(), rel=1e-5)
    assert ablated(safepatching(), RANDOM_SETS).strengths() == (3.0, 2.0)


def test_no_subtraction_keeps_what_matters_to_both():
    both = safepatching()
    for own, kept, masks, top in zip(
        ablated(both, NO_SUBTRACTION).kept(),
        ablated(both, SAFEPATCHING).kept(),
        both.retained,
        both.important(),
        strict=True,
    ):
        assert same(own, {name: masks[name] & top[name] for name in SHAPES})
        assert sum(counts(own).values()) > sum(counts(kept).values())
        assert all((own[name] | ~kept[name]).all() for name in SHAPES)


@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_rescaled_is_alpha_by_p_on_safepatchings_sets(scale):
    both = safepatching(scale=scale)
    assert ablated(both, "rescaled by 1/p").strengths() == pytest.approx(
        (3.0 / 0.6, 2.0 / 0.6), rel=1e-12
    )
    keep_se, keep_osm = kept = ablated(both, "rescaled by 1/p").kept()
    assert all(map(same, kept, ablated(both, SAFEPATCHING).kept()))
    expected = {
        name: 3.0 / 0.6 * both.se.delta(name) * keep_se[name]
        + 2.0 / 0.6 * both.osm.delta(name) * keep_osm[name]
        for name in SHAPES
    }
    found = ablated(both, "rescaled by 1/p").deltas()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6) for name in SHAPES)


@pytest.mark.parametrize("variant", CHANGES)
@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_a_changed_parameter_is_a_run_with_that_parameter(variant, scale):
    both = safepatching(scale=scale)
    other = with_config(both, **CHANGES[variant])
    assert same(ablated(both, variant).deltas(), ablated(other, SAFEPATCHING).deltas())
    assert ablated(both, variant).strengths() == ablated(other, SAFEPATCHING).strengths()
    assert not same(ablated(both, variant).deltas(), ablated(both, SAFEPATCHING).deltas())


def test_which_variants_depend_on_the_mask():
    """What ABLATIONS says is what another seed does; matched strengths follow the masks, too."""
    both = safepatching(scale="norm_matched")
    moved = replace(both, seed=SEED + 1)
    for name, one in ABLATIONS.items():
        found = same(ablated(both, name).deltas(), ablated(moved, name).deltas())
        assert found is not one.masked, name


# ---- strengths


def test_the_two_rows_without_retention():
    """At SafePatching's strength, and at p times that, whatever SafePatching's strength is."""
    plain = safepatching(retention_rate=0.25)
    assert ablated(plain, SAFEPATCHING).strengths() == (3.0, 2.0)
    assert ablated(plain, NO_RETENTION).strengths() == (3.0, 2.0)
    assert ablated(plain, NO_RETENTION_SCALED).strengths() == (0.75, 0.5)
    longer = safepatching(retention_rate=0.25, rescale=True)
    assert ablated(longer, SAFEPATCHING).strengths() == (12.0, 8.0)
    assert ablated(longer, "intersection").strengths() == (12.0, 8.0)
    assert ablated(longer, NO_RETENTION).strengths() == (12.0, 8.0)
    assert ablated(longer, NO_RETENTION_SCALED).strengths() == (3.0, 2.0)
    assert [ablated(longer, name).strengths() for name in IN_NOTEBOOK_03[:3]] == [
        (1, 0),
        (0, 1),
        (1, 1),
    ]


def test_norm_matched_strengths_by_hand():
    both = five_long(scale="norm_matched")
    assert ablated(both, SAFEPATCHING).strengths() == (
        3.0 * 5 / 4,
        0.0,
    )  # P_OSM is 0 where it is kept
    # both keep 1 of a, where P_SE is 0 and P_OSM is 12
    assert ablated(both, "intersection").strengths() == (0.0, 2.0 * 13 / 12)
    assert ablated(both, NO_RETENTION).strengths() == (3.75, 0.0)
    # of the sets that are handed in, and not of the variant's own
    kept = ({n: torch.ones(1, 2, dtype=torch.bool) for n in "ab"},) * 2
    assert ablated(both, SAFEPATCHING).strengths(kept) == (3.0, 2.0)
    assert ablated(five_long(scale="norm_matched", rescale=True), SAFEPATCHING).strengths() == (
        3.75,
        0.0,
    )
    assert ablated(both, SAFEPATCHING).deltas()["b"].tolist() == [
        [15.0, 0.0]
    ]  # as long as alpha |P|


# ---- iteration


def test_ablations_come_in_order_and_one_at_a_time(monkeypatch):
    both, made, alive, own = safepatching(), [], [], ablations.ablated

    def spy(method, name):
        assert not [matrix for matrix in alive if matrix() is not None]  # the last one's are gone
        made.append(name)
        return own(method, name)

    monkeypatch.setattr(ablations, "ablated", spy)
    for name, deltas in ablations.ablations(both):
        assert made[-1] == name and len(made) == len(set(made))
        expected = own(both, name).deltas()
        assert all(torch.equal(deltas[n], expected[n]) for n in expected)
        alive = [weakref.ref(matrix) for matrix in deltas.values()]
        del deltas
    assert tuple(made) == IN_NOTEBOOK_03


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_variant_made_twice_has_the_same_bits(name):
    one, two = (ablated(safepatching(), name).deltas() for _ in range(2))
    assert same(one, two)


def test_safepatching_is_no_ablation_of_itself():
    both = safepatching(scale="norm_matched")
    found = ablated(both, SAFEPATCHING)
    assert type(found) is SafePatching and found == both


# ---- what does not fit


def test_an_unknown_variant():
    with pytest.raises(SpkitError, match=r"^unknown variant 'SE', allowed: SE only, OSM only"):
        ablated(safepatching(), "SE")
