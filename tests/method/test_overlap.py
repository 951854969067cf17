"""Where sets are and what they share, by hand; the summary's tables against exact rankings."""

import math

import numpy as np
import pytest
import torch

from spkit.method.overlap import COARSE, FINE, RATES, ImportanceSummary, overlap, where
from spkit.method.patching import global_top_rate_sets, top_rate_set

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight"
SHAPES = {Q: (60, 50), UP: (80, 100), "lm_head.weight": (40, 40)}
WIDTH = {"fine": 2.0 ** -(FINE - 8), "coarse": 2.0 ** -(COARSE - 8)}  # 8 bits are the exponent's


def scores(seed=0):
    """As importances are: positive, spread over many magnitudes, and matrices differ."""
    generator = torch.Generator().manual_seed(seed)
    window = {"se": {}, "osm": {}}
    for place, (name, shape) in enumerate(SHAPES.items()):
        common = torch.randn(shape, generator=generator)
        for patch in window:
            own = torch.randn(shape, generator=generator)
            window[patch][name] = torch.exp(2 * (common + own) + place)
    return window


def summary(*windows, **options):
    made = ImportanceSummary(**options)
    for window in windows:
        made.add(window)
    return made


WINDOW = scores()
SUMMARY = summary(WINDOW)


def exact(name, patch, rate):
    return top_rate_set(WINDOW[patch][name], rate).numpy()


def blurred(name, patch, rate):
    """How many weights lie within a bin's width of the rate's threshold: those that may be more."""
    values = np.sort(WINDOW[patch][name].numpy().ravel())[::-1]
    threshold = values[max(1, int(rate * values.size)) - 1]
    return int((np.abs(values / threshold - 1) <= WIDTH["fine"]).sum())


def test_the_bins_are_as_narrow_as_stated():
    assert WIDTH == {"fine": 2.0**-12, "coarse": 2.0**-8}


@pytest.mark.parametrize("rate", RATES)
def test_overlap_matrix_by_matrix(rate):
    frame = SUMMARY.overlap(rate).set_index("tensor")
    assert list(frame.index) == list(SHAPES)
    assert frame["layer"].tolist() == [0, 11, -1]
    assert frame["module"].tolist() == ["q_proj", "up_proj", "lm_head"]
    for name in SHAPES:
        row, own, other = frame.loc[name], exact(name, "se", rate), exact(name, "osm", rate)
        more = {patch: blurred(name, patch, rate) for patch in ("se", "osm")}
        assert own.sum() <= row["own"] < own.sum() + more["se"] + 1
        assert other.sum() <= row["other"] < other.sum() + more["osm"] + 1
        both = (own & other).sum()
        assert both <= row["both"] <= both + more["se"] + more["osm"]
        assert row["share"] == row["both"] / row["own"]
        assert row["jaccard"] == row["both"] / (row["own"] + row["other"] - row["both"])
        assert abs(row["share"] - both / own.sum()) < 0.01 or own.sum() < 100


def test_overlap_by_rate_sums_the_matrices():
    frame = SUMMARY.overlap_by_rate()
    assert list(frame.columns) == ["rate", "share", "jaccard"]
    assert frame["rate"].tolist() == list(RATES)
    for rate, share, jaccard in frame.itertuples(index=False):
        pairs = [(exact(name, "se", rate), exact(name, "osm", rate)) for name in SHAPES]
        both = sum((a & b).sum() for a, b in pairs)
        assert share == pytest.approx(both / sum(a.sum() for a, _ in pairs), abs=5e-3)
        assert jaccard == pytest.approx(both / sum((a | b).sum() for a, b in pairs), abs=5e-3)
    assert frame["share"].is_monotonic_increasing and frame["share"].iloc[0] > 0.1


def test_the_rates_that_are_used_may_differ():
    made = summary(WINDOW, rates=(0.1, 0.5), used=(0.4, 0.71))
    frame = made.overlap(0.4, 0.71).set_index("tensor")
    own = {name: exact(name, "se", 0.4) for name in SHAPES}
    other = {name: exact(name, "osm", 0.71) for name in SHAPES}
    for name in SHAPES:
        both = (own[name] & other[name]).sum()
        assert frame.loc[name, "share"] == pytest.approx(both / own[name].sum(), abs=5e-3)
    total = sum((own[n] & other[n]).sum() for n in SHAPES) / sum(own[n].sum() for n in SHAPES)
    assert made.share(0.4, 0.71) == pytest.approx(total, abs=5e-3)
    # the table of equal rates, and the shares of the top, are as without
    plain = summary(WINDOW, rates=(0.1, 0.5))
    assert made.overlap_by_rate().equals(plain.overlap_by_rate())
    both = (made.overlap(0.5), plain.overlap(0.5))
    assert both[0].reset_index(drop=True).equals(both[1].reset_index(drop=True))
    # a pair that is among the rates is counted once
    assert len(summary(WINDOW, rates=(0.1,), used=(0.1, 0.1)).overlap(0.1)) == len(SHAPES)


