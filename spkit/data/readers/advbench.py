"""AdvBench: harmful goals, each with the opening of an answer to it.

Published as a CSV file with the columns `goal,target`; on the hub as walledai/AdvBench with
`prompt,target`. All rows have the category "advbench". The target is an *opening* ("Sure, here is
..."), no full response: `data.responses` can put full ones in its place.
"""

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.data.readers.rows import identifier, text, unique
from spkit.data.readers.source import load_rows, remembered

CATEGORY = "advbench"


@remembered
def pairs(source: SourceConfig) -> tuple[Record, ...]:
    """Every row with its opening as the response. SpkitError for a bad file, row or value."""
    records = []
    for where, number, row in load_rows(source, (("goal", "prompt"), "target")):
        records.append(
            Record(
                id=identifier(row, ("id",), number, where),
                prompt=text(row, "goal" if "goal" in row else "prompt", where),
                response=text(row, "target", where),
                categories=(CATEGORY,),
            )
        )
    return unique(source.path, records)


prompts = pairs  # the same rows; as evaluation prompts their openings are not looked at
