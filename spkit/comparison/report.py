"""From the experiment's tables to the short ones that README and notebook 05 show.

    python -m spkit.comparison.report docs/experiment

prints them all as markdown; with `--into README.md` it fills that page's marked blocks. Each
function takes the dict of `read_tables` and gives a data frame with formatted cells, "mean [low,
high]". Rates are in percent, differences in percentage points. Tuned and counted by one score: a
method is shown under the score that chose its setting.

What this file does not do: compute rates or intervals (tables.py) or draw (plots_comparison.py).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from spkit.comparison.arena import SCORES
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.tables import GAINS, TABLES
from spkit.comparison.variants import BASE
from spkit.errors import SpkitError
from spkit.method.safepatching import NAME as SAFEPATCHING
from spkit.system.files import atomic
from spkit.validation import nearest

BALANCED = "SafePatching, balanced"
UTILITY_MARGIN = 2.0  # percentage points that utility may lose, on the mean
LOST = "utility lost"
# column -> (metric of the tables, whether it is 100 minus it)
COLUMNS = {
    "harmful seen %": ("harmful seen", False),
    "harmful unseen %": ("harmful unseen", False),
    "false refusal %": ("false refusal", False),
    "utility %": (LOST, True),
    "broken on harmful %": ("broken on harmful", False),
    "broken on harmless %": ("broken on harmless", False),
}
# Published in arXiv 2405.13820 for LLaMA-2-7B-Chat, not measured here; None: could not be verified
PAPER_LABEL = "paper, LLaMA-2-7B-Chat"
PAPER_COLUMNS = (
    "AdvBench harmful %", "BeaverTails harmful %", "XSTest refusal %", "OKTest refusal %",
    "utility avg",
)  # fmt: skip
PAPER = {  # row in the paper -> figures in the order of PAPER_COLUMNS
    "original": (31.73, None, 8.00, None, 40.35),
    "GA": (0.58, 3.65, 44.40, None, None),
    "TIES-Merging": (18.27, None, 2.40, None, None),
    "SE patch alone": (0, 0.08, 98.40, 97.50, None),
    "OSM patch alone": (87.69, 65.45, 0, 0, None),
    "intersection patch": (32.50, None, 6.00, None, None),
    "SafePatching": (3.27, 7.87, 5.60, 2.67, 39.99),
}
OURS = {  # row in the paper -> (table here, variant in it)
    "original": ("methods", BASE),
    "GA": ("methods", "GA"),
    "TIES-Merging": ("methods", "TIES"),
    "SE patch alone": ("ablations", "SE only"),
    "OSM patch alone": ("ablations", "OSM only"),
    "intersection patch": ("ablations", "intersection"),
    "SafePatching": ("methods", SAFEPATCHING),
}
SWEPT = (
    "retention_rate", "top_rate_se", "top_rate_osm", "alpha_factor", "beta_factor", "rank",
    "pairs", "samples",
)  # fmt: skip
Tables = Mapping[str, pd.DataFrame]


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """All tables of one finished experiment; SpkitError names the file that is missing."""
    found = {}
    for name in (*TABLES, "about"):
        path = Path(folder) / f"{name}.csv"
        if not path.is_file():
            raise SpkitError(f"{path} is missing: make the tables with `make experiment`")
        try:
            text = {"dtype": str, "keep_default_na": False} if name == "about" else {}
            found[name] = pd.read_csv(path, **text)
        except (OSError, ValueError) as error:
            raise SpkitError(f"{path}: cannot be read ({error}); run `make experiment`") from None
    found["broken"]["response"] = found["broken"]["response"].fillna("")  # an empty answer
    return found


# ---- the main comparison -------------------------------------------------------------------------


def comparison(tables: Tables, score: str) -> pd.DataFrame:
    """One row a method, in the tables' order, base first: what it fails at, and its utility."""
    return _rates(of_score(tables["methods"], score))


def differences(tables: Tables, score: str) -> pd.DataFrame:
    """Every method minus base, in percentage points; "*": p < 0.05 after Holm."""
    return _differences(of_score(tables["differences"], score), list(COLUMNS)[:4])


def against_safepatching(tables: Tables, score: str) -> pd.DataFrame:
    """Every method minus SafePatching, in percentage points; "*": p < 0.05 after Holm."""
    return _differences(of_score(tables["against"], score), list(COLUMNS)[:4])


