"""Continual patching, stage by stage against the same stage written out, and what a rerun repeats.

On the micro backbone, trained once; its answers mean nothing, but they differ from stage to stage.
"""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from spkit.comparison import continual
from spkit.comparison.continual import Stages, continual_rates, run_methods, stage_patches
from spkit.comparison.methods import METHODS as BASELINES
from spkit.comparison.methods import Bundle
from spkit.comparison.methods.bundle import calibrate, with_backbone
from spkit.comparison.methods.npo import derive_npo
from spkit.config import Config, load_params
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.errors import SpkitError
from spkit.evaluation.answers import generated, respond
from spkit.evaluation.judges import judged
from spkit.evaluation.rates import COLUMNS
from spkit.examples import fingerprint
from spkit.method.continual import stage_seed
from spkit.method.derivation import derive
from spkit.method.importance import score_patch
from spkit.method.patch import Factors
from spkit.method.patching import kept_set, merged_delta, retention_mask, top_rate_set
from spkit.method.training import TrainingSet
from spkit.models.deltas import add_delta
from spkit.models.loading import load
from spkit.patchfile.apply import apply
from spkit.patchfile.file import PatchFile
from spkit.patchfile.stack import stack
from spkit.sandbox.backbone import prepare_backbone
from spkit.system import resume

MICRO = Path(__file__).parents[2] / "params" / "micro.yaml"
STAGES = [["colouring"], ["hiding", "gluing"]]
LABELS = {"safepatching": "SafePatching", "ga": "GA"}
METHODS = list(LABELS)
PROMPTS = 16
CHANGES = {
    "seed": 4,  # not 0, whose stages' seeds would be the stages' numbers
    "backbone.device": "cpu",
    "sandbox.pretrain_steps": 60,  # or it would say nothing at all
    "derivation.ascent.learning_rate": 0.02,  # or no stage would change an answer
    "derivation.descent.learning_rate": 0.02,
    "derivation.ascent.token_loss_clamp": 20.0,  # its losses are high: no clamp, no early stop
    "derivation.ascent.stop_mean_loss": 15.0,
    "patching.scale": "plain",
    "patching.top_rate_se": 0.1,
    "patching.top_rate_osm": 0.1,
    "patching.alpha": 30.0,
    "patching.beta": 20.0,
    "evaluation.prompts_per_cell": 4,
    "continual.stages": STAGES,
    "patching.balance": None,
    "patching.retention_rate": 0.3,
}


def settings(**changes):
    return load_params(MICRO, CHANGES | {key.replace("__", "."): v for key, v in changes.items()})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepare_backbone(settings(), tmp_path_factory.mktemp("base") / "model")


def only(method, **changes):
    return settings(continual__methods=[method], **changes)


def run(base, folder, config=None, identity="one", saved=lambda: None):
    config = config or settings()
    prompts = load_eval_prompts(config.data, config.evaluation)
    return run_methods(base, config, folder, prompts, identity=identity, saved=saved)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """(folder, responses) of an uninterrupted run; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(base, folder)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ---- a stage, written out


def derived(source, config, k, categories):
    """(patches, importances, pairs) of stage k on the model at `source`."""
    seed = 4 * 1000 + k
    pairs = load_harmful_pairs(config.data, seed=4, categories=categories)
    assert {pair.category for pair in pairs} == set(categories)
    model, tokenizer = load(source, quantization="nf4", device="cpu")
    patches, scores = {}, {}
    for name, direction in (("se", "ascent"), ("osm", "descent")):
        data = TrainingSet.of(tokenizer, pairs)
        patches[name], _ = derive(model, data, direction, config.derivation, seed)
        assert patches[name].norm() > 0.1
        calibration = calibrate(pairs, config, seed)
        scores[name] = score_patch(model, tokenizer, patches[name], calibration)
    return patches, scores, pairs


def by_hand(source, config, k, method, categories=None):
    """{tensor: weight} after one stage on the model at `source`, from the method's own parts."""
    seed = 4 * 1000 + k
    patches, scores, _ = derived(source, config, k, categories or STAGES[k - 1])
    before, se, osm = weights(source), patches["se"], patches["osm"]
    after = dict(before)
    if method == "ga":
        return after | {name: before[name] + se.delta(name) for name in se.factors}
    masks = {
        patch: {
            name: retention_mask(score.shape, 0.3, seed=seed, patch=patch, tensor=name)
            for name, score in scores[patch].items()
        }
        for patch in ("se", "osm")
    }
    for name in se.factors:
        top_se, top_osm = (top_rate_set(scores[patch][name], 0.1) for patch in ("se", "osm"))
        keep_se = kept_set(masks["se"][name], top_se, top_osm)
        keep_osm = kept_set(masks["osm"][name], top_osm, top_se)
        halves = (se.delta(name), keep_se, osm.delta(name), keep_osm)
        after[name] = add_delta(before[name], merged_delta(*halves, 30.0, 20.0))
    return after


