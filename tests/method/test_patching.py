"""The equations of patching.py against values computed by hand, and their properties."""

import ast
import hashlib
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from spkit.method import patching
from spkit.method.patching import (
    difference_set,
    global_top_rate_sets,
    intersection_set,
    kept_set,
    merged_delta,
    norm,
    norm_matched,
    rate_count,
    rescaled,
    retention_mask,
    retention_slice,
    squared_norm,
    top_rate_set,
    top_rate_sets,
)
from spkit.models.deltas import add_delta

KEY = dict(seed=0, patch="se", tensor="model.layers.0.self_attn.q_proj.weight")
GOLDEN_ROWS = ["0000000100011000", "0010010010010110", "0000100000001011", "1100111001000100"]
GOLDEN_SUM, GOLDEN_HASH = 314252, "85f062dac2a561a9"
RATES = st.one_of(
    st.sampled_from([0.0, 0.29, 0.3, 0.5, 1.0]),
    st.decimals(0, 1, places=4).map(float),
    st.floats(0, 1),
)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(text):
    return torch.tensor([letter == "1" for letter in text])


# ---- retention


def test_retention_golden_values():
    """If one of these changes, no patch made before can be redrawn: raise RETENTION_VERSION."""
    assert patching.RETENTION_VERSION == 1
    drawn = retention_mask((4, 16), 0.3, **KEY).int()
    assert ["".join(map(str, row.tolist())) for row in drawn] == GOLDEN_ROWS
    long = retention_mask((1000, 1050), 0.3, **KEY)  # longer than one chunk
    assert int(long.sum()) == GOLDEN_SUM
    assert hashlib.sha256(np.packbits(long.numpy()).tobytes()).hexdigest()[:16] == GOLDEN_HASH


def test_retention_is_the_documented_draw():
    """Word i of Philox against round(p * 2**64), as docs say, written out."""
    text = f'[1, 7, "osm", "{KEY["tensor"]}"]'
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    words = [int(word) for word in np.random.Philox(key=key).random_raw(60)]
    expected = [word < round(Fraction(3, 10) * 2**64) for word in words]
    assert retention_mask((6, 10), 0.3, **KEY | dict(seed=7, patch="osm")).flatten().tolist() == (
        expected
    )


@given(st.integers(0, 500), st.integers(0, 300), RATES, SEEDS)
def test_a_slice_is_drawn_alone(start, count, rate, seed):
    key = KEY | dict(seed=seed)
    whole = retention_mask((800,), rate, **key)
    assert torch.equal(retention_slice(start, count, rate, **key), whole[start : start + count])


@given(SHAPES, RATES, st.integers(1, 50))
def test_retention_does_not_depend_on_chunks_or_order(shape, rate, chunk):
    whole = retention_mask(shape, rate, **KEY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching, "DRAWS_AT_ONCE", chunk)
        torch.manual_seed(chunk)  # no framework's random state matters
        retention_mask(shape, rate, **KEY | dict(tensor="another"))
        assert torch.equal(retention_mask(shape, rate, **KEY), whole)


def test_retention_is_exact_at_the_ends_and_nested_between():
    assert not retention_mask((50, 50), 0, **KEY).any()
    assert retention_mask((50, 50), 1, **KEY).all()
    third, half = retention_mask((50, 50), 0.3, **KEY), retention_mask((50, 50), 0.5, **KEY)
    assert not (third & ~half).any()


def test_retention_keeps_the_rate_and_is_independent_between_names():
    n, p = 200_000, 0.3
    masks = [
        retention_mask((n,), p, **KEY | change)
        for change in ({}, {"seed": 1}, {"patch": "osm"}, {"tensor": "another"})
    ]
    for drawn in masks:  # five standard deviations
        assert abs(drawn.double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    for other in masks[1:]:
        assert abs((masks[0] & other).double().mean() - p * p) < 5 * (p * p / n) ** 0.5


def test_names_cannot_run_into_each_other():
    one = retention_mask((64,), 0.5, seed=1, patch="a", tensor='b", "c')
    two = retention_mask((64,), 0.5, seed=1, patch='a", "b', tensor="c")
    assert not torch.equal(one, two)


def test_a_negative_slice_is_an_error():
    with pytest.raises(ValueError, match="must not be negative"):
        retention_slice(-1, 3, 0.5, **KEY)


# ---- selection


@pytest.mark.parametrize(
    "rate, total, count",
    [(0.29, 100, 29), (0.1, 10, 1), (0.3, 10, 3), (0.07, 100, 7), (0.1, 19, 1), (1, 7, 7)]
    + [(0.0, 7, 0), (1e-05, 100_000, 1), ("0.5", 3, 1), (np.float64(0.57), 100, 57)],
)
def test_rate_count_takes_the_decimal_at_its_word(rate, total, count):
    assert rate_count(rate, total) == count


def test_top_rate_set_by_hand():
    score = torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.0]])
    assert top_rate_set(score, 0.5).tolist() == [[False, True, True], [True, False, False]]
    assert top_rate_set(score, 0.2).tolist() == [[False, True, False], [False, False, False]]
    assert not top_rate_set(score, 0).any() and top_rate_set(score, 1).all()


