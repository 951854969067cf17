"""A patch on a copy of its backbone in another dtype: compared by values, and never by name."""

import json
from functools import partial

import plain
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spkit.cli import app
from spkit.errors import SpkitError
from spkit.models.checkpoint_files import tensor_files
from spkit.patchfile.apply import apply
from spkit.patchfile.file import PatchFile
from spkit.patchfile.revert import revert
from spkit.patchfile.verify import verify

apply, revert, verify = (partial(f, progress=False) for f in (apply, revert, verify))
SMALL = 2.0**-30  # below every float16
PAIRS = [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float16")]
PAIRS += [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")]
BY_VALUES = "by values: the backbone is a {} copy"


def cast(tensors, dtype):
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def weights(dtype="bfloat16", small=True):
    """Normal numbers, and in each matrix one that float16 has not."""
    found = plain.weights(dtype=dtype)
    for tensor in found.values() if small else ():
        tensor.view(-1)[5] = SMALL
    return found


def place(tmp_path, own="bfloat16", other="float32", small=True, **options):
    """(patch, backbone, its copy)."""
    backbone = plain.save(tmp_path / "backbone", weights(own, small))
    copy = plain.save(tmp_path / "copy", cast(weights(own, small), other))
    return plain.patch(tmp_path / "p.safetensors", backbone, **options), backbone, copy


def change(folder, name="b.weight", place=40, factor=1.5):
    """Another value at a place that the patch does not touch, exact in every dtype."""
    path = tensor_files(folder)[name]
    tensors = load_file(path)
    flat = tensors[name].view(-1)
    assert plain.deltas()[name].view(-1)[place] == 0 and flat[place] != 0
    flat[place] = flat[place] * factor
    save_file(tensors, path, metadata={"format": "pt"})


def equal(made, expected):
    """The weights of two folders, bit for bit."""
    one, two = ({p.name: load_file(p) for p in f.glob("*.safetensors")} for f in (made, expected))
    assert one.keys() == two.keys()
    for name, tensors in one.items():
        for key, tensor in tensors.items():
            assert tensor.dtype == two[name][key].dtype
            assert torch.equal(plain.bits(tensor), plain.bits(two[name][key])), key
    return True


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("own, other", PAIRS)
def test_as_apply_dtype_on_the_backbone(own, other, values, tmp_path):
    """Whatever decides; the way back, too."""
    path, backbone, copy = place(tmp_path, own, other, values=values, revertible=True)
    apply(path, backbone, tmp_path / "expected", dtype=other)
    exact = other == "float32"
    for k, original in enumerate((None, backbone)):
        made = tmp_path / f"made-{k}"
        done = apply(path, copy, made, original=original)
        assert equal(made, tmp_path / "expected")
        assert done.checked.startswith(BY_VALUES.format(other))
        assert done.dtype == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[other]
        alone = done.checked.endswith("the patch's originals at the weights that it changes alone")
        every = done.checked.endswith("every value the cast of the original's")
        # float32 holds every 16-bit value, and so does bfloat16 none of these float32 ones
        assert (alone, every) == ((not exact, False) if original is None else (False, True))
        found = verify(path, copy, made, original=original)
        assert found.ok and f"checked {done.checked}" in [f.detail for f in found.findings]
        assert verify(path, backbone, made).ok  # the same weights, whatever they were made of
    back = revert(path, tmp_path / "made-0", tmp_path / "back", backbone=backbone)
    assert equal(tmp_path / "back", copy) and f"the checkpoint is a {other} copy" in back.checked
    if exact:
        revert(path, tmp_path / "made-0", tmp_path / "again")
        assert equal(tmp_path / "again", copy)
        revert(path, tmp_path / "made-0", tmp_path / "third", backbone=copy)
        assert equal(tmp_path / "third", copy)


def test_float32_by_hand(tmp_path):
    """In float32 the stored value is added to the weight, and a replaced weight is its 16 bits."""
    path, _, copy = place(tmp_path)
    apply(path, copy, tmp_path / "made")
    replaced = 0
    with PatchFile(path) as patch:
        for name in plain.TOUCHED:
            (kept,) = patch.kept(name)
            made = load_file(tensor_files(tmp_path / "made")[name])[name].view(-1)
            expected = weights()[name].float().view(-1)
            where = torch.from_numpy(kept.positions.astype("int64"))
            expected[where] += torch.from_numpy(kept.deltas)
            chosen, bits = kept.replaced
            patched = torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
            expected[where[torch.from_numpy(chosen.astype("int64"))]] = patched
            assert torch.equal(made, expected)
            replaced += len(chosen)
    assert replaced > 0


def test_nothing_lost_in_float16_needs_no_original(tmp_path):
    """Where float16 has every value, the cast back has the backbone's hash."""
    path, backbone, copy = place(tmp_path, other="float16", small=False)
    assert apply(path, copy, tmp_path / "made").checked == BY_VALUES.format("float16")
    apply(path, backbone, tmp_path / "expected", dtype="float16")
    assert equal(tmp_path / "made", tmp_path / "expected")


def test_a_rounded_copy_alone_is_refused_with_both_ways(tmp_path):
    path, backbone, copy = place(tmp_path, other="float16")
    with pytest.raises(SpkitError, match=r"\(village/tiny\) with --original, or .* --revertible$"):
        apply(path, copy, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert apply(path, copy, tmp_path / "made", original=backbone).kept > 0
    found = verify(path, copy)
    assert not found.ok and "--original" in found.findings[-1].detail


@pytest.mark.parametrize("way", ["alone", "original", "revertible"])
@pytest.mark.parametrize("other", ["float32", "float16"])
def test_one_other_weight_is_another_backbone(other, way, tmp_path):
    path, backbone, copy = place(tmp_path, other=other, revertible=way == "revertible")
    original = backbone if way == "original" else None
    touched = int(plain.deltas()["b.weight"].view(-1).nonzero()[0])
    raw = {p: p.read_bytes() for p in copy.glob("*.safetensors")}
    # a factor that leaves no value of bfloat16; one more bit is told even where no hash can be
    for factor in (1 + 2.0**-9, 1.5):
        change(copy, factor=factor)
        told = other == "float32" or way == "original" or factor < 1.5
        if told:
            with pytest.raises(
                SpkitError, match="'b.weight': .* is .* and no copy of the bfloat16"
            ):
                apply(path, copy, tmp_path / "made", original=original)
            assert not verify(path, copy, original=original).ok
        for file, data in raw.items():
            file.write_bytes(data)
    if way == "revertible":  # and what the patch changes is always compared
        tensors = load_file(tensor_files(copy)["b.weight"])
        tensors["b.weight"].view(-1)[touched] *= 2
        save_file(tensors, tensor_files(copy)["b.weight"])
        with pytest.raises(SpkitError, match="'b.weight': .* no copy of the bfloat16 backbone"):
            apply(path, copy, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_original_must_be_the_backbone(tmp_path):
    path, backbone, copy = place(tmp_path, other="float16")
    change(backbone)
    both = {n: load_file(f)[n].half() for n, f in tensor_files(backbone).items()}
    same = plain.save(tmp_path / "both", both)
    with pytest.raises(SpkitError, match="'b.weight': the original's weights are not those that"):
        apply(path, same, tmp_path / "made", original=backbone)
    with pytest.raises(SpkitError, match="'b.weight': .* no copy"):
        apply(path, copy, tmp_path / "made", original=backbone)


def test_the_original_may_be_an_exact_copy_and_nothing_near_it(tmp_path):
    path, backbone, copy = place(tmp_path, other="float16")
    wide = plain.save(tmp_path / "wide", cast(weights(), "float32"))
    apply(path, copy, tmp_path / "made", original=wide)
    apply(path, backbone, tmp_path / "expected", dtype="float16")
    assert equal(tmp_path / "made", tmp_path / "expected")
    change(wide, factor=1 + 2.0**-20)  # rounded to bfloat16 it is the backbone's
    with pytest.raises(SpkitError, match="'b.weight': the original's weights are not those that"):
        apply(path, copy, tmp_path / "other", original=wide)


def test_too_large_for_float16(tmp_path):
    """A cast that overflows is another model, wherever the value is."""
    tensors = weights()
    tensors["b.weight"].view(-1)[40] = 1e5
    backbone = plain.save(tmp_path / "backbone", tensors)
    copy = plain.save(tmp_path / "copy", cast(tensors, "float16"))
    path = plain.patch(tmp_path / "p", backbone)
    with pytest.raises(SpkitError, match="'b.weight': .*too large for F16"):
        apply(path, copy, tmp_path / "made", original=backbone)


def test_the_commands_say_what_was_compared(tmp_path, monkeypatch):
    """And ~ is expanded in every path; what is not there is a sentence."""
    path, backbone, copy = place(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)

    def run(*arguments):
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})

    done = run("apply", "~/p.safetensors", "~/copy", "~/made", "--json")
    assert json.loads(done.stdout)["checked"] == BY_VALUES.format("float32"), done.stdout
    assert (tmp_path / "made").is_dir()
    done = run("verify", "~/p.safetensors", "--backbone=~/copy", "--checkpoint", "~/made")
    assert done.exit_code == 0 and f"checked {BY_VALUES.format('float32')}" in done.output
    done = run("apply", "~/p.safetensors", "~/copy", "~/x", "--dry-run", "--original", "~/backbone")
    assert done.exit_code == 0 and "every value the cast of the original's" in done.output
    done = run("inspect", "~/none.safetensors")
    assert done.exit_code == 1 and f"{tmp_path}/none.safetensors cannot be read" in done.stderr
    done = run("apply", "~nobody-of-this-name/p", "~/copy", "~/x")
    assert done.exit_code == 2 and "no such user" in done.output
