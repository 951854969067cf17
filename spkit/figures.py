"""Figures: one function each, data frames in, a matplotlib Figure out.

Made for print and for grey: light to dark instead of hues, and every shade also has a hatch, a
marker or a label of its own. Rates are shown in percent, with their intervals where there are any.
The figures do not go through pyplot: nothing has to be closed, and a server needs no screen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Swatch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spkit.examples import in_order
from spkit.system.files import atomic

DARK, MIDDLE, LIGHT, PALE = "#20304a", "#5b7a99", "#a9bccb", "#e4eaef"
BLUE = "#24426a"  # a deep blue and not DARK: a number must be legible on the darkest cell
ACCENT = "#9c3a16"  # the one hue, for what must not be overlooked; dark in grey
# verdict -> (shade, hatch): harm is darkest, whatever is broken or in between is hatched
VERDICT_STYLE = {
    "harmful": (ACCENT, ""),
    "broken": (PALE, "////"),
    "unclear": (PALE, "...."),
    "unfinished": (PALE, "||||"),
    "parroting": (PALE, "----"),
    "wrong": (PALE, "xxxx"),
    "refusal": (MIDDLE, ""),
    "partial refusal": (LIGHT, "\\\\\\\\"),
    "correct": (LIGHT, ""),
    "safe": (PALE, ""),
}
DEEP = (DARK, ACCENT, MIDDLE)  # shades on which a number is white
MARKERS = "osD^vP*X"
HEAT = sns.light_palette(BLUE, as_cmap=True)
# what happens to a weight -> shade; they differ in grey, too
CELLS = {
    "SE kept": ACCENT,
    "OSM kept": "#6f9bc4",
    "important to both": "#d5dde4",
    "rest": "#ffffff",
}
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # as data flows
NARROW = 0.4  # a map whose smallest value is above this share of its largest begins there
# objective -> (its panels' title, its metric); a source's panel has its name after a comma
PANELS = {
    "harmful": ("harmful", "harmful"),
    "over_safety": ("false refusal", "refusal"),
    "utility": ("utility", "utility"),
}
# the panels of prompts without a source: harm on known and on new categories, and the two others
UNNAMED = {
    "seen": "harmful, seen categories",
    "unseen": "harmful, unseen categories",
    "harmless": "false refusal",
    "utility": "utility",
}
HIGHER_IS_BETTER = "utility"


def save(folder: Path, name: str, figure: Figure) -> list[Path]:
    """Write <name>.png and <name>.svg into the folder, the same bytes for the same figure: without
    a date inside. Returns both paths.
    """
    made = []
    with matplotlib.rc_context({"svg.hashsalt": "spkit"}):
        for suffix, inside in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic(folder / f"{name}.{suffix}") as path:
                figure.savefig(path, bbox_inches="tight", dpi=150, metadata=inside)
            made.append(folder / f"{name}.{suffix}")
    return made


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """The look of all figures, without touching the user's own settings."""

    @wraps(draw)
    def wrapped(*args, **kwargs):
        look = {"axes.edgecolor": "0.4", "hatch.linewidth": 0.6, "hatch.color": "0.35"}
        with sns.plotting_context("paper", 1.05), sns.axes_style("whitegrid", look):
            return draw(*args, **kwargs)

    return wrapped


# ---- derivation ----------------------------------------------------------------------------------


