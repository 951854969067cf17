"""Patch files on checkpoints: made, applied, taken back, verified and stacked, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import plain
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spkit.errors import SpkitError
from spkit.method.patching import merged_delta, retention_mask
from spkit.models.checkpoint_files import INDEX, SINGLE, tensor_files
from spkit.models.deltas import add_delta
from spkit.models.weights import target_weights
from spkit.patchfile import apply, floats, revert, stack, verify
from spkit.patchfile.add import add_deltas
from spkit.patchfile.encoding import BLOCK
from spkit.patchfile.file import PatchFile
from spkit.patchfile.make import About, config_sha256, make_patch

apply, revert, verify = (  # noqa: PLW0127
    partial(command, progress=False) for command in (apply.apply, revert.revert, verify.verify)
)
stack = partial(stack.stack, progress=False)
CASES = {  # what is special about each architecture of the paper
    "LLaMA-2": ("llama", {"kv_heads": 4, "tied": False}),
    "LLaMA-3": ("llama", {"kv_heads": 2, "tied": False}),
    "Gemma": ("gemma", {}),
    "Mistral": ("mistral", {"tied": False}),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ALPHA, BETA = 0.7, 1.3
IDS = torch.tensor([[2, 4, 9, 10, 5]])


def save(folder, case="LLaMA-3", dtype="bfloat16", shards=True):
    """A checkpoint with a tokenizer, a licence, and a pickle that nobody should copy."""
    architecture, options = CASES[case]
    model = tiny.model(architecture, **options).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="50KB" if shards else "5GB")
    tiny.tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def parts(case):
    """{matrix: (delta_se, keep_se, delta_osm, keep_osm)}, deltas of many magnitudes."""
    architecture, options = CASES[case]
    draw, found = torch.Generator().manual_seed(0), {}
    for name, layer in target_weights(tiny.model(architecture, **options), tiny.TARGETS).items():
        shape, sides = layer.weight.shape, []
        for patch in ("se", "osm"):
            size = 10 ** (9 * torch.rand(shape, generator=draw) - 9)  # from 1e-9 to 1
            sides.append(size * torch.randn(shape, generator=draw))
            sides.append(retention_mask(shape, 0.2, seed=0, patch=patch, tensor=name))
        sides[3] &= ~sides[1]
        found[name] = tuple(sides)
    return found


def merged(case):
    return {name: merged_delta(*four, ALPHA, BETA) for name, four in parts(case).items()}


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def without_pickles(contents):
    return {name: data for name, data in contents.items() if not name.endswith(".bin")}


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(IDS).logits


def stored(path):
    """{matrix: (the stored values, nan where a weight is replaced; the replacing bits)}."""
    found = {}
    with PatchFile(path) as patch:
        for name, matrix in patch.manifest.tensors.items():
            values, bits = np.zeros(matrix.weights, "<f4"), np.zeros(matrix.weights, "<u4")
            for start, kept in enumerate(patch.kept(name)):
                positions = start * BLOCK + kept.positions.astype(np.int64)
                values[positions] = kept.deltas
                values[positions[kept.replaced[0]]] = np.nan
                bits[positions[kept.replaced[0]]] = kept.replaced[1]
            shape = matrix.shape
            found[name] = torch.from_numpy(values.reshape(shape)), bits.reshape(shape)
    return found


def assert_equal_bits(made, expected):
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(plain.bits(made[name]), plain.bits(tensor)), name


@pytest.fixture
def backbone(tmp_path):
    """A plain checkpoint in bfloat16: five tensors, each in its own shard."""
    return plain.save(tmp_path / "backbone")


@pytest.fixture
def patch(tmp_path, backbone):
    """A patch for it."""
    return plain.patch(tmp_path / "patch.safetensors", backbone)


# ---- the round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "single"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", CASES)
def test_made_saved_and_applied_is_composed_in_memory(case, dtype, shards, tmp_path):
    source, deltas = save(tmp_path / "source", case, dtype, shards), merged(case)
    assert (len(list(source.glob("*.safetensors"))) > 2) == (source / INDEX).is_file() == shards
    path, made = tmp_path / "patch.safetensors", tmp_path / "made"
    how = {"revertible": True, "progress": False}
    manifest = make_patch(source, deltas, path, About(case), **how)
    done = apply(path, source, made)

    before, four = tensors(source), parts(case)
    assert ("lm_head.weight" in before) == (case != "Gemma")
    expected = {
        name: add_delta(old, merged_delta(*four[name], ALPHA, BETA)) if name in four else old
        for name, old in before.items()
    }
    assert_equal_bits(tensors(made), expected)
    assert not any(torch.equal(expected[name], before[name]) for name in four)

    written = add_deltas(source, deltas, tmp_path / "written", identity="test")
    moved = sum(int((delta != 0).sum()) for delta in deltas.values())
    assert plain.contents(made) == plain.contents(tmp_path / "written")
    assert (done.tensors, done.kept, done.lost) == (14, moved, written.count)
    assert (manifest.kept, manifest.lost) == (moved, written.count)
    assert done.lost > 0 and done.dtype == DTYPES[dtype] and done.folder == str(made)
    assert torch.equal(logits(made), logits(tmp_path / "written"))
    assert not torch.equal(logits(made), logits(source))

    back = revert(path, made, tmp_path / "back")
    assert plain.contents(tmp_path / "back") == without_pickles(plain.contents(source))
    assert (back.source, back.kept, back.tensors) == ("patch", moved, 14)


@pytest.mark.parametrize("out", list(DTYPES))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_another_dtype(dtype, out, tmp_path):
    """As composing in float32 with the stored values, then converting with torch."""
    source, path, made = save(tmp_path / "source", dtype=dtype), tmp_path / "p", tmp_path / "made"
    make_patch(source, merged("LLaMA-3"), path, About("tiny"), progress=False)
    done = apply(path, source, made, dtype=out)
    values, lost, expected = stored(path), 0, {}
    for name, old in tensors(source).items():
        new = old.to(getattr(torch, out))
        if name in values:
            delta, bits = values[name]
            again = delta.isnan()
            moved = (old.float() + delta.nan_to_num()).to(new.dtype)
            new = torch.where((delta == 0) | again, new, moved)
            if again.any():
                kind = np.uint16 if dtype != "float32" else np.uint32
                replacing = torch.from_numpy(bits.astype(kind)).view(old.dtype)
                new = torch.where(again, replacing.to(new.dtype), new)
            kept = merged("LLaMA-3")[name] != 0
            lost += int(((new == old.to(new.dtype)) & kept).sum())
        expected[name] = new
    assert_equal_bits(tensors(made), expected)
    assert done.dtype == DTYPES[out] and done.lost == lost

    assert json.loads((made / "config.json").read_text())["dtype"] == out
    config = json.loads((source / "config.json").read_text())
    assert json.loads((made / "config.json").read_text()) == config | {"dtype": out}
    index = json.loads((made / INDEX).read_text())
    size = sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"]["total_size"] == size
    model = AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    assert model.dtype == getattr(torch, out)
    assert verify(path, source, made).ok
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
            copied = (made / file.name).is_file()
            assert copied == (file.suffix != ".bin")
            assert not copied or (made / file.name).read_bytes() == file.read_bytes()


def test_a_dtype_that_is_too_small_names_the_tensor(tmp_path):
    weights = plain.weights()
    weights["embed.weight"][0, 1] = 1e6
    source = plain.save(tmp_path / "source", weights)
    path = plain.patch(tmp_path / "p", source)
    with pytest.raises(SpkitError, match="'embed.weight' has values that are too large for F16"):
        apply(path, source, tmp_path / "made", dtype="float16")
    weights = plain.weights()
    weights["a.weight"].fill_(1e6)
    plain.save(tmp_path / "large", weights)
    plain.patch(path, tmp_path / "large")
    with pytest.raises(SpkitError, match=f"^{path}, tensor 'a.weight': .*not finite in F16"):
        apply(path, tmp_path / "large", tmp_path / "made", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["large", "p", "source"]
    with pytest.raises(SpkitError, match="unknown dtype 'int8', allowed: bfloat16, float16"):
        apply(path, source, tmp_path / "made", dtype="int8")


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_shortened_values(dtype, values, tmp_path):
    """The result is composed with the stored values, and the errors are those of the manifest."""
    source = plain.save(tmp_path / "source", plain.weights(dtype=dtype))
    path, deltas = tmp_path / "p", plain.deltas(share=0.3)
    manifest = make_patch(source, deltas, path, About("tiny"), values=values, progress=False)
    apply(path, source, tmp_path / "made")
    short, before, after = stored(path), tensors(source), tensors(tmp_path / "made")
    squared = squared_error = largest = 0.0
    changed = lost = 0
    for name, delta in deltas.items():
        value, _ = short[name]
        assert not value.isnan().any() and not value[delta == 0].any()
        made = add_delta(before[name], value)
        assert torch.equal(plain.bits(after[name]), plain.bits(made))
        if values == "bfloat16":
            assert torch.equal(value, delta.bfloat16().float())
        error = (value.double() - delta.double()).abs()
        squared += float(delta.double().square().sum())
        squared_error += float(error.square().sum())
        largest = max(largest, float(error.max()))
        changed += int((made != add_delta(before[name], delta)).sum())
        lost += int(((made == before[name]) & (delta != 0)).sum())
    assert manifest.error.relative_rms == pytest.approx(sqrt(squared_error / squared))
    assert manifest.error.largest == largest
    assert (manifest.error.changed, manifest.lost) == (changed, lost)
    limits = {"bfloat16": (1e-4, 0.003), "int8": (1e-3, 0.02)}
    low, high = limits[values]
    assert low < manifest.error.relative_rms < high
    assert values == "bfloat16" or changed > 0
    assert {matrix.values for matrix in manifest.tensors.values()} == (
        {"BF16"} if values == "bfloat16" else {"I8"}
    )
    assert verify(path, source, tmp_path / "made").ok
    make_patch(source, deltas, path, About("tiny"), values=values, revertible=True, progress=False)
    revert(path, tmp_path / "made", tmp_path / "back")
    assert plain.contents(tmp_path / "back") == plain.contents(source)


def test_exact_values_of_a_float32_backbone_are_the_deltas(tmp_path):
    source = plain.save(tmp_path / "source", plain.weights(dtype="float32"))
    path, deltas = plain.patch(tmp_path / "p", source), plain.deltas()
    for name, (values, _) in stored(path).items():
        assert torch.equal(values, deltas[name])
    with PatchFile(path) as patch:
        error = patch.manifest.error
        for name, delta in deltas.items():
            assert torch.equal(torch.from_numpy(patch.delta(name)), delta)
    assert (error.relative_rms, error.largest, error.changed) == (0.0, 0.0, 0)


def test_exact_changes_nothing_and_states_how_far_the_values_are(backbone, tmp_path):
    manifest = make_patch(backbone, plain.deltas(), tmp_path / "p", About("x"), progress=False)
    assert manifest.error.changed == 0 and 0 < manifest.error.relative_rms < 0.05


def test_lost_by_hand(tmp_path):
    """bf16 has 8 bits: next to 1 lie 1 + 2**-7 and 1 - 2**-8, so 2**-9 is lost there.

    float16 has no 1e-9, whose stored value is 0: it is lost as well.
    """
    weights = {
        "a": torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16),
        "b": torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16),
        "c": torch.tensor([[5.0]]),
        "d": torch.tensor([[5.0, 0.0, -2.0]], dtype=torch.float16),
    }
    deltas = {
        "a": torch.tensor([[2.0**-9, 2.0**-7, 0.0, -(2.0**-8)]]),
        "b": torch.tensor([[2.0**-9, 2.0**-9]]),
        "c": torch.tensor([[2.0**-9]]),
        "d": torch.tensor([[1e-9, 1e-9, 1.0]]),
    }
    source, path = plain.save(tmp_path / "source", weights), tmp_path / "p"
    manifest = make_patch(source, deltas, path, About("x"), progress=False)
    assert {n: (m.kept, m.lost) for n, m in manifest.tensors.items()} == {
        "a": (3, 1),
        "b": (2, 1),
        "c": (1, 0),
        "d": (3, 2),
    }
    done = apply(path, source, tmp_path / "made")
    assert (done.kept, done.lost, done.dtype) == (9, 4, "BF16, F16, F32")
    assert add_deltas(source, deltas, tmp_path / "written", identity="test").count == 4
    made = tensors(tmp_path / "made")
    assert made["a"].tolist() == [[1.0, 1 + 2.0**-7, 1.0, 1 - 2.0**-8]]
    assert made["d"].tolist() == [[5.0, 0.0, -1.0]]
    # in float32 nothing of it is lost but what float16 could not even store
    assert apply(path, source, None, dtype="float32").lost == 2


def test_a_matrix_of_two_blocks(tmp_path):
    """1500 x 1500 weights: one block of 2**21 and one of the rest, kept on both sides."""
    weights = plain.weights({"w": (1500, 1500), "v": (3, 3)})
    source = plain.save(tmp_path / "source", weights)
    delta = {"w": torch.zeros(1500, 1500)}
    flat, draw = delta["w"].view(-1), torch.Generator().manual_seed(0)
    places = torch.tensor([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1500 * 1500 - 1])
    places = torch.cat([places, torch.randint(0, len(flat), (20_000,), generator=draw)]).unique()
    flat[places] = 0.1 * torch.randn(len(places), generator=draw)
    path = plain.patch(tmp_path / "p", source, delta, revertible=True)
    with PatchFile(path) as patch:
        assert [block.kept > 0 for block in patch.manifest.tensors["w"].blocks] == [True, True]
        found = [k.positions for k in patch.kept("w")]
        assert set(np.flatnonzero(patch.delta("w"))) == set(places.tolist())  # of both blocks
    assert found[0][[0, 1, -1]].tolist() == [0, 1, BLOCK - 1]
    assert found[1][[0, 1, -1]].tolist() == [0, 1, 1500 * 1500 - 1 - BLOCK]
    apply(path, source, tmp_path / "made")
    expected = weights | {"w": add_delta(weights["w"], delta["w"])}
    assert_equal_bits(tensors(tmp_path / "made"), expected)
    revert(path, tmp_path / "made", tmp_path / "back")
    assert plain.contents(tmp_path / "back") == plain.contents(source)
    assert verify(path, source, tmp_path / "made").ok
    apply(path, source, tmp_path / "single", dtype="float32")
    assert verify(path, source, tmp_path / "single").ok


def test_a_matrix_that_keeps_all_or_nothing(tmp_path):
    """All kept, and two blocks of which one keeps nothing."""
    weights = plain.weights({"all": (20, 30), "half": (1500, 1500), "none": (4, 4)})
    source = plain.save(tmp_path / "source", weights)
    deltas = {"all": torch.full((20, 30), 0.5), "half": torch.zeros(1500, 1500)}
    deltas["half"][-1, -1], deltas["none"] = 1.0, torch.zeros(4, 4)
    path = plain.patch(tmp_path / "p", source, deltas, revertible=True)
    apply(path, source, tmp_path / "made")
    expected = {name: add_delta(weights[name], deltas[name]) for name in weights}
    assert_equal_bits(tensors(tmp_path / "made"), expected)
    revert(path, tmp_path / "made", tmp_path / "back")
    assert plain.contents(tmp_path / "back") == plain.contents(source)


# ---- what does not depend on what ----------------------------------------------------------------


def test_the_same_bytes_each_time_and_with_any_number_of_threads(backbone, patch, tmp_path):
    again = plain.patch(tmp_path / "again", backbone)
    assert again.read_bytes() == patch.read_bytes()
    flipped = {name: delta.T.contiguous().T for name, delta in plain.deltas().items()}
    as_numpy = {name: delta.numpy() for name, delta in plain.deltas().items()}
    for other in (flipped, as_numpy):
        assert plain.patch(again, backbone, other).read_bytes() == patch.read_bytes()
    results = []
    for threads in (1, 2, 7):
        done = apply(patch, backbone, tmp_path / f"made-{threads}", threads=threads)
        results.append((plain.contents(tmp_path / f"made-{threads}"), done.lost))
    assert results[0] == results[1] == results[2]


def test_a_dry_run_counts_the_same_and_writes_nothing(backbone, patch, tmp_path):
    there = sorted(os.listdir(tmp_path))
    for out in (None, "float16"):
        dry = asdict(apply(patch, backbone, None, dtype=out))
        assert sorted(os.listdir(tmp_path)) == there
        real = asdict(apply(patch, backbone, tmp_path / "made", dtype=out, overwrite=True))
        same = ("patch", "tensors", "kept", "lost", "dtype")
        assert {key: dry[key] for key in same} == {key: real[key] for key in same}
        assert dry["folder"] is None and real["folder"] == str(tmp_path / "made")
        made = plain.contents(tmp_path / "made").values()
        assert abs(real["bytes"] - sum(map(len, made))) < 100  # JSON that is written anew
        touched = sum(plain.weights()[name].nbytes for name in plain.TOUCHED)
        assert dry["bytes"] == touched
        there = sorted(os.listdir(tmp_path))


def test_a_dry_run_finds_what_is_wrong(backbone, patch, tmp_path):
    flip(tensor_files(backbone)["b.weight"])
    with pytest.raises(SpkitError, match="tensor 'b.weight': the checkpoint's weights are not"):
        apply(patch, backbone, None)


def test_links_are_followed_and_not_copied(backbone, patch, tmp_path):
    """The hub's cache is a folder of links."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in backbone.iterdir():
        (cache / path.name).symlink_to(path)
    apply(patch, cache, tmp_path / "one")
    apply(patch, backbone, tmp_path / "two")
    assert plain.contents(tmp_path / "one") == plain.contents(tmp_path / "two")
    assert not any(path.is_symlink() for path in (tmp_path / "one").iterdir())


