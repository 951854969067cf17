"""Figures of the comparison: one function each, tables in, a matplotlib Figure out.

Same look and rules as spkit/figures.py: light to dark instead of hues, a marker of its own for
every method, intervals wherever the tables have them. Columns are those of tables.py. All that is
computed here are means over the backbones and masks of a sweep; the range is drawn beside them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spkit.comparison.report import continual_label, of_score
from spkit.comparison.variants import BASE
from spkit.figures import DARK, HEAT, LIGHT, MIDDLE, PALE, _legend_below, _panels, _reach, styled
from spkit.method.safepatching import NAME as SAFEPATCHING

WIDE = 8.6  # inches: what a notebook's page shows without shrinking it
MANY_MARKERS = "osD^vP*X<>pd"
RUST = "#a23b1e"
# of lines that cross: six colours that differ in grey, too, each with a marker of its own
COLOURS = (RUST, "#1f6f8b", "#e0a030", "#7d5ba6", "#203a20", "#8fbf9f")
LINES = ("-", "--", "-", "--", ":", ":")
# panel title -> metric of the tables
GAINS = {
    "harmful, seen categories": "harmful seen",
    "harmful, unseen categories": "harmful unseen",
    "false refusal": "false refusal",
}
ABLATED = {
    "harmful": "harmful",
    "broken on harmful": "broken on harmful",
    "false refusal": "false refusal",
}
# line of a sweep -> (column of the sweeps, marker, line style, shade)
SWEPT = {
    "harmful, seen": ("seen", "o", "-", RUST),
    "harmful, unseen": ("unseen", "s", "--", RUST),
    "false refusal": ("refusal", "D", "-", MIDDLE),
    "broken": ("broken", "X", ":", "0.35"),
}


# ---- the main comparison -------------------------------------------------------------------------


@styled
def pareto(methods: pd.DataFrame, score: str) -> Figure:
    """Harm against false refusal, a point a method, with intervals both ways.

    methods: the table of that name. The darker a point, the more utility it has lost. The dotted
    steps join the points that no other beats in both.
    """
    table = of_score(methods, score)
    names = _base_first(table["variant"])
    x, y = (_of_metric(table, metric, names) for metric in ("harmful", "false refusal"))
    utility = 100 - _of_metric(table, "utility lost", names)["rate"]
    figure, (ax,) = _panels(1, 1, width=7.2, height=5)
    lowest = np.floor(utility.min() / 10) * 10 if utility.notna().any() else 0
    look = {"cmap": HEAT.reversed(), "norm": Normalize(lowest, 100), "edgecolor": "black"}
    ax.errorbar(
        x["rate"], y["rate"], xerr=_reach(x), yerr=_reach(y), fmt="none", ecolor="0.6",
        capsize=2, linewidth=0.8, zorder=1,
    )  # fmt: skip
    for marker, name in zip(_markers(names), names, strict=True):
        own = name == SAFEPATCHING
        drawn = ax.scatter(
            x.loc[name, "rate"], y.loc[name, "rate"], c=[utility[name]], marker=marker, **look,
            s=150 if own else 85, linewidth=2 if own else 1, label=name, zorder=3 if own else 2,
            plotnonfinite=True,
        )  # fmt: skip
    best = _front(x["rate"].to_numpy(), y["rate"].to_numpy())
    ax.step(*best, where="post", color="black", linestyle=":", linewidth=1, zorder=1)
    ax.set(xlabel="harmful, all categories [%] (lower is better)")
    ax.set(ylabel="false refusal [%] (lower is better)")
    figure.colorbar(drawn, ax=ax, label="utility [%]", aspect=30)
    _legend_below(figure, _legend(names, "white"))
    return figure


@styled
def paired_differences(differences: pd.DataFrame, per_backbone: pd.DataFrame, score: str) -> Figure:
    """Every method minus base: mean and interval, and below it a small dot for every backbone.

    differences, per_backbone: the tables of these names.
    """
    table, each = of_score(differences, score), of_score(per_backbone, score)
    names = list(dict.fromkeys(table["variant"]))
    figure, axes = _panels(1, len(GAINS), width=WIDE, height=1.6 + 0.34 * len(names), sharey=True)
    rows = np.arange(len(names))
    for ax, (title, metric) in zip(axes, GAINS.items(), strict=True):
        gap = _of_metric(table, metric, names, "difference")
        dots = each[each["metric"] == metric]
        dots = dots[dots["variant"].isin(names)]
        at = [names.index(name) + 0.28 for name in dots["variant"]]
        ax.scatter(
            dots["difference"], at, s=14, color=LIGHT, edgecolor=DARK, linewidth=0.5,
            label="one backbone",
        )  # fmt: skip
        ax.errorbar(
            gap["rate"], rows, xerr=_reach(gap), fmt="o", color=DARK, markersize=5, capsize=3,
            label="mean, with its interval",
        )  # fmt: skip
        ax.axvline(0, color="black", linewidth=1)
        ax.set(title=title, xlabel="minus base [points]", ylim=(len(names) - 0.4, -0.6))
        ax.grid(False, axis="y")
    axes[0].set_yticks(rows, names)
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


@styled
def hypervolumes(table: pd.DataFrame) -> Figure:
    """The area that each method's front dominates, under both scores, with its interval.

    table: hypervolumes. 1 is a method without harm and false refusal; the line is SafePatching's.
    """
    scores = list(dict.fromkeys(table["score"]))
    names = list(dict.fromkeys(table["method"]))
    figure, axes = _panels(
        1, len(scores), width=1.8 + 3.4 * len(scores), height=1.4 + 0.3 * len(names), sharey=True
    )
    for ax, score in zip(axes, scores, strict=True):
        own = table[table["score"] == score].set_index("method").reindex(names)
        own = own.rename(columns={"hypervolume": "rate"})
        _dots(ax, own, names)
        ax.set(title=f"{score} score", xlabel="hypervolume (higher is better)")
    axes[0].set_yticks(np.arange(len(names)), names)
    return figure


# ---- ablations and sweeps ------------------------------------------------------------------------


@styled
def ablations(table: pd.DataFrame, score: str = "paper") -> Figure:
    """SafePatching with one part changed, a row a change, with intervals.

    table: ablations. SafePatching as it is comes first; the upright line is its value.
    """
    table = of_score(table, score)
    names = list(dict.fromkeys(table["variant"]))
    names.sort(key=lambda name: name != SAFEPATCHING)
    figure, axes = _panels(1, len(ABLATED), width=WIDE, height=1.5 + 0.28 * len(names), sharey=True)
    for ax, (title, metric) in zip(axes, ABLATED.items(), strict=True):
        _dots(ax, _of_metric(table, metric, names), names)
        ax.set(title=f"{title} %", xlim=(-3, 103), xlabel="lower is better")
    axes[0].set_yticks(np.arange(len(names)), names)
    return figure


@styled
def retention_sweep(sweeps: pd.DataFrame, score: str = "paper") -> Figure:
    """Failures by the retention rate p: mean over backbones and masks, with the range.

    sweeps: the table of that name, on the dev pool. The marks at the right edge are base's.
    """
    figure, (ax,) = _panels(1, 1, width=7.5, height=4)
    _lines(ax, sweeps, "retention", "retention_rate", score)
    ax.set(xlabel="retention rate p", ylabel="failures on dev [%]")
    _legend_below(figure, ax.get_legend_handles_labels()[0])
    return figure


@styled
def top_rate_grid(sweeps: pd.DataFrame, score: str = "paper") -> Figure:
    """Failures by both top rates: a map each for harm, false refusal and broken text.

    sweeps: the table of that name, on the dev pool. Numbers: mean over backbones and masks, and
    under it lowest and highest. harmful: the mean of seen and unseen categories.
    """
    return _maps(
        sweeps,
        "top-rates",
        {"top_rate_se": "top rate a (SE)", "top_rate_osm": "top rate b (OSM)"},
        score,
    )


@styled
def strength_grid(sweeps: pd.DataFrame, score: str = "paper") -> Figure:
    """Failures by both strengths, as factors of the chosen ones: maps as in top_rate_grid."""
    return _maps(
        sweeps,
        "strengths",
        {"alpha_factor": "α, times the chosen one", "beta_factor": "β, times the chosen one"},
        score,
    )


@styled
def other_sweeps(sweeps: pd.DataFrame, score: str = "paper") -> Figure:
    """Failures by the rank of the factors, the number of pairs and of calibration samples."""
    panels = {
        "rank": "rank r of the factors",
        "pairs": "harmful pairs",
        "samples": "calibration samples",
    }
    figure, axes = _panels(1, len(panels), width=WIDE, height=3.6, sharey=True)
    for ax, (name, label) in zip(axes, panels.items(), strict=True):
        _lines(ax, sweeps, name, name, score, log=2)
        ax.set_xlabel(label)
    axes[0].set_ylabel("failures on dev [%]")
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


# ---- sizes, stages, what remains -----------------------------------------------------------------


@styled
def sizes(table: pd.DataFrame, score: str = "paper") -> Figure:
    """Every method on every size of the backbone, with the settings chosen on the usual one.

    table: sizes. Means over the backbones of a size, where there are several.
    """
    panels = {
        "harmful, seen categories": "seen",
        "harmful, unseen categories": "unseen",
        "false refusal": "refusal",
        "utility lost": "utility lost",
    }
    names = _base_first(table["variant"])
    weights = table.groupby("size")["weights"].first().sort_values()
    means = table.groupby(["size", "variant"]).mean(numeric_only=True)
    figure, axes = _panels(1, len(panels), width=WIDE, height=1.6 + 0.34 * len(names), sharey=True)
    shades = sns.color_palette(f"blend:{PALE},{DARK}", len(weights))
    for ax, (title, key) in zip(axes, panels.items(), strict=True):
        for number, (size, count) in enumerate(weights.items()):
            own = means.loc[size].reindex(names)[f"{score} {key}"]
            shift = (number - (len(weights) - 1) / 2) * 0.2
            ax.plot(
                own, np.arange(len(names)) + shift, MANY_MARKERS[number], color=shades[number],
                markeredgecolor="black", label=f"{size} ({count:,} weights)",
            )  # fmt: skip
        ax.set(title=f"{title} %".replace(", ", ",\n"), xticks=(0, 50, 100))
        ax.set(xlim=(-3, 103), ylim=(len(names) - 0.4, -0.6))
        ax.grid(False, axis="y")
    axes[0].set_yticks(np.arange(len(names)), names)
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


@styled
def continual_stages(continual: pd.DataFrame, score: str = "paper") -> Figure:
    """Harm and false refusal after every stage: mean over orders and backbones, with the range.

    continual: the table of that name. Harm counts all seen categories, also those still to come.
    """
    panels = {"harmful, seen categories": "seen", "false refusal": "refusal"}
    names = list(dict.fromkeys(continual["method"]))
    figure, axes = _panels(1, len(panels), width=WIDE, height=4.4, sharey=True)
    for ax, (title, key) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            own = _ranges(continual[continual["method"] == name], "stage", f"{score} {key}")
            shift = (number - (len(names) - 1) / 2) * 0.08
            ax.errorbar(
                own.index + shift, own["rate"], yerr=_reach(own), fmt=LINES[number % len(LINES)],
                color=COLOURS[number % len(COLOURS)], marker=MANY_MARKERS[number], markersize=6,
                markeredgecolor="black", markeredgewidth=0.7, capsize=2, linewidth=1.4,
                label=continual_label(name),
            )  # fmt: skip
        stages = sorted(continual["stage"].unique())
        ax.set_xticks(stages, ["base" if stage == 0 else f"{stage}" for stage in stages])
        ax.set(title=f"{title} %", xlabel="after stage", ylim=(-3, 103))
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


@styled
def remaining(remains: pd.DataFrame, score: str) -> Figure:
    """Harm by phrasing and by category, base against SafePatching, with intervals.

    remains: the table of that name. In brackets: the number of prompts.
    """
    table = of_score(remains, score)
    panels = {
        f"{title}\nby {by}": (metric, by)
        for by in ("phrasing", "category")
        for title, metric in list(GAINS.items())[:2]
    }
    models = {BASE: ("o", LIGHT), SAFEPATCHING: ("D", DARK)}
    figure, axes = _panels(2, 2, width=WIDE, height=6)
    for ax, (title, (metric, by)) in zip(axes, panels.items(), strict=True):
        part = table[(table["metric"] == metric) & (table["by"] == by)]
        cells = list(dict.fromkeys(part["cell"]))
        for shift, (model, (marker, shade)) in zip((-0.13, 0.13), models.items(), strict=True):
            own = part[part["variant"] == model].rename(columns={"mean": "rate"})
            own = own.set_index("cell").reindex(cells)
            ax.errorbar(
                own["rate"], np.arange(len(cells)) + shift, xerr=_reach(own), fmt=marker,
                color=shade, ecolor="0.3", markeredgecolor="black", capsize=2, label=model,
            )  # fmt: skip
        prompts = part.groupby("cell")["n_items"].max()
        labels = [f"{cell} ({prompts[cell]})" for cell in cells]
        ax.set_yticks(np.arange(len(cells)), labels)
        ax.set(title=title, xlim=(-3, 103), ylim=(len(cells) - 0.4, -0.6))
        ax.grid(False, axis="y")
    for ax in axes[2:]:
        ax.set_xlabel("harmful [%]")
    _legend_below(figure, axes[0].get_legend_handles_labels()[0])
    return figure


# ---- parts ---------------------------------------------------------------------------------------


def _base_first(names) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: name != BASE)


def _of_metric(
    table: pd.DataFrame, metric: str, names: Sequence[str], value: str = "mean"
) -> pd.DataFrame:
    """rate, low and high of one metric, a row a variant; nan where there is none."""
    own = table[table["metric"] == metric].drop_duplicates("variant").set_index("variant")
    own = own.rename(columns={value: "rate"})[["rate", "low", "high"]]
    return own.astype(float).reindex(names)


def _markers(names: Sequence[str]) -> list[str]:
    return [MANY_MARKERS[number % len(MANY_MARKERS)] for number in range(len(names))]


def _legend(names: Sequence[str], shade: str) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            marker=marker,
            linestyle="",
            color=shade,
            markeredgecolor="black",
            label=n,
            markersize=8,
        )  # fmt: skip
        for marker, n in zip(_markers(names), names, strict=True)
    ]


def _front(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """The points that no other beats in both, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(p for p in zip(x, y, strict=True) if not np.isnan(p).any()):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return [p[0] for p in best], [p[1] for p in best]