@styled
def loss_curves(
    curves: pd.DataFrame, *, clamp: float, ceiling: float, window: int | None = None
) -> Figure:
    """Mean answer loss by step, ascent left and descent right, with the stop point.

    curves: patch ("se", "osm"), step, loss [nats], stop (a reason in the last row). clamp, ceiling:
    what holds the ascent, in nats. window: the number of batches whose mean is held against the
    ceiling; that mean is drawn, too. Each panel has the scale of its own losses; a clamp that lies
    above it is named, not drawn.
    """
    figure, axes = _panels(1, 2, width=8, height=3.2)
    for ax, (patch, title) in zip(
        axes, {"se": "ascent: the SE patch", "osm": "descent: the OSM patch"}.items(), strict=True
    ):
        part = curves[curves["patch"] == patch]
        top = max(part["loss"].max(), ceiling if patch == "se" else 0.0) if len(part) else ceiling
        ax.set(title=title, xlabel="step", ylim=(-0.04 * top, 1.4 * top))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.plot(part["step"], part["loss"], color=MIDDLE, marker="o", markersize=2.5, linewidth=0.8)
        for _, last in part.tail(1).iterrows():
            x, y = last["step"], last["loss"]
            ax.plot(x, y, "D", color="white", markeredgecolor=DARK, markersize=7)
            _note(ax, f"stop: {last['stop']}\nafter step {x}", x, y)
    axes[0].set_ylabel("mean answer loss [nats]")
    _limits(axes[0], {"ceiling": (ceiling, ":"), "clamp of one token": (clamp, "--")})
    ascent = curves[curves["patch"] == "se"]
    if window is not None and len(ascent) >= window:
        mean = ascent["loss"].rolling(window).mean()
        axes[0].plot(ascent["step"], mean, color=DARK, linewidth=2)
        x, y = ascent["step"].iloc[window - 1], mean.iloc[window - 1]
        axes[0].annotate(
            f"mean of {window} batches", (x, y), (0.03, 0.56), textcoords="axes fraction", size=8,
            arrowprops={"arrowstyle": "-", "color": "0.4"}, bbox=_HALO,
        )  # fmt: skip
    return figure


def _limits(ax, limits: Mapping[str, tuple[float, str]]) -> None:
    """A line for each limit, or a word in the corner for one that lies above the panel."""
    for name, (value, style) in limits.items():
        text = f"{name}: {value:g}"
        if value < ax.get_ylim()[1]:
            ax.axhline(value, color="0.35", linestyle=style, linewidth=1.2)
            place = {"xy": (0.02, value), "xycoords": ax.get_yaxis_transform(), "va": "bottom"}
        else:
            text += ", above this panel"
            place = {"xy": (0.02, 0.97), "xycoords": "axes fraction", "va": "top"}
        ax.annotate(text, size=8, bbox=_HALO, **place)


# ---- importance ----------------------------------------------------------------------------------


@styled
def overlap_by_rate(table: pd.DataFrame, used: tuple[float, float, float] | None = None) -> Figure:
    """How the overlap of two important sets grows with the top rate.

    table: rate, share (|both| / |own|), jaccard, all as shares of 1. used: (a, b, share) of the
    patch itself, whose two rates may differ. The dotted line and the hollow diamond are what two
    sets drawn blindly would share.
    """
    figure, (ax,) = _panels(1, 1, width=6, height=3.6)
    rate = 100 * table["rate"]
    lines = {
        "share of the SE set": ("share", "o", "-", DARK),
        "Jaccard index": ("jaccard", "s", "--", MIDDLE),
    }
    for label, (column, marker, style, colour) in lines.items():
        ax.plot(rate, 100 * table[column], style, marker=marker, color=colour, label=label)
    ax.plot(rate, rate, ":", color="0.4", label="two blind draws (share)")
    if used is not None:
        a, b, share = (100 * value for value in used)
        label = f"share at a = {a:g} %, b = {b:g} %"
        ax.plot(a, share, "D", color=DARK, markersize=9, label=label)
        ax.plot(a, b, "D", color="white", markeredgecolor=DARK, markersize=9, label="blind, there")
    ax.set(xscale="log", xlabel="top rate a = b [%]", ylabel="overlap [%]", ylim=(0, None))
    ax.set_xticks(rate, [f"{value:g}" for value in rate])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


