"""Checkpoints written tensor by tensor: the bits of memory, and everything else as it was."""

import fnmatch
import json
import weakref

import plain
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spkit.comparison.continual import difference
from spkit.errors import SpkitError
from spkit.method.patching import retention_mask
from spkit.method.sets import Lazy
from spkit.models.checkpoint_files import INDEX, SINGLE, local_folder, read_header, tensor_files
from spkit.models.deltas import add_delta
from spkit.models.patched import patched
from spkit.models.weights import target_weights
from spkit.patchfile.add import add_deltas

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save(folder, architecture="llama", dtype="float32", tied=None, shards=True):
    """A checkpoint with a tokenizer, and with files that people leave in such folders."""
    model = tiny.model(architecture, tied=tied).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="50KB" if shards else "5GB")
    tiny.tokenizer().save_pretrained(folder)
    for name in ("pytorch_model.bin", "training_args.bin", "model.gguf", "consolidated.00.pth"):
        (folder / name).write_bytes(b"weights in another format")
    (folder / "LICENSE").write_text("do as you like")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"more weights")
    return folder


def deltas(names=tiny.TARGETS, seed=0):
    """Of every target, about a third of the positions."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in target_weights(tiny.model("llama"), names).items():
        keep = retention_mask(layer.weight.shape, 0.3, seed=seed, patch="se", tensor=name)
        noise = 0.1 * torch.randn(layer.weight.shape, generator=generator)
        made[name] = torch.where(keep, noise, 0.0)
    return made


def written(source, more, folder):
    return add_deltas(source, more, folder, identity="test", progress=False)


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def headers(folder):
    """{file: everything up to where the data begins}."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            _, start = read_header(file, path)
        found[path.name] = path.read_bytes()[:start]
    return found


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is written


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "single"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_same_bits_as_in_memory(architecture, dtype, tied, shards, tmp_path):
    source = save(tmp_path / "source", architecture, dtype, tied, shards)
    assert (len(list(source.glob("*.safetensors"))) > 2) == (source / INDEX).is_file() == shards
    before, more = tensors(source), deltas()
    assert ("lm_head.weight" in before) is not tied
    made = tmp_path / "made"
    done = written(source, more, made)
    after = tensors(made)
    assert list(after) == list(before)
    for name, old in before.items():
        expected = add_delta(old, more[name]) if name in more else old
        assert after[name].dtype == old.dtype == getattr(torch, dtype)
        assert torch.equal(bits(after[name]), bits(expected)), name
        assert torch.equal(after[name], old) is (name not in more), name
    assert headers(made) == headers(source)
    left_out = ["consolidated.00.pth", "model.gguf", "onnx", "pytorch_model.bin"]
    left_out.append("training_args.bin")
    assert contents(made) == [name for name in contents(source) if name not in left_out]
    for path in made.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (source / path.name).read_bytes()
    moved = sum(int((delta != 0).sum()) for delta in more.values())
    differ = sum(int((after[name] != old).sum()) for name, old in before.items())
    assert len(more) == 14 and differ == moved - done.count

    model = AutoModelForCausalLM.from_pretrained(made, dtype="auto").eval()
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids = torch.tensor([[2, 4, 9, 10, 5]])
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, expected(ids).logits)
        with patched(expected, more):
            assert torch.equal(model(ids).logits, expected(ids).logits)


def test_untouched_files_are_byte_equal(tmp_path):
    """And of a touched file, all bytes but those of its tensor."""
    source, made = save(tmp_path / "source"), tmp_path / "made"
    delta = torch.zeros(64, 64)
    delta[0, 0] = 1.0
    written(source, {Q_PROJ: delta}, made)
    touched = tensor_files(source)[Q_PROJ]
    differing = []
    for path in source.glob("*.safetensors"):
        old, new = path.read_bytes(), (made / path.name).read_bytes()
        assert len(old) == len(new)
        if path.name != touched.name:
            assert old == new
        else:
            differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    with touched.open("rb") as file:
        header, start = read_header(file, touched)
    first = start + dict(header)[Q_PROJ]["data_offsets"][0]
    assert differing and first <= differing[0] <= differing[-1] < first + 4


def test_odd_headers_are_copied_as_they_are(tmp_path):
    """Another order of keys, metadata, padding, and data that follow another order than the keys.

    Integer tensors that no delta is for are no hindrance.
    """
    source = tmp_path / "source"
    before, behind = plain.odd(source)
    delta = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    done = written(source, {"w": delta}, tmp_path / "made")
    expected = torch.tensor([[1.5, 2.0], [3.0, -0.0]], dtype=torch.float16).numpy().tobytes()
    made = (tmp_path / "made" / SINGLE).read_bytes()
    assert made == before + expected + behind
    assert done.count == 0


