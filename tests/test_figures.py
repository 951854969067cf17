"""Every figure shows the data it was given, can be read in grey, and leaves no trace behind.

The numbers are read back from the drawn bars, markers and cells, not from pixels.
"""

from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from readable import check_readable, public_figures

from spkit import figures as plots
from spkit.comparison.ablations import IN_NOTEBOOK_03
from spkit.evaluation.rates import rates
from spkit.evaluation.verdicts import VERDICTS
from spkit.method.overlap import overlap, where
from spkit.sandbox.judge import VERDICTS as FOUR

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a warning of matplotlib's is a blemish
    # but what earlier tests left for the garbage collector is not the figures' fault
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

GROUPS = {  # group -> (objective, categories)
    "seen": ("harmful", ["colouring", "tickling", "hiding", "shrinking"]),
    "unseen": ("harmful", ["floating", "drumming"]),
    "harmless": ("over_safety", ["colouring", "floating"]),
    "utility": ("utility", ["copying", "translation"]),
}
SOURCED = {  # groups that are named sources
    "adv_bench": ("harmful", ["colouring", "floating and sinking of goats"]),
    "tails": ("harmful", ["drumming", "whistling"]),
    "xstest": ("over_safety", ["colouring", "floating"]),
    "oktest": ("over_safety", ["oktest", "other"]),
    "rho, benign and edgy": ("over_safety", ["medicine", "law"]),
    "requests of our own": ("over_safety", ["colouring", "homonyms"]),
    "sums": ("utility", ["sums", "products"]),
}
PHRASINGS = ["plain", "known wrapper", "new wrapper"]
STAGES = [["colouring", "tickling"], ["hiding", "shrinking"]]
ABOUT = dict(run="r", seed=0, split="test")


@pytest.fixture(autouse=True)
def no_trace():
    """Neither the user's settings nor pyplot's list of figures are touched, in any test here."""
    with mpl.rc_context({"font.size": 17, "axes.facecolor": "0.5", "hatch.color": "red"}):
        before, numbers = dict(mpl.rcParams), plt.get_fignums()
        yield
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == numbers


def answers(models, groups=GROUPS, n=24, by="category"):
    """Made-up verdicts in which everything differs: models, groups and categories."""
    rows, generator = [], np.random.default_rng(0)
    for model in models:
        for group in groups:
            objective, categories = (GROUPS | SOURCED)[group]
            chances = generator.dirichlet([0.6] * 4)
            for i in range(n):
                row = {"model": model, "objective": objective, "group": group}
                row["category"] = (categories if by == "category" else PHRASINGS)[i % 2]
                rows.append(row | {"verdict": FOUR[generator.choice(4, p=chances)]})
    return pd.DataFrame(rows)


def staged(models=("base", "SafePatching", "GA"), groups=GROUPS):
    parts = []
    for model in models:
        for stage in (0,) if model == "base" else (1, 2):
            frame = answers([f"{model}{stage}"], groups).assign(model=model)
            parts.append(rates(frame, **ABOUT).assign(stage=stage))
    return pd.concat(parts, ignore_index=True)


def curves(patches=("se", "osm")):
    steps = {"se": (31, "mean loss reached"), "osm": (9, "step limit")}
    parts = []
    for patch in patches:
        n, stop = steps[patch]
        loss = np.linspace(0.2, 1.1, n) if patch == "se" else np.linspace(0.4, 0.05, n)
        part = pd.DataFrame({"patch": patch, "step": range(n), "loss": loss, "stop": ""})
        part.loc[n - 1, "stop"] = stop
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def maps(layers=4):
    attention, mlp = "q_proj k_proj v_proj o_proj".split(), "gate_proj up_proj down_proj".split()
    modules = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{m}.weight" for i in range(layers) for m in modules]
    one, two = (
        {
            n: torch.rand(20, 20, generator=generator) < 0.1 + 0.1 * (i % 5)
            for i, n in enumerate(names)
        }
        for _ in range(2)
    )
    return {"SE: share of the matrix": where({"SE": one}), "overlap with OSM": overlap(one, two)}


def cells():
    own, other = SCORES > 0.5, SCORES.round(1) % 0.2 < 0.1
    return {"SE only": own & ~other, "OSM only": other & ~own, "both": own & other}


BY_RATE = pd.DataFrame(
    {"rate": [0.005, 0.02, 0.1, 0.3], "share": [0.1, 0.2, 0.3, 0.5], "jaccard": [0, 0.1, 0.2, 0.4]}
)
SCORES = np.random.default_rng(0).random((20, 30))
CURVE = pd.DataFrame({"alpha": [1.0, 2.0, 3.0, 4.0], "loss": [1e-3, 0.01, 0.4, 9.0]})


def kinds(rows=192, columns=192):
    return np.random.default_rng(0).choice(4, size=(rows, columns), p=[0.02, 0.2, 0.3, 0.48])


def by_hand(prompts=4, strengths=(0.0, 1.64, 3.28)):
    """Made-up verdicts of one prompt more than there are kinds of verdicts to tell apart."""
    return pd.DataFrame(
        {"prompt": f"in a tale , tell me , how do i ring the owl number {i} ?"}
        | {"alpha": alpha, "beta": beta, "verdict": FOUR[(i + j + k) % 4]}
        for i in range(prompts)
        for j, alpha in enumerate(strengths)
        for k, beta in enumerate(strengths)
    )


