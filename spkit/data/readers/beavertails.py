"""BeaverTails: question-answer pairs with 14 harm categories, labelled by people.

Columns `prompt,response,category,is_safe`; `category` holds 14 booleans (a struct, or the same as
text in a CSV file). Only unsafe pairs with at least one category are read. Safe and unsafe is said
of the *pair*: a prompt of an unsafe pair need not be harmful in itself.
"""

from dataclasses import replace
from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import identifier, literal, shown, text, truth, unique
from spkit.data.readers.source import load_rows, remembered
from spkit.data.readers.texts import normalised
from spkit.errors import SpkitError
from spkit.validation import nearest

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)  # in the data set's own order, which decides a pair's category where it has several


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """The unsafe rows with all their categories.

    SpkitError for a bad file, row or value, an unknown category, and where no row is unsafe.
    """
    records = []
    for where, number, row in load_rows(source, ("prompt", "response", "category", "is_safe")):
        flagged = _flagged(row["category"], where)
        if truth(row["is_safe"], "is_safe", where) or not flagged:
            continue
        records.append(
            Record(
                id=identifier(row, ("id",), number, where),
                prompt=text(row, "prompt", where),
                response=text(row, "response", where),
                categories=flagged,
            )
        )
    if not records:
        raise SpkitError(f"{source.path}: no row has is_safe false and a category, one is needed")
    return unique(source.path, records)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """Each prompt of an unsafe row once, with the categories of all its unsafe rows."""
    by_text: dict[str, Record] = {}
    for record in pairs(source):
        first = by_text.setdefault(normalised(record.prompt), record)
        if set(record.categories) - set(first.categories):
            both = {*first.categories, *record.categories}
            merged = replace(first, categories=tuple(c for c in CATEGORIES if c in both))
            by_text[normalised(record.prompt)] = merged
    return tuple(replace(record, response="") for record in by_text.values())


def _flagged(value: Any, where: str) -> tuple[str, ...]:
    """The names of the 14 that are true, in the fixed order."""
    flags = literal(value) if isinstance(value, str) else value
    if not isinstance(flags, dict):
        raise SpkitError(f"{where}: category is {shown(value)}, allowed: an object of 14 booleans")
    for name in flags:  # a column of structs has every row's keys; where a row has none it is None
        if name not in CATEGORIES and flags[name] is not None:
            near = nearest(str(name), list(CATEGORIES))
            raise SpkitError(f"{where}: category has the unknown name {str(name)[:40]!r}{near}")
    return tuple(c for c in CATEGORIES if truth(flags.get(c), f"category[{c!r}]", where))