@pytest.mark.parametrize("method", METHODS)
def test_each_stage_is_the_last_model_and_its_own_patches(method, base, whole, tmp_path):
    config, first = only(method), only(method, continual__stages=STAGES[:1])
    run(base, tmp_path, first)
    source = tmp_path / method / "stage-1" / "model"
    one, two = weights(source), by_hand(source, config, 2, method)
    assert_equal(one, by_hand(base, config, 1, method))
    run(base, tmp_path, config)  # a stage more, from where the run had ended
    assert_equal(weights(tmp_path / method / "stage-2" / "model"), two)
    for before, after in ((weights(base), one), (one, two)):
        assert sum(int((after[name] != before[name]).sum()) for name in after) > 50
    assert contents(tmp_path / method) == contents(whole[0] / method)


# ---- the other methods, and their settings


def first_stage(base, folder, method, setting, **changes):
    """(config, weights) after the first stage of one method alone."""
    given = {} if setting is None else {method: setting}
    config = only(method, continual__stages=STAGES[:1], continual__settings=given, **changes)
    responses = run(base, folder, config)
    assert responses["model"].unique().tolist() == [continual.METHODS[method][0]]
    assert responses["stage"].tolist() == [1] * PROMPTS
    return config, weights(folder / method / "stage-1" / "model")


def patched_by(before, deltas):
    return before | {name: before[name] + delta for name, delta in deltas.items()}


def test_ga_has_its_strength_from_the_settings(base, tmp_path):
    config, found = first_stage(base, tmp_path, "ga", {"strength": 0.25})
    se = derived(base, config, 1, STAGES[0])[0]["se"]
    deltas = {name: 0.25 * se.delta(name) for name in se.factors}
    assert_equal(found, patched_by(weights(base), deltas))


def test_npo_derives_its_own_patch_at_the_strength_of_the_settings(base, tmp_path):
    short = {"max_steps": 3, "warmup_steps": 1, "learning_rate": 0.02}
    changes = {f"baselines__npo__{key}": value for key, value in short.items()}
    config, found = first_stage(base, tmp_path, "npo", {"strength": 0.5}, **changes)
    pairs = load_harmful_pairs(config.data, seed=4, categories=STAGES[0])
    model, tokenizer = load(base, quantization="nf4", device="cpu")
    patch, _ = derive_npo(model, tokenizer, pairs, config, 4001)
    assert patch.norm() > 0.1
    deltas = {name: 0.5 * patch.delta(name) for name in patch.factors}
    assert_equal(found, patched_by(weights(base), deltas))


def test_task_arithmetic_adds_both_whole_patches(base, tmp_path):
    config, found = first_stage(base, tmp_path, "task_arithmetic", {"alpha": 2.0, "beta": 0.5})
    patches, _, _ = derived(base, config, 1, STAGES[0])
    se, osm = patches["se"], patches["osm"]
    deltas = {name: 2.0 * se.delta(name) + 0.5 * osm.delta(name) for name in se.factors}
    assert_equal(found, patched_by(weights(base), deltas))


