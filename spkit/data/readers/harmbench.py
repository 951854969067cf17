"""HarmBench: harmful behaviours, some of them about a text that is given with them.

The authors' CSV files (harmbench_behaviors_text_all, _val, _test) have the columns
`Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID`; walledai/HarmBench on
the hub has `prompt,category` and, in its config contextual, `context`. On the hub `split` says the
config: standard (also where it is train) or contextual. Of the authors' files it says which rows
are read: those of this FunctionalCategory, or all where it is train.

A context goes before its behaviour, as in HarmBench. Behaviours on copyright are left out, and a
line says how many: whether a song was said word for word is no question of harm, and HarmBench
decides it by hashes. Behaviours on pictures are refused, for the backbone reads text. There are no
responses: as D_h they need `data.responses`.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, unique
from spkit.data.readers.source import hub_part, load_rows, remembered
from spkit.errors import SpkitError

BETWEEN = "\n\n---\n\n"  # between a context and its behaviour
COPYRIGHT = "copyright"
KINDS = ("standard", "contextual", COPYRIGHT)
CATEGORIES = (
    "chemical_biological",
    COPYRIGHT,
    "cybercrime_intrusion",
    "harassment_bullying",
    "harmful",
    "illegal",
    "misinformation_disinformation",
)


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """Every behaviour but those on copyright, with an empty response.

    SpkitError for a bad file, row or value, a behaviour on a picture, and where none is left.
    """
    records, left_out, others = [], 0, 0
    columns = (("Behavior", "prompt"), ("SemanticCategory", "category", "tags"))
    for where, number, row in load_rows(source, columns, _part(source)):
        if row.get("ImageFileName"):
            raise SpkitError(
                f"{where}: a behaviour on a picture, which a backbone that reads text cannot see; "
                f"take harmbench_behaviors_text_all.csv"
            )
        if source.split in KINDS and row.get("FunctionalCategory", source.split) != source.split:
            others += 1
            continue
        if _is_on_copyright(row, where):
            left_out += 1
            continue
        column = "SemanticCategory" if "SemanticCategory" in row else "category"
        record = Record(
            id=identifier(row, ("BehaviorID", "id"), number, where),
            prompt=_prompt(row, where),
            categories=(choice(row, column, CATEGORIES, where),),
        )
        records.append(record)
    if not records and left_out:
        raise SpkitError(f"{source.path}: all behaviours are on copyright, another one is needed")
    if not records:
        raise SpkitError(f"{source.path}: no row has the FunctionalCategory {source.split!r}")
    if left_out:
        print(f"{source.path}: {len(records)} behaviours; {left_out} on copyright left out.")
    if others:
        print(f"{source.path}: {len(records)} {source.split} behaviours; {others} left out.")
    return unique(source.path, records)


prompts = pairs


def _part(source: SourceConfig) -> tuple[str | None, str]:
    """(config, split) on the hub."""
    if source.split in KINDS:
        return source.split, "train"
    return hub_part(source, "standard")


def _is_on_copyright(row: dict, where: str) -> bool:
    if "FunctionalCategory" in row:
        return choice(row, "FunctionalCategory", KINDS, where) == COPYRIGHT
    return "category" not in row or row["category"] == COPYRIGHT  # the hub's third config: tags


def _prompt(row: dict, where: str) -> str:
    """The behaviour, behind its context where it has one; a contextual one must have one."""
    behaviour = text(row, "Behavior" if "Behavior" in row else "prompt", where)
    column = "ContextString" if "ContextString" in row else "context"
    if row.get("FunctionalCategory") == "contextual" or row.get(column) not in (None, ""):
        return f"{text(row, column, where)}{BETWEEN}{behaviour}"
    return behaviour
