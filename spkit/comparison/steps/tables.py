"""All tables of the experiment, from what the other units wrote."""

from pathlib import Path

from spkit.comparison import tables
from spkit.comparison.steps.shared import Places


def write_tables(folder: Path, places: Places, draws: int, confidence: float) -> None:
    """One CSV for each table, in the folder; draws: of the bootstrap."""
    tables.write(places, folder, draws=draws, confidence=confidence)