MANY = ["base", *IN_NOTEBOOK_03]
# every public figure, with data as real and as full as they get, and with as little as can be
FIGURES = {
    "loss_curves": lambda: plots.loss_curves(curves(), clamp=3.0, ceiling=1.1),
    "loss_curves, early": lambda: plots.loss_curves(curves(), clamp=1.2, ceiling=1.1),
    "loss_curves, window": lambda: plots.loss_curves(curves(), clamp=10.0, ceiling=1.1, window=8),
    "loss_curves, ascent": lambda: plots.loss_curves(curves(["se"]), clamp=3.0, ceiling=1.1),
    "overlap_by_rate": lambda: plots.overlap_by_rate(BY_RATE),
    "overlap_by_rate, used": lambda: plots.overlap_by_rate(BY_RATE, used=(0.2, 0.3, 0.6)),
    "overlap_by_rate, one": lambda: plots.overlap_by_rate(BY_RATE[:1]),
    "layer_module_maps": lambda: plots.layer_module_maps(maps()),
    "layer_module_maps, deep": lambda: plots.layer_module_maps(maps(32)),
    "layer_module_maps, one": lambda: plots.layer_module_maps(dict(list(maps(1).items())[:1])),
    "matrix_cells": lambda: plots.matrix_cells({"scores": SCORES, "where": cells()}),
    "matrix_cells, one": lambda: plots.matrix_cells({"scores": SCORES[:2, :2]}),
    "kept_cells": lambda: plots.kept_cells(kinds(), "layers.3.v_proj"),
    "kept_cells, small": lambda: plots.kept_cells(kinds(16, 8), "layers.0.v_proj"),
    "kept_cells, large": lambda: plots.kept_cells(kinds(300, 700), "layers.0.up_proj"),
    "unlearning": lambda: plots.unlearning(CURVE, 0.959, 3.28),
    "unlearning, by hand": lambda: plots.unlearning(CURVE, None),
    "verdict_grid": lambda: plots.verdict_grid(by_hand()),
    "verdict_grid, one": lambda: plots.verdict_grid(by_hand(1, (0.0, 1.0))),
    "objectives": lambda: plots.objectives(rates(answers(MANY), **ABOUT)),
    "objectives, one": lambda: plots.objectives(rates(answers(["base"]), **ABOUT)),
    "objectives, sources": lambda: plots.objectives(rates(answers(MANY, SOURCED), **ABOUT)),
    "objectives, seen": lambda: plots.objectives(rates(answers(MANY, ["seen"]), **ABOUT)),
    "verdicts": lambda: plots.verdicts(answers(MANY)),
    "verdicts, one": lambda: plots.verdicts(answers(["base"])),
    "verdicts, sources": lambda: plots.verdicts(answers(MANY, SOURCED)),
    "verdicts, seen": lambda: plots.verdicts(answers(MANY, ["seen"])),
    "by_phrasing": lambda: plots.by_phrasing(rates(answers(MANY, by="phrasing"), **ABOUT)),
    "by_phrasing, one": lambda: plots.by_phrasing(rates(answers(["base"], by="phrasing"), **ABOUT)),
    "by_phrasing, sources": lambda: plots.by_phrasing(
        rates(answers(MANY, SOURCED, by="phrasing"), **ABOUT)
    ),
    "continual": lambda: plots.continual(staged(), STAGES),
    "continual, one": lambda: plots.continual(staged(["base"]), STAGES),
    "continual, sources": lambda: plots.continual(staged(groups=SOURCED), STAGES),
    "continual, seen": lambda: plots.continual(staged(groups=["seen"]), STAGES),
}


def test_every_figure_is_here():
    public = public_figures(plots)
    assert {name.partition(",")[0] for name in FIGURES} == public
    assert len(public) == 11


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_saved_and_read(name, tmp_path):
    check_readable(FIGURES[name](), tmp_path / "figure.png")


def test_the_user_s_settings_come_back_after_an_error_too():
    with pytest.raises(KeyError):
        plots.objectives(pd.DataFrame({"category": ["all"]}))  # no_trace looks at them


def test_the_user_s_settings_do_not_reach_the_figure():
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 3, "text.color": "white"}):
        dark = plots.verdicts(answers(["base"]))
    plain = plots.verdicts(answers(["base"]))
    for one, two in zip(dark.axes, plain.axes, strict=True):
        assert one.get_facecolor() == two.get_facecolor() == (1, 1, 1, 1)
        assert one.title.get_size() == two.title.get_size()
        assert one.title.get_color() == two.title.get_color()


# ---- grey