def test_concentration():
    frame = SUMMARY.concentration()
    assert list(frame.index) == list(SHAPES)
    assert list(frame.columns) == ["top 1%", "top 10%", "top 50%"]
    for name in SHAPES:
        values = WINDOW["se"][name].numpy().astype(np.float64)
        for column, rate in zip(frame.columns, (0.01, 0.1, 0.5), strict=True):
            held = values[exact(name, "se", rate)].sum() / values.sum()
            # a few weights more, each of about the threshold's size
            count = int(rate * values.size)
            threshold = np.sort(values.ravel())[-count] * (1 + WIDTH["fine"])
            more = blurred(name, "se", rate) * threshold / values.sum()
            assert held - 1e-9 <= frame.loc[name, column] <= held + more + 1e-9


@pytest.mark.parametrize("patch", ["se", "osm"])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.4])
def test_the_top_of_all_weights(patch, rate):
    frame = SUMMARY.in_global_top(patch, rate).set_index("tensor")
    expected = global_top_rate_sets(WINDOW[patch], rate)
    everything = torch.cat([value.flatten() for value in WINDOW[patch].values()])
    threshold = everything.sort(descending=True).values[int(rate * everything.numel()) - 1]
    for name, (rows, columns) in SHAPES.items():
        near = (WINDOW[patch][name] / threshold - 1).abs() <= WIDTH["coarse"]
        exactly = int(expected[name].sum())
        assert frame.loc[name, "n"] == rows * columns
        assert exactly <= frame.loc[name, "k"] <= exactly + int(near.sum())
        assert frame.loc[name, "share"] == frame.loc[name, "k"] / (rows * columns)
    assert frame["k"].sum() == pytest.approx(rate * everything.numel(), rel=0.02, abs=2)


def test_by_hand():
    """Powers of 2 have bins of their own, so nothing is approximate."""
    se = 2.0 ** torch.arange(10).reshape(2, 5)
    osm = 2.0 ** torch.arange(9, -1, -1).reshape(2, 5)
    made = summary({"se": {"a": se}, "osm": {"a": osm}}, rates=(0.1, 0.5, 0.6))
    assert made.weights == 10
    assert made.concentration().to_dict() == {
        "top 10%": {"a": 512 / 1023},
        "top 50%": {"a": (1023 - 31) / 1023},
    }
    counts = made.overlap(0.6)[["own", "other", "both", "share", "jaccard"]]
    assert counts.to_numpy().tolist() == [[6, 6, 2, 2 / 6, 2 / 10]]
    assert made.overlap_by_rate()["share"].tolist() == [0, 0, 2 / 6]
    made.add({"se": {"b": se * 1024}, "osm": {"b": osm}})
    assert made.weights == 20
    top = made.in_global_top("se", 0.6)[["tensor", "n", "k", "share"]]
    assert top.to_numpy().tolist() == [["a", 10, 2, 0.2], ["b", 10, 10, 1.0]]
    top = made.in_global_top("osm", 0.2)
    assert top["k"].tolist() == [2, 2]


def test_at_least_one_weight():
    made = summary({p: {"a": torch.tensor([[1.0, 4.0]])} for p in ("se", "osm")}, rates=(0.01,))
    assert made.overlap(0.01)[["own", "both"]].to_numpy().tolist() == [[1, 1]]
    assert made.in_global_top("se", 0.01)["k"].tolist() == [1]


def test_window_by_window_is_all_at_once():
    windows = [{p: {name: WINDOW[p][name]} for p in WINDOW} for name in SHAPES]
    made = summary(*windows)
    assert made.weights == SUMMARY.weights == 60 * 50 + 80 * 100 + 40 * 40
    assert made.concentration().equals(SUMMARY.concentration())
    assert made.overlap_by_rate().equals(SUMMARY.overlap_by_rate())
    for rate in RATES:
        assert made.overlap(rate).equals(SUMMARY.overlap(rate))
    for patch in WINDOW:
        assert made.in_global_top(patch, 0.1).equals(SUMMARY.in_global_top(patch, 0.1))


