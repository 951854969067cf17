"""Who is asked in a study: the backbone, each patch alone, their sum, and SafePatching twice."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from spkit.comparison.ablations import ablated
from spkit.method.safepatching import SafePatching

BASE = "base"
PLAIN = ("SE only", "OSM only", "plain sum")
AS_IN_THE_PAPER = "SafePatching, as in the paper"
TUNED = "SafePatching, tuned"
# rates as the paper gives them for LLaMA-2 (section 4.2); strengths of 1, and no norm matched
PAPER = {
    "retention_rate": 0.3,
    "top_rate_se": 0.03,
    "top_rate_osm": 0.02,
    "scale": "plain",
    "rescale": False,
    "balance": None,
    "alpha": 1.0,
    "beta": 1.0,
}
NAMES = (BASE, *PLAIN, AS_IN_THE_PAPER, TUNED)


def patches(method: SafePatching) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """(name, deltas) of every row but the base. method: with the tuned setting."""
    for name in PLAIN:
        yield name, ablated(method, name).deltas()
    yield AS_IN_THE_PAPER, method.changed(**PAPER).deltas()
    yield TUNED, method.deltas()