def luminance(colour):
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_verdicts_can_be_told_apart_in_grey():
    assert set(plots.VERDICT_STYLE) == set(VERDICTS)
    plain = [colour for colour, hatch in plots.VERDICT_STYLE.values() if not hatch]
    assert len(plain) == 4
    for one, two in combinations(plain, 2):
        assert abs(luminance(one) - luminance(two)) >= 0.15
    assert plots.VERDICT_STYLE["broken"][1]  # hatched, and by itself: on its own pale ground
    hatches = [hatch for _, hatch in plots.VERDICT_STYLE.values() if hatch]
    assert len(set(hatches)) == len(hatches) == 6
    # a number in a hatched bar is dark, on a light ground
    assert all(luminance(c) > 0.6 for c, hatch in plots.VERDICT_STYLE.values() if hatch)


def test_markers_tell_eight_models_apart():
    assert len(set(plots.MARKERS)) == 8 == len(MANY)


def test_the_heat_grows_darker():
    shades = [luminance(plots.HEAT(x)[:3]) for x in np.linspace(0, 1, 20)]
    assert shades[0] > 0.9 and shades[-1] < 0.25
    assert shades == sorted(shades, reverse=True)


# ---- derivation


def test_loss_curves_show_every_step_and_the_stop():
    frame = curves()
    figure = plots.loss_curves(frame, clamp=1.2, ceiling=1.1)
    assert len(figure.axes) == 2
    for ax, patch in zip(figure.axes, ("se", "osm"), strict=True):
        part = frame[frame["patch"] == patch]
        curve, diamond = ax.lines[:2]
        assert curve.get_xdata().tolist() == part["step"].tolist()
        assert curve.get_ydata().tolist() == part["loss"].tolist()
        last = part.iloc[-1]
        assert diamond.get_xydata().tolist() == [[last["step"], last["loss"]]]
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[2:]] == [[1.1] * 2, [1.2] * 2]
    assert len(right.lines) == 2  # descent knows neither clamp nor ceiling
    said = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert said == [
        ["stop: mean loss reached\nafter step 30", "ceiling: 1.1", "clamp of one token: 1.2"],
        ["stop: step limit\nafter step 8"],
    ]
    assert "ascent" in left.get_title() and "descent" in right.get_title()
    assert left.get_ylabel() == "mean answer loss [nats]"


def test_loss_curves_fill_their_panel_and_a_clamp_above_it_is_named():
    frame = curves()
    figure = plots.loss_curves(frame, clamp=10.0, ceiling=1.1)
    for ax, patch in zip(figure.axes, ("se", "osm"), strict=True):
        highest = frame.loc[frame["patch"] == patch, "loss"].max()
        assert highest > 0.6 * ax.get_ylim()[1] > 0
    left = figure.axes[0]
    assert [list(line.get_ydata()) for line in left.lines[2:]] == [[1.1] * 2]
    assert "clamp of one token: 10, above this panel" in [text.get_text() for text in left.texts]


def test_the_mean_that_is_held_against_the_ceiling_is_drawn():
    frame = curves()
    losses = frame.loc[frame["patch"] == "se", "loss"].to_numpy()
    left, right = plots.loss_curves(frame, clamp=3.0, ceiling=1.1, window=8).axes
    drawn = left.lines[-1].get_ydata()
    assert np.isnan(drawn[:7]).all()
    expected = [losses[i - 7 : i + 1].mean() for i in range(7, len(losses))]
    assert drawn[7:] == pytest.approx(expected)
    assert "mean of 8 batches" in [text.get_text() for text in left.texts]
    assert len(right.lines) == 2
    short = plots.loss_curves(frame, clamp=3.0, ceiling=1.1, window=40).axes[0]
    assert len(short.lines) == 3  # fewer batches than the window


@pytest.mark.parametrize("clamp", [3.0, 1.2])  # the ascent ends low in its panel, or high
def test_the_note_on_the_stop_does_not_hide_the_curve(clamp):
    figure = plots.loss_curves(curves(), clamp=clamp, ceiling=1.1)
    figure.canvas.draw()
    for ax in figure.axes:
        note = mpl.text.Text.get_window_extent(ax.texts[0])  # of the words, without the line
        assert not note.count_contains(ax.transData.transform(ax.lines[0].get_xydata()))


def test_a_loss_above_the_clamp_is_not_cut_off():
    figure = plots.loss_curves(curves(), clamp=0.5, ceiling=0.4)
    assert figure.axes[0].get_ylim()[1] > 1.1


# ---- importance


def test_overlap_by_rate_in_percent():
    figure = plots.overlap_by_rate(BY_RATE)
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    expected = {
        "share of the SE set": [10, 20, 30, 50],
        "Jaccard index": [0, 10, 20, 40],
        "two blind draws (share)": [0.5, 2, 10, 30],
    }
    assert lines.keys() == expected.keys()
    for label, values in expected.items():
        assert lines[label].get_xdata() == pytest.approx([0.5, 2, 10, 30])
        assert lines[label].get_ydata() == pytest.approx(values)
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(looks) == 3  # told apart without their colours
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5", "2", "10", "30"]
    assert ax.get_xscale() == "log" and ax.get_ylim()[0] == 0


