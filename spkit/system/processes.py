"""The processes that one computation runs in: one as a rule, or several that share its batches.

    here()          what this process is one of: `One`, or the `Several` that it has joined
    join(device)    what a started process says first (spkit/distributed)

The method asks `here()` at three places: which pairs of a batch are its own, how gradients and
losses come together, and who adds up which calibration batch. With `One` each of these is what a
computation without processes does, to the bit.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spkit.errors import SpkitError

Pass = tuple[list[int], float]  # pairs that are computed at once, and their share of the batch


class Sums(dict):
    """{tensor name: sum fp32} over the samples of all batches.

    samples: so many there are in the batches so far. own: so many of them this process computes.
    seen: so many of those are in the sum of a name.
    """

    def __init__(self):
        super().__init__()
        self.samples, self.own, self.seen = 0, 0, Counter()

    def mine(self, samples: int) -> bool:
        """Whether this process computes the next batch, of so many samples; asked of each."""
        self.samples += samples
        self.own += samples
        return True

    def add(self, name: str, value: Tensor) -> None:
        """Add what comes of a sample, which may be changed in place, to the sum of this name."""
        self[name] = self[name].add_(value) if name in self else value
        self.seen[name] += 1

    def batch_done(self, name: str) -> None:
        """Called when all samples of a batch are in the sum of this name."""

    @property
    def whole(self) -> bool:
        """Whether the sums are here, after the last batch."""
        return True


class One:
    """A computation in a single process."""

    count, rank, first = 1, 0, True

    def passes(self, indices: Sequence[int], at_once: int) -> list[Pass]:
        """The pairs of a batch that this process computes, at most `at_once` at a time."""
        parts = [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
        return [(list(part), len(part) / len(indices)) for part in parts]

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replace the gradient of each weight by its sum over the processes."""

    def batch_losses(self, own: Sequence[Tensor], size: int) -> Tensor:
        """The losses of all `size` pairs of a batch, in its order; own: those of `passes`."""
        return torch.cat(list(own))

    def set_seed(self, seed: int, step: int) -> None:
        """Fix what is drawn in this step, such as dropout."""

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values, in all of them."""
        return value

    def meet(self) -> None:
        """Wait until all processes have come here: what the first one wrote before is there."""

    def sums(self, batches: Iterable) -> Sums:
        """Where the sums over these batches are kept."""
        return Sums()


class Several(One):
    """One of the processes of torch's default group. All of them call the same in the same order.

    device: of this process, where tensors are for the others to receive.
    """

    def __init__(self, device: torch.device):
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        self.first, self.device = self.rank == 0, device

    def passes(self, indices: Sequence[int], at_once: int) -> list[Pass]:
        """Consecutive pairs, as many in each process but for one; as many passes in each.

        A process with fewer pairs repeats the batch's first one with share 0, for sharded weights
        (FSDP) are only there while all processes compute.
        """
        shares = [self._bounds(len(indices), rank) for rank in range(self.count)]
        most = max(stop - start for start, stop in shares)
        start, stop = shares[self.rank]
        parts = [indices[i : min(i + at_once, stop)] for i in range(start, stop, at_once)]
        found = [(list(part), len(part) / len(indices)) for part in parts]
        return found + [([indices[0]], 0.0)] * (-(-most // at_once) - len(found))

    def _bounds(self, size: int, rank: int) -> tuple[int, int]:
        return size * rank // self.count, size * (rank + 1) // self.count

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """One all-reduce of all of them, in their own precision (fp32 for LoRA factors)."""
        found = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([gradient.flatten().to(self.device) for gradient in found])
        dist.all_reduce(flat)
        for gradient, total in zip(found, flat.split([g.numel() for g in found]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def batch_losses(self, own: Sequence[Tensor], size: int) -> Tensor:
        start, stop = self._bounds(size, self.rank)
        whole = torch.zeros(size, device=self.device)
        if start < stop:
            whole[start:stop] = torch.cat(list(own))
        dist.all_reduce(whole)  # each is added to zeros: exact
        return whole

    def set_seed(self, seed: int, step: int) -> None:
        """Another one in each process and step, so that a resumed training draws the same."""
        text = f"{seed}|{step}|{self.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))

    def smallest(self, value: int) -> int:
        found = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def meet(self) -> None:
        self.smallest(0)  # nobody has it before all have sent theirs

    def sums(self, batches: Sequence) -> Sums:
        return PassedOn(self, len(batches))


class PassedOn(Sums):
    """Sums that go from process to process, layer by layer, so that nothing is added twice or in
    another order: the bits are those of one process.

    In each round every process computes one batch. It takes the sum of a layer from the process
    before it as soon as both have come to that layer in their backward pass, adds its own samples,
    and sends the sum on. The next round goes the other way, for the sums are at that end. The last
    round ends in process 0; if there is no batch for every process, it is in the first round.
    """

    def __init__(self, group: Several, batches: int):
        super().__init__()
        self.group = group
        self.before: int | None = None
        self.after: int | None = None
        order = rounds(batches, group.count)
        self.turns = iter([(ranks, place) for ranks in order for place in range(len(ranks))])

    def mine(self, samples: int) -> bool:
        ranks, place = next(self.turns)
        if ranks[place] != self.group.rank:
            self.samples += samples
            return False
        self.before = ranks[place - 1] if place else None
        self.after = ranks[place + 1] if place + 1 < len(ranks) else None
        return super().mine(samples)

    def add(self, name: str, value: Tensor) -> None:
        if name not in self and self.before is not None:
            self[name] = self._received(name, value)
        super().add(name, value)

    def batch_done(self, name: str) -> None:
        if self.after is not None:
            total = self.pop(name).to(self.group.device).contiguous()
            dist.send(self._mark(name), self.after)
            dist.send(total, self.after)

    @property
    def whole(self) -> bool:
        return self.group.first

    def _received(self, name: str, like: Tensor) -> Tensor:
        mark = torch.empty_like(self._mark(name))
        dist.recv(mark, self.before)
        if int(mark) != int(self._mark(name)):
            raise SpkitError(f"The processes come to {name!r} in different orders of the layers.")
        total = torch.empty_like(like, device=self.group.device)
        dist.recv(total, self.before)
        return total.to(like.device)

    def _mark(self, name: str) -> Tensor:
        """A number of its name goes before each sum: one in the place of another would not show."""
        return torch.tensor(zlib.crc32(name.encode()), device=self.group.device)


def rounds(batches: int, count: int) -> list[list[int]]:
    """The ranks of each round in the order of its batches; each begins where the last one ended."""
    whole, rest = divmod(batches, count)
    last = whole + bool(rest) - 1
    found = []
    for number in range(last + 1):
        down = (last - number) % 2 == 0  # the last one ends in process 0
        ranks = list(range(count))[::-1] if down else list(range(count))
        found.append(ranks[count - rest :] if rest and number == 0 else ranks)
    return found


_joined = One()


def here() -> One:
    """What this process is one of."""
    return _joined


def join(device: torch.device) -> One:
    """Be one of the processes of torch's default group from now on, where there is one."""
    global _joined
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _joined = Several(device)
    return _joined
