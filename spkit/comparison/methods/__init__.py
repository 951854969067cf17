"""The methods that SafePatching is compared with, one file each, behind one interface.

METHODS is {name as in every table: Method}, in the tables' order. bundle.py makes what they work
on; each file's head states every departure from its paper.
"""

from spkit.comparison.methods import (
    average,
    balanced,
    dare,
    ga,
    joint_top_sets,
    npo,
    safepatching,
    task_arithmetic,
    ties,
)
from spkit.comparison.methods.method import Bundle, Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        safepatching.METHOD,
        balanced.METHOD,
        joint_top_sets.METHOD,
        task_arithmetic.METHOD,
        balanced.SUM,
        ties.METHOD,
        dare.METHOD,
        average.METHOD,
        ga.METHOD,
        npo.METHOD,
    )
}

__all__ = ["METHODS", "Bundle", "Method"]