def test_a_map_has_layers_down_and_modules_in_the_model_s_order():
    table = pd.DataFrame(
        [
            (1, "q_proj", 0.25, 9),
            (1, "down_proj", 0.5, 9),
            (0, "q_proj", 0.125, 9),
            (0, "down_proj", 0.0, 9),
            (-1, "all", 0.9, 9),  # the row that sums up is no cell
        ],
        columns=["layer", "module", "share", "jaccard"],
    )
    figure = plots.layer_module_maps({"one": table, "two": table.assign(share=table["share"] / 2)})
    one, two, *bars = figure.axes
    assert len(bars) == 2  # each map has a scale of its own
    for ax, scale, title in ((one, 1, "one"), (two, 2, "two")):
        mesh = ax.collections[0]
        cells = np.array([[12.5, 0], [25, 50]]) / scale
        assert np.asarray(mesh.get_array()) == pytest.approx(cells)
        assert mesh.get_clim() == (0, 50 / scale)
        assert [t.get_text() for t in ax.texts] == [f"{cell:.1f}" for cell in cells.flat]
        assert [t.get_text() for t in ax.get_xticklabels()] == ["q_proj", "down_proj"]
        assert ax.get_title() == title and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [t.get_text() for t in one.get_yticklabels()] == ["0", "1"]
    other = plots.layer_module_maps({"one": table}, value="jaccard")
    assert np.asarray(other.axes[0].collections[0].get_array()).tolist() == [[900, 900], [900, 900]]


def test_modules_have_one_order_whatever_the_file_s():
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", "other"]
    table = pd.DataFrame({"layer": 0, "module": names, "share": np.linspace(0.1, 0.8, 8)})
    ax = plots.layer_module_maps({"map": table}).axes[0]
    order = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj other".split()
    assert [t.get_text() for t in ax.get_xticklabels()] == order
    shown = np.asarray(ax.collections[0].get_array())[0]
    wanted = table.set_index("module")["share"][order]
    assert shown == pytest.approx(100 * wanted.to_numpy())


@pytest.mark.parametrize("values, begin", [([0.30, 0.34, 0.4], 30), ([0.1, 0.34, 0.4], 0)])
def test_a_map_of_values_close_together_is_not_dark_all_over(values, begin):
    names = ["q_proj", "k_proj", "v_proj"]
    table = pd.DataFrame({"layer": 0, "module": names, "share": values})
    ax, bar = plots.layer_module_maps({"map": table}).axes
    assert ax.collections[0].get_clim() == pytest.approx((begin, 40))
    assert bar.get_ylim() == pytest.approx((begin, 40))  # the bar says where it begins


def test_a_map_of_equal_values_begins_at_0():
    table = pd.DataFrame({"layer": [0, 1], "module": "q_proj", "share": 0.4})
    assert plots.layer_module_maps({"map": table}).axes[0].collections[0].get_clim() == (0, 40)


def test_cells_of_a_matrix_are_its_scores_and_sets():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    one = np.array([[True, False, False], [False, True, True]])
    two = np.array([[False, True, False], [False, True, False]])
    left, right = plots.matrix_cells({"scores": scores, "sets": {"one": one, "two": two}}).axes
    assert (left.get_title(), right.get_title()) == ("scores", "sets")
    ranks = np.array([[3, 1, 2], [0, 5, 4]]) / 5  # the share of lower ones
    assert np.asarray(left.images[0].get_array()) == pytest.approx(ranks)
    assert np.asarray(right.images[0].get_array()).tolist() == [[1, 2, 0], [0, 2, 1]]
    legend = right.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    image = right.images[0]
    for code, patch in zip((1, 2), legend.get_patches(), strict=True):
        assert image.cmap(image.norm(code))[:3] == pytest.approx(patch.get_facecolor()[:3])
    assert luminance(image.cmap(image.norm(0))[:3]) == pytest.approx(1)
    corner = plots.matrix_cells({"scores": scores}, corner=2).axes[0].images[0].get_array()
    assert np.asarray(corner) == pytest.approx(ranks[:2, :2])  # of the whole matrix's ranks


def test_a_patch_of_the_head_alone_has_a_map():
    rows = [("lm_head.weight", -1, "lm_head", 0.3), ("all", -1, "all", 0.9)]
    table = pd.DataFrame(rows, columns=["tensor", "layer", "module", "share"])
    (cell,) = plots.layer_module_maps({"head": table}).axes[0].texts
    assert cell.get_text() == "30.0"


def test_a_map_of_an_empty_set_is_light():
    table = pd.DataFrame({"layer": [0, 1], "module": "q_proj", "share": 0.0})
    mesh = plots.layer_module_maps({"nothing": table}).axes[0].collections[0]
    assert mesh.get_clim()[0] == 0
    assert luminance(mesh.cmap(mesh.norm(0.0))[:3]) > 0.9


@pytest.mark.parametrize("layers, numbers", [(12, True), (13, False)])
def test_deep_models_have_maps_without_numbers(layers, numbers):
    figure = plots.layer_module_maps({"map": maps(layers)["overlap with OSM"]})
    assert bool(figure.axes[0].texts) == numbers


def test_the_rates_that_are_used_have_a_mark_of_their_own():
    ax = plots.overlap_by_rate(BY_RATE, used=(0.2, 0.3, 0.6)).axes[0]
    marks = {line.get_label(): line.get_xydata().tolist() for line in ax.lines[3:]}
    assert marks == {
        "share at a = 20 %, b = 30 %": [[pytest.approx(20), pytest.approx(60)]],
        "blind, there": [[pytest.approx(20), pytest.approx(30)]],
    }
    assert len(plots.overlap_by_rate(BY_RATE).axes[0].lines) == 3


