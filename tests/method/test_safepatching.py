"""SafePatching, step by step, against a computation in plain loops and values by hand."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
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
    row,
    scores,
)

from spkit.errors import SpkitError
from spkit.method import patching
from spkit.method.patch import Factors
from spkit.method.patching import rate_count, retention_mask, top_rate_set
from spkit.method.safepatching import SafePatching, kept_norm
from spkit.method.sets import BitSets
from spkit.models.deltas import add_delta


def method(seed=SEED, importance=None, **changes):
    se, osm = Factors("se", factors(1), 0.5), Factors("osm", factors(2), 2.0)
    return SafePatching(se, osm, importance or (scores(3), scores(4)), config(**changes), seed)


def mask(text):
    return torch.tensor([[letter == "1" for letter in text]])


# ---- the same in plain loops (loops.py)


def loop_kept(both):
    """({positions}, {positions}) of SE and OSM."""
    setting = both.config
    retained = [loop_retained("se"), loop_retained("osm")]
    rates = (setting.top_rate_se, setting.top_rate_osm)
    top_se, top_osm = (
        loop_top(flat(score), rate, held, setting)
        for score, rate, held in zip(both.importance, rates, retained, strict=True)
    )
    return retained[0] & (top_se - top_osm), retained[1] & (top_osm - top_se)


def loop_strengths(both):
    values = [3.0, 2.0]
    if both.config.scale == "norm_matched":
        deltas = [loop_delta(both.se), loop_delta(both.osm)]
        for i, kept in enumerate(loop_kept(both)):
            values[i] *= loop_norm(deltas[i]) / loop_norm(deltas[i], kept)
    elif both.config.rescale:
        values = [value / 0.6 for value in values]
    return tuple(values)


SETTINGS = [
    dict(scope=scope, order=order, **strength)
    for scope in ("matrix", "global")
    for order in ("rank_all", "rank_retained")
    for strength in ({}, {"rescale": True}, {"scale": "norm_matched"})
]
settings = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values()))
)


@settings
def test_it_is_what_the_loops_make_of_it(setting):
    both = method(**setting)
    kept = loop_kept(both)
    for found, expected in zip(both.kept(), kept, strict=True):
        assert {at for at, value in flat(found).items() if value} == expected
    strengths = loop_strengths(both)
    assert both.strengths() == pytest.approx(strengths, rel=1e-9)
    merged = dict.fromkeys(flat(both.importance[0]), 0.0)
    parts = zip((both.se, both.osm), kept, strengths, strict=True)
    for delta, keep, strength in [(loop_delta(patch), k, s) for patch, k, s in parts]:
        for at in keep:
            merged[at] += strength * delta[at]
    deltas = both.deltas()
    assert list(deltas) == list(SHAPES) and deltas.strengths == both.strengths()
    assert not deltas.whole and deltas.factors(next(iter(SHAPES))) is None
    assert all(delta.dtype == torch.float32 for delta in deltas.values())
    assert flat(deltas) == pytest.approx(merged, rel=1e-6, abs=1e-5)


def test_the_settings_above_are_not_the_same_in_disguise():
    """Each parameter changes a kept set or a strength, or the loops would prove nothing."""
    for changes in SETTINGS:
        assert all(loop_kept(method(**changes))), changes
    kept = {
        (scope, order): loop_kept(method(scope=scope, order=order))
        for scope in ("matrix", "global")
        for order in ("rank_all", "rank_retained")
    }
    assert all(a != b for a, b in itertools.combinations(kept.values(), 2))
    strengths = {loop_strengths(method(**s)) for s in ({}, {"rescale": True}, {"scale": "plain"})}
    strengths.add(loop_strengths(method(scale="norm_matched")))
    assert len(strengths) == 3  # "plain" is the first one again


# ---- by hand


def test_one_row_of_four_weights():
    """Everything retained: S_SE = {0, 1}, S_OSM = {1, 2}; 1 matters to both and stays."""
    both = four_weights()
    assert [s["w"].tolist() for s in both.important()] == [
        mask("1100").tolist(),
        mask("0110").tolist(),
    ]
    assert both.deltas()["w"].tolist() == [[2, 0, 90, 0]]
    assert both.weights == 4
    assert add_delta(row(1, 1, 1, -0.0), both.deltas()["w"]).tolist() == [[3, 1, 91, 0]]


class Held(SafePatching):
    """With retention masks that are given, and not drawn."""

    @property
    def retained(self):
        return {"w": mask("101011")}, {"w": mask("010110")}


def held(**changes):
    one = torch.ones(1, 1)
    return Held(
        Factors("se", {"w": (row(*[1] * 6), one)}, 1.0),
        Factors("osm", {"w": (row(*[1] * 6), one)}, 1.0),
        # S_SE among all: weights 0 1 2 (a = 3/6); S_OSM among all: weights 2 3 (b = 2/6)
        ({"w": row(6, 5, 4, 3, 2, 1)}, {"w": row(1, 2, 6, 5, 4, 3)}),
        config(top_rate_se=0.5, top_rate_osm=0.34, **changes),
        seed=0,
    )


def test_rank_all_by_hand():
    """The paper's order: the sets are of all weights, retention only thins what they leave."""
    keep_se, keep_osm = held().kept()
    assert torch.equal(keep_se["w"], mask("100000"))  # {0, 1, 2} less {2, 3}, retained
    assert torch.equal(keep_osm["w"], mask("000100"))  # {2, 3} less {0, 1, 2}, retained


