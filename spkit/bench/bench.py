"""What a stage is given: how many rounds, which sizes, and where its rows go."""

import ctypes
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from spkit.bench.peers import Peers
from spkit.bench.sizes import SHAPES, Size
from spkit.bench.timing import Spread, in_turn, ratios
from spkit.errors import SpkitError
from spkit.system.files import atomic

LIMIT, PEER, GROWTH, FIGURE = "limit", "peer", "growth", "figure"
GOAL = re.compile(r"(<=|>=) ([\d.]+)(?: and <= ([\d.]+))?")


@dataclass(frozen=True)
class Row:
    """One measured figure.

    against: what ours is compared with. role: a limit, which nothing can beat by much; a peer, that
    does the same; growth: our seconds at this size; or a figure that stands alone. what: its unit.
    Median, low and high of n rounds; ours, other: median seconds, where the figure is their ratio.
    goal: "<= 1.05", ">= 30" or ">= 0.85 and <= 1.15"; "" for none.
    """

    stage: str
    size: str
    weights: int
    against: str
    role: str
    what: str
    median: float
    low: float
    high: float
    n: int
    ours: float | None = None
    other: float | None = None
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without one."""
        return meets(self.median, self.goal)


def meets(value: float, goal: str) -> bool | None:
    """Whether a value meets a goal as Row has it; None for no goal."""
    if not goal:
        return None
    sign, bound, upper = GOAL.fullmatch(goal).groups()
    if sign == "<=":
        return value <= float(bound)
    return value >= float(bound) and (upper is None or value <= float(upper))


@dataclass
class Bench:
    """One stage's run.

    stage: its name. rounds: counted ones. sizes: only these, of those that a stage offers; None:
    all. threads: of torch. backbone: a params file, whose model is asked, too. folder: for what it
    writes meanwhile. told: called after each row with all rows so far.
    """

    stage: str
    folder: Path
    rounds: int = 5
    sizes: tuple[str, ...] | None = None
    device: str = "cpu"
    threads: int = 1
    backbone: str | None = None
    peers: Peers = field(default_factory=Peers)
    told: Callable[[list[Row]], object] = lambda rows: None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, *offered: str) -> Iterator[Size]:
        """The sizes to measure, small ones first."""
        for name in SHAPES:
            if name in offered if self.sizes is None else name in self.sizes:
                yield Size(name)

    def finish(self) -> None:
        """Wait until a GPU has ended its work."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def compare(
        self,
        size: Size,
        ours: Callable[[], object],
        others: Mapping[str, tuple[str, Callable[[], object], str]],
    ) -> None:
        """A row for each of `others`, in turn with ours: {name: (role, way, goal of the ratio)}."""
        ways = {"ours": ours} | {name: way for name, (_, way, _) in others.items()}
        what = f"{self.stage}, {size.name}"
        found = in_turn(ways, self.rounds, self.finish, what)
        own = Spread.of(found["ours"]).median
        for name, (role, _, goal) in others.items():
            spread = ratios(found["ours"], found[name])
            seconds = {"ours": own, "other": Spread.of(found[name]).median}
            self.add(size, name, role, "ours / other", spread, goal=goal, **seconds)

    def add(self, size: Size, against: str, role: str, what: str, spread: Spread, **more) -> None:
        """One row; more: ours, other, goal, note."""
        about = (self.stage, size.name, size.weights, against, role, what)
        row = Row(*about, spread.median, spread.low, spread.high, spread.n, **more)
        self.rows.append(row)
        self.told(self.rows)

    def absent(self, what: str, why: str) -> None:
        """A peer that cannot run here; the table's notes say so."""
        self.notes.append(f"{self.stage}: {what}: {why}")
        self.told(self.rows)

    def right(self, what: str, close: bool) -> None:
        """SpkitError unless what is to be timed gives the right result."""
        if not close:
            raise SpkitError(f"{self.stage}: {what} do not agree, so nothing is timed")


def check_equal(bench: Bench, what: str, ours: Mapping, other: Mapping, within: float) -> None:
    """Tensors by name: |ours - other| / |other| of each at most `within`."""
    bench.right(f"the names of {what}", set(ours) == set(other))
    for name, value in other.items():
        apart = (ours[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-30)
        bench.right(f"{what} of {name}", float(apart) <= within)


@contextmanager
def peak_above(found: list[int]):
    """Appends the bytes that the process held at most, above what it held before. Linux only.

    What the process has freed and kept is given back first: it would be used again unseen.
    """
    with suppress(AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    yield
    found.append(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 2**10 for x in lines if x.startswith(f"{key}:"))


def write(path: Path, rows: list[Row], about: Mapping) -> None:
    """The rows and what they were measured with, as JSON; whole or not."""
    text = json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1)
    with atomic(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read(path: str | Path) -> tuple[list[Row], dict]:
    """(rows, about) of what `write` wrote; SpkitError for another file."""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        return [Row(**row) for row in about.pop("rows")], about
    except FileNotFoundError:
        raise SpkitError(f"{path}: there is no such file") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SpkitError(f"{path} is no bench.json of `spkit bench`: {error}") from error
