"""Controllable patching: the method's set algebra and arithmetic, as pure functions on tensors.

    retention   m ~ Bernoulli(p) for every weight of a patch    retention_mask
    selection   S = the top share a of the importances          top_rate_set, top_rate_sets
    difference  R_SE and (S_SE \\ S_OSM), and with SE and OSM   difference_set, kept_set
                exchanged
    strengths   alpha, beta, scaled                             norm_matched, rescaled
    merging     alpha * P_SE + beta * P_OSM on the kept sets    merged_delta
    patching    theta + merged delta, other weights copied      models/deltas.py: add_delta

docs/method.md, sections 2 to 4, states each equation. SafePatching (safepatching.py) calls these
functions. A wrong argument is a ValueError. Only global_top_rate_sets holds more than a few copies
of one matrix.
"""

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor

from spkit.system.ranking import largest

RETENTION_VERSION = 1  # of the draw below; to change the draw is to change every patch ever made
DRAWS_AT_ONCE = 1 << 20  # 8 MB of raw bits: bounds the memory, does not affect the result
PHILOX_WIDTH = 4  # 64-bit words per step of numpy's Philox4x64 counter

ORDERS = ("rank_all", "rank_retained")
SCOPES = ("matrix", "global")


# ---- retention -------------------------------------------------------------------------------


def retention_mask(
    shape: tuple[int, ...] | torch.Size, rate: float, *, seed: int, patch: str, tensor: str
) -> Tensor:
    """Random parameter retention [paper]: bool [shape], True with probability `rate`.

    A pure function of (seed, patch, tensor, position): no random state is read or written, so a
    mask can be redrawn alone, in any order, on any machine. Position i (row-major) is retained if
    the i-th raw 64-bit word of Philox4x64-10, keyed by a hash of (version, seed, patch, tensor), is
    below round(rate * 2**64): exact at rates 0 and 1, and a larger rate retains a superset.
    """
    mask = retention_slice(0, prod(shape), rate, seed=seed, patch=patch, tensor=tensor)
    return mask.reshape(tuple(shape))