def test_tensors_that_no_patch_can_touch_are_copied(tmp_path):
    """Integers, an empty tensor, metadata, and data in another order than the keys."""
    source = tmp_path / "source"
    before, behind = plain.odd(source)
    (source / "config.json").write_text("{}")
    path = plain.patch(tmp_path / "p", source, {"w": torch.tensor([[0.5, 0.0], [0.0, 0.0]])})
    apply(path, source, tmp_path / "made")
    expected = torch.tensor([[1.5, 2.0], [3.0, -0.0]], dtype=torch.float16).numpy().tobytes()
    made = (tmp_path / "made" / SINGLE).read_bytes()
    assert made == before + expected + behind
    apply(path, source, tmp_path / "wide", dtype="float32")
    with safe_open(tmp_path / "wide" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
        assert file.get_tensor("ids").numpy().tobytes() == bytes(range(16))
        assert file.get_tensor("w").tolist() == [[1.5, 2.0], [3.0, -0.0]]
        assert file.get_tensor("w").dtype == torch.float32


PEAK = """
import sys
from spkit.patchfile.apply import apply
apply(*sys.argv[1:], threads=2, progress=False)
assert "torch" not in sys.modules
print(next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="it looks into /proc")
def test_memory_does_not_grow_with_the_matrix(tmp_path):
    """8 MB and 64 MB, both more than one block; torch is not loaded."""
    peaks = []
    for rows in (2, 16):
        shape = (rows * 1024, 2048)
        weights = {"w": torch.ones(shape, dtype=torch.bfloat16)}
        source = plain.save(tmp_path / f"source-{rows}", weights)
        delta = {"w": (torch.arange(rows * 2**21) % 70 == 0).float().reshape(shape)}
        path = plain.patch(tmp_path / f"p-{rows}", source, delta)
        command = [sys.executable, "-c", PEAK, path, source, tmp_path / f"made-{rows}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
        made = load_file(tensor_files(tmp_path / f"made-{rows}")["w"])["w"]
        assert torch.equal(made, weights["w"] + delta["w"].bfloat16())
    assert peaks[1] < peaks[0] + 6  # MiB, of 56 more


# ---- the manifest --------------------------------------------------------------------------------


def test_what_the_manifest_says(tmp_path):
    source = save(tmp_path / "source")
    about = About(
        "meta/llama",
        revision="abc",
        method={"name": "safepatching", "seed": 3, "rates": [0.03, 0.02]},
        data={"sha256": "0" * 64, "pairs": 12},
        evaluation=[{"model": "patched", "rate": 0.25, "n": 4, "seed": None, "strict": True}],
    )
    manifest = make_patch(source, merged("LLaMA-3"), tmp_path / "p", about, progress=False)
    with PatchFile(tmp_path / "p") as patch:
        assert patch.manifest == manifest
    assert manifest.backbone.model_dump() == {
        "name": "meta/llama",
        "revision": "abc",
        "architecture": "LlamaForCausalLM",
        "config_sha256": config_sha256(json.loads((source / "config.json").read_text())),
    }
    assert manifest.method == about.method and manifest.data == about.data
    assert manifest.evaluation == list(about.evaluation) and manifest.stack == []
    assert {"python", "torch", "numpy", "spkit"} <= set(manifest.versions)


def test_the_identity_of_a_config():
    """Neither its order nor the library that saved it nor the dtype is part of it."""
    config = {"hidden_size": 8, "rope": {"theta": 1, "type": "x"}, "dtype": "bfloat16"}
    turned = {"rope": {"type": "x", "theta": 1}, "transformers_version": "5", "hidden_size": 8}
    assert config_sha256(config) == config_sha256(turned)
    assert config_sha256(config) != config_sha256(config | {"hidden_size": 9})


@pytest.mark.parametrize(
    "given, name",
    [
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-chat-hf"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/mine", "mine"),
        ("/home/someone/models/mine/", "mine"),
        ("outputs/someone/mine", "mine"),
        ("../someone/mine", "mine"),
        ("./mine", "mine"),
        ("../mine", "mine"),
        ("~/mine", "mine"),
        ("C:\\Users\\someone\\mine", "mine"),
        ("here/mine", "mine"),
    ],
)
def test_no_local_path_is_published(given, name, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "mine").mkdir(parents=True)
    path = plain.patch(tmp_path / "p", backbone, about=About(given))
    with PatchFile(path) as patch:
        assert patch.manifest.backbone.name == name
    raw = path.read_bytes()
    assert str(tmp_path).encode() not in raw and b"someone" not in raw


@pytest.mark.parametrize(
    "about, sentence",
    [
        (About("a\nb"), "name.: .*control characters"),
        (About("x", method={"alpha": float("nan")}), "method.alpha"),
        (About("x", data={"text": "a" * 3000}), "too long"),
        (About("x", evaluation=[{"rate": float("inf")}]), "evaluation.0.rate"),
    ],
)
def test_what_cannot_stand_in_a_manifest(about, sentence, backbone, tmp_path):
    with pytest.raises(SpkitError, match=f"cannot stand in a patch .*{sentence}"):
        plain.patch(tmp_path / "p", backbone, about=about)
    assert sorted(os.listdir(tmp_path)) == ["backbone"]


# ---- making: what goes wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, delta, sentence",
    [
        ("d.weight", torch.ones(2, 2), "has no tensor 'd.weight'"),
        ("a.weight", torch.ones(48, 64), r"'a.weight'.*\[48, 64\], the backbone's is \[64, 48\]"),
        ("a.norm", torch.ones(48), r"'a.norm' is BF16 \[48\]; a patch needs a matrix"),
        ("a.weight", torch.full((64, 48), float("nan")), "'a.weight' cannot be added: .*finite"),
        ("a.weight", torch.full((64, 48), float("inf")), "'a.weight' cannot be added: .*finite"),
        ("a.weight", torch.full((64, 48), 3.4e38), "'a.weight' cannot be added: .*finite"),
    ],
)
def test_deltas_that_do_not_fit(name, delta, sentence, backbone, tmp_path):
    deltas = {"b.weight": torch.ones(48, 64), name: delta}
    for values in ("exact", "bfloat16"):
        with pytest.raises(SpkitError, match=sentence):
            plain.patch(tmp_path / "p", backbone, deltas, values=values)
    assert sorted(os.listdir(tmp_path)) == ["backbone"]


def test_a_patch_of_nothing(backbone, tmp_path):
    with pytest.raises(SpkitError, match="needs at least one weight matrix"):
        make_patch(backbone, {}, tmp_path / "p", About("x"), progress=False)


def test_a_backbone_without_a_config(backbone, tmp_path):
    (backbone / "config.json").unlink()
    with pytest.raises(SpkitError, match="config.json cannot be read"):
        plain.patch(tmp_path / "p", backbone)


def test_an_older_patch_file_survives_an_error(backbone, patch, tmp_path):
    before = patch.read_bytes()
    with pytest.raises(SpkitError):
        plain.patch(patch, backbone, {"a.weight": torch.ones(1, 1)})
    assert patch.read_bytes() == before


# ---- applying: what goes wrong -------------------------------------------------------------------


def flip(path, place=-1, bit=1):
    """One bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= bit
    path.write_bytes(raw)


def refuse(sentence, command, *args, **options):
    """SpkitError in one sentence, and nothing new anywhere."""
    folder = Path(str(args[-1])).parent if isinstance(args[0], list) else args[0].parent
    there = sorted(os.listdir(folder))
    with pytest.raises(SpkitError, match=sentence) as caught:
        command(*args, **options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(folder)) == there


def test_a_patch_for_another_checkpoint(backbone, patch, tmp_path):
    made = tmp_path / "made"
    shapes = plain.SHAPES | {"b.weight": (48, 63)}
    other = plain.save(tmp_path / "shape", plain.weights(shapes))
    refuse(f"^{patch} does not fit {other}: .*'b.weight' is BF16", apply, patch, other, made)
    other = plain.save(tmp_path / "dtype", {n: w.char() for n, w in plain.weights().items()})
    refuse(f"^{patch} does not fit {other}: .*'a.weight' is I8", apply, patch, other, made)
    lacking = plain.weights()
    del lacking["c.weight"]
    other = plain.save(tmp_path / "lacking", lacking)
    sentence = f"^{patch} does not fit {other}: that has no tensor 'c.weight'.*village/tiny"
    refuse(sentence, apply, patch, other, made)
    other = plain.save(tmp_path / "seed", plain.weights(seed=9))
    sentence = f"^{patch}, tensor '[abc].weight': the checkpoint's weights are not those"
    refuse(sentence, apply, patch, other, made)


def test_a_patch_is_not_applied_twice(backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made")
    refuse("patched already", apply, patch, tmp_path / "made", tmp_path / "twice")


def test_a_patch_that_lies_about_its_result(backbone, patch, tmp_path):
    """Its digests are those of another seed's patch; the weights decide."""
    other = plain.patch(tmp_path / "other", backbone, plain.deltas(seed=5))
    with PatchFile(patch) as one, PatchFile(other) as two:
        old, new = (opened.manifest.tensors["b.weight"].after for opened in (one, two))
    raw = patch.read_bytes()
    manifest = read_header(raw)["__metadata__"]["spkit_patch"]
    changed = manifest.replace(old, new)
    patch.write_bytes(with_manifest(raw, manifest, changed))
    refuse(
        f"^{patch}, tensor 'b.weight': the result is not the one that the patch promises",
        *(apply, patch, backbone, tmp_path / "made"),
    )


def read_header(raw):
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_manifest(raw, old, new):
    """The patch file with another manifest of the same length and that one's own SHA-256."""
    from hashlib import sha256

    assert len(old) == len(new)
    escaped = json.dumps(new).encode()
    raw = raw.replace(json.dumps(old).encode(), escaped)
    old, new = (sha256(text.encode()).hexdigest().encode() for text in (old, new))
    return raw.replace(old, new)


def test_an_index_that_names_files_elsewhere(backbone, patch, tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(tensor_files(backbone)["b.weight"].read_bytes())
    index = json.loads((backbone / INDEX).read_text())
    names = [
        "../outside.safetensors",
        str(outside),
        "sub/x.safetensors",
        "",
        "..",
        "a\0.safetensors",
    ]
    for name in [*names, "..\\outside.safetensors", "config.json", 5, None]:
        index["weight_map"]["b.weight"] = name
        (backbone / INDEX).write_text(json.dumps(index))
        refuse("is no checkpoint in safetensors files", apply, patch, backbone, tmp_path / "made")


@pytest.mark.parametrize("what", ["a folder", "a pipe", "nothing"])
def test_a_shard_that_is_no_file(what, backbone, patch, tmp_path):
    path = tensor_files(backbone)["b.weight"]
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)  # whoever opens it waits for ever
    refuse(f"is no checkpoint.*{path.name}", apply, patch, backbone, tmp_path / "made")


# ---- the target ----------------------------------------------------------------------------------


def test_a_target_that_exists(backbone, patch, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    apply(patch, backbone, made)  # an empty folder is as good as none
    before = plain.contents(made)
    refuse("made exists already: choose another folder", apply, patch, backbone, made)
    assert plain.contents(made) == before
    (made / "old.txt").write_text("of the run before")
    apply(patch, backbone, made, overwrite=True)
    assert plain.contents(made) == before
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        options = {"overwrite": overwrite}
        refuse("file exists already", apply, patch, backbone, tmp_path / "file", **options)
    assert (tmp_path / "file").read_text() == "mine"


def test_overwriting_replaces_checkpoints_only(backbone, patch, tmp_path, monkeypatch):
    """What was there is deleted as a whole, so it must not be a folder of anything else."""
    home = tmp_path / "home"
    shutil.copytree(backbone, home / "models" / "backbone")
    (home / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").write_text("mine")
    made = Path(shutil.copytree(backbone, tmp_path / "made"))
    inner = Path(shutil.copy(patch, made / "patch.safetensors"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = {"overwrite": True}
    refuse("no safetensors file", apply, patch, backbone, tmp_path / "texts", **options)
    refuse("the folder 'models'", apply, patch, backbone, home, **options)
    refuse("is in it", apply, patch, home / "models" / "backbone", home, **options)
    refuse("is in it", apply, inner, backbone, made, **options)
    apply(inner, backbone, tmp_path / "patched")
    refuse("is in it", revert, inner, tmp_path / "patched", made, backbone=backbone, **options)
    for folder in (made, tmp_path):
        monkeypatch.chdir(folder)
        refuse("is in it", apply, patch, backbone, ".", **options)
    refuse("is in it", apply, patch, backbone, "/", **options)
    shutil.rmtree(tmp_path / "patched")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_target_that_is_a_link(backbone, patch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    for to in (elsewhere, tmp_path / "nothing", backbone):
        (tmp_path / "link").symlink_to(to)
        for overwrite in (False, True):
            options = {"overwrite": overwrite}
            refuse("link", apply, patch, backbone, tmp_path / "link", **options)
        (tmp_path / "link").unlink()
    assert plain.contents(elsewhere) == {"mine": b"mine"}


def test_a_target_that_is_the_source(backbone, patch, tmp_path):
    before = plain.contents(backbone)
    for target in (backbone, tmp_path / "x" / ".." / "backbone"):
        options = {"overwrite": True}
        refuse("is the checkpoint itself", apply, patch, backbone, target, **options)
    assert plain.contents(backbone) == before


def test_targets_without_a_name_of_their_own(backbone, patch, tmp_path, monkeypatch):
    """`.` in an empty folder, and a path with a slash behind it."""
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.chdir(made)
    apply(patch, backbone, ".")
    apply(patch, backbone, f"{tmp_path}/other/")
    assert plain.contents(made) == plain.contents(tmp_path / "other")
    monkeypatch.chdir(tmp_path)  # the shell still stands in the empty folder, which is gone
    refuse("exists already", apply, patch, backbone, "/")
    refuse("exists already", apply, patch, backbone, "..")


def test_an_overwritten_target_survives_an_error(backbone, patch, tmp_path):
    made = tmp_path / "made"
    apply(patch, backbone, made)
    before = plain.contents(made)
    flip(tensor_files(backbone)["c.weight"])
    refuse("'c.weight'", apply, patch, backbone, made, overwrite=True)
    assert plain.contents(made) == before


# ---- taking back ---------------------------------------------------------------------------------


def test_taken_back_with_the_backbone(backbone, patch, tmp_path):
    made = tmp_path / "made"
    apply(patch, backbone, made)
    done = revert(patch, made, tmp_path / "back", backbone=backbone)
    assert plain.contents(tmp_path / "back") == plain.contents(backbone)
    assert done.source == "backbone" and done.folder == str(tmp_path / "back")
    dry = revert(patch, made, None, backbone=backbone)
    assert dry.folder is None and dry.kept == done.kept


def test_not_taken_back_without_originals(backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made")
    sentence = f"^{patch} cannot be taken back by itself: it was not made revertible.*village/tiny"
    refuse(sentence, revert, patch, tmp_path / "made", tmp_path / "back")


@pytest.mark.parametrize("way", ["patch", "backbone"])
def test_what_is_taken_back_must_be_what_the_patch_made(way, backbone, tmp_path):
    path = plain.patch(tmp_path / "p", backbone, revertible=True)
    options = {"backbone": backbone} if way == "backbone" else {}
    sentence = f"^{path}, tensor '[abc].weight': the checkpoint's weights are not what this patch"
    refuse(sentence, revert, path, backbone, tmp_path / "back", **options)
    apply(path, backbone, tmp_path / "made")
    flip(tensor_files(tmp_path / "made")["b.weight"])
    sentence = sentence.replace("[abc]", "b")
    refuse(sentence, revert, path, tmp_path / "made", tmp_path / "back", **options)
    apply(path, backbone, tmp_path / "wide", dtype="float32")
    flip(tensor_files(tmp_path / "wide")["b.weight"])
    refuse(sentence, revert, path, tmp_path / "wide", tmp_path / "back", **options)


def test_taken_back_with_another_backbone(backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made")
    other = plain.save(tmp_path / "other", plain.weights(seed=9))
    sentence = "tensor '[abc].weight': the backbone's weights are not those that the patch was made"
    refuse(sentence, revert, patch, tmp_path / "made", tmp_path / "back", backbone=other)


def test_originals_are_only_in_revertible_files(backbone, patch, tmp_path):
    with_originals = plain.patch(tmp_path / "p", backbone, revertible=True)
    with PatchFile(patch) as one, PatchFile(with_originals) as two:
        assert one.manifest.size("originals") == 0 < two.manifest.size("originals")
        assert two.size > one.size and two.id != one.id
        for name in plain.TOUCHED:
            for a, b in zip(one.kept(name), two.kept(name), strict=True):
                assert a.originals is None
                kept = plain.deltas()[name].view(-1) != 0
                bits = plain.weights()[name].view(torch.int16).view(-1)[kept]
                assert np.array_equal(b.originals, bits.numpy().view(np.uint16))
                assert np.array_equal(a.deltas, b.deltas)


# ---- verifying -----------------------------------------------------------------------------------


def wrong(found):
    """The one thing that is wrong: (what, detail)."""
    assert not found.ok
    (no,) = [finding for finding in found.findings if finding.ok is False]
    return no.what, no.detail


WHOLE, FITS = "the patch file is whole", "the patch fits the backbone's tensors"
ITS_OWN = "the backbone's weights are those the patch was made for"
MADE = "the checkpoint's patched weights are what the patch makes"
OTHERS = "all other weights are the backbone's"


def test_yes(backbone, patch, tmp_path):
    made = tmp_path / "made"
    apply(patch, backbone, made)
    for given, what in [
        ((), [WHOLE]),
        ((backbone,), [WHOLE, FITS, ITS_OWN]),
        ((backbone, made), [WHOLE, FITS, ITS_OWN, MADE, OTHERS]),
    ]:
        found = verify(patch, *given)
        assert found.ok and [(f.what, f.ok) for f in found.findings] == [(w, True) for w in what]
    found = verify(patch, None, made)
    assert found.ok and found.findings[-1].ok is None  # other weights need the backbone
    assert [f.what for f in found.findings[2:]] == [MADE, OTHERS]
    with PatchFile(patch) as opened:
        assert found.patch == opened.id


@pytest.mark.parametrize("place", [3, 60, -1, -200])
def test_no_a_patch_that_is_damaged(place, backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made")
    flip(patch, place)
    what, detail = wrong(verify(patch, backbone, tmp_path / "made"))
    assert what == WHOLE and str(patch) in detail
    assert place > 0 or "tensor 'c.weight'" in detail


def test_no_another_backbone(backbone, patch, tmp_path):
    other = plain.save(tmp_path / "other", plain.weights(seed=9))
    what, detail = wrong(verify(patch, other))
    assert what == ITS_OWN and "tensor '" in detail and "another revision" in detail
    other = plain.save(tmp_path / "shape", plain.weights(plain.SHAPES | {"b.weight": (9, 9)}))
    what, detail = wrong(verify(patch, other))
    assert what == FITS and "'b.weight'" in detail


def test_another_config_is_a_remark(backbone, patch):
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"hidden_size": 49}))
    found = verify(patch, backbone)
    assert found.ok and found.findings[-1].ok is None
    assert found.findings[-1].what == "config.json is the one the patch was made with"


def test_no_patched_twice(backbone, tmp_path):
    """A patch can be applied twice only by hand; its own sums are then not there."""
    deltas = plain.deltas()
    path = plain.patch(tmp_path / "p", backbone)
    apply(path, backbone, tmp_path / "once")
    add_deltas(tmp_path / "once", deltas, tmp_path / "twice", identity="test")
    assert wrong(verify(path, None, tmp_path / "twice"))[0] == MADE
    assert wrong(verify(path, backbone, tmp_path / "twice"))[0] == MADE
    assert wrong(verify(path, tmp_path / "once", None))[0] == ITS_OWN


@pytest.mark.parametrize("out", [None, "float32"])
@pytest.mark.parametrize("name, what", [("b.weight", MADE), ("embed.weight", OTHERS)])
def test_no_one_flipped_bit(name, what, out, backbone, patch, tmp_path):
    made = tmp_path / "made"
    apply(patch, backbone, made, dtype=out)
    assert verify(patch, backbone, made).ok
    path = tensor_files(made)[name]
    flip(path, -7, 16)
    found, detail = wrong(verify(patch, backbone, made))
    assert found == what and str(path) in detail and repr(name) in detail


def test_no_another_dtype_without_the_backbone(backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made", dtype="float32")
    what, detail = wrong(verify(patch, None, tmp_path / "made"))
    assert what == "the checkpoint has the patched tensors" and "is F32" in detail


def test_no_a_tensor_more_or_less(backbone, patch, tmp_path):
    apply(patch, backbone, tmp_path / "made")
    for change in ({"more": torch.ones(2)}, {"a.norm": None}, {"a.norm": torch.ones(3)}):
        tensors_ = tensors(tmp_path / "made") | change
        name = next(iter(change))
        folder = tmp_path / f"other-{len(os.listdir(tmp_path))}"
        plain.save(folder, {n: t for n, t in tensors_.items() if t is not None})
        what, detail = wrong(verify(patch, backbone, folder))
        assert what == OTHERS and repr(name) in detail
    del tensors_["b.weight"]
    plain.save(tmp_path / "less", tensors_)
    found = verify(patch, backbone, tmp_path / "less")
    assert any(
        f.what == MADE and f.ok is False and "'b.weight'" in f.detail for f in found.findings
    )


def test_what_is_not_there_is_an_error(backbone, patch, tmp_path):
    with pytest.raises(SpkitError, match="nothing is no file"):
        verify(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    for given in ((tmp_path / "empty",), (backbone, tmp_path / "empty")):
        with pytest.raises(SpkitError, match="empty is no checkpoint in safetensors files"):
            verify(patch, *given)


# ---- stacking ------------------------------------------------------------------------------------


def stages(backbone, tmp_path, count=3, **options):
    """Patches one on another: (their files, the folders that they leave)."""
    files, folders = [], [backbone]
    for k in range(count):
        names = plain.TOUCHED if k != 1 else ("b.weight", "c.weight", "embed.weight")
        deltas = plain.deltas(names=names, share=0.2, seed=10 + k)
        files.append(plain.patch(tmp_path / f"stage-{k}", folders[-1], deltas, **options))
        folders.append(tmp_path / f"after-{k}")
        apply(files[-1], folders[-2], folders[-1])
    return files, folders


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stack_is_the_patches_in_their_order(dtype, values, tmp_path):
    backbone = plain.save(tmp_path / "source", plain.weights(dtype=dtype))
    files, folders = stages(backbone, tmp_path, values=values)
    made = stack(files, backbone, tmp_path / "stack", revertible=True)
    apply(tmp_path / "stack", backbone, tmp_path / "made")
    assert plain.contents(tmp_path / "made") == plain.contents(folders[-1])
    revert(tmp_path / "stack", folders[-1], tmp_path / "back")
    assert plain.contents(tmp_path / "back") == plain.contents(backbone)
    with PatchFile(tmp_path / "stack") as patch:
        assert patch.id == made.patch and patch.manifest.kept == made.kept
        ids = []
        for file in files:
            with PatchFile(file) as stage:
                ids.append(stage.id)
        assert patch.manifest.stack == ids
        assert set(patch.manifest.tensors) == {*plain.TOUCHED, "embed.weight"}
    assert (made.patches, made.tensors) == (3, 4)


def test_a_stack_of_stacks(backbone, tmp_path):
    files, folders = stages(backbone, tmp_path)
    stack(files[:2], backbone, tmp_path / "two")
    stack([tmp_path / "two", files[2]], backbone, tmp_path / "three")
    apply(tmp_path / "three", backbone, tmp_path / "made")
    assert plain.contents(tmp_path / "made") == plain.contents(folders[-1])


def test_stages_that_undo_each_other(tmp_path):
    """The sum of values is 0 at two weights: one comes back, one does not, for it was rounded."""
    weights = {"w": torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.bfloat16)}
    source = plain.save(tmp_path / "source", weights)
    steps = [torch.tensor([[2.0**-7, 2.0**-9 + 2.0**-8, 0.0]]), None]
    steps[1] = -steps[0]
    files, folder = [], source
    for k, delta in enumerate(steps):
        files.append(plain.patch(tmp_path / f"p-{k}", folder, {"w": delta}))
        apply(files[-1], folder, tmp_path / f"after-{k}")
        folder = tmp_path / f"after-{k}"
    made = stack(files, source, tmp_path / "stack")
    apply(tmp_path / "stack", source, tmp_path / "made")
    assert_equal_bits(tensors(tmp_path / "made"), tensors(folder))
    assert made.kept == 2


def test_a_wrong_order_is_refused(backbone, tmp_path):
    (one, two, three), _ = stages(backbone, tmp_path)
    sentence = "patch 1 of 3 does not fit on what comes before it .is the order right"
    refuse(sentence, stack, *([one, two, three][::-1], backbone, tmp_path / "stack"))
    sentence = f"patch 2 of 2 does not fit .*is one missing.*{three}, tensor '[abc].weight'"
    refuse(sentence, stack, [one, three], backbone, tmp_path / "stack")
    refuse("patch 2 of 2", stack, [one, one], backbone, tmp_path / "stack")
    refuse("needs at least two patches; there are 1", stack, [one], backbone, tmp_path / "stack")


def test_overlaps_by_hand(tmp_path):
    weights = {"a": torch.ones(2, 4), "b": torch.ones(1, 4)}
    source, folder, files = plain.save(tmp_path / "source", weights), None, []
    folder = source
    moved = [
        {"a": [0, 1, 2, 5], "b": [0, 1]},
        {"a": [2, 5, 7], "b": []},
        {"b": [1, 2]},
    ]
    for k, places in enumerate(moved):
        deltas = {name: torch.zeros_like(weights[name]) for name in places}
        for name, where in places.items():
            deltas[name].view(-1)[where] = 1.0
        files.append(plain.patch(tmp_path / f"p-{k}", folder, deltas))
        apply(files[-1], folder, tmp_path / f"after-{k}")
        folder = tmp_path / f"after-{k}"
    made = stack(files, source, tmp_path / "stack")
    assert made.overlaps.to_dict("list") == {
        "first": [1, 1, 2],
        "second": [2, 3, 3],
        "kept_first": [6, 6, 3],
        "kept_second": [3, 2, 2],
        "both": [2, 1, 0],
        "share": [2 / 3, 0.5, 0.0],
    }
    assert made.kept == 5 + 3


# ---- without torch -------------------------------------------------------------------------------


def test_nothing_of_it_loads_torch():
    """Of a laptop's memory torch alone would take half a gigabyte."""
    names = "apply encoding file floats make manifest revert stack stream verify"
    imports = "; ".join(f"import spkit.patchfile.{name}" for name in names.split())
    code = f"import sys; {imports}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert floats.BITS["BF16"].itemsize == 2
