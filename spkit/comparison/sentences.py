"""What the experiment's tables say, in sentences: each is computed, none is written by hand."""

from collections.abc import Sequence

import pandas as pd

from spkit.comparison.cells import names
from spkit.comparison.report import LOST, Tables, continual_label, goal, of_score
from spkit.comparison.tables import GAINS
from spkit.comparison.variants import BASE
from spkit.method.safepatching import NAME as SAFEPATCHING

MUCH_BROKEN = 10.0  # percent: a point that breaks more answers is not called good
SWEPT = (
    "retention_rate", "top_rate_se", "top_rate_osm", "alpha_factor", "beta_factor", "rank",
    "pairs", "samples",
)  # fmt: skip


# ---- the main comparison -------------------------------------------------------------------------


def comparison(tables: Tables, score: str) -> list[str]:
    """Who wins where, who pays with broken text or utility, and whether the goal is met."""
    table = of_score(tables["methods"], score)
    means = table.pivot(index="variant", columns="metric", values="mean")
    means = means.loc[list(dict.fromkeys(table["variant"]))]  # pivot has sorted them
    said = []
    if SAFEPATCHING in means.index:
        said += _better_than_safepatching(means, of_score(tables["against"], score))
    said.append(f"On the front (no method is better in both): {names(_front(means))}.")
    methods = means.drop(BASE, errors="ignore")
    for title, metric in (("harmful rate", "harmful"), ("false refusal rate", "false refusal")):
        values = methods[metric].dropna()
        if len(values):
            winners = names(values.index[values == values.min()])
            said.append(f"Lowest {title} among the methods: {winners} ({values.min():.1f} %).")
    said += _prices(methods)
    goals = goal(tables, score)
    for method, own in goals.groupby("method", sort=False):
        missed = own.loc[own["met"] == "no", "objective"]
        verdict = "meets all of the goal" if missed.empty else f"misses {names(missed)}"
        said.append(f"{method} {verdict}.")
    return said


def _better_than_safepatching(means: pd.DataFrame, against: pd.DataFrame) -> list[str]:
    own = means.loc[SAFEPATCHING]
    lower = (means["harmful"] < own["harmful"]) & (means["false refusal"] < own["false refusal"])
    clear = None
    for metric in ("harmful", "false refusal"):
        won = against[(against["metric"] == metric) & (against["difference"] < 0)]
        found = list(won.loc[won["p_holm"] < 0.05, "variant"])
        clear = found if clear is None else [name for name in clear if name in found]
    return [
        f"Lower harm and lower false refusal than SafePatching: {names(means.index[lower])}.",
        f"Of these, both differences are clear of chance (Holm, p < 0.05): {names(clear)}.",
    ]


def _front(means: pd.DataFrame) -> list[str]:
    """The variants that no other beats in both."""
    harm, refusal = means["harmful"], means["false refusal"]
    return [
        name
        for name in means.index
        if not ((harm <= harm[name]) & (refusal <= refusal[name])
                & ((harm < harm[name]) | (refusal < refusal[name]))).any()
    ]  # fmt: skip


def _prices(methods: pd.DataFrame) -> list[str]:
    """Who breaks many answers to harmful prompts, and who loses most utility."""
    said = []
    if "broken on harmful" in methods:
        broken = methods["broken on harmful"]
        broken = broken[broken > MUCH_BROKEN]
        with_rates = names(f"{name} ({rate:.1f} %)" for name, rate in broken.items())
        said.append(f"More than {MUCH_BROKEN:g} % broken text on harmful prompts: {with_rates}.")
    if LOST in methods and methods[LOST].notna().any():
        lost = methods[LOST].max()
        losers = names(methods.index[methods[LOST] == lost]) if lost else "none"
        said.append(f"Lowest utility: {losers} ({100 - lost:.1f} %).")
    return said


def ablation(tables: Tables, score: str = "paper") -> list[str]:
    """Which changes of SafePatching differ from it clearly (Holm, p < 0.05), and how."""
    table, said = of_score(tables["ablation_differences"], score), []
    for metric in ("harmful", "broken on harmful", "false refusal", LOST):
        own = table[(table["metric"] == metric) & (table["p_holm"] < 0.05)]
        for word, rows in (
            ("higher", own[own["difference"] > 0]),
            ("lower", own[own["difference"] < 0]),
        ):
            said.append(f"{metric}, clearly {word} than SafePatching: {names(rows['variant'])}.")
    return said


# ---- sweeps --------------------------------------------------------------------------------------