def test_top_rate_set_among_counts_only_those():
    score = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    assert torch.equal(top_rate_set(score, 0.5, among=mask("011110")), mask("011000"))
    assert not top_rate_set(score, 0.5, among=mask("000000")).any()


def test_all_equal_scores_are_taken_by_index():
    assert torch.equal(top_rate_set(torch.zeros(10), 0.3), mask("1110000000"))
    assert torch.equal(top_rate_set(torch.tensor([0.0, -0.0, 0.0]), 0.4), mask("100"))


@given(SHAPES, RATES, SEEDS, st.booleans(), DTYPES)
def test_top_rate_set_against_a_stable_sort(shape, rate, seed, coarse, dtype):
    """Exact count, the largest scores, ties by index: what a stable descending sort says."""
    score = random(shape, seed, dtype)
    if coarse:
        score = score.round()  # many ties
    chosen = top_rate_set(score, rate)
    count = int(Fraction(str(rate)) * score.numel())
    order = sorted(range(score.numel()), key=lambda i: (-float(score.flatten()[i]), i))
    assert chosen.shape == score.shape
    assert chosen.flatten().nonzero().flatten().tolist() == sorted(order[:count])


@given(RATES, SEEDS, st.booleans())
def test_the_global_set_is_the_set_of_all_scores_in_a_row(rate, seed, masked):
    scores = {"a": random((3, 4), seed).round(), "b": random((5, 2), seed + 1).round()}
    among = {name: random(s.shape, seed + 2) > 0 for name, s in scores.items()} if masked else None
    sets = global_top_rate_sets(scores, rate, among)

    def row(parts):
        return torch.cat([parts["a"].flatten(), parts["b"].flatten()])

    expected = top_rate_set(row(scores), rate, row(among) if masked else None)
    assert torch.equal(row(sets), expected)


def test_a_nan_score_is_an_error_that_names_the_matrix():
    with pytest.raises(ValueError, match="scores contain NaN$"):
        top_rate_set(torch.tensor([1.0, float("nan")]), 0.5)
    with pytest.raises(ValueError, match="scores contain NaN b$"):
        global_top_rate_sets({"a": torch.ones(2), "b": torch.tensor([float("nan")])}, 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.0001, float("nan"), float("inf"), "a tenth"])
def test_a_rate_outside_0_to_1_is_an_error(rate):
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        top_rate_set(torch.ones(3), rate)
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        retention_mask((3,), rate, **KEY)


# ---- sets


def test_sets_by_hand():
    se, osm = mask("1100"), mask("1010")
    assert torch.equal(difference_set(se, osm), mask("0100"))
    assert torch.equal(difference_set(osm, se), mask("0010"))
    assert torch.equal(intersection_set(se, osm), mask("1000"))
    with pytest.raises(ValueError, match="other must be bool"):
        difference_set(se, osm.float())


@pytest.mark.parametrize("order", patching.ORDERS)
def test_kept_set_by_hand(order):
    """Retention thins what the difference leaves, whatever order the sets were ranked in."""
    se, osm = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2, 6, 5, 4, 3])
    held_se, held_osm = mask("101011"), mask("010110")
    top_se = top_rate_sets({"w": se}, 0.5, {"w": held_se}, order=order)["w"]
    top_osm = top_rate_sets({"w": osm}, 0.34, {"w": held_osm}, order=order)["w"]
    among_all = order == "rank_all"
    assert torch.equal(top_se, mask("111000" if among_all else "101000"))
    assert torch.equal(top_osm, mask("001100" if among_all else "000100"))
    # ranked among the retained, 2 stays: OSM's copy of it is not retained
    assert torch.equal(
        kept_set(held_se, top_se, top_osm), mask("100000" if among_all else "101000")
    )
    assert torch.equal(kept_set(held_osm, top_osm, top_se), mask("000100"))


@pytest.mark.parametrize("wrong", [{"order": "retain"}, {"scope": "layer"}])
def test_top_rate_sets_name_what_is_allowed(wrong):
    with pytest.raises(ValueError, match="allowed are"):
        top_rate_sets({}, 0.1, {}, **wrong)


# ---- strengths