def retention_slice(
    start: int, count: int, rate: float, *, seed: int, patch: str, tensor: str
) -> Tensor:
    """Positions start .. start + count - 1 of the flattened retention mask, bool [count]."""
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative; they are {start} and {count}")
    threshold = round(_fraction(rate) * 2**64)
    retained = np.empty(count, dtype=bool)
    if threshold == 2**64:  # does not fit into 64 bits, and retains everything
        retained[:] = True
        return torch.from_numpy(retained)
    words = np.random.Philox(key=_retention_key(seed, patch, tensor))
    words.advance(start // PHILOX_WIDTH)  # counts steps of the counter, not words
    words.random_raw(start % PHILOX_WIDTH, output=False)
    for done in range(0, count, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, count - done)
        retained[done : done + size] = words.random_raw(size) < np.uint64(threshold)
    return torch.from_numpy(retained)


def _retention_key(seed: int, patch: str, tensor: str) -> int:
    # JSON keeps the four apart whatever characters the names contain
    text = json.dumps([RETENTION_VERSION, int(seed), patch, tensor])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


# ---- selection -------------------------------------------------------------------------------


def rate_count(rate: float, total: int) -> int:
    """How many of `total` a rate selects: floor(rate * total) of the decimal as it is written.

    In binary 0.29 * 100 is 28.999999999999996; here it is 29.
    """
    return int(_fraction(rate) * total)


def top_rate_set(score: Tensor, rate: float, among: Tensor | None = None) -> Tensor:
    """S: the top `rate` of one importance matrix, bool of the same shape [paper].

    Exactly rate_count(rate, number of weights) are True; of equal scores the lower flat index wins.
    among: bool of the same shape; only these weights are ranked and counted.
    ValueError for a NaN score or a rate outside [0, 1].
    """
    return global_top_rate_sets({"": score}, rate, among=None if among is None else {"": among})[""]


def global_top_rate_sets(
    scores: Mapping[str, Tensor], rate: float, among: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The same over several matrices at once: `rate` of all their weights, wherever they lie.

    Of equal scores the earlier matrix wins, then the lower flat index. Several are copied once.
    """
    flat, pools = [], []
    for name, score in scores.items():
        values = score.detach().cpu().flatten()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()  # exact, and numpy has no bfloat16
        pool = None if among is None else _mask(among[name], score, "among").cpu().flatten()
        flat.append((values if pool is None else values[pool]).numpy())
        pools.append(pool)
    ranked = np.concatenate(flat) if len(flat) != 1 else flat[0]
    if ranked.size and np.isnan(ranked.min()):  # one NaN makes it NaN
        names = [name for name, values in zip(scores, flat, strict=True) if np.isnan(values).any()]
        raise ValueError(f"the scores contain NaN {names[0]}".rstrip())
    selected = torch.from_numpy(largest(ranked, rate_count(rate, ranked.size)))

    sets, start = {}, 0
    for (name, score), values, pool in zip(scores.items(), flat, pools, strict=True):
        part = selected[start : start + values.size]
        start += values.size
        if pool is not None:
            part = torch.zeros(score.numel(), dtype=torch.bool).masked_scatter_(pool, part)
        sets[name] = part.reshape(score.shape).to(score.device)
    return sets


# ---- sets ------------------------------------------------------------------------------------


def difference_set(own: Tensor, other: Tensor) -> Tensor:
    """own \\ other, bool: the weights that matter to one patch and not to the other [paper]."""
    return own & ~_mask(other, own, "other")


def intersection_set(own: Tensor, other: Tensor) -> Tensor:
    """own and other, bool: what the ablation keeps instead of the differences."""
    return own & _mask(other, own, "other")


def top_rate_sets(
    scores: Mapping[str, Tensor],
    rate: float,
    retained: Mapping[str, Tensor],
    *,
    order: str = "rank_all",
    scope: str = "matrix",
) -> dict[str, Tensor]:
    """S of one patch for every matrix, {name: bool}.

    order "rank_all" [paper, as docs/method.md reads it]: the rate counts all weights.
        "rank_retained": it counts the retained weights of this patch only, so S is a part of R, and
        a weight that matters to both but is retained in one only is not subtracted.
    scope "matrix": the rate of each weight matrix; "global": of all of them together.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; allowed are {', '.join(ORDERS)}")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; allowed are {', '.join(SCOPES)}")
    among = retained if order == "rank_retained" else None
    if scope == "global":
        return global_top_rate_sets(scores, rate, among)
    return {
        name: top_rate_set(score, rate, None if among is None else among[name])
        for name, score in scores.items()
    }


def kept_set(retained: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """retained and (own \\ other), bool: where one patch keeps its delta in one matrix [paper]."""
    return retained & difference_set(own, other)


# ---- strengths and the sum -------------------------------------------------------------------


def squared_norm(delta: Tensor, keep: Tensor | None = None) -> float:
    """Sum of squares of a delta, or of its kept part, in float64; sum these over the matrices."""
    chosen = delta if keep is None else delta[keep]
    return float(chosen.to(torch.float64, copy=True).square_().sum())


def norm_matched(alpha: float, total_norm: float, kept_norm: float) -> float:
    """alpha * |P| / |kept P|: the thinned patch gets alpha times the norm of the whole one.

    The norms are over all matrices. 0 where nothing is kept: no scale could make up for it.
    """
    return alpha * total_norm / kept_norm if kept_norm > 0 else 0.0


def rescaled(alpha: float, rate: float) -> float:
    """alpha / p, so that random retention keeps the delta's mean, as DARE does.

    0 at rate 0, where nothing is retained.
    """
    share = float(_fraction(rate))
    return alpha / share if share else 0.0


def norm(squared_norms) -> float:
    """The norm of a whole patch from the `squared_norm` of its matrices."""
    return sqrt(sum(squared_norms))


def merged_delta(
    delta_se: Tensor,
    keep_se: Tensor,
    delta_osm: Tensor,
    keep_osm: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """alpha * P_SE on keep_SE + beta * P_OSM on keep_OSM, fp32, and 0 elsewhere [paper].

    The sets may overlap (in ablations they do). ValueError if a kept value is not finite.
    """
    merged = _thinned(delta_se, keep_se, alpha)
    merged += _thinned(delta_osm, keep_osm, beta)
    if not all(torch.isfinite(end) for end in torch.aminmax(merged)):  # a NaN is both ends
        raise ValueError("a kept delta, scaled, is not finite")
    return merged


def _thinned(delta: Tensor, keep: Tensor, scale: float) -> Tensor:
    # filled and not multiplied by the set: 0 * inf is NaN, and 0 * -1 is -0.0
    return (delta.float() * scale).masked_fill_(~_mask(keep, delta, "keep"), 0.0)


# ---- checks ----------------------------------------------------------------------------------


def _fraction(rate: float) -> Fraction:
    """The rate as the decimal that was written; ValueError outside [0, 1]."""
    try:
        fraction = Fraction(str(rate))
    except ValueError:
        raise ValueError(f"a rate is a number from 0 to 1; this one is {rate!r}") from None
    if not 0 <= fraction <= 1:
        raise ValueError(f"a rate is a number from 0 to 1; this one is {rate!r}")
    return fraction


def _mask(mask: Tensor, like: Tensor, name: str) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != like.shape:
        raise ValueError(
            f"{name} must be bool {list(like.shape)}; it is {mask.dtype} {list(mask.shape)}"
        )
    return mask