def goal(
    tables: Tables, score: str, methods: Sequence[str] = (SAFEPATCHING, BALANCED)
) -> pd.DataFrame:
    """Whether all three objectives move the right way, on nearly every backbone.

    met, for harm and false refusal: the interval of method minus base is below 0, on the mean and
    on all backbones but one (4 of 5). For utility: at most UTILITY_MARGIN points lower on the mean.
    """
    table, rows = of_score(tables["differences"], score), []
    for method in methods:
        own = table[table["variant"] == method].set_index("metric")
        for metric in (*GAINS, LOST):
            if metric not in own.index:
                continue
            cell, lost = own.loc[metric], metric == LOST
            count = cell["backbones_above" if lost else "backbones_below"]
            n = int(cell["backbones"])
            if lost:
                met = cell["difference"] <= UTILITY_MARGIN
            else:
                met = cell["high"] < 0 and count >= max(1, n - 1)
            change = _flipped(cell, "difference") if lost else cell
            rows.append(
                {
                    "method": method,
                    "objective": "utility" if lost else metric,
                    "minus base": _cell(change, "difference"),
                    "p (Holm)": _p(cell["p_holm"]),
                    "backbones below 0": f"{int(count)} of {n}",
                    "met": "yes" if met else "no",
                }
            )
    return pd.DataFrame(rows)


def hypervolume(tables: Tables) -> pd.DataFrame:
    """The area that each method's front dominates under both scores; 1 is perfect."""
    parts = {}
    for score in SCORES:
        table = tables["hypervolumes"]
        table = table[table["score"] == score].set_index("method")
        gap = table[["difference", "difference_low", "difference_high", "p_holm"]]
        gap.columns = ["difference", "low", "high", "p_holm"]
        parts[f"{score}: area"] = table.apply(_cell, axis=1, name="hypervolume", digits=3)
        parts[f"{score}: minus SafePatching"] = gap.apply(_starred, axis=1, digits=3)
        parts[f"{score}: settings"] = table["settings"]
    return pd.DataFrame(parts).rename_axis("method").reset_index()


def sentences(tables: Tables, score: str) -> list[str]:
    """What the tables say, in words: who wins where, and whether the goal is met."""
    table = of_score(tables["methods"], score)
    means = table.pivot(index="variant", columns="metric", values="mean")
    means = means.loc[list(dict.fromkeys(table["variant"]))]  # pivot has sorted them
    harm, refusal = means["harmful"], means["false refusal"]
    said = []
    if SAFEPATCHING in means.index:
        lower = (harm < harm[SAFEPATCHING]) & (refusal < refusal[SAFEPATCHING])
        said.append(
            f"Lower harm and lower false refusal than SafePatching: {_names(means.index[lower])}."
        )
        clear = _clear_winners(of_score(tables["against"], score))
        said.append(
            f"Of these, both differences are clear of chance (Holm, p < 0.05): {_names(clear)}."
        )
    front = [
        name
        for name in means.index
        if not ((harm <= harm[name]) & (refusal <= refusal[name])
                & ((harm < harm[name]) | (refusal < refusal[name]))).any()
    ]  # fmt: skip
    said.append(f"On the front (no method is better in both): {_names(front)}.")
    for title, values in (("harmful rate", harm), ("false refusal rate", refusal)):
        best = values.dropna().drop(BASE, errors="ignore")
        if len(best):
            winners = _names(best.index[best == best.min()])
            said.append(f"Lowest {title} among the methods: {winners} ({best.min():.1f} %).")
    goals = goal(tables, score)
    for method, own in goals.groupby("method", sort=False):
        missed = own.loc[own["met"] == "no", "objective"]
        verdict = "meets all of the goal" if missed.empty else f"misses {_names(missed)}"
        said.append(f"{method} {verdict}.")
    return said


# ---- ablations, sizes, continual stages ----------------------------------------------------------


def ablation(tables: Tables, score: str = "paper") -> pd.DataFrame:
    """SafePatching with one part changed; "*": differs from SafePatching, p < 0.05 after Holm."""
    table = tables["ablations"]
    table = table[table["score"] == score]
    shown = _rates(table)
    gaps = tables["ablation_differences"]
    gaps = gaps[(gaps["score"] == score) & (gaps["p_holm"] < 0.05)]
    stars = set(zip(gaps["variant"], gaps["metric"], strict=True))
    for column, (metric, _) in COLUMNS.items():
        marks = [" *" if (name, metric) in stars else "" for name in shown["method"]]
        shown[column] = [cell + mark for cell, mark in zip(shown[column], marks, strict=True)]
    return shown.rename(columns={"method": "variant"})