def _dots(ax, rates: pd.DataFrame, names: Sequence[str]) -> None:
    """A dot with its interval a row; SafePatching is the filled diamond and the upright line."""
    rows = np.arange(len(names))
    ax.errorbar(
        rates["rate"], rows, xerr=_reach(rates), fmt="none", ecolor="0.3", capsize=2, linewidth=1
    )
    for row, name in zip(rows, names, strict=True):
        own = name == SAFEPATCHING
        ax.plot(
            rates.loc[name, "rate"], row, "D" if own else "o", color=DARK if own else LIGHT,
            markeredgecolor="black", markersize=6,
        )  # fmt: skip
    if SAFEPATCHING in names and not np.isnan(rates.loc[SAFEPATCHING, "rate"]):
        ax.axvline(rates.loc[SAFEPATCHING, "rate"], color="black", linestyle=":", linewidth=1)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")


def _ranges(table: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean, lowest and highest of one column, a row a value of another."""
    found = table.groupby(by)[value].agg(["mean", "min", "max"])
    return found.set_axis(["rate", "low", "high"], axis=1)


def _lines(ax, sweeps: pd.DataFrame, sweep: str, by: str, score: str, *, log: int = 0) -> None:
    """The lines of SWEPT over one column, and base's rates at the right edge.

    log: the base of a log axis; 0: a linear one, from 0 to 1.
    """
    own = sweeps[sweeps["sweep"] == sweep]
    base, points = own[own["mask"] == -1], own[own["mask"] >= 0]
    for number, (label, (key, marker, line, shade)) in enumerate(SWEPT.items()):
        rates = _ranges(points, by, f"{score} {key}")
        shift = number - 1.5  # or the ranges would hide one another
        x = rates.index * (1 + 0.02 * shift) if log else rates.index + 0.005 * shift
        ax.errorbar(
            x, rates["rate"], yerr=_reach(rates), fmt=line, marker=marker,
            color=shade, markeredgecolor="black", capsize=2, linewidth=1.3, label=label,
        )  # fmt: skip
        if len(base):  # at the edge: it belongs to no value of x
            ax.plot(
                1.03, base[f"{score} {key}"].mean(), marker=marker, color="white", markersize=5,
                markeredgecolor=shade, transform=ax.get_yaxis_transform(), clip_on=False,
            )  # fmt: skip
    if len(base):
        ax.annotate("base", (1.03, 1.02), xycoords="axes fraction", ha="center", size=7)
    values = sorted(points[by].dropna().unique())
    ax.set(ylim=(-3, 103))
    if values:
        if log:
            ax.set_xscale("log", base=log)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()


def _maps(sweeps: pd.DataFrame, sweep: str, axes_of: Mapping[str, str], score: str) -> Figure:
    own = sweeps[(sweeps["sweep"] == sweep) & (sweeps["mask"] >= 0)]
    harm = (own[f"{score} seen"] + own[f"{score} unseen"]) / 2
    panels = {
        "harmful %": harm,
        "false refusal %": own[f"{score} refusal"],
        "broken %": own[f"{score} broken"],
    }
    (down, down_label), (across, across_label) = axes_of.items()
    figure, axes = _map_panels(own[across].nunique(), own[down].nunique())
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        cells = (
            own.assign(value=values).groupby([down, across])["value"].agg(["mean", "min", "max"])
        )
        texts = [_with_range(*cell) for cell in cells.itertuples(index=False)]
        grid = cells["mean"].unstack()
        sns.heatmap(
            grid, ax=ax, cmap=HEAT, vmin=0, vmax=100, linewidths=0.5, fmt="", cbar=False,
            annot=cells.assign(text=texts)["text"].unstack().fillna(""), annot_kws={"size": 6.5},
            xticklabels=[f"{value:g}" for value in grid.columns],
            yticklabels=[f"{value:g}" for value in grid.index],
        )  # fmt: skip
        first = ax.get_subplotspec().is_first_col()
        ax.set(title=title, xlabel=across_label, ylabel=down_label if first else "")
        ax.tick_params(axis="both", rotation=0)
        ax.invert_yaxis()  # small values below, as on any axis
    figure.colorbar(axes[0].collections[0], ax=axes, label="%", aspect=30)
    return figure


def _map_panels(across: int, down: int):
    """Three maps side by side; two above one where they have many columns."""
    if across <= 5:
        return _panels(1, 3, width=WIDE, height=1.2 + 0.42 * down, sharey=True)
    figure, axes = _panels(2, 2, width=WIDE, height=1.6 + 0.72 * down)
    axes[3].remove()
    return figure, axes[:3]


def _with_range(mean: float, low: float, high: float) -> str:
    if round(low) == round(high):
        return f"{mean:.0f}"
    return f"{mean:.0f}\n{low:.0f}–{high:.0f}"
