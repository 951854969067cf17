"""Where the important and the kept weights are, and how much two sets have in common.

    overlap              share and Jaccard index of two sets, matrix by matrix
    where                how many weights of each matrix a set holds
    ImportanceSummary    both for the importances of a large model, gathered window by window

The scores of both patches of a 7 B model would take 52 GB. The summary keeps a histogram and a few
counts of each matrix. The bins are 2**-12 of a score wide (2**-8 for all matrices at once), so its
shares are right to a fraction of a percent; the sets of a patch are exact (patching.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import closing

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spkit.method.importance import Scores
from spkit.method.patching import intersection_set
from spkit.method.safepatching import Sets
from spkit.models.checkpoint_files import place

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8)
FINE, COARSE = 20, 16  # bits of a positive fp32 that name its bin: exponent first, then mantissa


class ImportanceSummary:
    """Add every window of importance.score_windows, then ask for tables; patches "se" and "osm".

    rates: the same top rate for both patches. used: one more pair, (a, b) of the patch itself.
    """

    def __init__(self, rates: tuple[float, ...] = RATES, used: tuple[float, float] | None = None):
        self.rates = rates
        pairs = [(rate, rate) for rate in rates] + ([used] if used else [])
        self._pairs = list(dict.fromkeys(pairs))
        self.weights = 0
        self._coarse: dict[str, dict[str, np.ndarray]] = {"se": {}, "osm": {}}
        self._shares: dict[str, dict[str, float]] = {}
        self._counts: list[dict] = []

    def watch(self, windows: Iterator[Scores]) -> Iterator[Scores]:
        """The same windows of score_windows, each taken in as it passes by."""
        with closing(windows):
            for window in windows:
                self.add(window)
                yield window

    def add(self, window: Scores) -> None:
        """Take in the scores of both patches, fp32 and not negative, of some matrices."""
        for tensor, score in window["se"].items():
            keys, floors = {}, {}
            for side, name in enumerate(("se", "osm")):
                keys[name], fine = _binned(window[name][tensor])
                self._coarse[name][tensor] = fine.reshape(1 << COARSE, -1).sum(axis=1)
                floors[name] = {pair[side]: _floor(fine, pair[side]) for pair in self._pairs}
            self.weights += score.numel()
            self._shares[tensor] = {
                f"top {rate:.0%}": self._held(score, keys["se"], floors["se"][rate])
                for rate in (0.01, 0.1, 0.5)
                if rate in self.rates
            }
            for rate, other_rate in self._pairs:
                own = keys["se"] >= floors["se"][rate]
                other = keys["osm"] >= floors["osm"][other_rate]
                rates = {"rate": rate, "other_rate": other_rate}
                self._counts.append({**place(tensor), **rates, **_counts(own, other)})

    @staticmethod
    def _held(score: Tensor, keys: Tensor, floor: int) -> float:
        flat = score.reshape(-1)
        total = flat.sum(dtype=torch.float64)
        return float(flat[keys >= floor].sum(dtype=torch.float64) / total) if total else 0.0

    def concentration(self) -> pd.DataFrame:
        """The share of SE's total importance that the top weights of each matrix hold."""
        return pd.DataFrame(self._shares).T

    def overlap_by_rate(self) -> pd.DataFrame:
        """Columns rate, share = both / own, jaccard = both / either, over all matrices."""
        frame = pd.DataFrame(self._counts)
        frame = frame[frame["rate"] == frame["other_rate"]]
        sums = frame.groupby("rate")[["own", "other", "both"]].sum()
        return with_measures(sums).reset_index()[["rate", "share", "jaccard"]]

    def overlap(self, rate: float, other_rate: float | None = None) -> pd.DataFrame:
        """The same at one of the pairs, matrix by matrix: tensor, layer, module, ..., share.

        other_rate: that of OSM; None: as SE's.
        """
        frame, other_rate = pd.DataFrame(self._counts), other_rate or rate
        frame = frame[(frame["rate"] == rate) & (frame["other_rate"] == other_rate)]
        return with_measures(frame.drop(columns=["rate", "other_rate"]))

    def share(self, rate: float, other_rate: float) -> float:
        """The share of S_SE that is in S_OSM at one of the pairs, over all matrices."""
        counts = self.overlap(rate, other_rate)[["own", "both"]].sum()
        return float(counts["both"] / counts["own"]) if counts["own"] else 0.0

    def in_global_top(self, name: str, rate: float) -> pd.DataFrame:
        """How much of each matrix lies in the top `rate` of *all* weights, for one patch."""
        histograms = self._coarse[name]
        floor = _floor(sum(histograms.values()), rate)
        rows = [
            {**place(tensor), "n": int(counts.sum()), "k": int(counts[floor:].sum())}
            for tensor, counts in histograms.items()
        ]
        frame = pd.DataFrame(rows)
        return frame.assign(share=frame["k"] / frame["n"])


def _binned(score: Tensor) -> tuple[Tensor, np.ndarray]:
    """(bin of every weight, int32 flat; how many weights each bin holds)."""
    # of positive floats the bits, read as an integer, are in the same order as the numbers
    keys = score.float().contiguous().view(torch.int32).reshape(-1) >> (31 - FINE)
    return keys, torch.bincount(keys, minlength=1 << FINE).numpy()


def _floor(histogram: np.ndarray, rate: float) -> int:
    """The bin from which upward about `rate` of all weights lie, at least one; not score 0's."""
    from_top = np.cumsum(histogram[::-1])
    wanted = max(1, int(rate * from_top[-1]))
    return max(1, len(histogram) - 1 - int(np.searchsorted(from_top, wanted)))


def where(sets: Mapping[str, Sets]) -> pd.DataFrame:
    """How many weights of each matrix each set holds: set, tensor, layer, module, n, k, share.

    sets: {label: {tensor name: bool}}. n: all weights of the matrix, k: those in the set.
    """
    rows = [
        {"set": label, **place(name), "n": mask.numel(), "k": int(mask.sum())}
        for label, masks in sets.items()
        for name, mask in masks.items()
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(share=frame["k"] / frame["n"])


def overlap(own: Sets, other: Sets) -> pd.DataFrame:
    """How much of `own` lies in `other`, matrix by matrix.

    Columns tensor, layer, module, own, other, both (counts), share = both / own, jaccard =
    both / either. A row with the tensor "all" sums the counts over all matrices. Empty sets give
    shares of 0.
    """
    rows = [{**place(name), **_counts(mask, other[name])} for name, mask in own.items()]
    frame = pd.DataFrame(rows)
    total = frame[["own", "other", "both"]].sum()
    frame.loc[len(frame)] = {"tensor": "all", "layer": -1, "module": "all", **total}
    return with_measures(frame)


def _counts(own: Tensor, other: Tensor) -> dict[str, int]:
    both = intersection_set(own, other)
    return {"own": int(own.sum()), "other": int(other.sum()), "both": int(both.sum())}


def with_measures(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame of counts own, other, both with share and jaccard behind, 0 for empty sets."""
    either = frame["own"] + frame["other"] - frame["both"]
    measures = {"share": frame["both"] / frame["own"], "jaccard": frame["both"] / either}
    return frame.assign(**{name: values.fillna(0.0) for name, values in measures.items()})
