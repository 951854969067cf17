"""The top-rate set of one importance matrix against sorting, kthvalue and topk, and one reading.

The largest is a matrix of LLaMA-2-7B's shape, 4096 x 11008. All give the same set; what they need
of memory above the matrix itself is measured, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spkit.bench.bench import FIGURE, LIMIT, PEER, Bench, peak_above
from spkit.bench.timing import Spread
from spkit.method.patching import rate_count, top_rate_set

MATRICES = {"1024 x 2816": (1024, 2816), "4096 x 4096": (4096, 4096), "4096 x 11008": (4096, 11008)}
GOAL = "4096 x 11008"
RATE = 0.03
LARGE = 2**26  # bytes; less may fit into memory that the process has freed and kept


@dataclass(frozen=True)
class Matrix:
    """Instead of a model's size."""

    name: str

    @property
    def weights(self) -> int:
        """Entries."""
        return MATRICES[self.name][0] * MATRICES[self.name][1]


def measure(bench: Bench) -> None:
    """Rows for all matrices; where sizes were asked for, of the smallest alone."""
    for name in list(MATRICES)[: None if bench.sizes is None else 1]:
        torch.manual_seed(0)
        score = (torch.randn(MATRICES[name]) * torch.randn(MATRICES[name])).abs()
        _measure(bench, Matrix(name), score.to(bench.device))


def _measure(bench: Bench, matrix: Matrix, score: Tensor) -> None:
    count, ours = rate_count(RATE, score.numel()), top_rate_set(score, RATE)
    ways = {"torch.sort": by_sort, "torch.kthvalue": by_kthvalue, "torch.topk": by_topk}
    others = {}
    for name, find in ways.items():
        bench.right(f"the sets of ours and {name}", torch.equal(ours, find(score, count)))
        goal = "<= 0.333" if matrix.name == GOAL and name != "torch.topk" else ""
        others[name] = (PEER, lambda find=find: find(score, count), goal)
    others["reading it once"] = (LIMIT, lambda: score.max(), "")
    bench.compare(matrix, lambda: top_rate_set(score, RATE), others)
    if bench.device == "cpu" and score.nbytes > LARGE:
        peaks = Spread.of([extra(score) for _ in range(bench.rounds)])
        goal = "<= 1.25" if matrix.name == GOAL else ""
        what = "extra bytes / the matrix's"
        bench.add(matrix, "the matrix", FIGURE, what, peaks, goal=goal)


def extra(score: Tensor) -> float:
    """Bytes that our set takes at most, over those of the scores."""
    found: list[int] = []
    with peak_above(found):
        top_rate_set(score, RATE)
    return found[0] / (score.numel() * score.element_size())


# ---- the same set by other means; random scores have no ties at the threshold --------------------


def by_sort(score: Tensor, count: int) -> Tensor:
    """All are put in order."""
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[order[:count]] = True
    return chosen.view_as(score)


def by_kthvalue(score: Tensor, count: int) -> Tensor:
    """The smallest that belongs to it, then a comparison."""
    return score >= torch.kthvalue(score.flatten(), score.numel() - count + 1).values


def by_topk(score: Tensor, count: int) -> Tensor:
    """The indices of the largest."""
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[torch.topk(score.flatten(), count, sorted=False).indices] = True
    return chosen.view_as(score)
