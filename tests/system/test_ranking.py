"""The largest values of an array: against a stable sort, with a sample made small."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from spkit.system import ranking
from spkit.system.ranking import largest

TINY = np.finfo(np.float32).smallest_subnormal
# what the values are: drawn freely, from few (many ties), and with the ends of the number line
VALUES = {
    "normal": lambda draw, n: draw.standard_normal(n),
    "scores": lambda draw, n: np.abs(draw.standard_normal(n)) * 1e-6,
    "heavy tail": lambda draw, n: np.exp(2 * draw.standard_normal(n)),
    "few values": lambda draw, n: draw.integers(0, 4, n) - 1.0,
    "mostly zero": lambda draw, n: draw.standard_normal(n) * (draw.random(n) < 0.2),
    "both zeros": lambda draw, n: np.where(draw.random(n) < 0.5, 0.0, -0.0),
    "denormal": lambda draw, n: draw.integers(0, 50, n) * TINY,
    "infinite": lambda draw, n: draw.choice([-np.inf, 0.0, 1.0, 2.0, np.inf], n),
    "one value": lambda draw, n: np.full(n, 3.0),
    "ascending": lambda draw, n: np.arange(n),
}


def test_few_values_are_left_to_partition():
    """With the sample as it is: a tenth of the values at most, and the threshold is among them."""
    values = np.random.default_rng(0).exponential(size=ranking.WORTH + 1).astype(np.float32)
    for count in (1, 1000, values.size // 3, values.size):
        above, near = ranking._around(values, count)
        assert above < count <= above + near.size and near.size < values.size / 10
        assert np.array_equal(largest(values, count), sorted_out(values, count))


@pytest.fixture(scope="module")
def small():
    """Every array of more than 50 values is sampled, with a bracket so narrow that it can miss."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(SAMPLE=16, MARGIN=2, WORTH=50, BLOCK=7).items():
            patch.setattr(ranking, name, value)
        yield


def sorted_out(values, count):
    """The same by a stable sort of the whole array: what `largest` promises."""
    selected = np.zeros(values.size, dtype=bool)
    selected[np.argsort(-values.astype(np.float64), kind="stable")[:count]] = True
    return selected


@given(
    st.sampled_from(sorted(VALUES)),
    st.integers(1, 400),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_the_largest_are_those_of_a_stable_sort(small, kind, size, share, seed, dtype):
    values = VALUES[kind](np.random.default_rng(seed), size).astype(dtype)
    before = values.copy()
    for count in {0, 1, round(share * size), size - 1, size}:
        assert np.array_equal(largest(values, count), sorted_out(values, count))
    assert values.tobytes() == before.tobytes()


@pytest.mark.parametrize("strided", [False, True])
def test_the_bracket_hits_misses_and_gives_up(small, strided, monkeypatch):
    """All three ways give the same set; a bracket that misses is not believed."""
    values = np.random.default_rng(0).standard_normal(1200)[:: 2 if strided else 1]
    monkeypatch.setattr(ranking, "SAMPLE", 64)
    found = {}
    for name, margin in (("narrow", 0), ("usual", 8), ("wide", 64)):
        monkeypatch.setattr(ranking, "MARGIN", margin)
        above, near = ranking._around(values, 200)
        found[name] = above < 200 <= above + near.size
        assert np.array_equal(largest(values, 200), sorted_out(values, 200))
    assert found == {"narrow": False, "usual": True, "wide": False}
