"""The statistics of an experiment: variants on backbones x derivations x masks, the same prompts.

A variant is a method with its settings. Every variant is evaluated on the same backbones (seeds);
on each there are the same number of derivations, on each of these the same number of retention
masks, and every such run answers the same items (prompts). An outcome is 1 (failure) or 0.

Here are the intervals and paired differences: a hierarchical bootstrap. What counts as a failure is
the caller's choice. The same draws give the intervals of hypervolumes (fronts.py).

What the intervals claim. A resampled experiment has other backbones, derivations, masks and items.
Two biases are known. With few backbones a percentile interval is too narrow: for five it is about
0.6 times as wide as Student's t interval where all the variance lies between backbones, and p is
too small likewise. And noise of single answers is counted for runs and for items (Owen 2007,
doi 10.1214/07-AOAS122), which widens the interval. Therefore paired() also says on how many single
backbones the difference holds.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spkit.errors import SpkitError
from spkit.evaluation.verdicts import VERDICTS

COLUMNS = "variant backbone derivation mask id verdict".split()
AXES = ("backbone", "derivation", "mask", "item")
TIE = 1e-12  # two draws this near to each other are equal: sums in another order differ so little


# --- outcomes ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # eq=False: the comparison of two arrays is no truth value
class Outcomes:
    """Who failed where.

    values: float32 [variant, backbone, derivation, mask, item], 1 is a failure and 0 is none.
    variants, backbones, items: the labels of those axes. n_runs: int [variant], the distinct runs
    that each variant really made, before any broadcasting.
    """

    values: np.ndarray
    variants: list
    backbones: list
    items: list
    n_runs: list[int]

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, failed: Collection[str]) -> "Outcomes":
        """From a tidy frame: variant, backbone, derivation, mask, id, verdict; a row an answer.

        failed: the verdicts that count as a failure. A variant that has mask 0 alone draws no
        masks, and counts for every mask; likewise one that has derivation 0 alone. Variants and
        items keep the frame's order, the other labels are sorted.
        SpkitError for a missing column or value, a verdict that does not exist, an answer that
        stands twice, and an answer that is missing (it names variant, backbone and what lacks).
        """
        _check_frame(frame, failed)
        codes, labels = [], []
        for column in COLUMNS[:-1]:
            code, label = pd.factorize(frame[column], sort=column not in ("variant", "id"))
            codes.append(code)
            labels.append(label.tolist())
        values = np.full([len(label) for label in labels], np.nan, dtype=np.float32)
        values[tuple(codes)] = frame["verdict"].isin(list(failed)).to_numpy()

        runs = frame[["variant", "backbone", "derivation", "mask"]].drop_duplicates()
        made = runs.groupby("variant", sort=False)
        n_runs = [int(n) for n in made.size()]
        for v, (_, own) in enumerate(made):
            if set(own["mask"]) == {0}:
                values[v] = values[v][:, :, [labels[3].index(0)]]
            if set(own["derivation"]) == {0}:
                values[v] = values[v][:, [labels[2].index(0)]]
        _check_complete(values, labels)
        return cls(values, labels[0], labels[1], labels[4], n_runs)

    def index(self, variant) -> int:
        """The variant's place on the first axis. SpkitError where there is no such variant."""
        if variant not in self.variants:
            raise SpkitError(f"there is no variant {variant!r}; there are {self.variants}")
        return self.variants.index(variant)

    def means(self) -> np.ndarray:
        """The failure rate of every variant on the data as they are: float64 [variant], shares."""
        return self.values.mean(axis=(1, 2, 3, 4), dtype=np.float64)


def _check_frame(frame: pd.DataFrame, failed: Collection[str]) -> None:
    """Everything that can be wrong before the cells are sorted into the array."""
    lacking = [column for column in COLUMNS if column not in frame]
    if lacking:
        raise SpkitError(f"the frame of outcomes lacks the columns {lacking}")
    if frame.empty:
        raise SpkitError("the frame of outcomes has no rows")
    empty = frame[COLUMNS].isna().any()
    if empty.any():
        raise SpkitError(f"the frame of outcomes has rows without {list(empty[empty].index)}")
    if isinstance(failed, str):
        raise SpkitError(f"failed must be a collection of verdicts, not the text {failed!r}")
    # a misspelt verdict would otherwise be a failure rate of 0 %
    known = {*VERDICTS, *frame["verdict"].unique()}
    unknown = sorted(set(failed) - known)
    if unknown:
        raise SpkitError(f"no verdict is called {unknown}; there are {sorted(known)}")
    twice = frame[frame.duplicated(COLUMNS[:-1])]
    if len(twice):
        first = twice.iloc[0]
        where = ", ".join(f"{column} {first[column]}" for column in COLUMNS[:-1])
        raise SpkitError(f"{len(twice)} outcomes stand twice, the first: {where}")


