"""The rows of a bench as a table: in a terminal, as markdown, as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd
from tabulate import tabulate

from spkit.bench.bench import GROWTH, Row
from spkit.bench.figures import exponents

COLUMNS = ("stage", "size", "against", "what", "figure", "goal", "met")
ANSWERS = {True: "yes", False: "no", None: ""}


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a row, numbers as they were measured."""
    return pd.DataFrame([asdict(row) | {"met": ANSWERS[row.met]} for row in rows])


def figure(row: Row) -> str:
    """ "0.52 [0.49, 0.60]": median, lowest and highest."""
    return f"{number(row.median)} [{number(row.low)}, {number(row.high)}]"


def number(value: float) -> str:
    """Three digits, however large it is."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    shown = [row for row in rows if row.role != GROWTH]
    return [[r.stage, r.size, r.against, r.what, figure(r), r.goal, ANSWERS[r.met]] for r in shown]


def text(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """For a terminal: figures below 1 are faster than what they are compared with."""
    table = tabulate(_cells(rows), COLUMNS, "simple", disable_numparse=True)
    return "\n".join([table, *_growth(rows), *notes, *_missed(rows)])


def markdown(rows: Sequence[Row], notes: Sequence[str], made_from: Mapping) -> str:
    """For the site: table, notes, machine and versions."""
    table = tabulate(_cells(rows), COLUMNS, "github", disable_numparse=True)
    lines = [*_growth(rows), *notes, *_missed(rows), about(made_from)]
    return "\n".join([table, "", *(f"* {line}" for line in lines)]) + "\n"


def about(made_from: Mapping) -> str:
    """Machine, versions and settings in a sentence."""
    machine, settings, code = (made_from[key] for key in ("hardware", "settings", "code"))
    place = machine["gpu"] if settings["device"] != "cpu" else machine["cpu"]
    threads = settings["threads"] or machine["cores"]
    named = " ".join(
        f"{name} {made_from['versions'][name]}"
        for name in ("python", "torch", "transformers", "peft")
        if name in made_from["versions"]
    )
    commit = (code["commit"] or "no commit")[:10] + (", changed" if code["changed"] else "")
    return (
        f"{place}, {machine['cores']} cores, {threads} threads, {machine['memory_gib']} GiB; "
        f"{named}; {settings['rounds']} rounds; seed 0; {commit}"
    )


def _growth(rows: Sequence[Row]) -> list[str]:
    """How the seconds of each stage grow with the number of weights."""
    return [
        f"growth of {name}: seconds ~ weights^{power:.2f} ({low:g} to {high:g} million)"
        for name, (power, low, high) in exponents(rows).items()
    ]


def _missed(rows: Sequence[Row]) -> list[str]:
    return [
        f"missed: {row.stage}, {row.size}, {row.against}: {row.what} is {number(row.median)}, "
        f"the goal {row.goal}{f' ({row.note})' if row.note else ''}"
        for row in rows
        if row.met is False
    ]
