"""benchmarks/large_shapes.py on a small shape, and what bounds a patch of a large one."""

import importlib.util
import weakref
from pathlib import Path

import numpy as np
import pytest

from spkit.errors import SpkitError
from spkit.patchfile import make
from spkit.patchfile.apply import apply
from spkit.patchfile.encoding import BLOCK
from spkit.patchfile.file import LONGEST_HEADER, PatchFile
from spkit.patchfile.verify import verify
from spkit.running.widths import PUBLIC, Widths

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def large(monkeypatch):
    """The benchmark as a module; its shape "small" has 3 layers."""
    spec = importlib.util.spec_from_file_location("large_shapes", BENCHMARKS / "large_shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(PUBLIC, "small", Widths(64, 3, 128, 4, 2, 16, 100))
    monkeypatch.setattr(module, "SHARD", 60_000)
    return module


def test_a_sparse_checkpoint_is_made_patched_and_verified(large, tmp_path):
    shapes = large.tensors("small", 2)
    assert sum(int(np.prod(s)) for s in large.tensors("small", 3).values()) == (
        PUBLIC["small"].shape().weights
    )
    assert large.write_sparse(tmp_path / "base", shapes) > 1
    large.child("make", tmp_path, "small", 2)
    patch = tmp_path / "patch.safetensors"
    found = apply(patch, tmp_path / "base", tmp_path / "target", progress=False)
    kept = sum(int(np.prod(s)) // large.EVERY for n, s in shapes.items() if "_proj" in n)
    assert found.tensors == 14 and kept - 14 <= found.kept <= kept
    assert verify(patch, tmp_path / "base", tmp_path / "target", progress=False).ok


def test_the_patch_of_all_layers_is_that_of_one_repeated(large, tmp_path):
    large.write_sparse(tmp_path / "base", large.tensors("small", 1))
    large.child("make", tmp_path, "small", 1)
    about = large.write_whole(tmp_path, 3)
    with PatchFile(tmp_path / "whole.safetensors") as patch:
        assert list(patch.manifest.tensors) == [
            name for name in large.tensors("small", 3) if "_proj" in name
        ]
    assert about["blocks"] == 21


def test_a_header_that_no_reader_would_take_is_not_written(large, tmp_path, monkeypatch):
    large.write_sparse(tmp_path / "base", large.tensors("small", 1))
    monkeypatch.setattr(make, "LONGEST_HEADER", 1000)
    with pytest.raises(SpkitError, match=r"header would take [\d,]+ bytes, and at most 1,000 are"):
        large.child("make", tmp_path, "small", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_largest_public_shape_has_room_in_a_header():
    """At most 130 bytes a block, escaped twice: kept, encoding, three sizes."""
    blocks = sum(-(-m.weights // BLOCK) * m.count for m in PUBLIC["llama3.1-405b"].shape().matrices)
    assert (
        130 * blocks < LONGEST_HEADER < 100_000_000
    )  # the safetensors library reads no longer one


def test_one_matrix_at_a_time_is_alive(large, tmp_path):
    large.write_sparse(tmp_path / "base", large.tensors("small", 2))
    given, alive = [], []

    class Watched(large.Simulated):
        def __getitem__(self, name):
            alive.append(sum(matrix() is not None for matrix in given))
            matrix = super().__getitem__(name)
            given.append(weakref.ref(matrix))
            return matrix

    about = make.About("simulated")
    deltas = Watched(large.tensors("small", 2))
    make.make_patch(tmp_path / "base", deltas, tmp_path / "p", about, progress=False)
    assert alive == [0] * 14