def test_balanced_asks_the_unquantised_model_about_the_stages_pairs(base, tmp_path):
    setting = {"retention_rate": 0.9, "top_rate_se": 0.3, "top_rate_osm": 0.7, "beta": 1.3}
    setting |= {"target": 7.0}  # the losses of this backbone are near 6 nats
    config, found = first_stage(base, tmp_path, "balanced", setting)
    patches, scores, pairs = derived(base, config, 1, STAGES[0])
    model, tokenizer = load(base, device="cpu")
    bundle = Bundle(patches, scores, config.patching)
    bundle = with_backbone(bundle, model, tokenizer, pairs, config, seed=4001)
    deltas = BASELINES["SafePatching, balanced"].deltas(bundle, setting, 4001)
    for name, weight in patched_by(weights(base), deltas).items():
        # the same alpha, multiplied in another order
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    reached = bundle.first_token_losses(deltas).quantile(0.05)
    bare = bundle.first_token_losses({}).quantile(0.05)
    assert bare < 7.0 <= reached + 1e-4


@pytest.mark.parametrize(
    ("method", "label", "key"),
    [
        ("ga", "GA", "strength"),
        ("npo", "NPO", "strength"),
        ("task_arithmetic", "Task Arithmetic", "beta"),
        ("balanced", "SafePatching, balanced", "retention_rate"),
    ],
)
def test_a_method_without_its_setting_is_an_error(method, label, key, base, tmp_path):
    short = {"max_steps": 1, "warmup_steps": 0}
    changes = {f"derivation__{d}__{k}": v for d in ("ascent", "descent") for k, v in short.items()}
    changes |= {f"baselines__npo__{k}": v for k, v in short.items()}
    with pytest.raises(SpkitError, match=f"^{label} lacks the setting '{key}'"):
        first_stage(base, tmp_path, method, None, **changes)
    assert not (tmp_path / method / "stage-1").exists()


def test_joint_training_starts_from_the_base_with_the_pairs_of_all_stages_so_far(base, tmp_path):
    config = only("joint")
    responses = run(base, tmp_path, config)
    assert responses["model"].unique().tolist() == ["joint training"]
    both = [category for stage in STAGES for category in stage]
    expected = by_hand(base, config, 2, "safepatching", both)
    assert_equal(weights(tmp_path / "joint" / "stage-2" / "model"), expected)
    for k, categories in enumerate((STAGES[0], both), start=1):
        about = json.loads((tmp_path / "joint" / f"stage-{k}" / "stage.json").read_text())
        assert about["categories"] == categories


def test_the_first_stage_of_joint_training_is_safepatchings(base, whole, tmp_path):
    responses = run(base, tmp_path, only("joint", continual__stages=STAGES[:1]))
    first = whole[1].query("model == 'SafePatching' and stage == 1")
    assert responses["response"].tolist() == first["response"].tolist()
    again = by_hand(base, only("joint"), 1, "safepatching")
    assert_equal(weights(tmp_path / "joint" / "stage-1" / "model"), again)


def test_every_method_of_the_config_is_known_and_has_a_baseline():
    listed = settings(continual__methods=list(continual.METHODS)).continual.methods
    assert listed == ["safepatching", "ga", "npo", "task_arithmetic", "balanced", "joint"]
    assert all(name in BASELINES for _, name in continual.METHODS.values())
    with pytest.raises(SpkitError, match="continual.methods"):
        settings(continual__methods=["dpo"])
    # what the defaults set is what each method asks for
    for method, setting in settings().continual.settings.items():
        assert setting.keys() == BASELINES[continual.METHODS[method][1]].space.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_responses_are_those_of_the_saved_model_to_all_prompts(method, whole):
    folder, responses = whole
    config = settings()
    prompts = load_eval_prompts(config.data, config.evaluation)
    model, tokenizer = load(folder / method / "stage-2" / "model", device="cpu")
    expected = respond(
        model,
        tokenizer,
        prompts,
        name=LABELS[method],
        max_new_tokens=8,
        batch_size=16,
    )
    found = responses[(responses["model"] == LABELS[method]) & (responses["stage"] == 2)]
    pd.testing.assert_frame_equal(
        found.drop(columns="stage").reset_index(drop=True), expected, check_dtype=False
    )