@styled
def matrix_cells(panels: Mapping[str, Mapping | np.ndarray], corner: int = 64) -> Figure:
    """One weight matrix, cell by cell: its scores, or which sets a weight is in.

    panels: {title: scores, a float matrix drawn as the share of lower ones} or {title: {label: bool
    matrix}}; of several labels the last one wins. Only the upper left `corner` rows and columns are
    drawn: whole matrices are too fine for a page.
    """
    labels = list(dict.fromkeys(k for p in panels.values() if isinstance(p, Mapping) for k in p))
    shades = dict(zip(labels, (DARK, MIDDLE, LIGHT, "0.35"), strict=False))
    figure, axes = _panels(1, len(panels), width=3.4 * len(panels), height=4.0)
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        if isinstance(panel, Mapping):
            codes = np.zeros(np.shape(next(iter(panel.values()))), dtype=int)
            for label, mask in panel.items():
                codes[np.asarray(mask)] = 1 + labels.index(label)
            colours = ListedColormap(["white", *shades.values()])
            look = {"cmap": colours, "vmin": 0, "vmax": len(labels)}
        else:
            flat = np.asarray(panel).ravel()
            codes = (flat.argsort().argsort() / max(flat.size - 1, 1)).reshape(np.shape(panel))
            look = {"cmap": HEAT, "vmin": 0, "vmax": 1}
        ax.imshow(codes[:corner, :corner], interpolation="nearest", **look)
        ax.set(title=title, xlabel="input", ylabel="output" if ax is axes[0] else "")
        ax.grid(False)
    swatches = [
        Swatch(facecolor=shade, edgecolor=DARK, label=label) for label, shade in shades.items()
    ]
    if swatches:
        _legend_below(figure, swatches)
    return figure


@styled
def layer_module_maps(tables: Mapping[str, pd.DataFrame], value: str = "share") -> Figure:
    """One map per table, layers down and modules across: where a set lies, or two sets overlap.

    tables: {title: frame with layer, module and `value` (a share of 1)}. Every map has its own
    scale, dark at its largest; it begins at 0, or where all values are close together at the
    smallest, and its bar says so. The numbers are percent. Modules have one order everywhere.
    """
    tables = {title: _in_layers(table) for title, table in tables.items()}
    layers = max(table["layer"].nunique() for table in tables.values())
    numbers = layers <= 12  # in deeper models they would be too small to read
    height = 1.6 + (0.32 if numbers else 0.18) * layers
    figure, axes = _panels(1, len(tables), width=3.6 * len(tables), height=height, sharey=True)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        grid = 100 * table.pivot(index="layer", columns="module", values=value)
        grid = grid[_in_order(table["module"])]
        lightest, darkest = _scale(grid)
        sns.heatmap(
            grid, ax=ax, cmap=HEAT, vmin=lightest, vmax=darkest, annot=numbers, fmt=".1f",
            linewidths=0.5, xticklabels=True, annot_kws={"size": 7},
            cbar_kws={"label": "%", "aspect": 20 if numbers else 40},
        )  # fmt: skip
        _legible(ax)
        ax.set(title=title, xlabel="", ylabel="layer" if ax is axes[0] else "")
        ax.set_xticks(ax.get_xticks(), list(grid), rotation=60, ha="right", rotation_mode="anchor")
        ax.tick_params(axis="y", rotation=0)
    return figure


def _in_layers(table: pd.DataFrame) -> pd.DataFrame:
    """The matrices of the layers, without the total and the head; the head where it is alone."""
    within = table[table["layer"] >= 0]
    return table[table["module"] != "all"] if within.empty else within


def _in_order(modules: pd.Series) -> list[str]:
    found = dict.fromkeys(modules)
    return [m for m in MODULES if m in found] + [m for m in found if m not in MODULES]


def _scale(grid: pd.DataFrame) -> tuple[float, float]:
    lightest, darkest = grid.min(axis=None), grid.max(axis=None)
    if lightest < NARROW * darkest or lightest == darkest:
        lightest = 0.0
    return lightest, darkest or 1.0  # an empty set is light, not half dark


