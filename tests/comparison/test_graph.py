"""The graph of units: what a folder's name depends on, the order, reruns, errors and interruptions.

The work is done by top-level functions of tests/work_of_units.py: a spawned process imports them by
name. Nothing heavy is imported, so that it starts at once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from work_of_units import fail_once, fail_while, print_loudly, sleep_and_tell, write

from spkit.comparison import graph
from spkit.comparison.graph import Unit
from spkit.errors import SpkitError
from spkit.system import made_from


def of(module):
    """The work of a module of the package, which is never run."""

    def work(folder, places):
        raise AssertionError

    work.__module__ = module
    return work


ONE, TWO, THREE = of("spkit.one"), of("spkit.two"), of("spkit.folder.three")


def chain(works=(write,) * 4, **changes):
    """a -> b -> d and c -> d, with the changes {unit: {field: value}}."""
    units = [
        Unit("a", works[0], {"text": "a"}),
        Unit("deep/b", works[1], {"text": "b"}, ("a",)),
        Unit("c", works[2], {"text": "c"}),
        Unit("d", works[3], {"text": "d"}, ("deep/b", "c")),
    ]
    return [replace(unit, **changes.get(unit.name.rpartition("/")[2], {})) for unit in units]


def coded(**changes):
    """The chain, each unit with a module of its own; d's is a's."""
    return chain((ONE, TWO, THREE, ONE), **changes)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a few modules in place of spkit; `two` imports `below`, as `three` does."""
    root = tmp_path / "package"
    (root / "folder").mkdir(parents=True)
    for name in ("__init__.py", "one.py", "below.py", "folder/__init__.py", "folder/other.py"):
        (root / name).write_text("x = 1")
    (root / "two.py").write_text("from spkit.below import x")
    (root / "folder/three.py").write_text("def f():\n    from spkit import below")
    monkeypatch.setattr(made_from, "PACKAGE", root)
    return root


def changed(before, after):
    """The units whose folders have other names; all others have the very same."""
    assert before.keys() == after.keys()
    return {name.rpartition("/")[2] for name in before if before[name] != after[name]}


# ---- what the digest depends on


def test_a_place_is_the_name_and_ten_digits_of_a_digest(package, tmp_path):
    places = graph.places(coded(), tmp_path / "root")
    assert list(places) == ["a", "deep/b", "c", "d"]
    for name, place in places.items():
        assert place.parent == (tmp_path / "root" / name).parent
        stem, _, digest = place.name.rpartition("-")
        assert stem == name.rpartition("/")[2] and len(digest) == 10
        assert int(digest, 16) >= 0
    assert len({place.name[-10:] for place in places.values()}) == 4
    assert graph.places(coded(), tmp_path / "root") == places


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a": {"inputs": {"text": "A"}}}, {"a", "b", "d"}),
        ({"b": {"inputs": {"text": "B"}}}, {"b", "d"}),
        ({"c": {"inputs": {"text": "c", "log": None}}}, {"c", "d"}),
        ({"d": {"inputs": {"text": "D"}}}, {"d"}),
        ({"c": {"work": TWO}}, {"c", "d"}),
        ({"d": {"needs": ("c", "deep/b")}}, {"d"}),
        ({"a": {"seconds": 99.0}, "d": {"seconds": 0.1}}, set()),
        ({}, set()),
    ],
    ids=["input a", "input b", "a None", "input d", "work", "need", "seconds", "nothing"],
)
def test_a_change_of_a_unit_moves_it_and_what_needs_it(package, change, expected):
    assert changed(graph.places(coded(), "x"), graph.places(coded(**change), "x")) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("one.py", {"a", "b", "d"}),
        ("two.py", {"b", "d"}),
        ("folder/three.py", {"c", "d"}),
        ("below.py", {"b", "c", "d"}),  # imported, at the top and in a function
        ("folder/__init__.py", {"c", "d"}),  # it runs before its modules do
        ("folder/other.py", set()),
        ("folder/notes.txt", set()),
        ("five.py", set()),
    ],
)
def test_a_change_of_a_code_file_moves_what_runs_it(package, file, expected):
    before = graph.places(coded(), "x")
    (package / file).write_text("from spkit import below")
    assert changed(before, graph.places(coded(), "x")) == expected


def test_a_unit_is_its_function_and_not_only_its_module(package):
    twin = of("spkit.one")
    twin.__qualname__ = "twin"
    assert changed(graph.places(coded(), "x"), graph.places(coded(a={"work": twin}), "x")) == {
        *("a", "b", "d")
    }


def test_two_units_of_one_name():
    with pytest.raises(SpkitError, match="^two units have the name 'a'$"):
        graph.places([*chain(), Unit("a", TWO)], "x")


@pytest.mark.parametrize("units", [chain()[1:], list(reversed(chain()))[2:]], ids=["none", "later"])
def test_a_need_that_no_earlier_unit_meets(units):
    with pytest.raises(SpkitError, match="^unit 'deep/b' needs 'a', which is not before it$"):
        graph.places(units, "x")


def test_remaining_seconds_are_of_what_is_not_done(tmp_path):
    units = [Unit("a", write, seconds=10.0), Unit("b", write, seconds=30.0)]
    places = graph.places(units, tmp_path)
    assert graph.remaining_seconds(units, places, 1) == 40.0
    assert graph.remaining_seconds(units, places, 2) == 20.0
    places["a"].mkdir()
    assert graph.remaining_seconds(units, places, 2) == 15.0


