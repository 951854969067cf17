"""How the pairs of a batch and the calibration batches are shared, without any process."""

from itertools import chain, pairwise

import pytest

from spkit.system import processes
from spkit.system.processes import One, PassedOn, Several, rounds


def ranks(count):
    """The processes of a group, without one."""
    for rank in range(count):
        one = Several.__new__(Several)
        one.count, one.rank, one.first = count, rank, rank == 0
        yield one


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("size, at_once", [(24, 24), (24, 2), (5, 1), (5, 3), (2, 1), (1, 4)])
def test_each_pair_is_computed_once_and_each_process_passes_as_often(count, size, at_once):
    batch = list(range(100, 100 + size))
    all_of_them = [one.passes(batch, at_once) for one in ranks(count)]
    assert len({len(passes) for passes in all_of_them}) == 1
    own = [[pairs for pairs, share in passes if share] for passes in all_of_them]
    assert list(chain(*chain(*own))) == batch  # in the batch's order
    assert all(len(pairs) <= at_once for pairs in chain(*own))
    assert sum(share for passes in all_of_them for _, share in passes) == pytest.approx(1)
    alone = One().passes(batch, at_once)
    assert list(chain(*(pairs for pairs, _ in alone))) == batch
    assert sum(share for _, share in alone) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("batches", [1, 2, 3, 7, 8, 9, 16, 64])
def test_sums_are_where_the_next_batch_is_computed_and_end_in_the_first_process(count, batches):
    order = rounds(batches, count)
    assert sum(map(len, order)) == batches and len(order) == -(-batches // count)
    assert all(len(set(each)) == len(each) for each in order)
    assert all(before[-1] == after[0] for before, after in pairwise(order))
    assert order[-1][-1] == 0


def test_a_process_counts_all_samples_and_those_of_its_own():
    own = []
    for one in ranks(2):
        sums = PassedOn(one, 3)
        mine = [sums.mine(samples) for samples in (2, 2, 1)]
        own.append((mine, sums.own, sums.samples, sums.whole))
    assert own[0] == ([False, False, True], 1, 5, True)
    assert own[1] == ([True, True, False], 4, 5, False)


def test_a_process_by_itself_is_one():
    assert type(processes.here()) is One and processes.join("cpu") is processes.here()