def test_lost_by_hand(tmp_path):
    """bf16 has 8 bits: next to 1 lie 1 + 2**-7 and 1 - 2**-8, so 2**-9 is lost there."""
    source = tmp_path / "source"
    source.mkdir()
    rows = {"a": [[1.0, 1.0, 1.0, 1.0]], "b": [[1.0, 2.0**-9]], "c": [[5.0]]}
    tensors = {name: torch.tensor(row, dtype=torch.bfloat16) for name, row in rows.items()}
    tensors["c"] = tensors["c"].float()
    save_file(tensors, source / SINGLE)
    more = {
        "a": torch.tensor([[2.0**-9, 2.0**-7, 0.0, -(2.0**-8)]]),
        "b": torch.tensor([[2.0**-9, 2.0**-9]]),
        "c": torch.tensor([[2.0**-9]]),
    }
    assert written(source, more, tmp_path / "made").count == 2
    made = load_file(tmp_path / "made" / SINGLE)
    assert made["a"].tolist() == [[1.0, 1 + 2.0**-7, 1.0, 1 - 2.0**-8]]
    assert made["b"].tolist() == [[1.0, 2.0**-8]]
    assert made["c"].tolist() == [[5 + 2.0**-9]]


def test_no_deltas_give_a_copy(tmp_path):
    source = save(tmp_path / "source")
    assert written(source, {}, tmp_path / "made").count == 0
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes()


def test_a_delta_in_another_layout(tmp_path):
    """One that lies in memory column by column gives the same bytes."""
    source, more = save(tmp_path / "source", dtype="bfloat16"), deltas(["down_proj"])
    written(source, more, tmp_path / "one")
    turned = {name: delta.T.contiguous().T for name, delta in more.items()}
    written(source, turned, tmp_path / "two")
    for path in source.glob("*.safetensors"):
        files = [(tmp_path / name / path.name).read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]


def test_links_are_followed(tmp_path):
    """The hub's cache is a folder of links."""
    source, cache = save(tmp_path / "blobs"), tmp_path / "snapshot"
    cache.mkdir()
    for path in source.iterdir():
        (cache / path.name).symlink_to(path)
    written(cache, deltas(), tmp_path / "made")
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())
    written(source, deltas(), tmp_path / "direct")
    one, two = tensors(tmp_path / "made"), tensors(tmp_path / "direct")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert torch.equal(tensors(source)[Q_PROJ], tensors(cache)[Q_PROJ])


def test_one_delta_at_a_time(tmp_path):
    """Each is asked for once, and the last one is gone by then."""
    source, made, alive = save(tmp_path / "source"), deltas(), []

    def compute(name):
        assert not [delta for _, delta in alive if delta() is not None]
        delta = made[name].clone()
        alive.append((name, weakref.ref(delta)))
        return delta

    written(source, Lazy(made, compute), tmp_path / "made")
    assert sorted(name for name, _ in alive) == sorted(made)


def test_an_older_result_is_not_replaced(tmp_path):
    """Whoever writes a stage anew gives a new folder; a checkpoint is never lost on the way."""
    source, made = save(tmp_path / "source"), tmp_path / "made"
    made.mkdir()
    written(source, deltas(), made)  # an empty folder is no result
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(SpkitError, match=f"{made} exists already"):
        written(source, deltas(seed=1), made)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert contents(tmp_path) == ["made", "source"]


# ---- what goes wrong


def refuse(source, more, sentence, folder="made"):
    """SpkitError, in one sentence, and nothing under the final name nor beside it."""
    there = contents(source.parent)
    with pytest.raises(SpkitError, match=sentence) as caught:
        written(source, more, source.parent / folder)
    assert "\n" not in str(caught.value)
    assert contents(source.parent) == there
    return str(caught.value)


@pytest.mark.parametrize(
    "name, delta, sentence",
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(1), "no tensor 'model.layers.9.mlp"),
        (
            Q_PROJ,
            torch.ones(64, 63),
            r"q_proj.*\[64, 63\], the checkpoint's is \[64, 64\]",
        ),
        (Q_PROJ, torch.ones(64), r"q_proj.*has the shape \[64\], the checkpoint's is"),
        (Q_PROJ, torch.full((64, 64), float("nan")), "q_proj.*not finite in F16"),
        (Q_PROJ, torch.full((64, 64), 1e5), "q_proj.*not finite in F16"),
    ],
)
def test_deltas_that_do_not_fit(name, delta, sentence, tmp_path):
    source = save(tmp_path / "source", dtype="float16")
    refuse(source, {DOWN: torch.ones(64, 128), name: delta}, sentence)


