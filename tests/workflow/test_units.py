"""Units of work: what a folder's name depends on."""

from dataclasses import replace

import pytest
from work_of_units import write

from spkit.errors import SpkitError
from spkit.system import made_from
from spkit.workflow import units as graph
from spkit.workflow.units import Unit


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


def test_an_identity_counts_instead_of_inputs_and_code(package):
    """Its keys may stand in any order; what a unit needs counts as ever."""
    given = {"params": {"seed": 1, "rates": [0.3]}, "files": {}}
    same = {"files": {}, "params": {"rates": [0.3], "seed": 1}}
    before = graph.places(coded(b={"identity": given}), "x")
    for change, expected in [
        ({"b": {"identity": same, "inputs": {"text": "other"}}}, set()),
        ({"b": {"identity": {**given, "files": {"a": "1"}}}}, {"b", "d"}),
        ({"b": {"identity": given}, "a": {"inputs": {"text": "A"}}}, {"a", "b", "d"}),
    ]:
        assert changed(before, graph.places(coded(**change), "x")) == expected
    (package / "two.py").write_text("x = 2")  # the code of b
    assert changed(before, graph.places(coded(b={"identity": given}), "x")) == set()


def test_the_kind_of_a_unit_is_the_first_part_of_its_name():
    assert [unit.kind for unit in chain()] == ["a", "deep", "c", "d"]
