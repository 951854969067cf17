"""Every figure of the comparison shows the tables it was given: values, order, labels, intervals.

The numbers are read back from the drawn markers, whiskers and cells, not from pixels.
"""

from itertools import product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from readable import check_readable, public_figures

from spkit.comparison import figures as plots
from spkit.comparison.tables import METRICS
from spkit.errors import SpkitError

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a warning of matplotlib's is a blemish
    # but what earlier tests left for the garbage collector is not the figures' fault
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

METHODS = ["base", "SafePatching", "SafePatching, balanced", "Joint top sets", "Task Arithmetic"]
METHODS += ["Task Arithmetic, balanced", "TIES", "DARE", "Weight averaging", "GA", "NPO"]
ABLATED = ["SE only", "OSM only", "plain sum", "without retention (same α)", "SafePatching"]
SCORES = ("paper", "strict")
FAILURES = ("seen", "unseen", "refusal", "utility lost", "broken")
KEYS = ["retention_rate", "top_rate_se", "top_rate_osm", "alpha_factor", "beta_factor"]
KEYS += ["rank", "pairs", "samples"]


@pytest.fixture(autouse=True)
def no_trace():
    """Neither the user's settings nor pyplot's list of figures are touched."""
    with mpl.rc_context({"font.size": 17, "axes.facecolor": "0.5", "hatch.color": "red"}):
        before, numbers = dict(mpl.rcParams), plt.get_fignums()
        yield
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == numbers


# ---- tables in which every number is another -----------------------------------------------------


def rates(names, tuned=SCORES, value="mean", seed=0, **extra):
    """methods, ablations, differences or remains."""
    draw, rows = np.random.default_rng(seed), []
    for own in tuned:
        for score in SCORES:
            for metric in METRICS:
                for name in names:
                    middle, left, right = draw.uniform([20, 1, 1], [80, 9, 9])
                    row = {"tuned": own, "score": score, "metric": metric, "variant": name}
                    row |= {"low": middle - left, "high": middle + right, "n_items": 200}
                    rows.append(row | {value: middle} | extra)
    return pd.DataFrame(rows)


def each(names, backbones=5):
    parts = [
        rates(names, value="difference", seed=9 + b, backbone=b).drop(columns="n_items")
        for b in range(backbones)
    ]
    return pd.concat(parts, ignore_index=True)


def failing(rows, seed=1):
    """sweeps, sizes or continual: the rows with failure rates under both scores."""
    draw = np.random.default_rng(seed)
    names = [f"{score} {key}" for score in SCORES for key in FAILURES]
    return pd.DataFrame([row | dict(zip(names, draw.uniform(5, 95, 10), strict=True))
                         for row in rows])  # fmt: skip


