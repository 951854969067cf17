"""The command line of patch files, and what inspect and card tell, on a tiny checkpoint."""

import json
import os
import re
import shutil
from math import log2

import numpy as np
import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from spkit.cli import app
from spkit.errors import SpkitError
from spkit.models.weights import target_weights
from spkit.patchfile.card import card, card_text
from spkit.patchfile.encoding import entropy_bound
from spkit.patchfile.file import PatchFile
from spkit.patchfile.make import About, make_patch
from spkit.patchfile.summary import inspect

ROWS = [
    {"model": "base", "group": "seen", "metric": "harmful", "n": 300, "k": 102, "rate": 0.34},
    {
        "model": "SafePatching",
        "group": "seen",
        "metric": "harmful",
        "n": 300,
        "k": 4,
        "rate": 0.013,
    },
]
ABOUT = About(
    backbone="village/tiny-7b",
    revision="abc123",
    method={"name": "SafePatching", "seed": 3, "alpha": 1.5, "patching": {"top_rate_se": 0.03}},
    data={"fingerprint": "f" * 64, "pairs": 192},
    evaluation=ROWS,
)


def deltas(seed=0):
    """Of every target weight, the first row moved, and one value in the last."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in target_weights(tiny.model("llama"), tiny.TARGETS).items():
        delta = torch.zeros_like(layer.weight)
        delta[seed] = 0.1 + torch.rand(delta.shape[1], generator=generator)
        delta[-1, -1] = 1.0
        made[name] = delta
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, a patch, a revertible one, and one made on what the first leaves."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny.model("llama").to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="50KB")
    tiny.tokenizer().save_pretrained(folder / "base")
    make_patch(folder / "base", deltas(), folder / "p.safetensors", ABOUT, progress=False)
    options = {"revertible": True, "progress": False}
    make_patch(folder / "base", deltas(), folder / "r.safetensors", ABOUT, **options)
    done = run("apply", folder / "p.safetensors", folder / "base", folder / "made")
    assert done.exit_code == 0, done.output
    make_patch(folder / "made", deltas(1), folder / "q.safetensors", ABOUT, progress=False)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def as_json(*arguments):
    done = run(*arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def same(one, other):
    names = {path.name for path in one.iterdir()} | {path.name for path in other.iterdir()}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# ---- commands


def test_every_command_has_help():
    assert run("--help").exit_code == 0
    for name in ("apply", "revert", "inspect", "verify", "stack", "card", "make"):
        done = run(name, "--help")
        assert done.exit_code == 0 and "Usage" in done.output
        assert name in run("--help").output


def test_apply_verify_revert(place, tmp_path):
    patch, base, made = place / "r.safetensors", place / "base", tmp_path / "made"
    code, done = as_json("apply", patch, base, made)
    assert code == 0 and done["folder"] == str(made)
    with PatchFile(patch) as opened:
        assert done["patch"] == opened.id
        assert (done["tensors"], done["kept"]) == (14, opened.manifest.kept)
        assert done["lost"] == opened.manifest.lost
    code, found = as_json("verify", patch, "--backbone", base, "--checkpoint", made)
    assert code == 0 and found["ok"] and all(row["ok"] for row in found["findings"])
    code, done = as_json("revert", patch, made, tmp_path / "back")
    assert code == 0 and done["source"] == "patch" and same(tmp_path / "back", base)


def test_a_dry_run_writes_nothing(place, tmp_path):
    code, done = as_json(
        "apply", place / "p.safetensors", place / "base", tmp_path / "x", "--dry-run"
    )
    assert code == 0 and done["folder"] is None and not list(tmp_path.iterdir())
    arguments = ("revert", place / "r.safetensors", place / "made", tmp_path / "x", "--dry-run")
    code, done = as_json(*arguments)
    # r and p are other files, but make the same weights
    assert code == 0 and done["folder"] is None and not list(tmp_path.iterdir())


def test_dtype(place, tmp_path):
    arguments = ("apply", place / "p.safetensors", place / "base", tmp_path / "made")
    code, done = as_json(*arguments, "--dtype", "float32")
    assert code == 0 and done["dtype"] == "F32"
    code, done = as_json(*arguments, "--dtype", "int4")
    assert code == 1 and "unknown dtype 'int4', allowed: bfloat16" in done["error"]


def test_verify_says_no_with_its_own_exit_code(place, tmp_path):
    code, found = as_json("verify", place / "p.safetensors", "--backbone", place / "made")
    assert code == 3 and not found["ok"]
    assert "patched already" in str(found["findings"])
    broken = tmp_path / "broken.safetensors"
    data = bytearray((place / "p.safetensors").read_bytes())
    data[-40] ^= 1
    broken.write_bytes(data)
    done = run("verify", broken)
    assert done.exit_code == 3 and "no" in done.output


def test_stack(place, tmp_path):
    stages = (place / "p.safetensors", place / "q.safetensors")
    made = tmp_path / "s.safetensors"
    code, done = as_json("stack", made, *stages, "--backbone", place / "base")
    assert code == 0 and done["patches"] == 2
    (pair,) = done["overlaps"]
    assert pair["both"] == 14  # the last weight of every matrix
    code, _ = as_json("apply", made, place / "base", tmp_path / "stacked")
    assert code == 0
    code, _ = as_json("apply", stages[1], place / "made", tmp_path / "one by one")
    assert code == 0 and same(tmp_path / "stacked", tmp_path / "one by one")
    code, done = as_json("stack", tmp_path / "no", *reversed(stages), "--backbone", place / "base")
    assert code == 1 and "patch 1 of 2 does not fit" in done["error"]
    assert not (tmp_path / "no").exists()


def test_an_error_is_one_sentence_and_exit_code_1(place, tmp_path):
    arguments = ("apply", tmp_path / "none.safetensors", place / "base", tmp_path / "made")
    done = run(*arguments)
    assert done.exit_code == 1 and done.stdout == ""
    assert re.search(r"error: .*none\.safetensors cannot be read as a patch: No such", done.stderr)
    code, done = as_json(*arguments)
    assert code == 1 and list(done) == ["error"]


def test_a_file_that_is_there_is_not_replaced_unasked(place, tmp_path):
    """By stack and make; and no patch is replaced by a stack of itself."""
    (tmp_path / "notes.txt").write_text("mine")
    patches = [tmp_path / "p.safetensors", tmp_path / "q.safetensors"]
    for patch in patches:
        shutil.copy(place / patch.name, patch)
    stack = ["stack", tmp_path / "notes.txt", *patches, "--backbone", place / "base"]
    make = ["make", "params/sandbox.yaml", tmp_path / "notes.txt"]
    for command in (stack, make):
        code, said = as_json(*command)
        assert code == 1 and "notes.txt exists already" in said["error"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert as_json("stack", patches[0], *stack[2:], "--overwrite")[0] == 1
    assert patches[0].read_bytes() == (place / "p.safetensors").read_bytes()
    assert as_json(*stack, "--overwrite")[0] == 0
    assert as_json("verify", tmp_path / "notes.txt", "--backbone", place / "base")[0] == 0


def test_a_figure_that_cannot_be_drawn(place, tmp_path):
    code, said = as_json("inspect", place / "p.safetensors", "--figure", tmp_path / "map.xyz")
    assert code == 1 and said["error"].endswith("a figure ends with .png, .svg, .pdf")
    assert not os.listdir(tmp_path)


def test_ids_are_printed_on_one_line(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, said = as_json("inspect", place / "p.safetensors")
    lines = run("inspect", place / "p.safetensors").output.splitlines()
    assert f"patch {said['summary']['patch']}" in lines


def test_a_checkpoint_of_another_dtype_says_what_to_do(place, tmp_path):
    made = tmp_path / "made"
    assert run("apply", place / "r.safetensors", place / "base", made, "--dtype", "float16")
    code, said = as_json("verify", place / "r.safetensors", "--checkpoint", made)
    assert code == 3 and "--dtype, it can be verified with the backbone" in str(said)
    code, said = as_json("revert", place / "r.safetensors", made, tmp_path / "back")
    assert code == 1 and said["error"].endswith("cannot be undone: use the backbone")


def test_a_wrong_command_line_is_exit_code_2(place):
    assert run("apply", place / "p.safetensors").exit_code == 2
    assert run("aply").exit_code == 2


def test_ctrl_c_is_exit_code_130(place, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spkit.patchfile.apply.stream", stop)
    done = run("apply", place / "p.safetensors", place / "base", tmp_path / "made")
    assert done.exit_code == 130 and "the same command resumes" in done.stderr


def test_make_needs_a_finished_run(tmp_path):
    params = tmp_path / "x.yaml"
    params.write_text(f"run_name: none\noutputs: {tmp_path}\n")
    code, done = as_json("make", params, tmp_path / "p.safetensors")
    assert code == 1 and "run notebooks" in done["error"]
    code, done = as_json("make", params, tmp_path / "p.safetensors", "--values", "int3")
    assert code == 1 and "unknown values 'int3'" in done["error"]


# ---- inspect


def test_inspect_counts(place, tmp_path):
    found = inspect(place / "r.safetensors")
    assert list(found.where["module"][:7]) == tiny.TARGETS
    weights = deltas()
    for row in found.where.to_dict("records"):
        delta = weights[row["tensor"]]
        assert row["n"] == delta.numel() and row["k"] == delta.shape[1] + 1
        assert row["share"] == row["k"] / row["n"]
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=0.01)  # 16-bit values
    assert found.by_module()["k"].sum() == found.manifest.kept == found.where["k"].sum()
    norms = found.where["norm"].to_numpy()
    assert np.square(found.by_module()["norm"]).sum() == pytest.approx(np.square(norms).sum())
    assert found.layers().shape == (2, 7)
    summary = found.summary()
    assert summary["bytes"] == (place / "r.safetensors").stat().st_size == found.size
    assert summary["backbone"] == "village/tiny-7b" and summary["revision"] == "abc123"
    parts = ("positions", "values", "replaced", "originals")
    assert found.where["bytes"].sum() == sum(found.manifest.size(part) for part in parts)
    assert summary["bytes of originals"] > 0 and summary["revertible"]


def test_inspect_prints_and_draws(place, tmp_path):
    figure = tmp_path / "map.png"
    done = run("inspect", place / "p.safetensors", "--figure", figure)
    assert done.exit_code == 0 and "down_proj" in done.output and "layers down" in done.output
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, found = as_json("inspect", place / "p.safetensors")
    assert code == 0 and set(found) == {"summary", "manifest", "where"}
    assert found["manifest"]["evaluation"] == ROWS and len(found["where"]) == 14


def test_the_entropy_bound():
    assert entropy_bound(0, 100) == entropy_bound(100, 100) == 0
    assert entropy_bound(50, 100) == 100 / 8  # a coin for each weight
    one = -(log2(1 / 8) / 8 + log2(7 / 8) * 7 / 8)
    assert entropy_bound(100, 800) == pytest.approx(100 * one)


# ---- card


def head_and_text(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_patch_says(place, tmp_path):
    path = card(place / "p.safetensors", tmp_path / "card.md", license="other")
    head, text = head_and_text(path.read_text())
    assert head["base_model"] == "village/tiny-7b" and head["license"] == "other"
    assert "safety-patch" in head["tags"]
    with PatchFile(place / "p.safetensors") as opened:
        manifest, identity = opened.manifest, opened.id
    assert identity in text and f"{manifest.kept:,} of {manifest.weights:,}" in text
    assert "| 34.0 %" in text and "| 102" in text and "f" * 64 in text
    for heading in ("Use", "Results", "Limits", "Hazards", "Licence"):
        assert f"## {heading}\n" in text
    assert "--backbone BACKBONE" in text and str(place) not in text
    assert "PATCHED ORIGINAL`" in card_text(inspect(place / "r.safetensors").manifest, identity)
    assert re.search(r"\| alpha, as used +\| 1.5 +\|", text)


@pytest.mark.parametrize(
    "brought, said",
    [
        ([], "two patches from one set of harmful question/answer pairs, thinned"),
        (
            ["se"],
            "one derived from one set of harmful question/answer pairs and one not (SE is the",
        ),
        (["se", "osm"], "not derived here (SE is the LoRA adapter npo and OSM is the LoRA adapter"),
    ],
)
def test_the_card_says_what_the_patches_were_made_of(brought, said, place):
    with PatchFile(place / "p.safetensors") as opened:
        manifest, identity = opened.manifest, opened.id
    adapters = {name: {"name": "npo", "sha256": "0" * 64} for name in brought}
    method = {**manifest.method, "derivation": adapters}
    assert said in card_text(manifest.model_copy(update={"method": method}), identity)


def test_an_existing_card_is_not_replaced_unasked(place, tmp_path):
    (tmp_path / "README.md").write_text("the backbone's")
    with pytest.raises(SpkitError, match="it may be the backbone's own card"):
        card(place / "p.safetensors", tmp_path)
    assert (tmp_path / "README.md").read_text() == "the backbone's"
    code, _ = as_json("card", place / "p.safetensors", tmp_path, "--overwrite")
    assert code == 0 and "safety patch" in (tmp_path / "README.md").read_text()


def test_no_markup_of_a_patch_survives_in_its_card(place, tmp_path):
    evil = "](javascript:x) <script> | `x` **"
    about = About(backbone=evil, method={evil: evil}, evaluation=[{"model": evil, "rate": 0.5}])
    make_patch(place / "base", deltas(), tmp_path / "e.safetensors", about, progress=False)
    text = card(tmp_path / "e.safetensors", tmp_path / "card.md").read_text()
    body = head_and_text(text)[1]
    assert not re.search(r"(?<!\\)<script", body) and not re.search(r"(?<!\\)\]\(javascript", body)


def test_a_card_without_evaluation_says_so(place, tmp_path):
    make_patch(place / "base", deltas(), tmp_path / "p.safetensors", About("x"), progress=False)
    text = card(tmp_path / "p.safetensors", tmp_path / "card.md").read_text()
    assert "carries no evaluation record" in text
