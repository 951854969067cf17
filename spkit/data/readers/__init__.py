"""Readers of published data sets, one small file per schema, and of files of one's own.

Each has two functions: `pairs(source)`, the records that can be D_h, and `prompts(source)`, those
that can be evaluation prompts. They check every row; they choose nothing.
"""

from spkit.config import SourceConfig
from spkit.data.readers import (
    advbench,
    beavertails,
    harmbench,
    jailbreakbench,
    oktest,
    orbench,
    own,
    pyrit,
    rho,
    sorrybench,
    strongreject,
    wildguardmix,
    xstest,
)
from spkit.data.readers.record import Record

READERS = {
    "advbench": advbench,
    "beavertails": beavertails,
    "xstest": xstest,
    "oktest": oktest,
    "pyrit": pyrit,
    "rho": rho,
    "harmbench": harmbench,
    "jailbreakbench": jailbreakbench,
    "orbench": orbench,
    "sorrybench": sorrybench,
    "strongreject": strongreject,
    "wildguardmix": wildguardmix,
    "own": own,
}
ROLES = ("D_h", "evaluation")


def read(source: SourceConfig, role: str) -> tuple[Record, ...]:
    """All records of a source in one of the ROLES; SpkitError for a bad file, row or value."""
    reader = READERS[source.reader]
    return reader.pairs(source) if role == "D_h" else reader.prompts(source)