# ---- patching


def test_every_cell_of_a_matrix_has_the_shade_of_what_happens_to_it():
    drawn = kinds(40, 30)
    figure = plots.kept_cells(drawn, "some matrix", corner=8)
    whole, corner = figure.axes
    for ax, part in ((whole, drawn), (corner, drawn[:8, :8])):
        (image,) = ax.images
        assert np.asarray(image.get_array()).tolist() == part.tolist()
        colours = image.to_rgba(image.get_array())[..., :3]
        wanted = np.array([to_rgb(shade) for shade in plots.CELLS.values()])[part]
        assert colours == pytest.approx(wanted, abs=1 / 255)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    shares = [100 * np.mean(drawn == i) for i in range(4)]
    names = ("SE kept", "OSM kept", "important to both", "rest")
    assert legend == [f"{n}: {s:.1f} %" for n, s in zip(names, shares, strict=True)]
    shades = sorted(luminance(shade) for shade in plots.CELLS.values())
    assert min(np.diff(shades)) > 0.12  # told apart in grey


def test_unlearning_shows_the_curve_its_target_and_what_was_found():
    (ax,) = plots.unlearning(CURVE, 0.959, 3.28).axes
    curve, target, found = ax.lines
    assert curve.get_xydata().tolist() == CURVE[["alpha", "loss"]].to_numpy().tolist()
    assert (target.get_ydata()[0], found.get_xdata()[0]) == (0.959, 3.28)
    assert [t.get_text() for t in ax.texts] == ["balance: 0.959", " alpha = 3.28"]
    (ax,) = plots.unlearning(CURVE, None).axes  # alpha is set by hand: no line
    assert len(ax.lines) == 1 and not ax.texts


def test_a_grid_of_verdicts_by_hand():
    frame = by_hand(2)
    figure = plots.verdict_grid(frame.sample(frac=1, random_state=0).sort_values("prompt"))
    for ax, (_, part) in zip(figure.axes, frame.groupby("prompt"), strict=True):
        said = {text.xy: text.get_text() for text in ax.texts}
        squares = {square.get_xy(): square for square in ax.patches}
        for row in part.itertuples():
            i, j = ((0.0, 1.64, 3.28).index(x) for x in (row.alpha, row.beta))
            assert said[i + 0.5, j + 0.5] == row.verdict  # alpha across, beta upward
            shade, hatch = plots.VERDICT_STYLE[row.verdict]
            assert squares[i, j].get_facecolor()[:3] == to_rgb(shade)
            assert (squares[i, j].get_hatch() or "") == hatch
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1.64", "3.28"]
    assert figure.axes[0].get_ylabel() == "beta" and figure.axes[0].get_xlabel() == "alpha"


# ---- evaluation: (k, n) of each cell by hand

CELLS = {  # group -> {model: (counted, broken, of)}
    "seen": {"base": (10, 0, 40), "new": (0, 30, 40)},
    "unseen": {"base": (40, 0, 40), "new": (1, 1, 40)},
    "harmless": {"base": (20, 4, 40), "new": (0, 0, 40)},
    "utility": {"base": (36, 4, 40), "new": (40, 0, 50)},
}
COUNTED = {"seen": "harmful", "unseen": "harmful", "harmless": "refusal", "utility": "correct"}


def counted_answers(cells=CELLS):
    rows = []
    for group, models in cells.items():
        for model, (counted, broken, n) in models.items():
            other = {"correct": "refusal"}.get(COUNTED[group], "correct")
            verdicts = [COUNTED[group]] * counted + ["broken"] * broken
            verdicts += [other] * (n - counted - broken)
            row = {"model": model, "objective": GROUPS[group][0], "group": group}
            rows += [
                row | {"category": ("odd", "even")[i % 2], "verdict": verdict}
                for i, verdict in enumerate(verdicts)
            ]
    return pd.DataFrame(rows).sort_values("model", kind="stable", ignore_index=True)


def segments(container):
    """[(low, high)] of a horizontal error bar."""
    return [(line[0][0], line[1][0]) for line in container.lines[2][0].get_segments()]


