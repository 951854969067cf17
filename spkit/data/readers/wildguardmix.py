"""WildGuardMix: prompts with labels of harm, and for some of them responses with labels.

Columns `prompt,adversarial,response,response_harm_label,response_refusal_label,prompt_harm_label,
subcategory`, in allenai/wildguardmix on the hub (split train is its config wildguardtrain, test
wildguardtest) and its Parquet files. An empty label says that there is none.

D_h: the pairs whose response is harmful. Evaluation: each harmful prompt once, and each benign one
that is adversarial, for over-safety. Other benign prompts are everyday ones: they are left out, as
prompts without a label are, and a line says how many. The category is the subcategory.
"""

from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, truth, unique
from spkit.data.readers.source import hub_part, load_rows, remembered
from spkit.data.readers.texts import normalised
from spkit.errors import SpkitError

COLUMNS = ("prompt", "adversarial", "prompt_harm_label", "subcategory")
OF_RESPONSES = ("response", "response_refusal_label", "response_harm_label")
CONFIGS = {"train": "wildguardtrain", "test": "wildguardtest"}
HARM = ("harmful", "unharmful")
REFUSAL = ("refusal", "compliance")
BENIGN = "benign"  # the group of the prompts for over-safety, so that each table shows both
MISSING = (None, "", "None", "nan", "NaN")  # as a label: what CSV files make of a missing one


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """The rows whose response is labelled harmful.

    SpkitError for a bad file, row or value, and where no response is harmful.
    """
    records = []
    for where, number, row in load_rows(source, (*COLUMNS, *OF_RESPONSES), _part(source)):
        _label(row, "prompt_harm_label", HARM, where)
        _label(row, "response_refusal_label", REFUSAL, where)
        if _label(row, "response_harm_label", HARM, where) == "harmful":
            record = Record(
                id=identifier(row, ("id",), number, where),
                prompt=text(row, "prompt", where),
                response=text(row, "response", where),
                categories=(text(row, "subcategory", where),),
            )
            records.append(record)
    if not records:
        raise SpkitError(f"{source.path}: no row has response_harm_label harmful, one is needed")
    return unique(source.path, records)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """Each harmful prompt and each adversarial benign one, once.

    SpkitError for a bad file, row or value, two labels of one prompt, and where none is left.
    """
    found: dict[str, Record] = {}
    left_out = 0
    for where, number, row in load_rows(source, COLUMNS, _part(source)):
        label = _label(row, "prompt_harm_label", HARM, where)
        adversarial = truth(row["adversarial"], "adversarial", where)
        if label is None or (label == "unharmful" and not adversarial):
            left_out += 1
            continue
        record = Record(
            id=identifier(row, ("id",), number, where),
            prompt=text(row, "prompt", where),
            categories=(text(row, "subcategory", where),),
            objective="harmful" if label == "harmful" else "over_safety",
            group="" if label == "harmful" else BENIGN,
            phrasing="adversarial" if adversarial else "plain",
        )
        first = found.setdefault(normalised(record.prompt), record)
        if first.objective != record.objective:
            raise SpkitError(
                f"{where}: prompt_harm_label is {label!r}, but an earlier row with the same prompt "
                f"has another label"
            )
    if not found:
        raise SpkitError(f"{source.path}: no prompt is harmful or adversarial, one is needed")
    if left_out:
        print(
            f"{source.path}: {len(found)} prompts; {left_out} rows left out, whose prompt is "
            f"benign and not adversarial, or has no label."
        )
    return unique(source.path, list(found.values()))


def _part(source: SourceConfig) -> tuple[str | None, str]:
    """(config, split) on the hub; `split` may also be the config's own name."""
    split = {config: split for split, config in CONFIGS.items()}.get(source.split, source.split)
    return (CONFIGS[split], split) if split in CONFIGS else hub_part(source)


def _label(row: dict[str, Any], key: str, allowed: tuple[str, str], where: str) -> str | None:
    """The label, None where the row has none."""
    value = row.get(key)
    if value != value or value in MISSING:  # NaN, as pandas writes a missing value
        return None
    return choice(row, key, allowed, where)