def _check_complete(values: np.ndarray, labels: list[list]) -> None:
    """SpkitError that names the first hole, and no more of its place than needs to be said."""
    missing = np.isnan(values)
    if not missing.any():
        return
    where = [int(i) for i in np.argwhere(missing)[0]]
    # a backbone without any run is named as such, not as its first item
    depth = 1
    while not missing[tuple(where[: depth + 1])].all():
        depth += 1
    named = zip(AXES, labels[1:], where[1:], strict=True)
    places = [f"{axis} {label[i]!r}" for axis, label, i in named][:depth]
    raise SpkitError(f"variant {labels[0][where[0]]!r} lacks {' of '.join(reversed(places))}")


# --- resampling -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Resampling:
    """How often each run and each item occurs in every draw: one for all variants, so paired.

    runs: int64 [draws, backbone, derivation, mask], sums to B*D*M in each draw.
    items: int64 [draws, item], sums to I. within: like runs, but with every backbone once, for the
    statistics of single backbones; sums to D*M on each.
    """

    runs: np.ndarray
    items: np.ndarray
    within: np.ndarray
    seed: int

    def with_items(self, items: int, item_set: int = 1) -> "Resampling":
        """The same runs with another set of items, which are drawn independently of the first.

        item_set: that set's number; resample() itself draws number 0.
        """
        drawn = _draw_items(len(self.runs), items, self.seed, item_set)
        return Resampling(self.runs, drawn, self.within, self.seed)


def resample(
    backbones: int,
    derivations: int,
    masks: int,
    items: int,
    draws: int = 2000,
    seed: int = 0,
) -> Resampling:
    """The hierarchical bootstrap: a backbone for each of B slots, with replacement; in each slot
    D of that backbone's derivations; for each of these M of its masks; and, crossed, I items.

    Items are drawn once for all the runs of a draw: answers to one prompt stay together.
    The same arguments give the same draws, and the runs do not depend on the number of items.
    SpkitError for a count below 1. Few derivations or masks are as narrow a base as few backbones;
    the head of this file says what that does. The smallest p of paired() is 2 / (draws + 1), and
    Holm multiplies it by the number of comparisons: 80 of them need 5000 draws.
    """
    counts = {"backbones": backbones, "derivations": derivations, "masks": masks}
    for name, count in {**counts, "items": items, "draws": draws}.items():
        if count < 1:
            raise SpkitError(f"{name} must be 1 at least, not {count}")
    rng = _generator(seed, 0)
    once = np.ones((draws, backbones), dtype=np.int64)
    within = _draw_runs(rng, once, derivations, masks)
    slots = rng.multinomial(backbones, _even(backbones), size=draws)
    runs = _draw_runs(rng, slots, derivations, masks)
    return Resampling(runs, _draw_items(draws, items, seed, 0), within, seed)


def _draw_runs(rng, slots: np.ndarray, derivations: int, masks: int) -> np.ndarray:
    """[draws, backbone] how many slots each backbone has -> [draws, backbone, derivation, mask].

    The n slots of a backbone draw D derivations each, independently: their counts add up to one
    multinomial of n*D. So do the masks of a derivation.
    """
    drawn = rng.multinomial(slots * derivations, _even(derivations))
    return rng.multinomial(drawn * masks, _even(masks))


def _draw_items(draws: int, items: int, seed: int, item_set: int) -> np.ndarray:
    return _generator(seed, 1 + item_set).multinomial(items, _even(items), size=draws)


def _generator(seed: int, stream: int) -> np.random.Generator:
    """A stream of its own for the runs and for each item set: none shifts another."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,))))


def _even(n: int) -> np.ndarray:
    return np.full(n, 1 / n)


def rates(outcomes: Outcomes, resampling: Resampling) -> np.ndarray:
    """Every variant's failure rate in every draw: float64 [draws, variant], shares of 1.

    SpkitError where the resampling is for another design.
    """
    _check_design(outcomes, resampling)
    return _weighted(outcomes.values, resampling.runs, resampling.items)


def _weighted(values: np.ndarray, runs: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[variant, ..., item] and counts [draws, ...] and [draws, item] -> rates [draws, variant].

    One variant at a time: its [draws, item] product is all that has to fit into memory. The sums
    are whole numbers, exact in float64, so equal variants get equal rates.
    """
    runs = runs.reshape(len(runs), -1).astype(np.float64)
    items = items.astype(np.float64)
    sums = np.empty((len(runs), len(values)))
    for v, value in enumerate(values):
        flat = value.reshape(runs.shape[1], -1).astype(np.float64)
        sums[:, v] = np.einsum("di,di->d", runs @ flat, items)
    return sums / (runs.shape[1] * items.shape[1])