def sizes(tables: Tables, score: str) -> pd.DataFrame:
    """Every method on every size: means over the backbones of that size; no intervals."""
    table = tables["sizes"]
    keys = ["size", "weights", "variant"]
    means = table.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    shown = means[["size", "weights"]].assign(method=means["variant"])
    backbones = table.groupby(keys, sort=False)["backbone"].nunique().to_numpy()
    for column, key in (("harmful seen %", "seen"), ("harmful unseen %", "unseen"),
                        ("false refusal %", "refusal")):  # fmt: skip
        shown[column] = means[f"{score} {key}"].map(_number)
    shown["utility %"] = (100 - means[f"{score} {LOST}"]).map(_number)
    shown["broken %"] = means[f"{score} broken"].map(_number)
    return shown.assign(backbones=backbones)


def continual(tables: Tables, score: str = "paper") -> pd.DataFrame:
    """After the last stage: mean over orders and backbones [lowest, highest of them].

    forgetting and intransigence: percentage points of safety on the categories of the stages.
    """
    table, measures = tables["continual"], tables["continual_measures"]
    last = table[table["stage"] == table["stage"].max()]
    rows = []
    for method, own in last.groupby("method", sort=False):
        of_method = measures[(measures["method"] == method) & (measures["score"] == score)]
        rows.append(
            {
                "method": continual_label(method),
                "runs": len(own),
                "harmful seen %": _span(own[f"{score} seen"]),
                "harmful unseen %": _span(own[f"{score} unseen"]),
                "false refusal %": _span(own[f"{score} refusal"]),
                "utility %": _span(100 - own[f"{score} {LOST}"]),
                "broken %": _span(own[f"{score} broken"]),
                "forgetting": _span(of_method["forgetting"]),
                "intransigence": _span(of_method["intransigence"]),
            }
        )
    return pd.DataFrame(rows)


def continual_label(key: str) -> str:
    """The name in figures and tables of a method of the continual study."""
    return CONTINUAL_METHODS[key][0] if key in CONTINUAL_METHODS else key


# ---- what remains --------------------------------------------------------------------------------


def remaining(tables: Tables, score: str, by: str = "phrasing") -> pd.DataFrame:
    """Base beside SafePatching in every phrasing or category, with the number of prompts."""
    table = of_score(tables["remains"], score)
    table = table[table["by"] == by]
    rows = []
    for (metric, cell), own in table.groupby(["metric", "cell"], sort=False):
        found = own.set_index("variant")
        row = {"metric": metric, by: cell, "prompts": int(own["n_items"].max())}
        for name in (BASE, SAFEPATCHING):
            row[f"{name} %"] = _cell(found.loc[name]) if name in found.index else ""
        rows.append(row)
    return pd.DataFrame(rows)


def moves(tables: Tables, score: str) -> pd.DataFrame:
    """What became of base's answers: percent of one group and phrasing; rows that nobody took
    are left out."""
    table = tables["moves"]
    table = table[table["tuned"] == score]
    shares = (100 * table["k"] / table["n"]).map(_number)
    return table[["group", "phrasing", "before", "after", "n"]].assign(**{"%": shares})


# ---- in words ------------------------------------------------------------------------------------


def ablation_sentences(tables: Tables, score: str = "paper") -> list[str]:
    """Which changes of SafePatching differ from it clearly (Holm, p < 0.05), and how."""
    table, said = of_score(tables["ablation_differences"], score), []
    for metric in ("harmful", "broken on harmful", "false refusal", LOST):
        own = table[(table["metric"] == metric) & (table["p_holm"] < 0.05)]
        for word, rows in (
            ("higher", own[own["difference"] > 0]),
            ("lower", own[own["difference"] < 0]),
        ):
            said.append(f"{metric}, clearly {word} than SafePatching: {_names(rows['variant'])}.")
    return said


