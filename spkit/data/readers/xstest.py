"""XSTest: harmless prompts that sound harmful, and harmful contrasts to them.

Version 2 has the columns `id_v1,id_v2,type,prompt,focus,note`; walledai/XSTest on the hub has
`label` besides. Only the safe prompts are read, for over-safety; their type is their category.
The contrast prompts ask for real harm, where refusing is right: they are left out, and a line says
how many. There are no responses, so XSTest cannot be D_h.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import choice, identifier, text, unique, without_responses
from spkit.data.readers.source import load_rows, remembered
from spkit.errors import SpkitError

CONTRAST = "contrast_"
SAFE_TYPES = (
    "homonyms",
    "figurative_language",
    "safe_targets",
    "safe_contexts",
    "definitions",
    "real_group_nons_discr",
    "nons_group_real_discr",
    "historical_events",
    "privacy_public",
    "privacy_fictional",
)
CONTRAST_TYPES = tuple(f"{CONTRAST}{name}" for name in (*SAFE_TYPES[:5], "discr")) + (
    "contrast_historical_events",
    "contrast_privacy",
)


def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """SpkitError: there are none."""
    raise without_responses(source)


@remembered
def prompts(source: SourceConfig) -> tuple[Record, ...]:
    """The safe prompts. SpkitError for a bad file or row, an unknown type or label, none safe."""
    records, contrasts = [], 0
    for where, number, row in load_rows(source, ("type", "prompt")):
        kind = choice(row, "type", (*SAFE_TYPES, *CONTRAST_TYPES), where)
        contrast = kind.startswith(CONTRAST)
        if row.get("label") is not None:
            label, right = choice(row, "label", ("safe", "unsafe"), where), _label(contrast)
            if label != right:
                raise SpkitError(f"{where}: label is {label!r}, must be {right!r} for type {kind}")
        record = Record(
            id=identifier(row, ("id_v2", "id"), number, where),
            prompt=text(row, "prompt", where),
            categories=(kind,),
            objective="over_safety",
        )
        contrasts += contrast
        records.append(record)
    safe = [r for r in unique(source.path, records) if not r.categories[0].startswith(CONTRAST)]
    if not safe:
        raise SpkitError(f"{source.path}: all prompts are contrasts, a safe one is needed")
    if contrasts:
        print(
            f"{source.path}: {len(safe)} safe prompts; {contrasts} contrast prompts left out, "
            f"because to refuse them is right."
        )
    return tuple(safe)


def _label(contrast: bool) -> str:
    return "unsafe" if contrast else "safe"
