"""Outcomes from frames, the hierarchical bootstrap, paired tables, areas, forgetting: by hand."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from spkit.comparison.bootstrap import (
    Outcomes,
    Resampling,
    interval,
    paired,
    per_backbone,
    rates,
    resample,
    summary,
)
from spkit.comparison.forgetting import forgetting, intransigence
from spkit.comparison.fronts import Failures, paired_hypervolumes
from spkit.comparison.hypervolume import hypervolume, hypervolumes
from spkit.errors import SpkitError


def outcomes(values):
    """Labels for an array [variant, backbone, derivation, mask, item]: v0 ..., 0 ..., p0 ..."""
    values = np.asarray(values, dtype=np.float32)
    n, backbones, derivations, masks, items = values.shape
    names = [f"v{i}" for i in range(n)], list(range(backbones)), [f"p{i}" for i in range(items)]
    return Outcomes(values, *names, [backbones * derivations * masks] * n)


def on_items(*failures):
    """One run a variant: who fails on which item."""
    return outcomes(np.array(failures)[:, None, None, None, :])


def with_every_backbone(drawn):
    """The same draws, but every backbone occurs once in each."""
    return replace(drawn, runs=drawn.within)


def by_hand(items, runs=1):
    """A resampling with these item counts [draws, item], in which every run occurs once."""
    items = np.asarray(items)
    once = np.ones((len(items), runs, 1, 1), dtype=np.int64)
    return Resampling(once, items, once, seed=0)


def frame(cells, items=("p0", "p1")):
    """Rows of every (variant, backbone, derivation, mask) -> a verdict for each item."""
    rows = [
        dict(zip("variant backbone derivation mask id verdict".split(), row, strict=True))
        for cell, verdicts in cells.items()
        for row in [(*cell, i, v) for i, v in zip(items, verdicts, strict=True)]
    ]
    return pd.DataFrame(rows)


BAD, REFUSED, FINE = "harmful", "refusal", "correct"


@pytest.fixture
def cells():
    """base has one run on either backbone, plain two derivations, masked two masks on each."""
    made = {("base", b, 0, 0): (BAD, FINE if b else BAD) for b in (1, 0)}
    made |= {("plain", b, d, 0): (FINE, BAD if d else FINE) for b in (0, 1) for d in (0, 1)}
    for b, d, m in np.ndindex(2, 2, 2):
        made["masked", b, d, m] = (BAD if (b, d, m) == (1, 0, 1) else REFUSED, FINE)
    return made


def test_a_frame_is_sorted_into_its_cells_and_broadcast(cells):
    found = Outcomes.from_frame(frame(cells), {BAD})
    assert found.variants == ["base", "plain", "masked"]
    assert found.backbones == [0, 1] and found.items == ["p0", "p1"]
    assert found.values.dtype == np.float32 and found.n_runs == [2, 4, 8]
    wanted = np.zeros((3, 2, 2, 2, 2))
    wanted[0, 0] = 1  # backbone 0 of base: all harmful, whatever the derivation and the mask
    wanted[0, 1, :, :, 0] = 1
    wanted[1, :, 1, :, 1] = 1  # derivation 1 of plain, for every mask
    wanted[2, 1, 0, 1, 0] = 1
    np.testing.assert_array_equal(found.values, wanted)
    assert found.means() == pytest.approx([12 / 16, 4 / 16, 1 / 16])


def test_which_verdicts_fail_and_the_order_of_rows(cells):
    rows = frame(cells)
    strict = Outcomes.from_frame(rows, (BAD, REFUSED))
    assert strict.means()[2] == 0.5
    turned = Outcomes.from_frame(rows[::-1], [BAD])
    assert turned.variants == ["masked", "plain", "base"] and turned.items == ["p1", "p0"]
    straight = Outcomes.from_frame(rows, [BAD])
    np.testing.assert_array_equal(turned.values[::-1, ..., ::-1], straight.values)
    assert turned.n_runs == straight.n_runs[::-1]


@pytest.mark.parametrize(
    ("dropped", "said"),
    [
        (lambda f: (f.variant == "plain") & (f.backbone == 1), "'plain' lacks backbone 1$"),
        (
            lambda f: (f.variant == "plain") & (f.backbone == 1) & (f.derivation == 1),
            "'plain' lacks derivation 1 of backbone 1$",
        ),
        (
            lambda f: (f.variant == "masked") & (f.derivation == 1) & (f["mask"] == 0),
            "'masked' lacks mask 0 of derivation 1 of backbone 0$",
        ),
        (
            lambda f: (f.variant == "base") & (f.backbone == 1) & (f.id == "p1"),
            "'base' lacks item 'p1' of mask 0 of derivation 0 of backbone 1$",
        ),
    ],
)
def test_a_hole_is_named_with_its_place(cells, dropped, said):
    rows = frame(cells)
    with pytest.raises(SpkitError, match=said):
        Outcomes.from_frame(rows[~dropped(rows)], {BAD})


def test_other_items_are_not_the_same_items(cells):
    rows = frame(cells)
    rows.loc[(rows["variant"] == "plain") & (rows["id"] == "p0"), "id"] = "p9"
    with pytest.raises(SpkitError, match="lacks item 'p9'"):
        Outcomes.from_frame(rows, {BAD})


def test_frames_that_cannot_be_read(cells):
    rows = frame(cells)
    with pytest.raises(SpkitError, match=r"lacks the columns \['mask', 'verdict'\]"):
        Outcomes.from_frame(rows.drop(columns=["mask", "verdict"]), {BAD})
    with pytest.raises(SpkitError, match="has no rows"):
        Outcomes.from_frame(rows[:0], {BAD})
    with pytest.raises(SpkitError, match=r"rows without \['verdict'\]"):
        Outcomes.from_frame(rows.replace(FINE, None), {BAD})
    with pytest.raises(SpkitError, match="not the text 'harmful'"):
        Outcomes.from_frame(rows, BAD)
    with pytest.raises(SpkitError, match=r"no verdict is called \['harmfull'\]"):
        Outcomes.from_frame(rows, ["harmfull"])
    with pytest.raises(SpkitError, match="stand twice, .*variant base, backbone 1, .*id p0$"):
        Outcomes.from_frame(pd.concat([rows, rows[:1]]), {BAD})


def test_counts_add_up_on_every_level():
    drawn = resample(5, 3, 2, 7, draws=400)
    assert drawn.runs.shape == (400, 5, 3, 2) and drawn.items.shape == (400, 7)
    assert (drawn.runs.sum(axis=(1, 2, 3)) == 30).all() and (drawn.items.sum(axis=1) == 7).all()
    # a backbone comes in whole slots of 3*2 runs, a derivation in whole slots of 2
    slots = drawn.runs.sum(axis=(2, 3))
    assert (slots % 6 == 0).all() and set(np.unique(slots)) >= {0, 6, 12}
    assert (drawn.runs.sum(axis=3) % 2 == 0).all() and (drawn.runs % 2 == 1).any()
    assert (drawn.within.sum(axis=(2, 3)) == 6).all()
    fixed = with_every_backbone(resample(5, 3, 2, 7, draws=400))
    assert (fixed.runs.sum(axis=(2, 3)) == 6).all() and fixed.runs.std() > 0


def test_the_masks_of_two_slots_are_drawn_independently():
    """The count of a run of 2 derivations x 2 masks has variance 1: c ~ Bin(2, 1/2) slots, then
    Bin(2c, 1/2). Four runs drawn flat would have 0.75, one draw of masks for all slots 1.25."""
    runs = resample(1, 2, 2, 1, draws=20000).runs.reshape(20000, 4)
    assert runs.mean(axis=0) == pytest.approx(np.ones(4), abs=0.03)
    assert runs.var(axis=0) == pytest.approx(np.ones(4), abs=0.07)


def test_draws_depend_on_the_seed_alone():
    first, again, other = (resample(4, 2, 2, 9, draws=50, seed=s) for s in (3, 3, 4))
    for name in ("runs", "items", "within"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    assert np.array_equal(first.runs, resample(4, 2, 2, 30, draws=50, seed=3).runs)
    second = first.with_items(9)
    assert np.array_equal(second.runs, first.runs) and second.items.shape == (50, 9)
    assert abs(np.corrcoef(first.items.ravel(), second.items.ravel())[0, 1]) < 0.2
    assert not np.array_equal(second.items, first.with_items(9, item_set=2).items)


def test_a_resampling_needs_something_of_everything():
    for name, counts in (("masks", (2, 2, 0, 5)), ("items", (2, 2, 2, 0))):
        with pytest.raises(SpkitError, match=f"{name} must be 1 at least, not 0"):
            resample(*counts)
    with pytest.raises(SpkitError, match="draws must be 1 at least, not 0"):
        resample(1, 1, 1, 1, draws=0)


def test_rates_are_weighted_by_runs_and_by_items():
    values = np.zeros((2, 2, 1, 1, 3))
    values[0, 0, 0, 0] = 1, 0, 1
    values[0, 1, 0, 0] = 0, 1, 0
    values[1] = 1
    runs = np.array([[2, 0], [1, 1], [0, 2]])[:, :, None, None]
    items = np.array([[3, 0, 0], [0, 1, 2], [1, 2, 0]])
    found = rates(outcomes(values), Resampling(runs, items, runs, seed=0))
    # 2*3 of 6; run 0 gives 2 and run 1 gives 1 of 6; 2*2 of 6
    np.testing.assert_allclose(found, [[1, 1], [0.5, 1], [4 / 6, 1]])
    with pytest.raises(SpkitError, match=r"is for .*\[2, 1, 1, 4\], the outcomes have \[2, 1, 1, "):
        rates(outcomes(values), resample(2, 1, 1, 4))


def test_rates_are_those_of_a_resampled_data_set():
    values = np.random.default_rng(0).integers(0, 2, (3, 3, 2, 2, 5))
    drawn = resample(3, 2, 2, 5, draws=20)
    found = rates(outcomes(values), drawn)
    for draw in range(20):
        data = values.reshape(3, 12, 5)
        data = np.repeat(data, drawn.runs[draw].ravel(), axis=1)
        data = np.repeat(data, drawn.items[draw], axis=2)
        assert found[draw] == pytest.approx(data.mean(axis=(1, 2)))


def test_the_percentile_interval():
    low, high = interval(np.stack([np.arange(101), 2 * np.arange(101)], axis=1), confidence=0.9)
    assert low == pytest.approx([5, 10]) and high == pytest.approx([95, 190])
    for wrong in (0, 1, 95):
        with pytest.raises(SpkitError, match=f"between 0 and 1, not {wrong}"):
            interval(np.arange(3), wrong)


def test_the_summary_in_percent(cells):
    found = Outcomes.from_frame(frame(cells), {BAD})
    table = summary(found, resample(2, 2, 2, 2, draws=500))
    assert list(table) == "variant n_backbones n_runs n_items mean low high".split()
    assert list(table["variant"]) == ["base", "plain", "masked"]
    assert list(table["n_runs"]) == [2, 4, 8]
    assert set(table["n_backbones"]) == {2} and set(table["n_items"]) == {2}
    assert list(table["mean"]) == pytest.approx([75, 25, 6.25])
    # by chance both items are the one that base fails on, or both backbones the first
    assert table.loc[0, "low"] == 0 and table.loc[0, "high"] == 100


def test_data_without_variance_have_no_width():
    table = summary(outcomes(np.ones((1, 3, 2, 2, 4))), resample(3, 2, 2, 4, draws=100))
    assert table[["mean", "low", "high"]].to_numpy().tolist() == [[100, 100, 100]]


def test_variance_between_backbones_is_wider_than_a_binomial():
    """Two of five backbones always fail: a draw is Bin(5, 0.4)/5, its quantiles are 0 and 4/5."""
    values = np.zeros((1, 5, 2, 2, 50))
    values[:, :2] = 1
    table = summary(outcomes(values), resample(5, 2, 2, 50))
    assert table.loc[0, ["mean", "low", "high"]].tolist() == pytest.approx([40, 0, 80])
    naive = 2 * 1.96 * 100 * math.sqrt(0.4 * 0.6 / 1000)
    assert table.loc[0, "high"] - table.loc[0, "low"] > 10 * naive
    fixed = summary(outcomes(values), with_every_backbone(resample(5, 2, 2, 50)))
    assert fixed.loc[0, ["low", "high"]].tolist() == pytest.approx([40, 40])


def test_intervals_cover_where_backbones_and_items_differ():
    """20 backbones x 30 items, both with effects: near 95 %, where a binomial is far below."""
    rng = np.random.default_rng(0)
    drawn = resample(20, 1, 1, 30, draws=300)
    covered = naive = 0
    for _ in range(150):
        chance = rng.choice([0.1, 0.9], (20, 1)) * 0.5 + rng.choice([0.1, 0.9], (1, 30)) * 0.5
        values = (rng.random((20, 30)) < chance).reshape(1, 20, 1, 1, 30)
        low, high = interval(rates(outcomes(values), drawn)[:, 0])
        covered += low <= 0.5 <= high
        naive += abs(values.mean() - 0.5) <= 1.96 * math.sqrt(0.25 / 600)
    assert 0.88 <= covered / 150 <= 0.99
    assert naive / 150 < 0.7


def test_equal_variants_differ_by_nothing():
    once = np.random.default_rng(1).integers(0, 2, (1, 4, 2, 2, 10))
    twins = outcomes(np.concatenate([once, once]))
    drawn = resample(4, 2, 2, 10, draws=300)
    spread = summary(twins, drawn)
    assert (spread["high"] - spread["low"] > 10).all()
    row = paired(twins, drawn, "v0").iloc[0]
    assert row["variant"] == "v1" and row["reference"] == "v0"
    assert row[["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert (row["p"], row["p_holm"]) == (1, 1)
    assert (row["backbones_below"], row["backbones_above"], row["backbones"]) == (0, 0, 4)


def test_p_values_and_holm_by_hand():
    """99 draws: item 0 is missing in one, item 1 in none, item 2 in two. Without the item on which
    a variant fails there is a tie, so p is 2 (1 + ties) / 100."""
    found = on_items([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1])
    table = paired(found, by_hand([[1, 1, 1]] * 96 + [[0, 2, 1]] + [[1, 2, 0]] * 2), "v0")
    assert list(table["variant"]) == ["v1", "v2", "v3"]
    assert list(table["difference"]) == pytest.approx([100 / 3] * 3)
    assert list(table["p"]) == pytest.approx([0.04, 0.02, 0.06])
    assert list(table["p_holm"]) == pytest.approx([0.08, 0.06, 0.08])
    turned = paired(found, by_hand([[1, 1, 1]] * 98 + [[0, 2, 1]]), "v1")
    assert turned.loc[0, "difference"] == pytest.approx(-100 / 3)
    assert turned.loc[0, "p"] == pytest.approx(0.04)  # v0 - v1: the other tail


@pytest.fixture
def better_on_one():
    """v0 fails on backbone 0 alone, v1 never, v2 always; runs and items do not matter."""
    values = np.zeros((3, 2, 2, 1, 4))
    values[0, 0] = 1
    values[2] = 1
    return outcomes(values)


def test_on_how_many_backbones_the_difference_holds(better_on_one):
    table = paired(better_on_one, resample(2, 2, 1, 4, draws=500), "v0").set_index("variant")
    # both slots may draw one backbone: the whole range is within the interval
    assert table.loc["v1", ["difference", "low", "high"]].tolist() == [-50, -100, 0]
    assert table.loc["v2", ["difference", "low", "high"]].tolist() == [50, 0, 100]
    counts = table[["backbones_below", "backbones_above", "backbones"]]
    assert counts.loc["v1"].tolist() == [1, 0, 2] and counts.loc["v2"].tolist() == [0, 1, 2]
    fixed = paired(better_on_one, with_every_backbone(resample(2, 2, 1, 4, draws=99)), "v0")
    assert fixed.loc[0, ["difference", "low", "high"]].tolist() == [-50, -50, -50]
    assert list(fixed["p"]) == pytest.approx([0.02, 0.02])
    assert list(fixed["p_holm"]) == pytest.approx([0.04, 0.04])


def test_a_single_backbone_has_its_own_interval(better_on_one):
    table = per_backbone(better_on_one, resample(2, 2, 1, 4, draws=200), "v0")
    assert list(table) == "variant backbone rate reference_rate difference low high".split()
    assert table.to_numpy().tolist() == [
        ["v1", 0, 0, 100, -100, -100, -100],
        ["v1", 1, 0, 0, 0, 0, 0],
        ["v2", 0, 100, 100, 0, 0, 0],
        ["v2", 1, 100, 0, 100, 100, 100],
    ]


def test_a_single_backbone_resamples_its_items():
    found = on_items([0, 0], [1, 0])
    (row,) = per_backbone(found, by_hand([[2, 0]] * 5 + [[0, 2]] * 5), "v0").to_dict("records")
    assert (row["rate"], row["difference"], row["low"], row["high"]) == (50, 50, 0, 100)


def test_comparisons_that_cannot_be_made(better_on_one):
    drawn = resample(2, 2, 1, 4, draws=10)
    for table in (paired, per_backbone):
        with pytest.raises(SpkitError, match="no variant 'v7'; there are .*'v2'"):
            table(better_on_one, drawn, "v7")
        with pytest.raises(SpkitError, match="the resampling is for"):
            table(better_on_one, resample(2, 2, 1, 5, draws=10), "v0")
    with pytest.raises(SpkitError, match="no variant to compare with 'v0'"):
        paired(on_items([0, 1]), resample(1, 1, 1, 2, draws=10), "v0")


STAIRS = [(0.5, 0.3), (0.2, 0.6), (0.8, 0.1)]


def test_the_area_of_three_points_by_hand():
    assert hypervolume(STAIRS) == pytest.approx(0.3 * 0.4 + 0.3 * 0.7 + 0.2 * 0.9)
    assert hypervolume(STAIRS, (0.9, 0.9)) == pytest.approx(0.3 * 0.3 + 0.3 * 0.6 + 0.1 * 0.8)
    assert hypervolume([(0, 0)]) == 1 and hypervolume([]) == 0


def test_dominated_points_and_points_beyond_the_reference_add_nothing():
    whole = hypervolume(STAIRS)
    for more in ((0.6, 0.7), (0.5, 0.4), (0.5, 0.3), (1.2, 0.0), (0.0, 1.5), (1.0, 0.0)):
        assert hypervolume([*STAIRS, more]) == pytest.approx(whole)
    assert hypervolume([(1.2, 0.0), (0.1, 1.5)]) == 0


def test_areas_of_draws_agree_with_counted_squares():
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 13, (30, 4, 2))  # some beyond the reference, at 10
    x, y = corners[..., 0], corners[..., 1]
    column, row = np.indices((10, 10))
    covered = (x[..., None, None] <= column) & (y[..., None, None] <= row)
    counted = covered.any(axis=1).sum(axis=(1, 2))
    np.testing.assert_allclose(hypervolumes(x, y, (10, 10)), counted)


def test_points_that_are_none():
    with pytest.raises(SpkitError, match=r"shape \[n, 2\], not \[2, 3\]"):
        hypervolume(np.zeros((2, 3)))
    with pytest.raises(SpkitError, match="no number"):
        hypervolume([(0.1, math.nan)])
    with pytest.raises(SpkitError, match=r"not \[5, 2\] and \[5, 3\]"):
        hypervolumes(np.zeros((5, 2)), np.zeros((5, 3)))


@pytest.fixture
def two_sides():
    """Harm 1/4, 2/4, 3/4 and refusal 4/8, 2/8, 2/8 of v0, v1, v2, with 99 equal draws."""
    harm = on_items([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    refusal = on_items([1] * 4 + [0] * 4, [1] * 2 + [0] * 6, [1] * 2 + [0] * 6)
    drawn = by_hand(np.ones((99, 4))), by_hand(np.ones((99, 8)))
    return Failures(harm, drawn[0]), Failures(refusal, drawn[1])


def test_areas_of_methods_by_hand(two_sides):
    methods = {"both": [0, 1], "weak": [2], "turned": [1, 0]}
    table = paired_hypervolumes(*two_sides, methods, "both").set_index("method")
    both, weak = 0.25 * 0.5 + 0.5 * 0.75, 0.25 * 0.75
    assert table["hypervolume"].tolist() == pytest.approx([both, weak, both])
    assert table["low"].tolist() == pytest.approx([both, weak, both])
    assert table["high"].tolist() == pytest.approx([both, weak, both])
    assert set(table["against"]) == {"both"}
    compared = table.loc[["weak", "turned"]]
    for column in ("difference", "difference_low", "difference_high"):
        assert compared[column].tolist() == pytest.approx([weak - both, 0])
    assert compared["p"].tolist() == pytest.approx([0.02, 1])
    assert compared["p_holm"].tolist() == pytest.approx([0.04, 1])
    empty = ["difference", "difference_low", "difference_high", "p", "p_holm"]
    assert table.loc["both", empty].isna().all()
    shifted = paired_hypervolumes(*two_sides, {"weak": [2]}, "weak", reference=(1.0, 0.5))
    assert shifted.loc[0, "hypervolume"] == pytest.approx(0.25 * 0.25)


def test_areas_share_their_runs_and_not_their_items():
    """v0 fails on one of two backbones, on either side. With shared runs an area is 1, 1/4 or 0 in
    1/4, 1/2 and 1/4 of the draws; were they not shared, 1 would come in 1/16 of them."""
    values = np.zeros((2, 2, 1, 1, 5))
    values[0, 0] = 1
    both = outcomes(values)
    drawn = resample(2, 1, 1, 5, draws=800)
    sides = Failures(both, drawn), Failures(both, drawn.with_items(5))
    table = paired_hypervolumes(*sides, {"a": [0], "b": [1]}, "b", confidence=0.6)
    assert table.loc[0, ["hypervolume", "low", "high"]].tolist() == [0.25, 0, 1]
    names = ["difference", "difference_low", "difference_high"]
    assert table.loc[0, names].tolist() == [-0.75, -1, 0]
    with pytest.raises(SpkitError, match="must not share their item draws"):
        paired_hypervolumes(Failures(both, drawn), Failures(both, drawn), {"a": [0]}, "a")
    other = resample(2, 1, 1, 5, draws=400, seed=1)
    with pytest.raises(SpkitError, match="must share their resampled runs"):
        paired_hypervolumes(Failures(both, drawn), Failures(both, other), {"a": [0]}, "a")


def test_methods_that_do_not_fit(two_sides):
    harm, (refusal, drawn) = two_sides[0], (two_sides[1].outcomes, two_sides[1].resampling)
    with pytest.raises(SpkitError, match=r"no method 'c'; there are \['a'\]"):
        paired_hypervolumes(*two_sides, {"a": [0]}, "c")
    for places in ([3], [-1], []):
        with pytest.raises(SpkitError, match="method 'b' must have variants from 0 to 2, not"):
            paired_hypervolumes(*two_sides, {"a": [0], "b": places}, "a")
    fewer = Outcomes(refusal.values[:2], ["v0", "v1"], [0], refusal.items, [1, 1])
    with pytest.raises(SpkitError, match="other variants: .*'v2'"):
        paired_hypervolumes(harm, Failures(fewer, drawn), {"a": [0]}, "a")
    elsewhere = Outcomes(refusal.values, refusal.variants, [9], refusal.items, [1, 1, 1])
    with pytest.raises(SpkitError, match=r"other backbones: \[0\] and \[9\]"):
        paired_hypervolumes(harm, Failures(elsewhere, drawn), {"a": [0]}, "a")


NAN = math.nan
SCORES = [[0.9, NAN, NAN], [0.95, 0.8, NAN], [0.6, 0.5, 0.7]]


def test_forgetting_by_hand():
    assert forgetting(SCORES) == pytest.approx((0.95 - 0.6 + 0.8 - 0.5) / 2)
    assert forgetting([[0.4]]) == 0
    assert forgetting([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.2)  # it got better
    known_before = [[0.9, 1.0, 0.3], *SCORES[1:]]  # task 1 before stage 1 does not count
    assert forgetting(known_before) == forgetting(SCORES)


def test_intransigence_by_hand():
    assert intransigence([0.9, 0.95, 0.8], SCORES) == pytest.approx((0 + 0.15 + 0.1) / 3)
    assert intransigence([0.3], [[0.4]]) == pytest.approx(-0.1)


def test_scores_that_are_missing():
    with pytest.raises(SpkitError, match=r"as many, not \[2, 3\]"):
        forgetting(np.zeros((2, 3)))
    with pytest.raises(SpkitError, match="no score of task 0 after stage 1"):
        forgetting([[0.9, 0.1], [NAN, 0.8]])
    with pytest.raises(SpkitError, match=r"must be 3 numbers, one a stage, not \[0.9, 0.8\]"):
        intransigence([0.9, 0.8], SCORES)
    with pytest.raises(SpkitError, match="must be 3 numbers"):
        intransigence([0.9, NAN, 0.8], SCORES)
