"""The collector is as it was after a pause, and leaves alone what was made in it."""

import gc

import pytest

from spkit.system.collector import paused


@pytest.fixture(autouse=True)
def as_it_was():
    usual = gc.isenabled()
    yield
    gc.enable() if usual else gc.disable()


@pytest.mark.parametrize("usual", [True, False])
def test_a_pause_ends_as_it_began(usual):
    gc.enable() if usual else gc.disable()
    with paused():
        assert not gc.isenabled()
    assert gc.isenabled() == usual
    with pytest.raises(KeyError), paused():
        raise KeyError
    assert gc.isenabled() == usual


def test_what_was_made_meanwhile_is_not_looked_at_again():
    before = gc.get_freeze_count()
    with paused():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(made)
    assert not any(each is made for each in gc.get_objects())