def test_rank_retained_by_hand():
    """SE ranks 0 2 4 5 and takes two, {0, 2}; OSM ranks 1 3 4 and takes one, {3}."""
    keep_se, keep_osm = held(order="rank_retained").kept()
    assert torch.equal(keep_se["w"], mask("101000"))  # 2 stays: OSM's copy of it is not retained
    assert torch.equal(keep_osm["w"], mask("000100"))


def test_a_step_can_be_replaced_alone():
    """`keep` is the one place of the rule that decides which weights stay."""

    class Everything(SafePatching):
        def keep(self, retained, own, other):
            return torch.ones_like(retained)

    both = method()
    other = Everything(both.se, both.osm, both.importance, both.config, both.seed)
    for name in SHAPES:
        assert other.kept()[0][name].all() and not both.kept()[0][name].all()
        expected = 3.0 * both.se.delta(name) + 2.0 * both.osm.delta(name)
        assert torch.equal(other.deltas()[name], expected)


# ---- properties


RATES = st.one_of(st.sampled_from([0.0, 0.29, 0.5, 1.0]), st.floats(0, 1))


@given(
    st.integers(0, 2**32 - 1),
    *(RATES, RATES, RATES),
    st.sampled_from(patching.ORDERS),
    st.sampled_from(patching.SCOPES),
)
def test_kept_sets_are_disjoint_and_retained(seed, p, a, b, order, scope):
    shapes = {"u": (4, 6), "v": (3, 5)}
    total = sum(rows * columns for rows, columns in shapes.values())
    generator = torch.Generator().manual_seed(seed)
    se = {name: torch.randn(s, generator=generator).abs() for name, s in shapes.items()}
    osm = {name: torch.randn(s, generator=generator).abs() for name, s in shapes.items()}
    rates = dict(retention_rate=p, top_rate_se=a, top_rate_osm=b)
    setting = config(order=order, scope=scope).model_copy(update=rates)  # also the rates 0 and 1
    patches = (Factors(name, factors(0, shapes), 1.0) for name in ("se", "osm"))
    keep_se, keep_osm = SafePatching(*patches, (se, osm), setting, seed).kept()
    held_se, held_osm = (
        {n: retention_mask(s, p, seed=seed, patch=patch, tensor=n) for n, s in shapes.items()}
        for patch in ("se", "osm")
    )
    for name in shapes:
        assert not (keep_se[name] & keep_osm[name]).any()
        assert not (keep_se[name] & ~held_se[name]).any()
        assert not (keep_osm[name] & ~held_osm[name]).any()
    assert sum(int(keep.sum()) for keep in keep_se.values()) <= rate_count(a, total)
    if order == "rank_all" and scope == "matrix":
        for name in shapes:
            expected = held_se[name] & top_rate_set(se[name], a) & ~top_rate_set(osm[name], b)
            assert torch.equal(keep_se[name], expected)
            expected = held_osm[name] & top_rate_set(osm[name], b) & ~top_rate_set(se[name], a)
            assert torch.equal(keep_osm[name], expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("setting", SETTINGS[::3], ids=lambda s: "-".join(s.values()))
def test_what_is_kept_is_retained_and_important(setting, seed):
    both = method(seed, (scores(10 + seed), scores(20 + seed)), **setting)
    kept, masks, tops = both.kept(), both.retained, both.important()
    assert not any((kept[0][name] & kept[1][name]).any() for name in SHAPES)
    for keep, retained, top in zip(kept, masks, tops, strict=True):
        assert any(keep[name].any() for name in SHAPES)
        assert not any((keep[name] & ~(retained[name] & top[name])).any() for name in SHAPES)


def test_each_patch_has_a_draw_of_its_own_from_the_seed():
    both = method()
    for masks, patch in zip(both.retained, ("se", "osm"), strict=True):
        assert list(masks) == list(SHAPES)
        for name, drawn in masks.items():
            expected = retention_mask(SHAPES[name], 0.6, seed=SEED, patch=patch, tensor=name)
            assert torch.equal(drawn, expected)
    assert both.retained is both.retained  # drawn once
    one, other = both.retained
    assert not all(torch.equal(one[name], other[name]) for name in SHAPES)
    moved = method(SEED + 1).retained
    assert not all(torch.equal(one[name], moved[0][name]) for name in SHAPES)


def test_made_twice_it_has_the_same_bits():
    one, two = method().deltas(), method().deltas()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_deltas_are_computed_one_matrix_at_a_time(monkeypatch):
    asked, own = [], Factors.delta
    monkeypatch.setattr(Factors, "delta", lambda s, name: (asked.append(name), own(s, name))[1])
    deltas = method().deltas()
    assert asked == [] and list(deltas) == list(SHAPES)
    first, second = SHAPES
    assert deltas[second].shape == SHAPES[second]
    assert asked == [second, second]  # of SE and of OSM


def test_changed_leaves_the_rest_as_it_was():
    both = method()
    other = both.changed(alpha=7.0, scale="norm_matched")
    assert (both.config.alpha, both.config.scale) == (3.0, "plain")
    assert other.config == config(alpha=7.0, scale="norm_matched")
    assert (other.se, other.osm, other.seed) == (both.se, both.osm, both.seed)
    assert other.importance is both.importance
    thinner = both.changed(retention_rate=0.0)
    assert not any(mask.any() for mask in thinner.retained[0].values())  # drawn anew


# ---- strengths


def test_plain_and_rescaled_strengths():
    assert method(retention_rate=0.25).strengths() == (3.0, 2.0)
    assert method(retention_rate=0.25, rescale=True).strengths() == (12.0, 8.0)


def test_norm_matched_strengths_by_hand():
    both = five_long(scale="norm_matched")
    assert both.strengths() == (3.0 * 5 / 4, 0.0)  # P_OSM is 0 where it is kept
    # of the sets that are handed in, and not of its own
    kept = ({n: torch.ones(1, 2, dtype=torch.bool) for n in "ab"},) * 2
    assert both.strengths(kept) == (3.0, 2.0)
    assert five_long(scale="norm_matched", rescale=True).strengths() == (3.75, 0.0)
    assert both.deltas()["b"].tolist() == [[15.0, 0.0]]  # as long as alpha |P|


def test_kept_norm_by_hand():
    patch = five_long().se
    keep = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, True]])}
    assert kept_norm(patch, keep) == 3.0
    assert kept_norm(patch, {name: ~mask for name, mask in keep.items()}) == 4.0
    assert kept_norm(patch, {name: mask | True for name, mask in keep.items()}) == 5.0