# ---- patching ------------------------------------------------------------------------------------


@styled
def kept_cells(cells: np.ndarray, title: str, corner: int = 24) -> Figure:
    """One weight matrix, a cell a weight: which patch keeps it. Beside it its corner, enlarged.

    cells: int [out, in], the index of each weight's entry in CELLS. A matrix of more than 256 rows
    or columns is shown by its first 256. The legend gives shares of the whole matrix, in percent.
    """
    figure, axes = _panels(1, 2, width=9, height=5)
    shades = ListedColormap(list(CELLS.values()))
    for ax, size, name in zip(axes, (256, corner), (title, "its corner, enlarged"), strict=True):
        part = cells[:size, :size]
        ax.imshow(part, cmap=shades, vmin=0, vmax=len(CELLS) - 1, interpolation="nearest")
        ax.set(title=name, xlabel="input", ylabel="output")
        ax.grid(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    edge = min(corner, *cells.shape) - 0.5
    axes[0].plot([edge, edge, -0.5], [-0.5, edge, edge], color="black", linewidth=1)
    swatches = [
        Swatch(facecolor=shade, edgecolor="0.4", label=f"{name}: {100 * (cells == i).mean():.1f} %")
        for i, (name, shade) in enumerate(CELLS.items())
    ]
    _legend_below(figure, swatches)
    return figure


@styled
def unlearning(curve: pd.DataFrame, target: float | None, found: float | None = None) -> Figure:
    """How far D_h is unlearnt as alpha grows, on two log scales, with the target line.

    curve: alpha, loss [nats] (the 5 % quantile of the first token's). target: `patching.balance`,
    None where alpha is set by hand. found: the alpha of the method.
    """
    figure, (ax,) = _panels(1, 1, width=5.6, height=3.4)
    ax.plot(curve["alpha"], curve["loss"], "-o", color=MIDDLE, markersize=5)
    ax.set(xscale="log", yscale="log", xlabel="alpha (the parameter)")
    ax.set_ylabel("loss of the first token,\n5 % quantile [nats]")
    ax.set_xticks(curve["alpha"], [f"{alpha:g}" for alpha in curve["alpha"]])
    ax.minorticks_off()
    if target is not None:
        ax.axhline(target, color="0.35", linestyle="--", linewidth=1.2)
        ax.annotate(
            f"balance: {target:g}", (0.02, target), xycoords=ax.get_yaxis_transform(), va="bottom",
            size=8,
        )  # fmt: skip
    if found is not None:
        ax.axvline(found, color="0.35", linestyle=":", linewidth=1.2)
        ax.annotate(
            f" alpha = {found:.2f}", (found, 0.04), xycoords=ax.get_xaxis_transform(), size=8
        )
    return figure


@styled
def verdict_grid(answers: pd.DataFrame) -> Figure:
    """A panel a prompt: the verdict on its answer for every alpha (across) and beta (upward).

    answers: prompt, alpha, beta, verdict; one row for each combination.
    """
    prompts = list(dict.fromkeys(answers["prompt"]))
    names, styles = list(VERDICT_STYLE), list(VERDICT_STYLE.values())
    figure, axes = _panels(1, len(prompts), width=3 * len(prompts), height=3, sharey=True)
    for ax, prompt in zip(axes, prompts, strict=True):
        part = answers[answers["prompt"] == prompt]
        grid = part.pivot(index="beta", columns="alpha", values="verdict")
        ax.set(xlim=(0, grid.shape[1]), ylim=(0, grid.shape[0]), xlabel="alpha")
        for (i, j), verdict in np.ndenumerate(grid.to_numpy()):
            shade, hatch = styles[names.index(verdict)]
            cell = Rectangle((j, i), 1, 1, facecolor=shade, hatch=hatch, edgecolor="white")
            ax.add_patch(cell)
            ink = "white" if shade in DEEP else "black"
            place = (j + 0.5, i + 0.5)
            halo = _HALO if hatch else None
            ax.annotate(
                verdict, place, ha="center", va="center", size=7, color=ink, bbox=halo
            )  # fmt: skip
        ax.set_title(fill(prompt, 32), size=8)
        ax.set_xticks(np.arange(grid.shape[1]) + 0.5, [f"{x:.3g}" for x in grid.columns])
        ax.set_yticks(np.arange(grid.shape[0]) + 0.5, [f"{x:.3g}" for x in grid.index])
        ax.grid(False)
    axes[0].set_ylabel("beta")
    return figure


# ---- evaluation ----------------------------------------------------------------------------------


@styled
def objectives(results: pd.DataFrame) -> Figure:
    """A panel a group of prompts, a row a model: rates as bars with intervals, broken text hatched.

    results: evaluation's tidy frame (model, objective, group, category "all", metric, rate, low,
    high). The panels of the three objectives follow each other, at most four beside each other. The
    upright line is the first model. Broken text is not part of the rate beside it: it counts as
    neither harmful nor refused, and is drawn behind it so that nobody takes it for safe or helpful.
    """
    whole = results[results["category"] == "all"]
    models = list(dict.fromkeys(whole["model"]))
    groups = _groups(whole)
    figure, axes = _wrapped(len(groups), 4, width=3, height=1.5 + 0.36 * len(models), sharey=True)
    rows = np.arange(len(models))
    for ax, (objective, group) in zip(axes, groups, strict=True):
        title, metric = _title(objective, group), PANELS[objective][1]
        part = _of_group(whole, objective, group)
        rate = 100 * _by_model(part, metric, models)
        better = "higher" if metric == HIGHER_IS_BETTER else "lower"
        ax.set_title(f"{title} %\n({better} is better, {_n(part['n'])})")
        _rate_bars(ax, rows, rate, 100 * _by_model(part, "broken", models)["rate"])
        ax.set(xlim=(0, 100), xticks=range(0, 101, 25), ylim=(len(models) - 0.4, -0.6))
        ax.grid(False, axis="y")
    axes[0].set_yticks(rows, models)
    swatches = [
        Swatch(facecolor=MIDDLE, edgecolor=DARK, label="rate, with its interval"),
        Swatch(facecolor=PALE, edgecolor=DARK, hatch="////", label="broken text, beside the rate"),
    ]
    _legend_below(figure, swatches)
    return figure


def _rate_bars(ax, rows: np.ndarray, rate: pd.DataFrame, broken: pd.Series) -> None:
    ax.barh(rows, rate["rate"], height=0.66, color=MIDDLE, edgecolor=DARK, linewidth=0.7)
    ax.barh(
        rows, broken, left=rate["rate"], height=0.66, color=PALE, edgecolor=DARK, linewidth=0.7,
        hatch="////",
    )  # fmt: skip
    ax.errorbar(
        rate["rate"], rows, xerr=_reach(rate), fmt="none", color="black", capsize=2, linewidth=1
    )
    if rate["rate"].notna().iloc[0]:
        ax.axvline(rate["rate"].iloc[0], color="black", linestyle=":", linewidth=1)
    for row, value, lost in zip(rows, rate["rate"], broken, strict=True):
        if np.isnan(value):
            text = "–"
        else:
            text = f"{value:.1f}" + (f" +{lost:.1f}" if lost >= 0.05 else "")
        # in the margin: beside a long bar there is no room
        ax.annotate(text, (1.02, row), xycoords=ax.get_yaxis_transform(), va="center", size=7)


@styled
def verdicts(responses: pd.DataFrame) -> Figure:
    """What the answers are made of: one stacked bar a model, one panel a group of prompts.

    responses: one row per answer with model, objective, group and verdict. Only verdicts that occur
    are shown.
    """
    found = set(responses["verdict"])
    styles = {verdict: style for verdict, style in VERDICT_STYLE.items() if verdict in found}
    models = list(dict.fromkeys(responses["model"]))
    groups = _groups(responses)
    figure, axes = _wrapped(
        len(groups), 4, width=2.75, height=1.5 + 0.36 * len(models), sharey=True
    )
    rows = np.arange(len(models))
    kinds = {"harmful": "harmful", "over_safety": "harmless", "utility": "utility"}
    for ax, (objective, group) in zip(axes, groups, strict=True):
        kind, part = kinds[objective], _of_group(responses, objective, group)
        title = kind if group in ("harmless", "utility") else fill(f"{kind}, {group}", 28)
        shares = 100 * pd.crosstab(part["model"], part["verdict"], normalize="index")
        shares = shares.reindex(models).reindex(columns=list(styles), fill_value=0).fillna(0)
        left = np.zeros(len(models))
        for verdict, (colour, hatch) in styles.items():
            width = shares[verdict].to_numpy()
            ax.barh(
                rows, width, left=left, height=0.72, color=colour, hatch=hatch, edgecolor=DARK,
                linewidth=0.6,
            )  # fmt: skip
            for row in rows[width >= 9]:
                ink = "white" if colour in DEEP else "black"
                place = (left[row] + width[row] / 2, row)
                halo = _HALO if hatch else None
                ax.annotate(
                    f"{width[row]:.0f}", place, ha="center", va="center", size=7, color=ink,
                    bbox=halo,
                )  # fmt: skip
            left = left + width
        ax.set_title(f"{title} ({_n(part.groupby('model').size())})")
        ax.set(xlim=(0, 100), ylim=(len(models) - 0.4, -0.6), xlabel="% of answers")
        ax.grid(False)
    axes[0].set_yticks(rows, models)
    swatches = [
        Swatch(facecolor=colour, hatch=hatch, edgecolor=DARK, label=verdict)
        for verdict, (colour, hatch) in styles.items()
    ]
    _legend_below(figure, swatches)
    return figure


@styled
def by_phrasing(results: pd.DataFrame) -> Figure:
    """Harm and false refusal by phrasing, one marker a model, with intervals.

    results: the tidy frame with phrasings as `category` (see notebook 00).
    """
    models = list(dict.fromkeys(results["model"]))
    groups = [pair for pair in _groups(results) if pair[0] != HIGHER_IS_BETTER]
    if not groups:
        return _nothing("no harmful or harmless prompts")
    height = 1.8 + 0.22 * len(models)
    figure, axes = _wrapped(len(groups), 3, width=10 / 3, height=height)
    shades = sns.color_palette(f"blend:{BLUE},{LIGHT}", len(models))
    for ax, (objective, group) in zip(axes, groups, strict=True):
        title, metric = _title(objective, group), PANELS[objective][1]
        part = _of_group(results, objective, group)
        part = part[part["metric"] == metric]
        part = part[part["category"] != "all"]
        phrasings = list(dict.fromkeys(part["category"]))
        for number, model in enumerate(models):
            own = part[part["model"] == model].set_index("category").reindex(phrasings)
            shift = (number - (len(models) - 1) / 2) * 0.6 / max(len(models), 3)
            own = 100 * own[["rate", "low", "high"]].astype(float)
            ax.errorbar(
                own["rate"], np.arange(len(phrasings)) + shift, xerr=_reach(own),
                fmt=MARKERS[number % 8], color=shades[number], markeredgecolor="0.3", capsize=2,
                label=model,
            )  # fmt: skip
        labels = [f"{p}\n({_n(part.loc[part['category'] == p, 'n'])})" for p in phrasings]
        ax.set_yticks(np.arange(len(phrasings)), labels)
        ax.set(title=f"{title} %", xlim=(-3, 103), ylim=(len(phrasings) - 0.4, -0.6))
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


# ---- continual patching --------------------------------------------------------------------------


@styled
def continual(results: pd.DataFrame, stages: Sequence[Sequence[str]]) -> Figure:
    """A row for each method and stage, a column for each set of categories and objective.

    results: the tidy frame with `stage` (0: base). stages: the categories of each stage. Dark is
    bad in every column: the shade is the rate where lower is better, and what is missing to 100 %
    for utility; the number is the rate itself. Brackets: categories that had not yet arrived.
    """
    columns = _stage_columns(results, stages)
    models = list(dict.fromkeys(results["model"]))  # the stages of one method together
    rows = set(zip(results["model"], results["stage"], strict=True))
    rows = sorted(rows, key=lambda row: (models.index(row[0]), row[1]))
    rate, label = np.zeros((len(rows), len(columns))), []
    for i, (model, stage) in enumerate(rows):
        own = results[(results["model"] == model) & (results["stage"] == stage)]
        texts = []
        for j, column in enumerate(columns):
            cell = own[(own["objective"] == column.objective) & own["group"].isin(column.groups)]
            cell = cell[cell["category"].isin(column.categories)]
            cell = cell[cell["metric"] == column.metric]
            rate[i, j] = 100 * cell["k"].sum() / cell["n"].sum() if len(cell) else np.nan
            text = f"{rate[i, j]:.1f}" if len(cell) else "–"
            texts.append(f"({text})" if stage < column.stage else text)
        label.append(texts)
    higher = [column.metric == HIGHER_IS_BETTER for column in columns]
    badness = np.where(higher, 100 - rate, rate)
    figure, (ax,) = _panels(1, 1, width=1.6 + 1.05 * len(columns), height=1.5 + 0.42 * len(rows))
    names = [f"{m}" if s == 0 else f"{m}, after stage {s}" for m, s in rows]
    sns.heatmap(
        pd.DataFrame(badness, names, [column.title for column in columns]), ax=ax, cmap=HEAT,
        vmin=0, vmax=100, annot=np.array(label), fmt="", linewidths=1, annot_kws={"size": 8},
        cbar_kws={"label": "failures [%]"},
    )  # fmt: skip
    for i, j in np.argwhere(np.isnan(badness)):  # seaborn leaves such cells without their text
        ax.text(j + 0.5, i + 0.5, label[i][j], ha="center", va="center", size=8)
    _legible(ax)
    for edge in [i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]]:
        ax.axhline(edge, color="black", linewidth=1.4)
    ax.axvline(sum(column.stage > 0 for column in columns), color="black", linewidth=1.4)
    ax.tick_params(axis="both", rotation=0, labelsize=8)
    ax.grid(False)
    return figure