def test_one_infinite_value_is_enough(tmp_path):
    source = save(tmp_path / "source", dtype="float32")
    delta = torch.zeros(64, 64)
    delta[3, 3] = float("-inf")
    refuse(source, {Q_PROJ: delta}, "q_proj.*not finite in F32")


def test_integer_weights(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": torch.ones(2, 2, dtype=torch.int8), "v": torch.ones(2)}, source / SINGLE)
    sentence = "'w' is I8; a patch needs one of BF16, F16, F32"
    message = refuse(source, {"w": torch.ones(2, 2)}, sentence)
    assert str(source / SINGLE) in message
    written(source, {"v": torch.ones(2)}, tmp_path / "made")
    assert tensors(tmp_path / "made")["v"].tolist() == [2.0, 2.0]


class Cut(Exception):
    """Neither an error of ours nor one of the system."""


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt, SpkitError])
def test_a_mapping_that_fails_half_way(error, tmp_path):
    source, more, asked = save(tmp_path / "source"), deltas(), []

    def compute(name):
        asked.append(name)
        if len(asked) >= 7:
            raise error("half way")
        return more[name]

    with pytest.raises(error, match="half way"):
        written(source, Lazy(more, compute), tmp_path / "made")
    # after anything but a wrong delta, what is finished stays for the next try
    left = [] if error is SpkitError else [".tmp-made"]
    assert contents(tmp_path) == [*left, "source"]
    assert 7 <= len(asked) < len(more)
    written(source, more, tmp_path / "made")
    assert contents(tmp_path) == ["made", "source"]
    before, after = tensors(source), tensors(tmp_path / "made")
    assert all(torch.equal(after[name], add_delta(before[name], more[name])) for name in more)