# ---- saved top-rate sets


def saved(**changes):
    """The method with scores, and with sets of one bit a weight as notebook 02 saves them."""
    whole = method(**changes)
    rates = (whole.config.top_rate_se, whole.config.top_rate_osm)
    sets = tuple(
        BitSets({name: top_rate_set(s, rate) for name, s in found.items()}, {"top_rate": rate})
        for found, rate in zip(whole.importance, rates, strict=True)
    )
    return whole, SafePatching(whole.se, whole.osm, sets, whole.config, whole.seed)


@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_saved_sets_give_the_same_bits(scale):
    whole, packed = saved(scale=scale)
    assert all(a is b for a, b in zip(packed.important(), packed.importance, strict=True))
    assert whole.strengths() == packed.strengths() and whole.weights == packed.weights
    for name in SHAPES:
        assert torch.equal(whole.deltas()[name], packed.deltas()[name])


@pytest.mark.parametrize("key, made", [("top_rate_se", 0.5), ("top_rate_osm", 0.4)])
def test_saved_sets_refuse_another_top_rate(key, made):
    _, packed = saved()
    sentence = (
        f"The saved top-rate sets were made with patching.{key} {made}, and now it is 0.3: run "
        "notebook 02 again, or with importance.save 'scores'"
    )
    for make in (
        lambda: packed.changed(**{key: 0.3}),
        lambda: packed.changed(alpha=1.0).changed(beta=0.0).changed(**{key: 0.3}),
        lambda: method(importance=packed.importance, **{key: 0.3}),
    ):
        with pytest.raises(SpkitError) as caught:
            make()
        assert str(caught.value) == sentence
    assert packed.changed(**{key: made, "retention_rate": 0.1}).kept()
    assert method().changed(**{key: 0.3}).kept()  # scores can be ranked again