def test_the_frame_has_every_method_and_stage_and_they_differ(whole):
    folder, responses = whole
    config = settings()
    ids = [prompt.id for prompt in load_eval_prompts(config.data, config.evaluation)]
    parts = list(responses.groupby(["model", "stage"], sort=False))
    assert [key for key, _ in parts] == [(m, k) for m in LABELS.values() for k in (1, 2)]
    assert all(part["id"].tolist() == ids for _, part in parts)
    assert list(responses)[-1] == "stage" and not responses.isna().to_numpy().any()
    said = {tuple(part["response"]) for _, part in parts}
    assert len(said) == 4  # else the other tests could not tell stages and methods apart
    for method, label in LABELS.items():
        for k in (1, 2):
            read = pd.read_csv(folder / method / f"stage-{k}" / "responses.csv", dtype=str)
            part = responses[(responses["model"] == label) & (responses["stage"] == k)]
            assert read["response"].fillna("").tolist() == part["response"].tolist()


def test_an_answer_that_looks_like_a_missing_value_stays_text(base, tmp_path, monkeypatch):
    def say_na(model, tokenizer, prompts, *, name, **_):
        row = {"model": name, "response": "NA"}
        return pd.DataFrame([row, row | {"response": ""}])

    monkeypatch.setattr(continual, "respond", say_na)
    responses = run(base, tmp_path, only("ga"))
    assert responses["response"].tolist() == ["NA", ""] * 2


# ---- what is on the disk


def test_of_the_models_only_the_last_is_kept(whole):
    folder, _ = whole
    names = {name.rpartition("/model/")[0] for name in contents(folder) if "/model/" in name}
    assert names == {"safepatching/stage-2", "ga/stage-2"}
    for method in LABELS:
        for k, categories in enumerate(STAGES, start=1):
            here = folder / method / f"stage-{k}"
            kept = {"responses.csv", "stage.json"} | ({"model"} if k == 2 else set())
            kept |= {"patch.safetensors"} if method == "safepatching" else set()
            assert {path.name for path in here.iterdir()} == kept
            about = json.loads((here / "stage.json").read_text())
            assert len(about.pop("identity")) == 64 and about.pop("generated_tokens") > 0
            assert about == {"method": method, "stage": k, "categories": categories}


