"""The methods that SafePatching is compared with, one file each, behind one interface.

METHODS is {name as in every table: Method}, in the tables' order. bundle.py makes what they work
on; each file's head states every departure from its paper.
"""

from spkit.baselines import (
    average,
    dare,
    ga,
    joint_top_sets,
    npo,
    safepatching,
    task_arithmetic,
    ties,
)
from spkit.baselines.method import Bundle, Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (safepatching, joint_top_sets, task_arithmetic, ties, dare, average, ga, npo)
}

__all__ = ["METHODS", "Bundle", "Method"]