# ---- running


def logged(log):
    return log.read_text().split() if log.exists() else []


def with_log(log, **changes):
    return [replace(unit, inputs={**unit.inputs, "log": log}) for unit in chain(**changes)]


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_units_run_in_the_order_of_their_needs_and_once(tmp_path, monkeypatch):
    log, root = tmp_path / "log", tmp_path / "root"
    units = with_log(log)
    places = graph.run(units, root, jobs=2, label="test")
    order = logged(log)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order.index("a") < order.index("b") and order[-1] == "d"
    assert (places["d"] / "text").read_text() == "abcd"  # each need under its name, in order
    assert places == graph.places(units, root)
    about = json.loads((places["d"] / "unit.json").read_text())
    assert (about["unit"], about["predicted"]) == ("d", 1.0) and about["seconds"] >= 0
    whole = files(root)
    assert len(whole) == 8

    monkeypatch.setattr(graph, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("a new process"))
    assert graph.run(units, root, jobs=2, label="test") == places
    assert logged(log) == order and files(root) == whole


def test_only_what_a_change_touches_is_run_again(tmp_path):
    log, root = tmp_path / "log", tmp_path / "root"
    graph.run(with_log(log), root, jobs=1, label="test")
    log.write_text("")
    places = graph.run(with_log(log, b={"inputs": {"text": "B"}}), root, jobs=1, label="test")
    assert logged(log) == ["B", "d"]
    assert (places["d"] / "text").read_text() == "aBcd"


@pytest.mark.parametrize(("error", "raised"), [("value", SpkitError), ("interrupt", BaseException)])
def test_a_run_that_was_cut_keeps_what_is_finished_and_goes_on(tmp_path, error, raised):
    log, root, flag = tmp_path / "log", tmp_path / "root", tmp_path / "flag"
    flag.touch()
    inputs = {"text": "b", "flag": flag, "error": error}
    units = with_log(log, b={"work": fail_while, "inputs": inputs})
    with pytest.raises(raised) as caught:
        graph.run(units, root, jobs=1, label="test")
    if error == "value":
        assert str(caught.value) == "deep/b failed: no such luck"
        assert isinstance(caught.value.__cause__, ValueError)
    else:  # it is no error of the unit
        assert isinstance(caught.value, KeyboardInterrupt)
    places = graph.places(units, root)
    kept = {name for name, place in places.items() if place.exists()}
    assert {"a"} <= kept <= {"a", "c"}  # whole or not at all: nothing of b, though half was written
    assert not [path for path in root.rglob("half")]
    done = logged(log)
    assert set(done) == kept

    flag.unlink()
    assert graph.run(units, root, jobs=1, label="test") == places
    assert sorted(logged(log)) == ["a", "b", "c", "d"]  # no unit twice
    assert (places["d"] / "text").read_text() == "abcd"


def test_what_still_runs_at_an_error_is_stopped_and_leaves_no_folder(tmp_path):
    root, started, ended = tmp_path / "root", tmp_path / "started", tmp_path / "ended"
    units = [
        Unit("long", sleep_and_tell, {"started": started, "ended": ended}),
        Unit("wrong", fail_once, {"awaited": started}),
    ]
    begun = time.monotonic()
    with pytest.raises(SpkitError, match="^wrong failed: no such luck$"):
        graph.run(units, root, jobs=2, label="test")
    assert time.monotonic() - begun < 100 and started.exists() and not ended.exists()
    assert not any(place.exists() for place in graph.places(units, root).values())


def within(seconds, condition):
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def is_gone(process):
    """No such process, or one that has ended and is only not asked about."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks into /proc")
def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    """Even where that one is killed and can say nothing; what was half done is no result."""
    root, told = tmp_path / "root", tmp_path / "told"
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "import work_of_units\n"
        "from spkit.comparison import graph\n"
        "if __name__ == '__main__':\n"
        f"    told = Path({str(told)!r})\n"
        "    unit = graph.Unit('a', work_of_units.tell_and_sleep, {'told': told})\n"
        f"    graph.run([unit], {str(root)!r}, jobs=1, label='test')\n"
    )
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    starter = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        assert within(60, told.exists)
        worker = int(told.read_text())
        assert worker != starter.pid and not is_gone(worker)
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert within(20, lambda: is_gone(worker))
    assert [path.name[:5] for path in root.iterdir()] == [".tmp-"]


def test_a_half_written_folder_of_a_killed_run_is_no_result(tmp_path):
    unit = Unit("a", write, {"text": "a"})
    place = graph.places([unit], tmp_path)["a"]
    half = place.with_name(f".tmp-{place.name}")
    half.mkdir()
    (half / "rest").touch()
    graph.run([unit], tmp_path, jobs=1, label="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name]
    assert sorted(path.name for path in place.iterdir()) == ["text", "unit.json"]


def test_a_unit_prints_nothing_into_the_bar(tmp_path, capfd):
    graph.run([Unit("a", print_loudly)], tmp_path, jobs=1, label="the bar")
    printed = capfd.readouterr()
    assert "the bar" in printed.err and "NEWS" not in printed.out + printed.err