def swept(backbones=2, masks=2):
    rates_of, factors = (0.02, 0.06, 0.2, 0.4, 0.8), (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    pairs = {"top-rates": (rates_of, KEYS[1:3]), "strengths": (factors, KEYS[3:5])}
    grids = {name: [dict(zip(keys, at, strict=True)) for at in product(values, values)]
             for name, (values, keys) in pairs.items()}  # fmt: skip
    lines = {"retention": ("retention_rate", (0.05, 0.1, 0.3, 0.6, 0.9, 1.0))}
    lines |= {"rank": ("rank", (2, 8, 32)), "pairs": ("pairs", (24, 192, 384))}
    lines |= {"samples": ("samples", (4, 128))}
    grids |= {name: [{key: value} for value in values] for name, (key, values) in lines.items()}
    rows = []
    for name, points in grids.items():
        for backbone in range(backbones):
            start = {"sweep": name, "backbone": backbone} | dict.fromkeys(KEYS, np.nan)
            rows.append(start | {"mask": -1})
            rows += [start | {"mask": m} | p for p in points for m in range(masks)]
    return failing(rows)


def sized(sizes=(("5 M", 5_000_000), ("usual", 1_900_000), ("1 M", 900_000)), backbones=2):
    return failing(
        {"size": size, "weights": weights, "backbone": b, "variant": name}
        for size, weights in sizes for b in range(backbones) for name in METHODS
    )  # fmt: skip


def staged(methods=("safepatching", "ga", "npo", "task_arithmetic", "balanced", "joint"), orders=3):
    return failing(
        {"method": method, "order": order, "backbone": 0, "stage": stage}
        for method in methods for order in range(orders) for stage in range(4)
    )  # fmt: skip


def remains():
    cells = {"phrasing": ["plain", "new wrapper"], "category": ["gluing", "hiding", "soaking"]}
    parts = [
        rates(["base", "SafePatching"], seed=hash_of(cell), by=by, cell=cell)
        for by, own in cells.items() for cell in own
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def hash_of(text):
    return sum(map(ord, text))


def areas(names=METHODS[1:], scores=SCORES):
    draw = np.random.default_rng(3)
    rows = [
        {"method": name, "score": score, "hypervolume": (x := draw.uniform(0.3, 0.9)),
         "low": x - 0.05, "high": x + 0.02}
        for score in scores for name in names
    ]  # fmt: skip
    return pd.DataFrame(rows)


def gaps(names):
    return rates(names, value="difference", seed=5)


FIGURES = {
    "pareto": lambda: plots.pareto(rates(METHODS), "paper"),
    "pareto, one": lambda: plots.pareto(rates(METHODS[:1]), "strict"),
    "paired_differences": lambda: plots.paired_differences(
        gaps(METHODS[1:]), each(METHODS[1:]), "paper"
    ),
    "paired_differences, one": lambda: plots.paired_differences(
        gaps(["GA"]), each(["GA"], 1), "paper"
    ),
    "hypervolumes": lambda: plots.hypervolumes(areas()),
    "hypervolumes, one": lambda: plots.hypervolumes(areas(["SafePatching"], ["paper"])),
    "ablations": lambda: plots.ablations(rates(ABLATED, tuned=["paper"])),
    "ablations, one": lambda: plots.ablations(rates(["SE only"], tuned=["paper"]), "strict"),
    "retention_sweep": lambda: plots.retention_sweep(swept()),
    "retention_sweep, one": lambda: plots.retention_sweep(swept(1, 1), "strict"),
    "top_rate_grid": lambda: plots.top_rate_grid(swept()),
    "strength_grid": lambda: plots.strength_grid(swept()),
    "strength_grid, one": lambda: plots.strength_grid(swept(1, 1)),
    "other_sweeps": lambda: plots.other_sweeps(swept()),
    "sizes": lambda: plots.sizes(sized()),
    "sizes, one": lambda: plots.sizes(sized([("usual", 9)], 1)),
    "continual_stages": lambda: plots.continual_stages(staged()),
    "continual_stages, one": lambda: plots.continual_stages(staged(["ga"], 1)),
    "remaining": lambda: plots.remaining(remains(), "paper"),
}  # fmt: skip


def test_every_figure_is_here():
    public = public_figures(plots)
    assert {name.partition(",")[0] for name in FIGURES} == public
    assert len(public) == 11


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_saved_and_read(name, tmp_path):
    check_readable(FIGURES[name](), tmp_path / "figure.png")


# ---- reading back --------------------------------------------------------------------------------


def of(table, score, metric, name, value="mean"):
    """middle, low, high of one cell."""
    own = table[(table["score"] == score) & (table["metric"] == metric)]
    own = own[own["variant"] == name]
    if score in set(own["tuned"]):
        own = own[own["tuned"] == score]
    (row,) = own.to_dict("records")
    return [row[value], row["low"], row["high"]]


def whiskers(container):
    """[(low, high) of every point], once a direction: x, then y."""
    return [
        [(min(line[:, axis]), max(line[:, axis])) for line in bars.get_segments()]
        for bars, axis in zip(container[2], (0, 1) if len(container[2]) == 2 else (0,), strict=True)
    ]


def errorbars(ax):
    return [c for c in ax.containers if isinstance(c, ErrorbarContainer)]


def rows_of(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def vertical(container):
    """[(low, high)] of a line's whiskers upward."""
    (bars,) = container[2]
    return [tuple(segment[:, 1]) for segment in bars.get_segments()]


@pytest.mark.parametrize("score", SCORES)
def test_pareto_puts_every_method_at_its_rates(score):
    table = rates(METHODS[1:] + ["base"])
    figure = plots.pareto(table, score)
    ax = figure.axes[0]
    points = {point.get_label(): point for point in ax.collections if "_" not in point.get_label()}
    assert list(points) == METHODS  # base first
    (bars,) = errorbars(ax)
    across, upward = whiskers(bars)
    for number, (name, point) in enumerate(points.items()):
        x, y = (of(table, score, metric, name) for metric in ("harmful", "false refusal"))
        assert point.get_offsets().tolist() == [[x[0], y[0]]]
        assert across[number] == pytest.approx(x[1:]) and upward[number] == pytest.approx(y[1:])
        lost = of(table, score, "utility lost", name)[0]
        assert point.get_array().tolist() == pytest.approx([100 - lost])
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == METHODS
    markers = [handle.get_marker() for handle in legend.legend_handles]
    assert len(set(markers)) == len(METHODS)


def test_the_dotted_steps_join_what_no_other_beats():
    table = rates(["a", "b", "c", "d"])
    for name, x, y in (("a", 10, 30), ("b", 20, 40), ("c", 30, 5), ("d", np.nan, 1)):
        for metric, value in (("harmful", x), ("false refusal", y)):
            table.loc[(table["variant"] == name) & (table["metric"] == metric), "mean"] = value
    table[["low", "high"]] = np.nan
    (steps,) = (line for line in plots.pareto(table, "paper").axes[0].lines
                if line.get_linestyle() == ":")  # fmt: skip
    assert steps.get_xydata().tolist() == [[10, 30], [30, 5]]


def test_an_unknown_score_is_an_error():
    with pytest.raises(SpkitError, match="no score 'papers'"):
        plots.pareto(rates(METHODS), "papers")


def test_paired_differences_show_the_mean_and_every_backbone():
    names = METHODS[1:]
    table, dots = gaps(names), each(names)
    figure = plots.paired_differences(table, dots, "strict")
    assert rows_of(figure.axes[0]) == names
    for ax, metric in zip(figure.axes, plots.GAINS.values(), strict=True):
        (bars,) = errorbars(ax)
        (across,) = whiskers(bars)
        for row, name in enumerate(names):
            middle, *ends = of(table, "strict", metric, name, "difference")
            assert bars[0].get_xydata()[row].tolist() == [middle, row]
            assert across[row] == pytest.approx(ends)
        (points,) = (c for c in ax.collections if c.get_label() == "one backbone")
        own = dots[(dots["tuned"] == "strict") & (dots["score"] == "strict")]
        own = own[own["metric"] == metric]
        found = points.get_offsets()
        assert len(found) == 5 * len(names)
        for row, name in enumerate(names):
            beside = found[np.round(found[:, 1] - 0.28) == row][:, 0]
            assert sorted(beside) == sorted(own.loc[own["variant"] == name, "difference"])


def test_hypervolumes_stand_under_their_score():
    table = areas()
    figure = plots.hypervolumes(table)
    assert [ax.get_title() for ax in figure.axes] == ["paper score", "strict score"]
    assert rows_of(figure.axes[0]) == METHODS[1:]
    for ax, score in zip(figure.axes, SCORES, strict=True):
        own = table[table["score"] == score]
        drawn = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() in "oD"]
        assert drawn == [[value, row] for row, value in enumerate(own["hypervolume"])]
        (across,) = whiskers(errorbars(ax)[0])
        assert np.allclose(across, own[["low", "high"]])


@pytest.mark.parametrize("score", SCORES)
def test_ablations_begin_with_safepatching_and_keep_their_order(score):
    table = rates(ABLATED, tuned=["paper"])
    figure = plots.ablations(table, score)
    names = ["SafePatching", *ABLATED[:-1]]
    assert rows_of(figure.axes[0]) == names
    for ax, metric in zip(figure.axes, plots.ABLATED.values(), strict=True):
        drawn = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() in "oD"]
        cells = [of(table, score, metric, name) for name in names]
        assert drawn == [[cell[0], row] for row, cell in enumerate(cells)]
        (across,) = whiskers(errorbars(ax)[0])
        assert np.allclose(across, [cell[1:] for cell in cells])
        (upright,) = (line for line in ax.lines if line.get_linestyle() == ":")
        assert set(upright.get_xdata()) == {cells[0][0]}


def test_a_variant_without_a_value_leaves_its_row_empty():
    table = rates(ABLATED, tuned=["paper"])
    gone = (table["variant"] == "OSM only") & (table["metric"] == "harmful")
    table = table[~gone]
    ax = plots.ablations(table).axes[0]
    drawn = [line.get_xydata()[0] for line in ax.lines if line.get_marker() in "oD"]
    assert [int(row) for x, row in drawn if np.isnan(x)] == [2]
    assert len(drawn) == len(ABLATED)


def check_lines(ax, own, by, score):
    """The four lines are means over backbones and masks, with the range; base is beside them."""
    base, points = own[own["mask"] < 0], own[own["mask"] >= 0]
    bars = {container.get_label(): container for container in errorbars(ax)}
    assert list(bars) == list(plots.SWEPT)
    for label, (key, *_) in plots.SWEPT.items():
        found = points.groupby(by)[f"{score} {key}"]
        line = bars[label][0]
        assert np.allclose(line.get_xdata(), found.mean().index, rtol=0.04, atol=0.01)
        assert np.allclose(line.get_ydata(), found.mean())
        assert np.allclose(vertical(bars[label]), np.stack([found.min(), found.max()], axis=1))
    marks = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [1.03]]
    assert np.allclose(marks, [base[f"{score} {key}"].mean() for key, *_ in plots.SWEPT.values()])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        f"{value:g}" for value in sorted(points[by].unique())
    ]


