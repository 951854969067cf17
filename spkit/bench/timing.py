"""Seconds of several ways to the same result, in turn, and their ratios round by round.

A machine's speed drifts, more so where others use it, too: what is compared runs in the same
round, every other round in the reverse order, and a ratio is of two times of one round.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm


class Own(float):
    """Seconds that a way has measured by itself and returns, such as those of a process."""


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of n values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median(values), min(values), max(values), len(values))


def seconds(run: Callable[[], object], finish: Callable[[], object] = lambda: None) -> float:
    """Seconds of one run. finish: waits until a device has ended its work.

    Python's search for garbage is held off, so that it does not fall into some runs only.
    """
    gc.collect()
    gc.disable()
    try:
        finish()
        start = time.perf_counter()
        found = run()
        finish()
        return found if isinstance(found, Own) else time.perf_counter() - start
    finally:
        gc.enable()


def in_turn(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    finish: Callable[[], object] = lambda: None,
    what: str = "",
) -> dict[str, list[float]]:
    """{name: seconds of each round}; one more round goes before, which does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=rounds + 1, desc=what, unit="round", leave=False) as bar:
        for number in range(rounds + 1):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                one = seconds(ways[name], finish)
                if number:
                    found[name].append(one)
            bar.update()
    return found


def ratios(own: Sequence[float], other: Sequence[float]) -> Spread:
    """Own seconds over the other's, of the same round each: below 1 is faster."""
    return Spread.of([a / b for a, b in zip(own, other, strict=True)])
