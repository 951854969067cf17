"""What one row of any data set says, before a run's choices: categories to keep, group, split.

A reader turns the rows of its schema into records; data/selection.py turns records into the pairs
and prompts of a run. This file reads nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One row. Empty texts mean that the data set says nothing of it.

    categories: all that the row is labelled with, in the data set's own order; at least one.
    objective: "harmful", "over_safety" or "utility".
    group, split: only where the data set itself decides them.
    """

    id: str
    prompt: str
    categories: tuple[str, ...]
    objective: str = "harmful"
    response: str = ""
    group: str = ""
    phrasing: str = "plain"
    reference: str = ""
    forbidden: tuple[str, ...] = ()
    split: str = ""