def test_a_source_survives_an_error(tmp_path):
    source = save(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    refuse(source, {Q_PROJ: torch.full((64, 64), float("nan"))}, "not finite")
    assert all((source / name).read_bytes() == data for name, data in before.items())


def rewrite(path, change):
    """The file with another header; `change` gets the parsed one and may give text instead."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def shift(header):
    header[Q_PROJ]["data_offsets"][0] -= 4


def swap(header):
    header[Q_PROJ]["data_offsets"].reverse()


def reshape(header):
    header[Q_PROJ]["shape"] = [64, 63]


def retype(header):
    header[Q_PROJ]["dtype"] = "BF16"


def lacking(header):
    del header[Q_PROJ]["data_offsets"]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "three bytes": lambda path: path.write_bytes(b"\1\0\0"),
    "header too long": lambda path: path.write_bytes((2**62).to_bytes(8, "little") + bytes(99)),
    "no JSON": lambda path: rewrite(path, lambda header: b"{"),
    "no UTF-8": lambda path: rewrite(path, lambda header: b'{"\xff": 1}'),
    "a list": lambda path: rewrite(path, lambda header: b"[1]"),
    "overlapping": lambda path: rewrite(path, shift),
    "backwards": lambda path: rewrite(path, swap),
    "another shape": lambda path: rewrite(path, reshape),
    "another dtype": lambda path: rewrite(path, retype),
    "no offsets": lambda path: rewrite(path, lacking),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(damage, tmp_path):
    source = save(tmp_path / "source")
    path = tensor_files(source)[Q_PROJ]
    DAMAGES[damage](path)
    message = refuse(source, {Q_PROJ: torch.zeros(64, 64)}, "is no intact safetensors file: ")
    assert message.startswith(str(path))


@pytest.mark.parametrize("damage", ["truncated", "empty", "no JSON", "a list", "header too long"])
def test_a_damaged_single_file_is_named(damage, tmp_path):
    source = save(tmp_path / "source", shards=False)
    DAMAGES[damage](source / SINGLE)
    refuse(source, {Q_PROJ: torch.zeros(64, 64)}, f"^{source}.* safetensors file")


def test_folders_that_are_no_checkpoint(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    refuse(source, {}, f"^{source} is no checkpoint in safetensors files")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    refuse(source, {}, f"^{source} is no checkpoint in safetensors files")
    for index in ("{", "[]", "{}", '{"weight_map": []}', "null", '{"weight_map": {"w": 1}}'):
        (source / INDEX).write_text(index)
        refuse(source, {}, f"^{source} is no checkpoint in safetensors files")


def test_a_shard_that_is_not_there(tmp_path):
    source = save(tmp_path / "source")
    path = tensor_files(source)[DOWN]
    path.unlink()
    refuse(source, {Q_PROJ: torch.zeros(64, 64)}, path.name)


def test_an_index_that_names_the_wrong_shard(tmp_path):
    """Else the delta would be lost without a word."""
    source = save(tmp_path / "source")
    index = json.loads((source / INDEX).read_text())
    wrong = index["weight_map"][DOWN]
    assert wrong != index["weight_map"][Q_PROJ]
    index["weight_map"][Q_PROJ] = wrong
    (source / INDEX).write_text(json.dumps(index))
    message = refuse(source, {Q_PROJ: torch.ones(64, 64)}, f"no tensor '{Q_PROJ}'")
    assert str(source / wrong) in message


# ---- reading


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "single"])
def test_tensor_files(shards, tmp_path):
    source = save(tmp_path / "source", tied=False, shards=shards)
    files = tensor_files(str(source))
    assert sorted(files) == sorted(tiny.model("llama", tied=False).state_dict())
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118


def test_difference(tmp_path):
    """Of what was asked for, each time it is asked for; 0 where nothing moved."""
    source, made, more = save(tmp_path / "source", dtype="bfloat16"), tmp_path / "made", deltas()
    more[Q_PROJ].zero_()
    written(source, more, made)
    names = [DOWN, Q_PROJ]
    found = difference(source, made, names)
    assert list(found) == names
    old, new = tensors(source), tensors(made)
    for name in names:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], new[name].float() - old[name].float())
    assert found[DOWN].count_nonzero() > 1000 and not found[Q_PROJ].any()
    reverse = difference(made, source, [DOWN])
    assert torch.equal(reverse[DOWN], -found[DOWN])


@pytest.mark.parametrize("dtype", list(NAMES))
def test_the_backbone_with_the_difference_is_the_later_checkpoint(dtype, tmp_path):
    source, made = save(tmp_path / "source", dtype=dtype), tmp_path / "made"
    written(source, deltas(), made)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    later = tensors(made)
    with patched(model, difference(source, made, deltas())):
        for name in deltas():
            weight = model.get_parameter(name)
            step = torch.finfo(weight.dtype).eps  # rounded twice
            assert torch.allclose(weight.float(), later[name].float(), rtol=step, atol=step / 100)
            if dtype != "float32":
                assert (weight == later[name]).float().mean() > 0.999


def test_shards_and_a_single_file_of_the_same_weights_do_not_differ(tmp_path):
    shards, single = save(tmp_path / "a"), save(tmp_path / "b", shards=False)
    assert not any(delta.any() for delta in difference(shards, single, deltas()).values())


# ---- the hub


def test_a_local_folder_is_itself(tmp_path):
    assert local_folder(tmp_path) == local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["no such/name/at all", "/no/folder", "./nope", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_an_id(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpkitError, match="there is no such folder, and it is no hub id") as caught:
        local_folder(source or "~")
    assert repr(source or "~") in str(caught.value)


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / SINGLE).touch()
    with pytest.raises(SpkitError, match=f"{SINGLE} is a file: give the folder that it is in"):
        local_folder(tmp_path / SINGLE)


@pytest.mark.parametrize("source", ["nobody/nothing-at-all", "nothing-at-all"])
@pytest.mark.parametrize("way", ["offline", "unreachable"])
def test_an_unknown_id_without_a_network(source, way, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SpkitError) as caught:
        local_folder(source)
    message = str(caught.value)
    assert message.startswith(f"The checkpoint {source!r} cannot be downloaded: ")
    assert "\n" not in message


def test_what_is_fetched_from_the_hub(monkeypatch, tmp_path):
    """The revision asked for, and no weights in other formats."""
    import huggingface_hub

    asked = []

    def fetch(source, revision, allow_patterns):
        asked.append((source, revision))
        files = ("model.safetensors", "a.bin", "b.pt", "tokenizer.model", "c.pth", "config.json")
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert local_folder("some/model", "abc") == tmp_path
    assert asked == [("some/model", "abc")]
    assert contents(tmp_path) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_a_checkpoint_never_replaces_its_own_backbone(tmp_path):
    source = tiny.save(tmp_path / "model")
    with pytest.raises(SpkitError, match="is the checkpoint itself"):
        written(source, {}, tmp_path / "other" / ".." / "model")
    assert (source / "model.safetensors").is_file()