@pytest.mark.parametrize("score", SCORES)
def test_the_retention_sweep_shows_mean_and_range(score):
    table = swept()
    (ax,) = plots.retention_sweep(table, score).axes
    check_lines(ax, table[table["sweep"] == "retention"], "retention_rate", score)


def test_other_sweeps_have_a_panel_each():
    table = swept()
    figure = plots.other_sweeps(table, "strict")
    for ax, name in zip(figure.axes, ("rank", "pairs", "samples"), strict=True):
        check_lines(ax, table[table["sweep"] == name], name, "strict")


@pytest.mark.parametrize(
    ("draw", "sweep", "down", "across"),
    [
        (plots.top_rate_grid, "top-rates", "top_rate_se", "top_rate_osm"),
        (plots.strength_grid, "strengths", "alpha_factor", "beta_factor"),
    ],
)
def test_maps_show_mean_and_range_of_every_cell(draw, sweep, down, across):
    table = swept()
    own = table[(table["sweep"] == sweep) & (table["mask"] >= 0)]
    rising = [sorted(own[name].unique()) for name in (down, across)]
    values = {
        "harmful %": (own["strict seen"] + own["strict unseen"]) / 2,
        "false refusal %": own["strict refusal"],
        "broken %": own["strict broken"],
    }
    figure = draw(table, "strict")
    for ax, (title, value) in zip(figure.axes, values.items(), strict=False):
        assert ax.get_title() == title
        assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"{x:g}" for x in rising[1]]
        assert ax.get_ylim() == (0, len(rising[0]))  # small values below
        shades = np.array(ax.collections[0].get_array()).reshape(len(rising[0]), -1)
        for i, one in enumerate(rising[0]):
            for j, other in enumerate(rising[1]):
                cell = value[(own[down] == one) & (own[across] == other)]
                assert len(cell) == 4 and shades[i, j] == pytest.approx(cell.mean())
                (text,) = (t for t in ax.texts if t.get_position() == (j + 0.5, i + 0.5))
                range_of = f"{cell.min():.0f}–{cell.max():.0f}"
                assert text.get_text() == f"{cell.mean():.0f}\n{range_of}"
    assert rows_of(figure.axes[0]) == [f"{value:g}" for value in rising[0]]