@pytest.mark.parametrize("key, value", [("scope", "global"), ("order", "rank_retained")])
def test_saved_sets_refuse_another_scope_and_order(key, value):
    _, packed = saved()
    sentence = (
        f"patching.{key} {value!r} needs the importances, and only the top-rate sets were saved: "
        "set importance.save to 'scores'"
    )
    for make in (
        lambda: packed.changed(**{key: value}),
        lambda: packed.changed(alpha=1.0).changed(**{key: value}),
        lambda: method(importance=packed.importance, **{key: value}),
    ):
        with pytest.raises(SpkitError) as caught:
            make()
        assert str(caught.value) == sentence


def test_sets_that_do_not_say_how_they_were_made_are_refused():
    sets = tuple(BitSets({n: s > 4 for n, s in found.items()}) for found in method().importance)
    with pytest.raises(SpkitError, match="made with patching.top_rate_se None, and now it is 0.5"):
        method(importance=sets)


# ---- what does not fit


@pytest.mark.parametrize(
    "field, where",
    [("osm", "the OSM patch"), (0, "the SE importance"), (1, "the OSM importance")],
)
def test_parts_that_do_not_fit_are_named(field, where):
    both = method()
    first, second = SHAPES

    def put(matrices):
        if field == "osm":
            osm = Factors("osm", matrices, 1.0)
            return SafePatching(both.se, osm, both.importance, both.config, SEED)
        importance = tuple(matrices if i == field else both.importance[i] for i in range(2))
        return SafePatching(both.se, both.osm, importance, both.config, SEED)

    whole = dict(both.osm.factors if field == "osm" else both.importance[field])
    with pytest.raises(SpkitError) as caught:
        put({first: whole[first]})
    assert str(caught.value) == f"{where} lacks the tensor {second!r}, which the SE patch has"
    with pytest.raises(SpkitError) as caught:
        put(whole | {"more": whole[first]})
    assert str(caught.value) == f"the SE patch lacks the tensor 'more', which {where} has"
    with pytest.raises(SpkitError) as caught:
        put({first: whole[first], second: whole[first]})
    assert str(caught.value) == f"{second!r} is [3, 7] in the SE patch, but [4, 6] in {where}"
    assert put(whole).kept()


def test_saved_sets_that_do_not_fit_are_named():
    _, packed = saved()
    first, second = SHAPES
    cut = BitSets({first: packed.importance[1][first]}, packed.importance[1].about)
    with pytest.raises(SpkitError, match=f"the OSM importance lacks the tensor '{second}'"):
        SafePatching(packed.se, packed.osm, (packed.importance[0], cut), packed.config, SEED)
