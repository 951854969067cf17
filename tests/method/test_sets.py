"""Mappings that hold no values, and sets of one bit a weight."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spkit.errors import SpkitError
from spkit.method.sets import BitSets, Lazy

# none of these sizes but the last is a multiple of 8
SHAPES = {"b": (3, 7), "a": (1, 1), "c": (5, 13), "d": (9,), "e": (4, 4)}


def sets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(shape, generator=generator) < 0.5 for n, shape in SHAPES.items()}


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == torch.bool
        assert torch.equal(one[name], other[name]), name


# ---- Lazy


def test_lazy_computes_at_each_access_and_keeps_nothing():
    asked = []

    def compute(name):
        asked.append(name)
        return torch.full((2,), float(len(asked)))

    values = Lazy(["y", "x", "y"], compute)
    assert asked == []
    assert list(values) == ["y", "x"] and len(values) == 2
    assert values["x"].tolist() == [1, 1] and values["x"].tolist() == [2, 2]
    assert asked == ["x", "x"]
    assert [value.tolist() for value in values.values()] == [[3, 3], [4, 4]]
    assert asked == ["x", "x", "y", "x"]


def test_asking_whether_a_name_is_there_computes_nothing():
    asked = []
    values = Lazy(["x"], asked.append)
    assert "x" in values and "z" not in values
    assert asked == []


def test_lazy_knows_its_names_only():
    values = Lazy(["x"], lambda name: pytest.fail("the value of a stranger was computed"))
    with pytest.raises(KeyError, match="z"):
        values["z"]
    assert values.get("z", 3) == 3


def test_lazy_reads_its_names_once():
    names = (name for name in "ba")
    values = Lazy(names, str.upper)
    assert [dict(values), dict(values)] == [{"b": "B", "a": "A"}] * 2


# ---- BitSets


def test_bits_come_back_in_the_order_in_which_they_were_put():
    given = sets()
    held = BitSets(given)
    same(held, given)
    assert len(held) == 5
    assert all(held.shape(name) == shape for name, shape in SHAPES.items())
    flipped = BitSets({name: ~mask for name, mask in given.items()})
    assert all(torch.equal(flipped[name], ~given[name]) for name in given)


def test_bits_by_hand():
    """Row by row, the first weight in the highest bit of the first byte."""
    held = BitSets({"w": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()})
    assert held._bits["w"].tolist() == [0b10100011, 0b10000000]
    transposed = BitSets({"w": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool().T})
    assert held["w"].T.tolist() == transposed["w"].tolist() != held["w"].tolist()


def test_a_weight_takes_a_bit(tmp_path):
    held = BitSets({"w": torch.ones(64, 1000, dtype=torch.bool)})
    assert held._bits["w"].nbytes == 64 * 1000 // 8
    held.save(tmp_path / "sets.safetensors")
    assert load_file(tmp_path / "sets.safetensors")["w"].nbytes == 8000
    assert (tmp_path / "sets.safetensors").stat().st_size < 8000 + 400  # the header


def test_what_is_read_is_a_copy():
    held = BitSets({"w": torch.zeros(3, 3, dtype=torch.bool)})
    held["w"].fill_(True)
    assert not held["w"].any()


def test_a_set_read_matrix_by_matrix():
    asked, given = [], sets()
    held = BitSets(Lazy(given, lambda name: (asked.append(name), given[name])[1]))
    assert asked == list(given)
    same(held, given)
    assert asked == list(given)


def test_nothing_but_bool():
    for members in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=f"set of 'w' must be bool; it is {members.dtype}"):
            BitSets({"w": members})


def test_unknown_names():
    held = BitSets(sets())
    assert "a" in held and "z" not in held
    for ask in (held.__getitem__, held.shape):
        with pytest.raises(KeyError):
            ask("z")


# ---- files


def test_saved_and_loaded(tmp_path):
    about = {"top_rate": 0.1, "text": "é", "list": [1, None, {"a": True}]}
    held = BitSets(sets(), about)
    path = tmp_path / "run" / "sets.safetensors"
    held.save(path)
    loaded = BitSets.load(path)
    assert sorted(loaded) == sorted(SHAPES)
    assert all(torch.equal(loaded[name], held[name]) for name in SHAPES)
    assert all(loaded.shape(name) == shape for name, shape in SHAPES.items())
    assert loaded.about == about
    assert [file.name for file in path.parent.iterdir()] == ["sets.safetensors"]
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_same_sets_give_the_same_bytes(tmp_path):
    given = sets()
    paths = [tmp_path / f"{number}.safetensors" for number in range(4)]
    BitSets(given, {"x": 1, "y": 2}).save(paths[0])
    BitSets(dict(reversed(given.items())), {"y": 2, "x": 1}).save(paths[1])
    BitSets(given, {"x": 1, "y": 3}).save(paths[2])
    BitSets(sets(1), {"x": 1, "y": 2}).save(paths[3])
    first, *others = (path.read_bytes() for path in paths)
    assert [other == first for other in others] == [True, False, False]


def test_no_sets_at_all(tmp_path):
    BitSets(about={"top_rate": 0.0}).save(tmp_path / "none.safetensors")
    loaded = BitSets.load(tmp_path / "none.safetensors")
    assert dict(loaded) == {} and loaded.about == {"top_rate": 0.0}


def written(path, bits, **header):
    whole = {"shapes": {"first": [8], "second": [3, 7]}, "about": {}} | header
    save_file(bits, path, metadata={"spkit": json.dumps(whole)})
    return path


BYTES = {n: torch.zeros(size, dtype=torch.uint8) for n, size in {"first": 1, "second": 3}.items()}


@pytest.mark.parametrize(
    "second, sentence",
    [
        (torch.zeros(2, dtype=torch.uint8), "'second' has 2 bytes, its shape needs 3"),
        (torch.zeros(4, dtype=torch.uint8), "'second' has 4 bytes, its shape needs 3"),
        (torch.zeros(3, dtype=torch.int8), "'second'"),
    ],
)
def test_bytes_that_are_no_set_name_the_tensor(second, sentence, tmp_path):
    path = written(tmp_path / "sets.safetensors", BYTES | {"second": second})
    with pytest.raises(SpkitError, match=sentence) as caught:
        BitSets.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert list(BitSets.load(written(path, BYTES))) == ["first", "second"]


def test_files_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.safetensors"
    BitSets(sets()).save(whole)
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[:-1])
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no sets at all")
    plain = tmp_path / "plain.safetensors"
    save_file(BYTES, plain)
    text = tmp_path / "text.safetensors"
    save_file(BYTES, text, metadata={"spkit": "{"})
    lacking = written(tmp_path / "lacking.safetensors", BYTES, shapes={"first": [8]})
    odd = written(tmp_path / "odd.safetensors", BYTES, shapes={"first": [8], "second": ["x"]})
    for path in (half, junk, plain, text, lacking, odd, tmp_path / "none.safetensors"):
        with pytest.raises(SpkitError, match="cannot be read as sets of weights: ") as caught:
            BitSets.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
