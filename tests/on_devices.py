"""Tests that run on the CPU everywhere, and on a GPU where there is one: `pytest -m cuda`.

@on_devices
def test_something(device): ...

@on_devices_with("dtype", "float32", "bfloat16")       the CPU takes the first value alone
def test_something(device, dtype): ...
"""

import pytest

cuda = pytest.mark.cuda
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])


def on_devices_with(names: str, *cases):
    """One more parameter or several; of the cases all run on a GPU, and the first on the CPU."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    on_gpu = [pytest.param("cuda", *case, marks=cuda) for case in cases]
    return pytest.mark.parametrize(f"device, {names}", [("cpu", *cases[0]), *on_gpu])