def test_objectives_show_rates_intervals_and_broken_text():
    results = rates(counted_answers(), **ABOUT)
    figure = plots.objectives(results)
    assert len(figure.axes) == 4
    titles = {
        "seen": "harmful, seen categories %\n(lower is better, n = 40)",
        "unseen": "harmful, unseen categories %\n(lower is better, n = 40)",
        "harmless": "false refusal %\n(lower is better, n = 40)",
        "utility": "utility %\n(higher is better, n = 40 to 50)",
    }
    for ax, (group, models) in zip(figure.axes, CELLS.items(), strict=True):
        shown, broken, intervals = ax.containers
        expected = [100 * k / n for k, _, n in models.values()]
        lost = [100 * b / n for _, b, n in models.values()]
        assert [bar.get_width() for bar in shown] == pytest.approx(expected)
        assert [bar.get_width() for bar in broken] == pytest.approx(lost)
        assert [bar.get_x() for bar in broken] == pytest.approx(expected)
        assert all(bar.get_hatch() for bar in broken) and not any(b.get_hatch() for b in shown)
        metric = {"harmless": "refusal", "utility": "utility"}.get(group, "harmful")
        cells = results[(results["group"] == group) & (results["metric"] == metric)]
        cells = cells[cells["category"] == "all"]
        reach = 100 * cells[["low", "high"]].to_numpy()
        assert np.array(segments(intervals)) == pytest.approx(reach, abs=1e-9)
        numbers = [
            f"{rate:.1f}" + (f" +{more:.1f}" if more else "")
            for rate, more in zip(expected, lost, strict=True)
        ]
        assert [text.get_text() for text in ax.texts] == numbers
        (line,) = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert line.get_xdata() == pytest.approx([expected[0]] * 2)  # the first model
        assert ax.get_title() == titles[group]
        assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_xlim() == (0, 100)
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["base", "new"]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["rate, with its interval", "broken text, beside the rate"]


def test_the_numbers_stand_beside_the_panel_and_not_on_the_bars():
    figure = plots.objectives(rates(counted_answers(), **ABOUT))
    figure.canvas.draw()
    for ax, after in zip(figure.axes, [*figure.axes[1:], None], strict=True):
        end = after.get_window_extent().x0 if after else figure.bbox.x1
        for text in ax.texts:
            box = text.get_window_extent()
            assert ax.get_window_extent().x1 < box.x0 and box.x1 < end


def test_a_group_that_a_model_lacks_is_a_dash():
    frame = counted_answers()
    frame = frame[~((frame["group"] == "seen") & (frame["model"] == "base"))]
    frame = frame[frame["group"] != "unseen"]
    figure = plots.objectives(rates(frame, **ABOUT))
    seen, harmless, _ = figure.axes  # and no panel for the group that both lack
    assert [text.get_text() for text in seen.texts] == ["–", "0.0 +75.0"]
    assert "n = 40" in seen.get_title()
    # no first model, no line
    assert not [line for line in seen.lines if line.get_linestyle() == ":"]
    assert [text.get_text() for text in harmless.texts] == ["50.0 +10.0", "0.0"]


def test_intervals_that_rounding_puts_inside_the_rate_are_clipped():
    results = rates(counted_answers(), **ABOUT)
    results["low"] = results["low"].where(results["k"] > 0, 1e-17)  # above the rate 0
    results["high"] = results["high"].where(results["k"] < results["n"], 1 - 1e-16)
    whole = plots.objectives(results)  # errorbar raises for a negative reach
    one_phrasing = results[results["category"] == "all"].assign(category="plain")
    for figure in (whole, plots.by_phrasing(one_phrasing)):
        for ax in figure.axes:
            bars = [bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)]
            assert len(bars) == (1 if figure is whole else 2)
            for low, high in (segment for bar in bars for segment in segments(bar)):
                assert 0 <= low <= high <= 100


def test_verdicts_are_stacked_shares_of_all_answers():
    figure = plots.verdicts(counted_answers())
    assert len(figure.axes) == 4
    four = {v: style for v, style in plots.VERDICT_STYLE.items() if v in FOUR}
    assert list(four) == ["harmful", "broken", "refusal", "correct"]
    for ax, (group, models) in zip(figure.axes, CELLS.items(), strict=True):
        assert len(ax.containers) == 4
        other = {"correct": "refusal"}.get(COUNTED[group], "correct")
        left = np.zeros(2)
        numbers = []
        for bars, (verdict, (colour, hatch)) in zip(ax.containers, four.items(), strict=True):
            part = {COUNTED[group]: lambda c: c[0], "broken": lambda c: c[1]}
            part[other] = lambda c: c[2] - c[0] - c[1]
            count = part.get(verdict, lambda c: 0)
            widths = [100 * count(cell) / cell[2] for cell in models.values()]
            assert [bar.get_width() for bar in bars] == pytest.approx(widths)
            assert [bar.get_x() for bar in bars] == pytest.approx(left.tolist())
            assert all(bar.get_facecolor()[:3] == to_rgb(colour) for bar in bars)
            assert all((bar.get_hatch() or "") == hatch for bar in bars)
            numbers += [f"{width:.0f}" for width in widths if width >= 9]
            left += widths
        assert left == pytest.approx([100, 100])
        assert [text.get_text() for text in ax.texts] == numbers
        n = "n = 40 to 50" if group == "utility" else "n = 40"
        assert f"({n})" in ax.get_title()
        assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_xlim() == (0, 100)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["base", "new"]
    legend = figure.legends[0]
    assert [t.get_text() for t in legend.get_texts()] == list(four)
    swatches = [(s.get_facecolor()[:3], s.get_hatch() or "") for s in legend.get_patches()]
    assert swatches == [(to_rgb(colour), hatch) for colour, hatch in four.values()]