def test_strengths_by_hand():
    delta = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    assert squared_norm(delta) == 169
    assert squared_norm(delta, delta < 5) == 25
    assert norm([169, 0, 0]) == 13
    assert norm_matched(2.0, 13.0, 5.0) == pytest.approx(5.2)
    assert norm_matched(2.0, 13.0, 0.0) == 0
    assert rescaled(0.9, 0.3) == pytest.approx(3.0)
    assert rescaled(0.9, 0.0) == 0


# ---- composition: the merged delta, and theta + delta as models/patched.py adds it


def patched(weight, *parts):
    """alpha * se + beta * osm on their sets, added to one matrix."""
    return add_delta(weight, merged_delta(*parts))


def test_composition_by_hand():
    weight = torch.tensor([1.0, 1.0, 1.0, -0.0])
    se, osm = torch.tensor([0.5, 9.0, 9.0, 9.0]), torch.tensor([9.0, 0.25, 9.0, 9.0])
    made = patched(weight, se, mask("1000"), osm, mask("0100"), 2.0, -4.0)
    assert made.tolist() == [2.0, 0.0, 1.0, 0.0]
    assert torch.signbit(made[3])
    assert weight.tolist() == [1.0, 1.0, 1.0, 0.0]  # not written to


def test_overlapping_sets_add_up():
    merged = merged_delta(torch.ones(2), mask("11"), torch.ones(2), mask("01"), 2.0, 3.0)
    assert merged.tolist() == [2.0, 5.0]
    assert merged.dtype == torch.float32


@given(SHAPES, SEEDS, DTYPES, st.floats(-8, 8), st.floats(-8, 8))
def test_composition_touches_the_kept_sets_only(shape, seed, dtype, alpha, beta):
    weight = random(shape, seed, dtype)
    se, osm = random(shape, seed + 1), random(shape, seed + 2)
    keep_se = random(shape, seed + 3) > 0
    keep_osm = (random(shape, seed + 4) > 0) & ~keep_se
    made = patched(weight, se, keep_se, osm, keep_osm, alpha, beta)
    assert made.dtype == dtype
    outside = ~(keep_se | keep_osm)
    assert torch.equal(bits(made)[outside], bits(weight)[outside])
    expected = (weight.float() + se * torch.tensor(alpha)).to(dtype)
    assert torch.equal(made[keep_se], expected[keep_se])


@given(SEEDS, DTYPES)
def test_zero_strengths_copy_every_bit(seed, dtype):
    """Also -0.0, infinities and the payloads of NaN, and whatever the deltas are."""
    shape = (16, 16)
    raw = torch.randint(
        -(2**15), 2**15, (16, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(seed)
    )
    weight = raw.view(dtype)[:, :16].contiguous()
    weight[0, 0] = -0.0
    everything = torch.ones(shape, dtype=torch.bool)
    delta = random(shape, seed)
    made = patched(weight, delta, everything, -delta, everything, 0.0, 0.0)
    assert torch.equal(bits(made), bits(weight))
    thrown_away = torch.full(shape, float("inf"))  # not kept: must not turn into NaN
    made = patched(weight, thrown_away, ~everything, thrown_away, ~everything, 1.0, 1.0)
    assert torch.equal(bits(made), bits(weight))


def test_rounding_swallows_small_deltas():
    """In bf16 the steps near 1 are 2**-7 wide: what is below half of that changes nothing."""
    delta = torch.tensor([2**-9, 2**-7, 0.0, 2**-9])
    lost = [
        int(((add_delta(weight, delta) == weight) & (delta != 0)).sum())
        for weight in (torch.ones(4), torch.ones(4, dtype=torch.bfloat16))
    ]
    assert lost == [0, 2]


def test_composition_refuses_what_is_not_finite_or_does_not_fit():
    ones, everything = torch.ones(2), mask("11")
    with pytest.raises(ValueError, match="kept delta, scaled, is not finite"):
        merged_delta(torch.tensor([1.0, float("nan")]), everything, ones, everything, 1, 1)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        add_delta(ones.half(), torch.full((2,), 1e5))
    with pytest.raises(ValueError, match="differ"):
        add_delta(ones, torch.ones(3))
    with pytest.raises(ValueError, match="keep must be bool"):
        merged_delta(ones, ones, ones, everything, 1, 1)


def test_patching_imports_nothing_of_ours_but_a_ranking_of_arrays():
    tree = ast.parse(Path(patching.__file__).read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert [name for name in names if name.startswith("spkit")] == ["spkit.system.ranking"]
    assert {name.split(".")[0] for name in names} == {
        *("hashlib", "json", "collections", "fractions", "math", "numpy", "torch", "spkit")
    }
