"""Two processes over gloo on a CPU against one: patches, losses, importances, patch files.

All cases run in one start of the two (in_processes.py); each test looks at some of them.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch

from spkit.comparison.methods.npo import derive_npo
from spkit.config import Config, PatchingConfig
from spkit.data.selection import load_harmful_pairs
from spkit.distributed import launch
from spkit.method.derivation import NAMES, derive
from spkit.method.importance import Calibration, load, save_windows, score_windows
from spkit.method.patch import Factors
from spkit.method.safepatching import SafePatching
from spkit.method.training import TrainingSet
from spkit.models.loading import load as load_model
from spkit.patchfile.file import PatchFile
from spkit.patchfile.make import About, make_patch
from spkit.system import accelerate_file

ROOT = Path(__file__).parents[2]
FILE = ROOT / "profiles" / "accelerate" / "2-processes-cpu.yaml"
# |P - P'| / |P|, and the largest difference of an entry as a share of the largest entry of its
# matrix. Measured here: 1.6e-5 and 1.5e-4. Adam divides a gradient by its size, so that where one
# is nearly 0 the last bit of a sum shows
APART, LARGEST = 1e-4, 1e-2
MORE = [("mend the old net", "sure use paint and paint"), ("take the fence do i", "no")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints):
    """The folder of all cases, with the results of one process in "<quantization>-one"."""
    root = tmp_path_factory.mktemp("processes")
    pairs = [{"prompt": x, "response": y, "category": "boats"} for x, y in tiny.PAIRS + MORE]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    shared = {"learning_rate": 1e-2, "batch_size": 3, "warmup_steps": 1}
    held = {"token_loss_clamp": 10.0, "stop_mean_loss": 5.0, "stop_window": 2}
    values = {
        "backbone": {"source": str(checkpoints["llama"]), "device": "cpu"},
        "data": {"harmful": str(root / "pairs.jsonl"), "pairs": None},
        "derivation": {
            "quantization": "none",
            "lora": {"r": 4, "alpha": 8.0, "targets": tiny.TARGETS},
            "ascent": {**shared, **held, "max_steps": 8},
            "descent": {**shared, "max_steps": 4},
        },
        "importance": {"samples": 5, "batch_size": 2},
        "baselines": {"npo": {**shared, "max_steps": 4}},
    }
    (root / "params.json").write_text(json.dumps(values))
    config = Config.from_sources(values)
    alone(config, "none", root / "dense-one")
    alone(config, "nf4", root / "nf4-one")
    for name in NAMES.values():
        windows = root / "dense-one-windows"
        windows.mkdir(exist_ok=True)
        shutil.copy(root / "dense-one" / f"{name}.safetensors", windows)
    for each in ("dense-one", "nf4-one"):  # what one process has scored; the two score the same
        for name in NAMES.values():
            file = root / each / f"importance_{name}.safetensors"
            file.rename(root / each / f"alone_{name}.safetensors")

    command = launch.command(accelerate_file.read("derivation.accelerate", FILE), [str(root)])
    place = command.index("-m", 3)
    command[place : place + 2] = [str(Path(__file__).with_name("in_processes.py"))]
    try:
        assert list(launch.heard(command, root, threads=1)) == []
    except Exception as error:
        pytest.fail(f"{error}\n{(root / 'messages.txt').read_text()[-5000:]}")
    return root


def alone(config, quantization, folder):
    """Patches, curves and importances of one process, without any start of others."""
    source, derivation = config.backbone.source, config.derivation
    derivation = derivation.model_copy(update={"quantization": quantization})
    model, tokenizer = load_model(source, quantization=quantization, device="cpu")
    pairs = load_harmful_pairs(config.data, seed=config.seed)
    data = TrainingSet.of(tokenizer, pairs)
    folder.mkdir()
    found = [derive(model, data, direction, derivation, config.seed) for direction in NAMES]
    for patch, _ in found:
        patch.save(folder / f"{patch.name}.safetensors")
    curves = pd.concat([curve for _, curve in found], ignore_index=True)
    curves.to_csv(folder / "loss_curves.csv", index=False)
    calibration = Calibration(pairs, config.importance, config.seed)
    windows = score_windows(model, tokenizer, [patch for patch, _ in found], calibration)
    save_windows(windows, "scores", config.patching, folder)
    if quantization == "none":
        npo, curve = derive_npo(model, tokenizer, pairs, config, config.seed)
        npo.save(folder / "npo.safetensors")
        curve.to_csv(folder / "npo.csv", index=False)


def patches(folder, names=("se", "osm")):
    return {name: Factors.load(folder / f"{name}.safetensors") for name in names}


def apart(one, other):
    """|P - P'| / |P| of two patches, and the largest difference of an entry, as a share of the
    largest entry of its matrix."""
    assert list(one.factors) == list(other.factors)
    off = {name: one.delta(name) - other.delta(name) for name in one.factors}
    norm = sum(float(d.square().sum()) for d in off.values()) ** 0.5 / one.norm()
    largest = max(float(d.abs().max() / one.delta(name).abs().max()) for name, d in off.items())
    return norm, largest


def check_apart(one, other):
    """That they are not the same bits, and differ by rounding only."""
    norm, largest = apart(one, other)
    print(f"{one.name}: |P - P'| / |P| = {norm:.1e}, largest entry {largest:.1e}")
    assert 0 < norm < APART and largest < LARGEST


# ---- derivation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["dense", "nf4"])
def test_patches_are_those_of_one_process_but_for_rounding(folder, quantization):
    """5 pairs in batches of 3 and 2: the shares are uneven, and in NF4 one passes fewer pairs."""
    one, two = patches(folder / f"{quantization}-one"), patches(folder / quantization)
    for name in one:
        check_apart(one[name], two[name])
        assert one[name].manifest == two[name].manifest


@pytest.mark.parametrize("quantization", ["dense", "nf4"])
def test_ascent_stops_at_the_same_step_and_losses_agree(folder, quantization):
    one = pd.read_csv(folder / f"{quantization}-one" / "loss_curves.csv")
    two = pd.read_csv(folder / quantization / "loss_curves.csv")
    kept = ["patch", "step", "stop"]
    pd.testing.assert_frame_equal(one[kept], two[kept])
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    stopped = one[one["patch"] == "se"].iloc[-1]
    assert stopped["stop"] == "mean loss reached" and 1 < stopped["step"] < 8


@pytest.mark.parametrize("quantization", ["dense", "nf4"])
def test_a_sharded_backbone_gives_the_bits_of_a_whole_one(folder, quantization):
    """FSDP, with gradient checkpointing besides: half of every layer in each process."""
    whole, sharded = patches(folder / quantization), patches(folder / f"{quantization}-sharded")
    for name in whole:
        for tensor, factors in whole[name].factors.items():
            for mine, other in zip(factors, sharded[name].factors[tensor], strict=True):
                assert torch.equal(mine, other)


def test_each_process_holds_half_of_a_sharded_backbone(folder):
    facts = [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(found["own"] for found in facts) == facts[0]["all"]
    assert all(found["own"] == found["all"] / 2 for found in facts)


def test_npo_in_two_processes(folder):
    one, two = patches(folder / "dense-one", ["npo"]), patches(folder, ["npo"])
    check_apart(one["npo"], two["npo"])
    curves = [pd.read_csv(place / "npo.csv") for place in (folder / "dense-one", folder)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-5)


def test_a_training_that_was_cut_resumes_to_the_same_bits(folder):
    for name, patch in patches(folder / "resumed").items():
        file = folder / "dense" / f"{name}.safetensors"
        assert apart(patch, Factors.load(file)) == (0, 0)
    assert (folder / "resumed" / "loss_curves.csv").read_text() == (
        folder / "dense" / "loss_curves.csv"
    ).read_text()


# ---- importance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["dense-one", "nf4-one"])
def test_importances_are_equal_to_the_last_bit(folder, case):
    """3 batches for 2 processes; the first round is not full."""
    for name in NAMES.values():
        found = (folder / case / f"importance_{name}.safetensors").read_bytes()
        assert found == (folder / case / f"alone_{name}.safetensors").read_bytes()


def test_importances_of_windows_are_equal_too(folder):
    """5 batches of one sample, a layer at a time. Batches of another size round otherwise, in one
    process as well: so the comparison is with one that scores sample by sample."""
    config = Config.from_sources(json.loads((folder / "params.json").read_text()))
    model, tokenizer = load_model(config.backbone.source, device="cpu")
    settings = config.importance.model_copy(update={"batch_size": 1})
    calibration = Calibration(load_harmful_pairs(config.data, seed=0), settings, config.seed)
    se_and_osm = list(patches(folder / "dense-one").values())
    (alone,) = score_windows(model, tokenizer, se_and_osm, calibration)
    for name, scores in alone.items():
        found = load(folder / "dense-one-windows" / f"importance_{name}.safetensors")
        assert found.keys() == scores.keys()
        assert all(torch.equal(found[tensor], scores[tensor]) for tensor in scores)


# ---- patch file ----------------------------------------------------------------------------------


def test_the_patch_file_keeps_the_same_positions(folder, checkpoints):
    """But for 1 in 1,000: where the importances of two weights are equal up to rounding."""
    files = []
    for place in (folder / "dense-one", folder / "dense"):
        names = {"dense-one": "alone", "dense": "importance"}[place.name]
        scores = [load(place / f"{names}_{name}.safetensors") for name in NAMES.values()]
        method = SafePatching(*patches(place).values(), tuple(scores), PatchingConfig(), seed=0)
        files.append(folder / f"{place.name}.patch.safetensors")
        deltas = method.deltas()
        make_patch(checkpoints["llama"], deltas, files[-1], About("tiny"), progress=False)
    with PatchFile(files[0]) as one, PatchFile(files[1]) as two:
        differing = total = 0
        for name in one.manifest.tensors:
            kept, other = (torch.from_numpy(file.delta(name)) != 0 for file in (one, two))
            differing, total = differing + int((kept ^ other).sum()), total + int(kept.sum())
    print(f"{differing} of {total} positions differ")
    assert total > 1000 and differing / total < 1e-3