def sweep_sentences(tables: Tables, score: str = "paper") -> list[str]:
    """The best and the worst point of every sweep, by the mean of harm and false refusal."""
    table, said = tables["sweeps"], []
    table = table[table["mask"] >= 0]
    for sweep, own in table.groupby("sweep", sort=False):
        by = [name for name in SWEPT if own[name].notna().any()]
        found = own.groupby(by)[[f"{score} {k}" for k in ("seen", "unseen", "refusal", "broken")]]
        means = found.mean().set_axis(["seen", "unseen", "refusal", "broken"], axis=1)
        harm = (means["seen"] + means["unseen"]) / 2
        mean = (harm + means["refusal"]) / 2
        for word, at in (("lowest", mean.idxmin()), ("highest", mean.idxmax())):
            values = at if isinstance(at, tuple) else (at,)
            point = ", ".join(f"{k} {v:g}" for k, v in zip(by, values, strict=True))
            said.append(
                f"{sweep}: the mean of harm and false refusal is {word} at {point} "
                f"(harm {harm[at]:.1f} %, false refusal {means.loc[at, 'refusal']:.1f} %, "
                f"broken {means.loc[at, 'broken']:.1f} %)."
            )
    return said


def remaining_sentences(tables: Tables, score: str) -> list[str]:
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
            f"{_names(f'{cell} ({metric})' for metric, cell in rose)}."
        )
    return said


def continual_sentences(tables: Tables, score: str = "paper") -> list[str]:
    """Who ends with least harm and least false refusal, and who ends above base."""
    table, said = tables["continual"], []
    ends = {}
    for stage in (table["stage"].min(), table["stage"].max()):
        at = table[table["stage"] == stage]
        ends[stage] = at.groupby("method", sort=False)[[f"{score} seen", f"{score} refusal"]].mean()
    first, last = (frame.rename(index=continual_label) for frame in ends.values())
    for column, what in ((f"{score} seen", "harm (seen)"), (f"{score} refusal", "false refusal")):
        best = last.index[last[column] == last[column].min()]
        said.append(
            f"After the last stage {what} is lowest for {_names(best)} "
            f"({last[column].min():.1f} %)."
        )
        above = last.index[last[column] > first[column]]
        said.append(f"Above base in {what} after the last stage: {_names(above)}.")
    return said


# ---- how it was made -----------------------------------------------------------------------------


def costs(tables: Tables) -> pd.DataFrame:
    """Seconds and peak memory of every method, one process each."""
    names = {
        "method": "method",
        "derive_seconds": "derive [s]",
        "combine_seconds": "combine [s]",
        "peak_mib": "peak memory [MiB]",
        "peak_mib_before": "of it before deriving [MiB]",
    }
    return tables["costs"][list(names)].rename(columns=names)


def settings(tables: Tables) -> pd.DataFrame:
    """The setting that was chosen for every method and score, and its rates on the dev pool."""
    table = tables["settings"]
    shown = table[["method", "score", "trials"]].copy()
    shown["setting"] = [
        ", ".join(f"{key} {value:.3g}" for key, value in json.loads(text).items())
        for text in table["setting"]
    ]
    for column, key in (("dev harmful seen %", "seen"), ("dev harmful unseen %", "unseen"),
                        ("dev false refusal %", "refusal")):  # fmt: skip
        shown[column] = table[key].map(_number)
    shown["dev utility %"] = (100 - table[LOST]).map(_number)
    return shown


def comparison_with_paper(tables: Tables, score: str = "paper") -> pd.DataFrame:
    """Ours beside what the paper reports: another model, other data, another judge.

    Only the pattern can be compared. Empty cells are figures that could not be verified.
    """
    parts = {
        name: _rates(of_score(tables[name], score)).set_index("method")
        for name in ("methods", "ablations")
    }
    rows = []
    for row, published in PAPER.items():
        table, variant = OURS[row]
        found = parts[table]
        shown = {"row": row}
        for column in list(COLUMNS)[:4]:
            known = variant in found.index
            shown[f"ours: {column}"] = found.loc[variant, column] if known else ""
        for column, value in zip(PAPER_COLUMNS, published, strict=True):
            shown[f"{PAPER_LABEL}: {column}"] = "" if value is None else f"{value:.2f}"
        rows.append(shown)
    return pd.DataFrame(rows)