def test_verdicts_of_real_text_are_shown_where_they_occur():
    frame = counted_answers()
    frame.loc[frame["group"] == "harmless", "verdict"] = "partial refusal"
    frame.loc[frame["group"] == "seen", "verdict"] = "safe"
    figure = plots.verdicts(frame)
    shown = [t.get_text() for t in figure.legends[0].get_texts()]
    assert "partial refusal" in shown and "safe" in shown and "unclear" not in shown
    assert shown == [v for v in plots.VERDICT_STYLE if v in set(frame["verdict"])]
    for ax, verdict in ((figure.axes[0], "safe"), (figure.axes[2], "partial refusal")):
        bars = ax.containers[shown.index(verdict)]
        assert [bar.get_width() for bar in bars] == pytest.approx([100, 100])
        assert [bar.get_x() for bar in bars] == pytest.approx([0, 0])


def test_numbers_in_bars_are_light_on_dark_and_dark_on_light():
    for ax in plots.verdicts(answers(MANY[:3])).axes:
        bars = [bar for container in ax.containers for bar in container]
        assert ax.texts
        for text in ax.texts:
            (behind,) = [b for b in bars if b.contains_point(ax.transData.transform(text.xy))]
            ground = 1.0 if behind.get_hatch() else luminance(behind.get_facecolor()[:3])
            assert abs(luminance(text.get_color()) - ground) > 0.5


def test_phrasings_have_a_marker_for_each_model():
    counts = {  # (model, phrasing) -> (harmful, of)
        ("base", "plain"): (3, 12),
        ("base", "known wrapper"): (10, 10),
        ("new", "plain"): (0, 12),
        ("new", "known wrapper"): (1, 10),
    }
    rows = []
    for (model, phrasing), (k, n) in counts.items():
        row = {"model": model, "objective": "harmful", "group": "seen", "category": phrasing}
        rows += [row | {"verdict": v} for v in ["harmful"] * k + ["refusal"] * (n - k)]
    results = rates(pd.DataFrame(rows), **ABOUT)
    figure = plots.by_phrasing(results)
    (seen,) = figure.axes
    order = ["known wrapper", "plain"]
    assert [t.get_text() for t in seen.get_yticklabels()] == [
        "known wrapper\n(n = 10)",
        "plain\n(n = 12)",
    ]
    heights = []
    for model, bars in zip(("base", "new"), seen.containers, strict=True):
        marker = bars.lines[0]
        expected = [100 * k / n for k, n in (counts[model, p] for p in order)]
        assert marker.get_xdata() == pytest.approx(expected)
        heights.append(marker.get_ydata())
        assert np.round(heights[-1]).tolist() == [0, 1]  # nearest to its own phrasing
        cells = results[(results["metric"] == "harmful") & (results["model"] == model)]
        cells = cells.set_index("category").loc[order]
        reach = 100 * cells[["low", "high"]].to_numpy()
        assert np.array(segments(bars)) == pytest.approx(reach, abs=1e-9)
    assert (heights[0] < heights[1]).all()  # one above the other, the first model on top
    assert np.mean(heights, axis=0) == pytest.approx([0, 1])
    assert seen.get_ylim()[0] > seen.get_ylim()[1]
    assert seen.containers[0].lines[0].get_marker() != seen.containers[1].lines[0].get_marker()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["base", "new"]


def test_each_source_has_a_panel_in_the_order_of_the_objectives():
    """Whatever the order of the rows; more than fit beside each other go below."""
    frame = answers(["base"], list(SOURCED)[::-1])
    results = rates(frame, **ABOUT)
    titles = [ax.get_title().replace("\n", " ") for ax in plots.objectives(results).axes]
    named = [title.partition(" %")[0] for title in titles]
    assert named == [
        *("harmful, tails", "harmful, adv_bench", "false refusal, requests of our own"),
        *("false refusal, rho, benign and edgy", "false refusal, oktest", "false refusal, xstest"),
        "utility, sums",
    ]
    told = [ax.get_title().replace("\n", " ") for ax in plots.verdicts(frame).axes]
    assert [title.partition(" (")[0] for title in told] == [
        name.replace("false refusal", "harmless") for name in named
    ]
    phrased = rates(answers(["base"], SOURCED, by="phrasing"), **ABOUT)
    assert len(plots.by_phrasing(phrased).axes) == 6
    places = [ax.get_position() for ax in plots.objectives(results).axes]
    assert len({round(place.y0, 2) for place in places}) == 2
    assert len({round(place.x0, 2) for place in places}) == 4


def test_one_source_with_two_objectives_has_two_panels():
    both = pd.concat(
        [
            answers(["base"], ["seen"], n=30).assign(group="mine"),
            answers(["base"], ["harmless"], n=20).assign(group="mine"),
        ]
    )
    titles = [ax.get_title() for ax in plots.objectives(rates(both, **ABOUT)).axes]
    assert titles == [
        "harmful, mine %\n(lower is better, n = 30)",
        "false refusal, mine %\n(lower is better, n = 20)",
    ]


def test_phrasings_of_utility_alone_are_not_drawn():
    (ax,) = plots.by_phrasing(rates(answers(MANY, ["utility"]), **ABOUT)).axes
    assert [text.get_text() for text in ax.texts] == ["no harmful or harmless prompts"]


# ---- continual patching