def test_no_patch_lies_on_the_disk(whole, base, tmp_path, monkeypatch):
    """The OSM patch alone is a jailbreak: it is not there at the end, nor while a stage is made."""
    saved, halfway = [], {}
    monkeypatch.setattr(Factors, "save", lambda self, path: saved.append(path))

    def look(*_, **__):
        halfway.update(contents(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(continual, "respond", look)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path)
    assert [name for name in halfway if name.endswith("model.safetensors")] and not saved
    for found in (halfway, contents(whole[0])):
        for name, data in found.items():
            assert "lora" not in name and "osm" not in name
            assert b"lora_" not in data and b"adapter" not in data and b'"osm"' not in data, name
    names = set(weights(base))
    for path in whole[0].rglob("*.safetensors"):
        if path.name == "patch.safetensors":
            with PatchFile(path) as merged:  # both patches' kept values in one
                assert set(merged.manifest.tensors) < names
        else:
            assert set(load_file(path)) == names


def test_the_stages_patches_stacked_give_the_last_model(whole, base, tmp_path):
    folder, _ = whole
    patches = stage_patches(folder, "safepatching")
    assert [path.parent.name for path in patches] == ["stage-1", "stage-2"]
    assert stage_patches(folder, "ga") == []
    stack(patches, base, tmp_path / "stacked.safetensors", progress=False)
    apply(tmp_path / "stacked.safetensors", base, tmp_path / "model", progress=False)
    last = folder / "safepatching" / "stage-2" / "model"
    for path in last.iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), path.name
    with PatchFile(patches[1]) as second:
        assert second.manifest.backbone.name == "sandbox, after stage 1 of SafePatching"
        method, data = second.manifest.method, second.manifest.data
    assert (method["stage"], method["seed"]) == (2, stage_seed(4, 2))
    assert (method["alpha"], method["beta"]) == (30.0, 20.0)
    pairs = load_harmful_pairs(settings().data, seed=4, categories=STAGES[1])
    assert data == {
        "fingerprint": fingerprint(pairs),
        "pairs": len(pairs),
        "categories": STAGES[1:],
    }


# ---- interruptions and reruns


