"""From the experiment's tables to the short ones that pages and notebook 05 show.

Each function takes the dict of `read_tables` and gives a data frame with formatted cells, "mean
[low, high]". Rates are in percent, differences in percentage points. Tuned and counted by one
score: a method is shown under the score that chose its setting. sentences.py says the same in
words, publish.py writes it all into pages.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from spkit.comparison import cells, published
from spkit.comparison.arena import SCORES
from spkit.comparison.continual import METHODS as CONTINUAL_METHODS
from spkit.comparison.tables import GAINS, TABLES
from spkit.comparison.variants import BASE
from spkit.errors import SpkitError
from spkit.evaluation.labels import BALANCED
from spkit.method.safepatching import NAME as SAFEPATCHING

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
OURS = {  # row in the paper -> (table here, variant in it)
    "original": ("methods", BASE),
    "GA": ("methods", "GA"),
    "TIES-Merging": ("methods", "TIES"),
    "SE patch alone": ("ablations", "SE only"),
    "OSM patch alone": ("ablations", "OSM only"),
    "intersection patch": ("ablations", "intersection"),
    "SafePatching": ("methods", SAFEPATCHING),
}
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
    table = of_score(tables["differences"], score)
    rows = []
    for method in methods:
        own = table[table["variant"] == method].set_index("metric")
        rows += [_objective(method, m, own.loc[m]) for m in (*GAINS, LOST) if m in own.index]
    return pd.DataFrame(rows)


def _objective(method: str, metric: str, cell: pd.Series) -> dict[str, str]:
    """One row of `goal`."""
    lost, n = metric == LOST, int(cell["backbones"])
    below = int(cell["backbones_above" if lost else "backbones_below"])
    if lost:
        met = cell["difference"] <= UTILITY_MARGIN
    else:
        met = cell["high"] < 0 and below >= max(1, n - 1)
    change = cells.flipped(cell, "difference") if lost else cell
    return {
        "method": method,
        "objective": "utility" if lost else metric,
        "minus base": cells.interval(change, "difference"),
        "p (Holm)": cells.p_value(cell["p_holm"]),
        "backbones below 0": f"{below} of {n}",
        "met": "yes" if met else "no",
    }


def hypervolume(tables: Tables) -> pd.DataFrame:
    """The area that each method's front dominates under both scores; 1 is perfect."""
    parts = {}
    for score in SCORES:
        table = tables["hypervolumes"]
        table = table[table["score"] == score].set_index("method")
        gap = table[["difference", "difference_low", "difference_high", "p_holm"]]
        gap.columns = ["difference", "low", "high", "p_holm"]
        parts[f"{score}: area"] = table.apply(cells.interval, axis=1, name="hypervolume", digits=3)
        parts[f"{score}: minus SafePatching"] = gap.apply(cells.starred, axis=1, digits=3)
        parts[f"{score}: settings"] = table["settings"]
    return pd.DataFrame(parts).rename_axis("method").reset_index()


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
    """Every method on every size: means over the backbones of that size; no intervals.

    Withdrawn rows are left out; `withdrawn` says why.
    """
    table = current(tables["sizes"])
    keys = ["size", "weights", "variant"]
    means = table.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    shown = means[["size", "weights"]].assign(method=means["variant"])
    backbones = table.groupby(keys, sort=False)["backbone"].nunique().to_numpy()
    for column, key in (("harmful seen %", "seen"), ("harmful unseen %", "unseen"),
                        ("false refusal %", "refusal")):  # fmt: skip
        shown[column] = means[f"{score} {key}"].map(cells.number)
    shown["utility %"] = (100 - means[f"{score} {LOST}"]).map(cells.number)
    shown["broken %"] = means[f"{score} broken"].map(cells.number)
    return shown.assign(backbones=backbones)


def current(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: those without a reason in the column `withdrawn`, if there is one."""
    if "withdrawn" not in table:
        return table
    return table[table["withdrawn"].isna()].drop(columns="withdrawn")


def withdrawn(tables: Tables) -> str:
    """Which sizes are not shown, and why; empty where all are."""
    table = tables["sizes"]
    reasons = table["withdrawn"].dropna() if "withdrawn" in table else pd.Series(dtype=str)
    sizes = table.loc[reasons.index, "size"]
    return " ".join(
        f"Withdrawn until they are made again: the sizes {' and '.join(own.unique())}. {reason}"
        for reason, own in sizes.groupby(reasons, sort=False)
    )


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
                "harmful seen %": cells.span(own[f"{score} seen"]),
                "harmful unseen %": cells.span(own[f"{score} unseen"]),
                "false refusal %": cells.span(own[f"{score} refusal"]),
                "utility %": cells.span(100 - own[f"{score} {LOST}"]),
                "broken %": cells.span(own[f"{score} broken"]),
                "forgetting": cells.span(of_method["forgetting"]),
                "intransigence": cells.span(of_method["intransigence"]),
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
            row[f"{name} %"] = cells.interval(found.loc[name]) if name in found.index else ""
        rows.append(row)
    return pd.DataFrame(rows)


def moves(tables: Tables, score: str) -> pd.DataFrame:
    """What became of base's answers, in percent of one group and phrasing."""
    table = tables["moves"]
    table = table[table["tuned"] == score]
    shares = (100 * table["k"] / table["n"]).map(cells.number)
    return table[["group", "phrasing", "before", "after", "n"]].assign(**{"%": shares})


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
        shown[column] = table[key].map(cells.number)
    shown["dev utility %"] = (100 - table[LOST]).map(cells.number)
    return shown


def comparison_with_paper(tables: Tables, score: str = "paper") -> pd.DataFrame:
    """Ours beside what the paper reports: another model, other data, another judge.

    Only the pattern can be compared. Empty cells are figures that could not be verified.
    """
    parts = {
        name: _rates(of_score(tables[name], score)).set_index("method")
        for name in ("methods", "ablations")
    }
    theirs = published.table(list(OURS), published.COLUMNS[:5])
    rows = []
    for row, (table, variant) in OURS.items():
        found = parts[table]
        known = variant in found.index
        ours = {f"ours: {c}": found.loc[variant, c] if known else "" for c in list(COLUMNS)[:4]}
        paper = {f"{published.LABEL}: {column}": text for column, text in theirs.loc[row].items()}
        rows.append({"row": row, **ours, **paper})
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
    made = {what: about.get(f"{what}s", "?") for what in ("derivation", "mask", "trial")}
    derivations, masks, trials = (cells.count(n, what) for what, n in made.items())
    return (
        f"{cells.count(len(seeds), 'backbone')}, {derivations} each, {masks} each; "
        f"test prompts: {', '.join(counts)}; {trials} a method, on the dev pool; "
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
                cell = cells.flipped(cell, "mean", 100.0)
            row[column] = "" if cell is None else cells.interval(cell)
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
                cell = cells.flipped(cell, "difference")
            row[column.removesuffix(" %")] = "" if cell is None else cells.starred(cell)
        rows.append(row)
    return pd.DataFrame(rows)
