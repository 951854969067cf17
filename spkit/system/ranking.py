"""The largest values of a long array: exactly so many, in linear time and with few copies.

A sample of the values says between which two the threshold very probably lies. One pass counts
what is above and keeps what is between; only these few are partitioned. The counts show whether
the threshold is among them, so the result is exact and the same for every sample.
"""

import numpy as np

SAMPLE = 1 << 16  # values drawn: 1 ms to sort
MARGIN = 5 * 128  # in ranks of the sample, whose standard deviation is at most sqrt(SAMPLE) / 2
WORTH = 1 << 20  # shorter arrays are partitioned whole
BLOCK = 1 << 18  # values compared at once: they stay in the processor's cache


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: the `count` largest of values [n]; of equal ones the lower index wins.

    values: any real dtype, without NaN. Extra memory: the result, and of 4-byte values a few per
    cent of `values`; where very many are equal, one copy of them.
    """
    if count == 0:
        return np.zeros(values.size, dtype=bool)
    threshold = kth_largest(values, count)
    selected = values >= threshold
    surplus = int(np.count_nonzero(selected)) - count
    for start in reversed(range(0, values.size, BLOCK)):
        if surplus == 0:
            break
        ties = np.flatnonzero(values[start : start + BLOCK] == threshold)[-surplus:]
        selected[start + ties] = False
        surplus -= ties.size
    return selected


def kth_largest(values: np.ndarray, count: int):
    """The `count`-th largest of values [n], 1 <= count <= n."""
    if values.size > WORTH:
        above, near = _around(values, count)
        place = near.size - (count - above)
        if 0 <= place < near.size:
            near.partition(place)
            return near[place]
    place = values.size - count
    return np.partition(values, place)[place]


def _around(values: np.ndarray, count: int) -> tuple[int, np.ndarray]:
    """(how many are above the bracket, the values in it); of these at most half of `values`."""
    drawn = np.random.default_rng(0).integers(values.size, size=SAMPLE)
    sample = np.sort(values[drawn])
    place = SAMPLE - SAMPLE * count // values.size
    low = sample[place - MARGIN] if place >= MARGIN else -np.inf
    high = sample[place + MARGIN] if place + MARGIN < SAMPLE else np.inf
    above, near, held = 0, [], 0
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        above += int(np.count_nonzero(block > high))
        near.append(block[(block >= low) & (block <= high)])
        held += near[-1].size
        if held > values.size // 2:  # many are equal: nothing is won
            return 0, near[0][:0]
    return above, np.concatenate(near)
