"""The experiment's short tables as markdown, and in the marked blocks of the pages that show them.

`spkit report docs/experiment` prints them all; with `--into README.md` it fills that page.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from spkit.comparison import report, sentences
from spkit.comparison.arena import SCORES
from spkit.comparison.blocks import fill_pages, filled
from spkit.comparison.report import Tables, read_tables, to_markdown
from spkit.comparison.sentences import bullets

IN_README = ("base", "SafePatching", "SafePatching, balanced", "Task Arithmetic, balanced", "GA")


def sizes(tables: Tables, score: str) -> str:
    """The table of sizes, and which are withdrawn."""
    parts = [to_markdown(report.sizes(tables, score)), report.withdrawn(tables)]
    return "\n\n".join(part for part in parts if part)


def in_short(tables: Tables, score: str = "paper") -> str:
    """README's table: five rows and four columns of the comparison."""
    whole = report.comparison(tables, score)
    columns = ["method", "harmful unseen %", "false refusal %", "broken on harmful %", "utility %"]
    return to_markdown(whole[whole["method"].isin(IN_README)][columns])


# name -> what is in a page between `<!-- table: name -->` and `<!-- end -->`
BLOCKS: dict[str, Callable[[Tables], str]] = {
    "caption": report.caption,
    "in short": in_short,
    "hypervolumes": lambda tables: to_markdown(report.hypervolume(tables)),
    "ablations": lambda tables: to_markdown(report.ablation(tables)),
    "continual": lambda tables: to_markdown(report.continual(tables)),
    "sizes": lambda tables: sizes(tables, "paper"),
    "costs": lambda tables: to_markdown(report.costs(tables)),
    "settings": lambda tables: to_markdown(report.settings(tables)),
    "sweeps": lambda tables: bullets(sentences.sweeps(tables)),
    **{f"comparison, {s}": lambda t, s=s: to_markdown(report.comparison(t, s)) for s in SCORES},
    **{f"goal, {s}": lambda t, s=s: to_markdown(report.goal(t, s)) for s in SCORES},
    **{
        f"against, {s}": lambda t, s=s: to_markdown(report.against_safepatching(t, s))
        for s in SCORES
    },
    **{f"phrasing, {s}": lambda t, s=s: to_markdown(report.remaining(t, s)) for s in SCORES},
}


def fill(page: str, tables: Tables) -> str:
    """The page with every marked block made anew; SpkitError for a block that is not known."""
    return filled(page, "table", BLOCKS, tables)


def publish(tables: str | Path, pages: Iterable[str | Path]) -> None:
    """Fill the marked blocks of these pages from the folder of tables."""
    found = read_tables(tables)
    fill_pages(pages, lambda page: fill(page, found))


def markdown(tables: Tables) -> str:
    """All short tables under headings."""
    parts = [f"# The experiment's tables\n\n{report.caption(tables)}"]
    for make in (_compared, _changed, _remaining, _elsewhere):
        for score in SCORES:
            parts += make(tables, score)
        if make is _compared:
            parts.append(_titled("Hypervolumes", report.hypervolume(tables)))
    parts.append(_titled("Costs", report.costs(tables)))
    parts.append(_titled("Settings", report.settings(tables)))
    parts.append(_titled("Beside the paper's figures", report.comparison_with_paper(tables)))
    return "\n\n".join(parts)


def _titled(title: str, table) -> str:
    return f"## {title}\n\n{to_markdown(table)}"


def _compared(tables: Tables, score: str) -> list[str]:
    return [
        _titled(f"Comparison, {score} score", report.comparison(tables, score)),
        bullets(sentences.comparison(tables, score)),
        _titled(f"The goal, {score} score", report.goal(tables, score)),
        _titled(f"Minus base, {score} score", report.differences(tables, score)),
        _titled(f"Minus SafePatching, {score} score", report.against_safepatching(tables, score)),
    ]


def _changed(tables: Tables, score: str) -> list[str]:
    return [
        _titled(f"Ablations, {score} score", report.ablation(tables, score)),
        bullets(sentences.ablation(tables, score)),
        f"## Sweeps, {score} score\n\n{bullets(sentences.sweeps(tables, score))}",
    ]


def _remaining(tables: Tables, score: str) -> list[str]:
    by = {by: report.remaining(tables, score, by) for by in ("phrasing", "category")}
    moves = report.moves(tables, score)
    return [
        *(_titled(f"What remains, by {key}, {score} score", table) for key, table in by.items()),
        bullets(sentences.remaining(tables, score)),
        _titled(f"What became of base's answers, tuned by the {score} score", moves),
    ]


def _elsewhere(tables: Tables, score: str) -> list[str]:
    return [
        f"## Other sizes, {score} score\n\n{sizes(tables, score)}",
        _titled(f"Continual stages, {score} score", report.continual(tables, score)),
        bullets(sentences.continual(tables, score)),
    ]
