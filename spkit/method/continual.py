"""Continual PSA: harmful categories arrive one after another, each stage patches the last model.

    theta_k = theta_{k-1} + deltas_k        deltas_k from the harmful pairs of stage k alone [paper]

The loop takes any method and any way of adding; comparison/continual.py runs it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

STAGE_SEEDS = 1000  # seed * 1000 + stage: another draw for each stage of each seed

Model = TypeVar("Model")  # a model in memory, or the folder of a checkpoint
Data = TypeVar("Data")  # what a stage brings: its pairs, or the names of its categories


def run_stages(
    backbone: Model,
    stages: Sequence[Data],
    step: Callable[[int, Model, Data], Model],
    done: int = 0,
    last: Model | None = None,
) -> Iterator[tuple[int, Model]]:
    """(k, theta_k) for k = 1, 2, ...: each stage starts from the model that the last one left.

    step(k, theta_{k-1}, data of stage k) derives, scores, patches and returns theta_k.
    done, last: so many stages are there already, and the model that the last of them left.
    """
    model = backbone if done == 0 else last
    for k, data in enumerate(stages[done:], start=done + 1):
        model = step(k, model, data)
        yield k, model


def stage_seed(seed: int, stage: int) -> int:
    """The seed of one stage's derivation, calibration and masks: a new draw each stage."""
    return seed * STAGE_SEEDS + stage