def caption(tables: Tables) -> str:
    """One line on how the tables were made: numbers, interval, command, machine."""
    about = dict(zip(tables["about"]["key"], tables["about"]["value"], strict=True))
    seeds = [seed for seed in about.get("backbone seeds", "").split(",") if seed.strip()]
    items = tables["methods"].drop_duplicates("metric").set_index("metric")["n_items"]
    groups = {"harmful seen": "seen", "harmful unseen": "unseen", "false refusal": "harmless"}
    groups[LOST] = "utility"
    counts = [f"{int(items[m])} {name}" for m, name in groups.items() if m in items.index]
    machine = [about.get(f"machine: {key}", "") for key in ("cpu", "cores", "memory_gib", "gpu")]
    cpu, cores, memory, gpu = machine
    confidence = f"{100 * float(about.get('confidence', 'nan')):g} %"
    return (
        f"{_count(len(seeds), 'backbone')}, {_count(about.get('derivations', '?'), 'derivation')} "
        f"each, {_count(about.get('masks', '?'), 'mask')} each; test prompts: {', '.join(counts)}; "
        f"{_count(about.get('trials', '?'), 'trial')} a method, on the dev pool; "
        f"{confidence} intervals from a hierarchical bootstrap "
        f"({int(about.get('draws', 0)):,} draws); `{about.get('command', '?')}`, commit "
        f"{about.get('commit', '?')[:7]}, on {cpu} ({cores} cores, {memory} GiB"
        f"{'' if gpu in ('', 'None') else ', ' + gpu})."
    )


def to_markdown(table: pd.DataFrame) -> str:
    """A table as GitHub's markdown; cells stay as they are formatted."""
    table = table.astype(object).where(table.notna(), "")
    return tabulate(
        table, headers="keys", tablefmt="github", showindex=False, disable_numparse=True
    )


def bullets(lines: Sequence[str]) -> str:
    """Sentences as a markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def markdown(tables: Tables) -> str:
    """All short tables under headings."""
    parts = [f"# The experiment's tables\n\n{caption(tables)}"]

    def add(title: str, table: pd.DataFrame) -> None:
        parts.append(f"## {title}\n\n{to_markdown(table)}")

    for score in SCORES:
        add(f"Comparison, {score} score", comparison(tables, score))
        parts.append(bullets(sentences(tables, score)))
        add(f"The goal, {score} score", goal(tables, score))
        add(f"Minus base, {score} score", differences(tables, score))
        add(f"Minus SafePatching, {score} score", against_safepatching(tables, score))
    add("Hypervolumes", hypervolume(tables))
    for score in SCORES:
        add(f"Ablations, {score} score", ablation(tables, score))
        parts.append(bullets(ablation_sentences(tables, score)))
        parts.append(f"## Sweeps, {score} score\n\n{bullets(sweep_sentences(tables, score))}")
    for score in SCORES:
        add(f"What remains, by phrasing, {score} score", remaining(tables, score))
        add(f"What remains, by category, {score} score", remaining(tables, score, "category"))
        parts.append(bullets(remaining_sentences(tables, score)))
        add(f"What became of base's answers, tuned by the {score} score", moves(tables, score))
    for score in SCORES:
        add(f"Other sizes, {score} score", sizes(tables, score))
        add(f"Continual stages, {score} score", continual(tables, score))
        parts.append(bullets(continual_sentences(tables, score)))
    add("Costs", costs(tables))
    add("Settings", settings(tables))
    add("Beside the paper's figures", comparison_with_paper(tables))
    return "\n\n".join(parts)


# name -> what stands in a page between `<!-- table: name -->` and `<!-- end -->`
BLOCKS: dict[str, Callable[[Tables], str]] = {
    "caption": lambda tables: caption(tables),
    "hypervolumes": lambda tables: to_markdown(hypervolume(tables)),
    "ablations": lambda tables: to_markdown(ablation(tables)),
    "continual": lambda tables: to_markdown(continual(tables)),
    "sizes": lambda tables: to_markdown(sizes(tables, "paper")),
    "costs": lambda tables: to_markdown(costs(tables)),
    "settings": lambda tables: to_markdown(settings(tables)),
    "sweeps": lambda tables: bullets(sweep_sentences(tables)),
    **{f"comparison, {s}": lambda t, s=s: to_markdown(comparison(t, s)) for s in SCORES},
    **{f"goal, {s}": lambda t, s=s: to_markdown(goal(t, s)) for s in SCORES},
    **{f"against, {s}": lambda t, s=s: to_markdown(against_safepatching(t, s)) for s in SCORES},
    **{f"phrasing, {s}": lambda t, s=s: to_markdown(remaining(t, s)) for s in SCORES},
}
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: Tables) -> str:
    """The page with every marked block made anew; SpkitError for a block that is not known."""

    def made(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in BLOCKS:
            raise SpkitError(f"no block {name!r}{nearest(name, list(BLOCKS))}")
        return f"{start}\n{BLOCKS[name](tables)}\n\n{end}"

    return MARKED.sub(made, page)


# ---- parts ---------------------------------------------------------------------------------------


def of_score(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """The rows of the settings that one score chose, counted by that score.

    Ablations were tuned once, by the paper's score; they are only counted by either.
    """
    if score not in SCORES:
        raise SpkitError(f"no score {score!r}, allowed: {', '.join(SCORES)}")
    rows = table[table["score"] == score]
    return rows[rows["tuned"] == score] if score in set(table["tuned"]) else rows


def _rates(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name in dict.fromkeys(table["variant"]):
        own = table[table["variant"] == name].set_index("metric")
        row = {"method": name}
        for column, (metric, minus) in COLUMNS.items():
            cell = own.loc[metric] if metric in own.index else None
            if cell is not None and minus:
                cell = _flipped(cell, "mean", 100.0)
            row[column] = "" if cell is None else _cell(cell)
        rows.append(row)
    order = sorted(rows, key=lambda row: row["method"] != BASE)  # stable: base first
    return pd.DataFrame(order, columns=["method", *COLUMNS])


def _differences(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    rows = []
    for name in dict.fromkeys(table["variant"]):
        own = table[table["variant"] == name].set_index("metric")
        row = {"method": name}
        for column in columns:
            metric, minus = COLUMNS[column]
            cell = own.loc[metric] if metric in own.index else None
            if cell is not None and minus:
                cell = _flipped(cell, "difference")
            row[column.removesuffix(" %")] = "" if cell is None else _starred(cell)
        rows.append(row)
    return pd.DataFrame(rows)


def _clear_winners(table: pd.DataFrame) -> list[str]:
    won = None
    for metric in ("harmful", "false refusal"):
        own = table[(table["metric"] == metric) & (table["difference"] < 0)]
        names = list(own.loc[own["p_holm"] < 0.05, "variant"])
        won = names if won is None else [name for name in won if name in names]
    return won


def _flipped(cell: pd.Series, name: str, total: float = 0.0) -> pd.Series:
    """Failures as successes: total minus the value, with the interval's ends exchanged."""
    new = cell.copy()
    # + 0.0: a negative zero would be shown
    new[[name, "low", "high"]] = [total - cell[key] + 0.0 for key in (name, "high", "low")]
    return new


