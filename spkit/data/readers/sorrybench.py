"""SORRY-Bench: unsafe requests of 44 categories (45 in its first version), in 21 styles each.

Columns `question_id,category,turns,prompt_style`, in sorry-bench/sorry-bench-202503 and -202406 on
the hub and in its file question.jsonl; `turns` holds one text. Only the requests as they were
written (style base) are read, and a line says how many others there are. Another style is read
where `split` names it. The category is the published number. There are no responses: as D_h they
need `data.responses`.
"""

from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, literal, shown, text, unique
from spkit.data.readers.source import hub_part, is_local, load_rows, remembered
from spkit.errors import SpkitError

CATEGORIES = 45  # numbers from 1
STYLES = (
    *("base", "ascii", "atbash", "authority_endorsement", "caesar", "evidence-based_persuasion"),
    *("expert_endorsement", "logical_appeal", "misrepresentation", "misspellings", "morse"),
    *("question", "role_play", "slang", "technical_terms", "translate-fr", "translate-ml"),
    *("translate-mr", "translate-ta", "translate-zh-cn", "uncommon_dialects"),
)


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """The requests of one style, with empty responses.

    SpkitError for a bad file, row or value, and where no row has the style.
    """
    if is_local(source.path) and source.split not in ("train", *STYLES):
        raise SpkitError(
            f"{source.path}: its split is {source.split!r}, allowed for the reader sorrybench: "
            f"train (style base), or one of {', '.join(STYLES)}"
        )
    style = source.split if source.split in STYLES else "base"
    part = (None, "train") if source.split in STYLES else hub_part(source)
    records, others = [], 0
    columns = (("turns", "question"), "category", "prompt_style")
    for where, number, row in load_rows(source, columns, part):
        if choice(row, "prompt_style", STYLES, where) != style:
            others += 1
            continue
        record = Record(
            id=identifier(row, ("question_id", "id"), number, where),
            prompt=_request(row, where),
            categories=(_category(row["category"], where),),
            phrasing="plain" if style == "base" else style,
        )
        records.append(record)
    if not records:
        raise SpkitError(f"{source.path}: no row has the prompt_style {style!r}, one is needed")
    if others:
        print(f"{source.path}: {len(records)} requests of style {style}; {others} others left out.")
    return unique(source.path, records)


prompts = pairs


def _request(row: dict[str, Any], where: str) -> str:
    """The one text in `turns`: a list, or the same as text in a CSV file."""
    if "turns" not in row:
        return text(row, "question", where)
    turns = row["turns"]
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = literal(turns)
    if not isinstance(turns, list) or len(turns) != 1:
        raise SpkitError(f"{where}: turns is {shown(row['turns'])}, allowed: a list of one text")
    return text({"turns": turns[0]}, "turns", where)


def _category(value: Any, where: str) -> str:
    """The number as a text, or a name where the file has names."""
    said = str(value).strip() if isinstance(value, int | str) else ""
    number = said.isdecimal() and 1 <= int(said) <= CATEGORIES
    name = isinstance(value, str) and any(character.isalpha() for character in said)
    if not (number or name):  # True is an int, but "True" no number
        rule = f"allowed: a number from 1 to {CATEGORIES}, or a name"
        raise SpkitError(f"{where}: category is {shown(value)}, {rule}")
    return said