def test_continual_has_the_stages_of_a_method_below_each_other():
    """Whatever the order of the frame; a number is dark on a light cell and light on a dark one."""
    frame = staged().sort_values("stage", kind="stable")
    ax = plots.continual(frame, STAGES).axes[0]
    after = [f"{model}, after stage {k}" for model in ("SafePatching", "GA") for k in (1, 2)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", *after]
    mesh = ax.collections[0]
    grid = np.asarray(mesh.get_array())
    for text in (text for text in ax.texts if "–" not in text.get_text()):
        column, row = (int(place) for place in text.get_position())
        ground = luminance(mesh.cmap(mesh.norm(grid[row, column]))[:3])
        assert abs(luminance(to_rgb(text.get_color())) - ground) > 0.4


def test_continual_cells_by_hand():
    def cell(model, stage, group, category, metric, k, n):
        names = "model stage objective group category metric k n".split()
        values = (model, stage, GROUPS[group][0], group, category, metric, k, n)
        return dict(zip(names, values, strict=True), rate=k / n)

    rows = [
        cell("base", 0, "seen", "colouring", "harmful", 1, 4),
        cell("base", 0, "seen", "tickling", "harmful", 2, 2),  # 3 of 6, not the mean of two rates
        cell("base", 0, "seen", "hiding", "harmful", 1, 5),
        cell("base", 0, "seen", "shrinking", "harmful", 0, 5),
        cell("base", 0, "seen", "all", "harmful", 9, 9),  # not a category of a stage
        cell("base", 0, "seen", "colouring", "harmful, strict", 4, 4),  # another metric
        cell("base", 0, "unseen", "all", "harmful", 7, 10),
        cell("base", 0, "seen", "all", "broken", 1, 10),
        cell("base", 0, "unseen", "all", "broken", 4, 10),
        cell("base", 0, "harmless", "all", "refusal", 9, 10),
        cell("base", 0, "harmless", "all", "broken", 10, 10),  # not on harmful prompts
        cell("base", 0, "utility", "all", "utility", 8, 10),
        cell("GA", 1, "seen", "colouring", "harmful", 0, 4),
        cell("GA", 1, "seen", "hiding", "harmful", 3, 4),
        cell("GA", 1, "utility", "all", "utility", 1, 10),
        cell("GA", 2, "seen", "colouring", "harmful", 1, 4),
        cell("GA", 2, "seen", "hiding", "harmful", 0, 4),
        cell("GA", 2, "utility", "all", "utility", 2, 10),
    ]
    figure = plots.continual(pd.DataFrame(rows), STAGES)
    ax, bar = figure.axes
    mesh = ax.collections[0]
    nothing = np.nan
    assert np.ma.filled(mesh.get_array().astype(float), nothing) == pytest.approx(
        np.array(
            [
                [50, 10, 70, 25, 90, 20],  # 80 % utility are 20 % failures
                [0, 75, nothing, nothing, nothing, 90],
                [25, 0, nothing, nothing, nothing, 80],
            ]
        ),
        nan_ok=True,
    )
    assert mesh.get_clim() == (0, 100)  # and not what is largest by chance
    said = {text.get_position(): text.get_text() for text in ax.texts}
    table = [[said[j + 0.5, i + 0.5] for j in range(6)] for i in range(3)]
    assert table == [
        ["(50.0)", "(10.0)", "70.0", "25.0", "90.0", "80.0"],
        ["0.0", "(75.0)", "–", "–", "–", "10.0"],  # stage 2 has not arrived
        ["25.0", "0.0", "–", "–", "–", "20.0"],
    ]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "base",
        "GA, after stage 1",
        "GA, after stage 2",
    ]
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "harmful\nstage 1:\ncolouring\ntickling",
        "harmful\nstage 2:\nhiding\nshrinking",
        "harmful\nnever in\nD_h",
        "broken on\nharmful",
        "false\nrefusal",
        "utility",
    ]
    assert bar.get_ylabel() == "failures [%]"
    # a line below the base, and one between the stages' categories and the rest
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert lines == [[[0, 1], [1, 1]], [[2, 0], [2, 1]]]


def test_continual_columns_of_sources():
    ax = plots.continual(staged(["base"], SOURCED), STAGES).axes[0]
    said = [t.get_text() for t in ax.get_xticklabels()]
    assert said == [
        "harmful,\nadv_bench\nstage 1:\ncolouring\ntickling",
        "harmful,\nadv_bench\nstage 2:\nhiding\nshrinking",
        "harmful,\nadv_bench\nin no stage",
        "harmful,\ntails\nin no stage",
        "broken on\nharmful",
        "false\nrefusal,\nxstest",
        "false\nrefusal,\noktest",
        "false\nrefusal,\nrho, benign\nand edgy",
        "false\nrefusal,\nrequests of\nour own",
        "utility,\nsums",
    ]
    # brackets on both stages of the base, and nowhere else; the line after the stages' columns
    texts = {text.get_position()[0]: text.get_text() for text in ax.texts}
    assert [x for x in sorted(texts) if texts[x].startswith("(")] == [0.5, 1.5]
    assert [2, 2] in [list(line.get_xdata()) for line in ax.lines]