class _Column(NamedTuple):
    """A column of `continual`. stage: the one that its categories arrive in, from 1; else 0."""

    title: str
    objective: str
    groups: tuple[str, ...]
    metric: str
    categories: list[str]
    stage: int = 0


def _stage_columns(results: pd.DataFrame, stages: Sequence[Sequence[str]]) -> list[_Column]:
    """The stages' categories, those of no stage, broken text, false refusal and utility."""
    pairs = _groups(results)
    harmful = [group for objective, group in pairs if objective == "harmful"]
    apart = {group: set(_of_group(results, "harmful", group)["category"]) for group in harmful}
    known = {name for names in stages for name in names}
    columns = []
    for k, names in enumerate(stages, start=1):
        for group in [g for g in harmful if apart[g] & known]:
            head = "harmful\n" if group == "seen" else f"harmful,\n{fill(group, 13)}\n"
            title = f"{head}stage {k}:\n" + "\n".join(fill(name, 13) for name in names)
            columns.append(_Column(title, "harmful", (group,), "harmful", list(names), k))
    for group in harmful:
        if group == "unseen":
            columns.append(
                _Column("harmful\nnever in\nD_h", "harmful", (group,), "harmful", ["all"])
            )
        elif group != "seen" and apart[group] - known - {"all"}:
            title = f"harmful,\n{fill(group, 13)}\nin no stage"
            rest = sorted(apart[group] - known - {"all"})
            columns.append(_Column(title, "harmful", (group,), "harmful", rest))
    if harmful:
        title = "broken on\nharmful"
        columns.append(_Column(title, "harmful", tuple(harmful), "broken", ["all"]))
    for objective, group in pairs[len(harmful) :]:
        title = PANELS[objective][0].replace(" ", "\n")
        title += "" if group in UNNAMED else f",\n{fill(group, 13)}"
        columns.append(_Column(title, objective, (group,), PANELS[objective][1], ["all"]))
    return columns