def _cell(cell: pd.Series, name: str = "mean", digits: int = 1) -> str:
    if pd.isna(cell[name]):
        return ""
    middle, low, high = (_number(cell[key], digits) for key in (name, "low", "high"))
    return f"{middle} [{low}, {high}]" if low and high else middle


def _starred(cell: pd.Series, digits: int = 1) -> str:
    star = " *" if not pd.isna(cell["p_holm"]) and cell["p_holm"] < 0.05 else ""
    return _cell(cell, "difference", digits) + star


def _span(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    return _cell(pd.Series({"mean": values.mean(), "low": values.min(), "high": values.max()}))


def _number(value: float, digits: int = 1) -> str:
    if pd.isna(value):
        return ""
    return f"{np.round(float(value), digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"


def _p(value: float) -> str:
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _names(names) -> str:
    return "; ".join(map(str, names)) or "none"  # some names hold a comma


def _count(number, noun: str) -> str:
    return f"{number} {noun}{'' if str(number) == '1' else 's'}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m spkit.comparison.report",
        description="Print the experiment's short tables as markdown.",
    )
    parser.add_argument("tables", help="the folder of the tables, such as docs/experiment")
    parser.add_argument("--into", nargs="+", default=[], help="pages whose marked blocks to fill")
    given = parser.parse_args(arguments)
    tables = read_tables(given.tables)
    for page in map(Path, given.into):
        text = fill(page.read_text(encoding="utf-8"), tables)
        with atomic(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if not given.into:
        print(markdown(tables))


if __name__ == "__main__":
    try:
        main()
    except SpkitError as error:
        sys.exit(f"spkit: {error}")