def test_half_precision_and_other_layouts_are_read_as_they_are():
    halves = {p: {n: v.bfloat16() for n, v in WINDOW[p].items()} for p in WINDOW}
    floats = {p: {n: v.float() for n, v in halves[p].items()} for p in WINDOW}
    turned = {p: {n: v.T.contiguous().T for n, v in floats[p].items()} for p in WINDOW}
    frames = [summary(w).overlap(0.1) for w in (halves, floats, turned)]
    assert frames[0].equals(frames[1]) and frames[1].equals(frames[2])


def test_scores_of_zero():
    nothing = {p: {"a": torch.zeros(3, 4)} for p in ("se", "osm")}
    made = summary(nothing)
    assert made.concentration().to_numpy().tolist() == [[0.0, 0.0, 0.0]]
    for frame in (made.overlap(0.1), made.overlap_by_rate(), made.in_global_top("se", 0.1)):
        numbers = frame.select_dtypes("number").to_numpy()
        assert all(math.isfinite(value) for value in numbers.ravel())


def test_zeros_below_the_threshold_change_nothing():
    some = torch.zeros(10, 10)
    some[0] = torch.arange(1.0, 11.0)
    made = summary({"se": {"a": some}, "osm": {"a": some.flip(0)}})
    row = made.overlap(0.05).iloc[0]
    assert (row["own"], row["other"], row["both"]) == (5, 5, 0)
    assert made.concentration().loc["a", "top 10%"] == 1.0
    assert made.concentration().loc["a", "top 1%"] == 10 / 55


def test_a_rate_that_reaches_into_the_zeros_takes_no_zeros():
    """They matter to neither patch, however many are asked for."""
    some = torch.zeros(10, 10)
    some[0] = torch.arange(1.0, 11.0)
    made = summary({"se": {"a": some}, "osm": {"a": some.flip(0)}})
    row = made.overlap(0.5).iloc[0]
    assert (row["own"], row["other"], row["both"]) == (10, 10, 0)


def test_windows_are_taken_in_as_they_pass_and_closed_at_once():
    """Also after an error, which a notebook keeps and with it the generators."""
    closed = []

    def walk():
        try:
            yield WINDOW
            yield {"se": {}, "osm": {}}
        finally:
            closed.append(True)

    made = ImportanceSummary()
    seen = made.watch(walk())
    assert next(seen) is WINDOW and made.weights == SUMMARY.weights
    assert closed == []
    seen.close()
    assert closed == [True]
    with pytest.raises(KeyError) as caught:
        next(made.watch(iter_of({"osm": {}}, closed)))
    assert closed == [True, True] and caught.tb is not None


def iter_of(window, closed):
    try:
        yield window
    finally:
        closed.append(True)


# ---- sets that are at hand


def mask(text):
    return torch.tensor([[letter == "1" for letter in row] for row in text.split()])


def rows(frame):
    return [tuple(row) for row in frame.itertuples(index=False)]


def test_where_by_hand():
    up, head = "model.layers.12.mlp.up_proj.weight", "lm_head.weight"
    se, osm = {up: mask("110 100"), head: mask("0000")}, {up: mask("000 000"), head: mask("1111")}
    frame = where({"SE": se, "OSM": osm})
    assert list(frame) == ["set", "tensor", "layer", "module", "n", "k", "share"]
    assert rows(frame) == [
        ("SE", up, 12, "up_proj", 6, 3, 0.5),
        ("SE", head, -1, "lm_head", 4, 0, 0.0),
        ("OSM", up, 12, "up_proj", 6, 0, 0.0),
        ("OSM", head, -1, "lm_head", 4, 4, 1.0),
    ]


def test_overlap_by_hand():
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"
    own, other = {q: mask("1111 0000"), up: mask("100")}, {q: mask("1000 1100"), up: mask("000")}
    frame = overlap(own, other)
    named = ["tensor", "layer", "module", "own", "other", "both", "share", "jaccard"]
    assert list(frame) == named
    assert rows(frame) == [
        (q, 0, "q_proj", 4, 3, 1, 1 / 4, 1 / 6),
        (up, 3, "up_proj", 1, 0, 0, 0.0, 0.0),
        ("all", -1, "all", 5, 3, 1, 1 / 5, 1 / 7),  # of the sums, no mean of the shares
    ]
    swapped = overlap(other, own)
    assert swapped["share"].tolist() == [1 / 3, 0.0, 1 / 3]
    assert swapped["jaccard"].tolist() == frame["jaccard"].tolist()


def test_overlap_of_empty_sets():
    nothing = {"a": mask("000"), "b": mask("00")}
    frame = overlap(nothing, nothing)
    assert frame["tensor"].tolist() == ["a", "b", "all"]
    assert frame[["own", "other", "both", "share", "jaccard"]].to_numpy().tolist() == [[0] * 5] * 3