def _rates_within(outcomes: Outcomes, resampling: Resampling) -> np.ndarray:
    """Rates with one backbone alone: float64 [draws, backbone, variant]."""
    _check_design(outcomes, resampling)
    each = [
        _weighted(outcomes.values[:, b], resampling.within[:, b], resampling.items)
        for b in range(len(outcomes.backbones))
    ]
    return np.stack(each, axis=1)


def _check_design(outcomes: Outcomes, resampling: Resampling) -> None:
    wanted = outcomes.values.shape[1:]
    given = (*resampling.runs.shape[1:], resampling.items.shape[1])
    if given != wanted:
        named = "[backbones, derivations, masks, items]"
        raise SpkitError(
            f"the resampling is for {named} {list(given)}, the outcomes have {list(wanted)}"
        )


def interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval over the first axis: low and high, of the shape of one draw.

    SpkitError where confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise SpkitError(f"confidence must lie between 0 and 1, not {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def p_value(differences: np.ndarray) -> np.ndarray:
    """Two-sided: twice the smaller tail beyond 0 over the first axis, ties in both, at most 1."""
    below = (differences <= TIE).sum(axis=0)
    above = (differences >= -TIE).sum(axis=0)
    return np.minimum(1, 2 * (1 + np.minimum(below, above)) / (1 + len(differences)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction, as statsmodels' multipletests, which collects all garbage in every call.

    The smallest of n values counts n times, the next n - 1 times; none less than a smaller one.
    """
    order = np.argsort(p)
    grown = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, grown)
    return corrected


# --- tables -----------------------------------------------------------------------------------


def summary(outcomes: Outcomes, resampling: Resampling, confidence: float = 0.95) -> pd.DataFrame:
    """A row a variant: variant, n_backbones, n_runs, n_items, mean, low, high (percent).

    The mean is that of the data; n_runs counts the runs really made, not the broadcast ones.
    """
    low, high = interval(rates(outcomes, resampling), confidence)
    return pd.DataFrame(
        {
            "variant": outcomes.variants,
            "n_backbones": len(outcomes.backbones),
            "n_runs": outcomes.n_runs,
            "n_items": len(outcomes.items),
            "mean": 100 * outcomes.means(),
            "low": 100 * low,
            "high": 100 * high,
        }
    )


def paired(
    outcomes: Outcomes, resampling: Resampling, reference, confidence: float = 0.95
) -> pd.DataFrame:
    """A row for every variant but the reference: the difference, variant minus reference.

    Columns: variant, reference, difference, low, high (percentage points), p (two-sided, from the
    bootstrap), p_holm (Holm over the rows of this table), backbones_below and backbones_above (on
    how many backbones the interval from that backbone alone lies below or above 0), backbones.
    SpkitError for an unknown reference, and where there is no other variant.
    """
    at = outcomes.index(reference)
    others = [v for v in range(len(outcomes.variants)) if v != at]
    if not others:
        raise SpkitError(f"there is no variant to compare with {reference!r}")
    drawn = rates(outcomes, resampling)
    gaps = drawn[:, others] - drawn[:, [at]]
    low, high = interval(gaps, confidence)
    p = p_value(gaps)

    within = _rates_within(outcomes, resampling)
    low_each, high_each = interval(within[..., others] - within[..., [at]], confidence)
    means = outcomes.means()
    return pd.DataFrame(
        {
            "variant": [outcomes.variants[v] for v in others],
            "reference": reference,
            "difference": 100 * (means[others] - means[at]),
            "low": 100 * low,
            "high": 100 * high,
            "p": p,
            "p_holm": holm(p),
            "backbones_below": (high_each < 0).sum(axis=0),
            "backbones_above": (low_each > 0).sum(axis=0),
            "backbones": len(outcomes.backbones),
        }
    )


def per_backbone(
    outcomes: Outcomes, resampling: Resampling, reference, confidence: float = 0.95
) -> pd.DataFrame:
    """A row for every variant but the reference, and backbone, from that backbone alone.

    Columns: variant, backbone, rate, reference_rate (percent), difference, low, high (percentage
    points). Derivations, masks and items are resampled. SpkitError for an unknown reference.
    """
    at = outcomes.index(reference)
    within = _rates_within(outcomes, resampling)
    low, high = interval(within - within[..., [at]], confidence)
    means = outcomes.values.mean(axis=(2, 3, 4), dtype=np.float64)
    rows = [
        {
            "variant": variant,
            "backbone": backbone,
            "rate": 100 * means[v, b],
            "reference_rate": 100 * means[at, b],
            "difference": 100 * (means[v, b] - means[at, b]),
            "low": 100 * low[b, v],
            "high": 100 * high[b, v],
        }
        for v, variant in enumerate(outcomes.variants)
        for b, backbone in enumerate(outcomes.backbones)
        if v != at
    ]
    columns = "variant backbone rate reference_rate difference low high".split()
    return pd.DataFrame(rows, columns=columns)