def test_a_cell_without_a_range_is_one_number():
    assert {text.get_text().count("\n") for text in plots.strength_grid(swept(1, 1)).axes[0].texts
            } == {0}  # fmt: skip


def test_sizes_rise_and_show_means_over_backbones():
    table = sized()
    figure = plots.sizes(table, "paper")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "1 M (900,000 weights)", "usual (1,900,000 weights)", "5 M (5,000,000 weights)"
    ]  # fmt: skip
    assert rows_of(figure.axes[0]) == METHODS
    for ax, key in zip(figure.axes, FAILURES, strict=False):
        for line, size in zip(ax.lines, ("1 M", "usual", "5 M"), strict=True):
            own = table[table["size"] == size].groupby("variant")[f"paper {key}"].mean()
            assert np.allclose(line.get_xdata(), own.loc[METHODS])
            assert np.round(line.get_ydata()).tolist() == list(range(len(METHODS)))


def test_continual_shows_every_method_after_every_stage():
    table = staged()
    figure = plots.continual_stages(table, "strict")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["SafePatching", "GA", "NPO", "Task Arithmetic", "SafePatching, balanced",
                     "joint training"]  # fmt: skip
    for ax, key in zip(figure.axes, ("seen", "refusal"), strict=True):
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["base", "1", "2", "3"]
        for bars, method in zip(errorbars(ax), dict.fromkeys(table["method"]), strict=True):
            own = table[table["method"] == method].groupby("stage")[f"strict {key}"]
            assert np.allclose(bars[0].get_ydata(), own.mean())
            assert [round(x) for x in bars[0].get_xdata()] == [0, 1, 2, 3]
            assert np.allclose(vertical(bars), np.stack([own.min(), own.max()], axis=1))


@pytest.mark.parametrize("score", SCORES)
def test_what_remains_is_drawn_by_phrasing_and_by_category(score):
    table = remains()
    figure = plots.remaining(table, score)
    panels = [("phrasing", m) for m in ("harmful seen", "harmful unseen")]
    panels += [("category", m) for m in ("harmful seen", "harmful unseen")]
    for ax, (by, metric) in zip(figure.axes, panels, strict=True):
        assert ax.get_title().endswith(f"by {by}")
        own = table[(table["by"] == by) & (table["tuned"] == score)]
        cells = list(dict.fromkeys(own["cell"]))
        assert rows_of(ax) == [f"{cell} (200)" for cell in cells]
        for bars, model in zip(errorbars(ax), ("base", "SafePatching"), strict=True):
            assert bars.get_label() == model
            (across,) = whiskers(bars)
            for row, cell in enumerate(cells):
                middle, *ends = of(own[own["cell"] == cell], score, metric, model)
                assert bars[0].get_xdata()[row] == middle
                assert across[row] == pytest.approx(ends)