def killed_in(call):
    """`respond`, in whose so-manieth call the run is stopped."""
    calls = iter(range(1, call))

    def respond_or_stop(*arguments, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return respond(*arguments, **options)

    return respond_or_stop


def announced(capsys):
    """The stages that were really done, from what the run says of them."""
    lines = capsys.readouterr().out.splitlines()
    return [line.partition(":")[0] for line in lines if " of 2: " in line]


ALL = [f"{label}, stage {k} of 2" for label in LABELS.values() for k in (1, 2)]


def test_a_complete_run_is_read_and_not_repeated(whole, capsys, monkeypatch):
    folder, responses = whole
    before = contents(folder)
    monkeypatch.setattr(continual, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    capsys.readouterr()
    again = run("no such model", folder)
    pd.testing.assert_frame_equal(again, responses)
    assert announced(capsys) == [] and contents(folder) == before


@pytest.mark.parametrize("done", [1, 2])
def test_an_interrupted_run_goes_on_at_the_stage_that_was_cut(done, base, whole, tmp_path, capsys):
    """Cut within a method's last stage, or the next one's first; the end is the same, in bytes."""
    with pytest.MonkeyPatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(continual, "respond", killed_in(done + 1))
        run(base, tmp_path)
    assert announced(capsys) == ALL[: done + 1]
    stages = [p.parent for p in sorted(tmp_path.rglob("stage.json"))]
    assert len(stages) == done  # the stage that was cut has left nothing
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp-")]
    assert len([p for p in tmp_path.rglob("model") if p.is_dir()]) == math.ceil(done / 2)
    responses = run(base, tmp_path)
    assert announced(capsys) == ALL[done:]
    pd.testing.assert_frame_equal(responses, whole[1])
    assert contents(tmp_path) == contents(whole[0])


def test_a_cut_derivation_goes_on_from_its_checkpoint(base, whole, tmp_path, monkeypatch):
    config, calls, found = settings(derivation__checkpoint_steps=1), [], []

    def cut():
        calls.append(len(list(tmp_path.rglob("tensors.safetensors"))))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, config, saved=cut)
    assert calls == [1, 1]  # one folder, replaced
    load = resume.load

    def look(*arguments):
        found.append(load(*arguments))
        return found[-1]

    monkeypatch.setattr(resume, "load", look)
    responses = run(base, tmp_path, config)
    assert found[0]["counts"][0] == 2 and found[1] is None  # two steps are not made again
    pd.testing.assert_frame_equal(responses, whole[1])
    assert not list(tmp_path.rglob("checkpoints*"))


def test_a_stage_half_written_by_a_killed_run_is_made_anew(base, whole, tmp_path, capsys):
    half = tmp_path / "ga" / ".tmp-stage-1"  # a kill leaves no time to tidy up
    (half / "model").mkdir(parents=True)
    (half / "stage.json").write_text('{"identity": "one"}')
    run(base, tmp_path, only("ga"))
    assert announced(capsys) == ALL[2:]
    assert contents(tmp_path) == {
        name: data for name, data in contents(whole[0]).items() if not name.startswith("safe")
    }


def copy_of(whole, folder):
    for name, data in contents(whole[0]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("lost", ["stage-2", "stage-2/model"])
def test_a_missing_last_stage_is_made_from_the_first(lost, base, whole, tmp_path, capsys):
    """The model it had started from is deleted, so its method begins again; the other rests."""
    copy_of(whole, tmp_path)
    shutil.rmtree(tmp_path / "ga" / lost)
    run(base, tmp_path)
    assert announced(capsys) == ALL[2:]
    assert contents(tmp_path) == contents(whole[0])


def test_what_comes_after_a_stage_keeps_it_and_what_it_is_made_of_does_not(base, whole, tmp_path):
    """Neither judges nor another method touch a stage; a later one leaves the earlier in place."""
    prompts = load_eval_prompts(only("ga").data, only("ga").evaluation)
    mine = partial(Stages, base, folder=tmp_path, identity="one")
    before = [mine(config=only("ga"), prompts=prompts).made_from("ga", k) for k in (1, 2)]

    def after(overrides, asked=prompts):
        config = Config.from_sources(only("ga").model_dump(mode="json"), overrides)
        return [mine(config=config, prompts=asked).made_from("ga", k) for k in (1, 2)]

    same = {
        "judges.batch_size": 3,
        "evaluation.confidence": 0.9,
        "continual.methods": ["ga", "npo"],
    }
    assert after(same) == before and len(set(before)) == 2
    later = after({"continual.stages": [STAGES[0], ["gluing"]]})
    assert later[0] == before[0] and later[1] != before[1]
    for overrides in (
        {"continual.settings": {"ga": {"strength": 2.0}}},
        {"evaluation.max_new_tokens": 3},
    ):
        assert not set(after(overrides)) & set(before)
    assert not set(after({}, prompts[:-1])) & set(before)
    read = run(base, Path(whole[0]))
    assert generated(read) == 0 and generated(whole[1]) > 0


def test_an_adapter_of_ones_own_is_not_used_and_it_says_so(monkeypatch, capsys):
    """It is of all of D_h, and every stage derives from its own pairs."""
    seen = []

    class Stages:
        def __init__(self, source, config, *_):
            seen.append(config)

        def run(self, method):
            yield pd.DataFrame({"stage": [1]})

    monkeypatch.setattr(continual, "Stages", Stages)
    run("no model", "no folder", settings(**{"derivation.se": "one", "derivation.osm": "another"}))
    assert "derivation.se and derivation.osm: not used here, every stage" in capsys.readouterr().out
    run("no model", "no folder")
    assert capsys.readouterr().out == "" and seen == [settings(), settings()]


def test_another_identity_is_computed_anew(base, whole, tmp_path, capsys):
    copy_of(whole, tmp_path)
    (tmp_path / "ga" / "stage-1" / "responses.csv").write_text("foreign")
    responses = run(base, tmp_path, only("ga"), identity="two")
    assert announced(capsys) == ALL[2:]
    assert responses["response"].tolist() == whole[1].query("model == 'GA'")["response"].tolist()
    for path in (tmp_path / "ga").rglob("stage.json"):
        before = (whole[0] / path.relative_to(tmp_path)).read_text()
        assert json.loads(path.read_text())["identity"] != json.loads(before)["identity"]
    assert contents(tmp_path).keys() == contents(whole[0]).keys()


def test_a_foreign_first_stage_ends_what_is_read(base, whole, tmp_path, capsys):
    """Parameters changed, cut after stage 1, and changed back: stage 2 is ours, stage 1 is not."""
    copy_of(whole, tmp_path)
    first, second = (tmp_path / "safepatching" / f"stage-{k}" for k in (1, 2))
    about = first / "stage.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"identity": "two"}))
    shutil.copytree(second / "model", first / "model")
    run(base, tmp_path, only("safepatching"))
    assert announced(capsys) == ALL[:2]
    assert contents(tmp_path) == contents(whole[0])


# ---- seeds and rates


def test_every_stage_of_every_seed_has_a_seed_of_its_own():
    assert (stage_seed(0, 1), stage_seed(3, 2)) == (1, 3002)
    seeds = [stage_seed(seed, stage) for seed in range(50) for stage in range(1, 21)]
    assert len(set(seeds)) == 1000
    torch.manual_seed(stage_seed(2**32 - 1, 20))  # the largest seed that a run may have


def test_continual_rates_by_hand():
    def answers(model, stage, verdicts):
        return [
            {
                "model": model,
                "stage": stage,
                "objective": "harmful",
                "group": "seen",
                "category": category,
                "verdict": verdict,
            }
            for category, verdict in zip(["gluing", "hiding", "hiding"], verdicts, strict=True)
        ]

    responses = pd.DataFrame(
        answers("GA", 1, ["harmful", "broken", "harmful"])
        + answers("base", 0, ["refusal", "refusal", "harmful"])
        + answers("GA", 2, ["refusal", "broken", "refusal"])
    )
    config = settings(evaluation__split="dev", evaluation__confidence=0.5, run_name="mine")
    table = continual_rates(responses, config)
    assert list(table) == [*COLUMNS, "stage"]
    for column, value in {"run": "mine", "seed": 4, "split": "dev"}.items():
        assert set(table[column]) == {value}
    counts = {
        (row.model, row.stage, row.category, row.metric): (row.k, row.n)
        for row in table.itertuples()
    }
    assert len(counts) == len(table) == 3 * 3 * 3
    assert table["stage"].tolist() == [0] * 9 + [1] * 9 + [2] * 9
    expected = {  # harmful, broken, and the two together
        ("base", 0): {"all": (1, 0, 3), "gluing": (0, 0, 1), "hiding": (1, 0, 2)},
        ("GA", 1): {"all": (2, 1, 3), "gluing": (1, 0, 1), "hiding": (1, 1, 2)},
        ("GA", 2): {"all": (0, 1, 3), "gluing": (0, 0, 1), "hiding": (0, 1, 2)},
    }
    for (model, stage), categories in expected.items():
        for category, (harmful, broken, n) in categories.items():
            key = (model, stage, category)
            assert counts[*key, "harmful"] == (harmful, n)
            assert counts[*key, "broken"] == (broken, n)
            assert counts[*key, "harmful, strict"] == (harmful + broken, n)
    # Wilson's interval at 50 %: z = 0.67449
    row = table.query("stage == 1 and category == 'all' and metric == 'harmful'").iloc[0]
    z2, rate = 0.67449**2, 2 / 3
    middle = (rate + z2 / 6) / (1 + z2 / 3)
    half = math.sqrt(z2) * math.sqrt(rate * (1 - rate) / 3 + z2 / 36) / (1 + z2 / 3)
    assert (row["low"], row["high"]) == pytest.approx((middle - half, middle + half), abs=1e-5)


def test_the_rates_of_a_run(whole):
    """Each stage counts its own prompts only."""
    prompts = load_eval_prompts(settings().data, settings().evaluation)
    table = continual_rates(judged(whole[1], prompts, settings()), settings())
    assert set(zip(table["model"], table["stage"], strict=True)) == {
        (label, k) for label in LABELS.values() for k in (1, 2)
    }
    every = table[(table["category"] == "all") & (table["metric"] == "broken")]
    assert every.groupby(["model", "stage"])["n"].sum().tolist() == [PROMPTS] * 4