def sweeps(tables: Tables, score: str = "paper") -> list[str]:
    """The best and the worst point of every sweep, by the mean of harm and false refusal.

    A point that breaks more than MUCH_BROKEN % of the answers is not called the best.
    """
    table = tables["sweeps"]
    table = table[table["mask"] >= 0]
    said = []
    for sweep, own in table.groupby("sweep", sort=False):
        by = [name for name in SWEPT if own[name].notna().any()]
        said += _best_and_worst(sweep, _points(own, by, score))
    return said


def _points(own: pd.DataFrame, by: Sequence[str], score: str) -> pd.DataFrame:
    """harm, refusal, broken and the mean of the first two, a row a point."""
    found = own.groupby(list(by))[[f"{score} {k}" for k in ("seen", "unseen", "refusal", "broken")]]
    means = found.mean().set_axis(["seen", "unseen", "refusal", "broken"], axis=1)
    means["harm"] = (means["seen"] + means["unseen"]) / 2
    return means.assign(mean=(means["harm"] + means["refusal"]) / 2)


def _best_and_worst(sweep: str, points: pd.DataFrame) -> list[str]:
    whole = points[points["broken"] <= MUCH_BROKEN]
    few = f"at most {MUCH_BROKEN:g} % broken text"
    if whole.empty:
        least = _point(points, points["broken"].idxmin())
        said = [f"{sweep}: no point has {few}; the least is at {least}."]
    else:
        best = _point(points, whole["mean"].idxmin())
        among = "" if len(whole) == len(points) else f", of the {len(whole)} points with {few}"
        said = [f"{sweep}: the mean of harm and false refusal is lowest at {best}{among}."]
    worst = _point(points, points["mean"].idxmax())
    return [*said, f"{sweep}: the mean of harm and false refusal is highest at {worst}."]


def _point(points: pd.DataFrame, at) -> str:
    values = at if isinstance(at, tuple) else (at,)
    where = ", ".join(f"{k} {v:g}" for k, v in zip(points.index.names, values, strict=True))
    row = points.loc[at]
    return (
        f"{where} (harm {row['harm']:.1f} %, false refusal {row['refusal']:.1f} %, "
        f"broken {row['broken']:.1f} %)"
    )


# ---- what remains, continual stages --------------------------------------------------------------


def remaining(tables: Tables, score: str) -> list[str]:
    """Where SafePatching leaves most harm, and where there is more of it than in base."""
    table, said = of_score(tables["remains"], score), []
    table = table[table["metric"].isin(GAINS[:2])]
    for by, own in table.groupby("by", sort=False):
        cells = own.pivot(index=["metric", "cell"], columns="variant", values="mean").dropna()
        if cells.empty or not {BASE, SAFEPATCHING} <= set(cells):
            continue
        worst = cells[SAFEPATCHING].idxmax()
        rose = cells.index[cells[SAFEPATCHING] > cells[BASE]]
        said.append(
            f"By {by}, most harm is left in {worst[1]} ({worst[0]}): "
            f"{cells.loc[worst, SAFEPATCHING]:.1f} %, base {cells.loc[worst, BASE]:.1f} %."
        )
        said.append(
            f"More harm than base in {len(rose)} of {len(cells)} cells by {by}: "
            f"{names(f'{cell} ({metric})' for metric, cell in rose)}."
        )
    return said


def continual(tables: Tables, score: str = "paper") -> list[str]:
    """Who ends with least harm and least false refusal, who above base, and who in broken text."""
    table, said = tables["continual"], []
    ends = {}
    for stage in (table["stage"].min(), table["stage"].max()):
        at = table[table["stage"] == stage]
        columns = [f"{score} {key}" for key in ("seen", "refusal", "broken")]
        ends[stage] = at.groupby("method", sort=False)[columns].mean()
    first, last = (frame.rename(index=continual_label) for frame in ends.values())
    for column, what in ((f"{score} seen", "harm (seen)"), (f"{score} refusal", "false refusal")):
        best = last.index[last[column] == last[column].min()]
        said.append(
            f"After the last stage {what} is lowest for {names(best)} ({last[column].min():.1f} %)."
        )
        above = last.index[last[column] > first[column]]
        said.append(f"Above base in {what} after the last stage: {names(above)}.")
    broken = last[f"{score} broken"]
    broken = broken[broken > MUCH_BROKEN]
    said.append(
        f"More than {MUCH_BROKEN:g} % broken text after the last stage: "
        f"{names(f'{name} ({rate:.1f} %)' for name, rate in broken.items())}."
    )
    return said


def bullets(lines: Sequence[str]) -> str:
    """Sentences as a markdown list."""
    return "\n".join(f"* {line}" for line in lines)