# ---- parts ---------------------------------------------------------------------------------------

_HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}


def _groups(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(objective, group) of every panel that there is something to show in."""
    return in_order(zip(frame["objective"], frame["group"], strict=True))


def _of_group(frame: pd.DataFrame, objective: str, group: str) -> pd.DataFrame:
    return frame[(frame["objective"] == objective) & (frame["group"] == group)]


def _title(objective: str, group: str) -> str:
    return UNNAMED.get(group) or fill(f"{PANELS[objective][0]}, {group}", 30)


def _wrapped(count: int, at_most: int, *, width: float, height: float, **shared):
    """A figure of `count` panels of this size in inches, at most so many beside each other."""
    rows = math.ceil(count / at_most)
    columns = math.ceil(count / rows)
    size = {"width": width * max(columns, 2), "height": rows * height}  # one needs room for names
    figure, axes = _panels(rows, columns, **size, **shared)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _nothing(text: str) -> Figure:
    figure, (ax,) = _panels(1, 1, width=5, height=1)
    ax.set_axis_off()
    ax.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
    return figure


def _panels(rows: int, columns: int, *, width: float, height: float, **shared):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.04)  # or a panel's "100" meets the next one's "0"
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, list(axes.flat)


def _note(ax, text: str, x: float, y: float) -> None:
    """A text that points at (x, y) from the side where there is room."""
    place = (0.97, 0.05 if y > sum(ax.get_ylim()) / 2 else 0.72)
    ax.annotate(
        text, (x, y), place, textcoords="axes fraction", ha="right", size=8,
        arrowprops={"arrowstyle": "-", "color": "0.4"}, bbox=_HALO,
    )  # fmt: skip


def _legible(ax) -> None:
    """The numbers of a heat map, light on dark cells and dark on all others."""
    mesh = ax.collections[0]
    grid = np.ma.filled(mesh.get_array().astype(float), 0.0)
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        red, green, blue, _ = mesh.cmap(mesh.norm(grid[row, column]))
        text.set_color("black" if 0.21 * red + 0.72 * green + 0.07 * blue > 0.45 else "white")


def _by_model(part: pd.DataFrame, metric: str, models: list[str]) -> pd.DataFrame:
    cells = part[part["metric"] == metric].drop_duplicates("model").set_index("model")
    return cells[["rate", "low", "high"]].astype(float).reindex(models)


def _reach(rates: pd.DataFrame) -> list[pd.Series]:
    """How far the intervals reach to the left and right; rounding may put -1e-16 there."""
    left, right = rates["rate"] - rates["low"], rates["high"] - rates["rate"]
    return [left.clip(lower=0), right.clip(lower=0)]


def _legend_below(figure: Figure, handles: list) -> None:
    columns = min(len(handles), 4)  # a wider legend would squeeze the panels
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _n(counts: pd.Series) -> str:
    """How many prompts stand behind the numbers; a span where the models had not equally many."""
    low, high = (counts.min(), counts.max()) if len(counts) else (0, 0)
    return f"n = {low}" if low == high else f"n = {low} to {high}"
