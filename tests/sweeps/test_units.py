"""What points share is one unit; a changed parameter moves exactly the units that it decides."""

from collections import Counter
from pathlib import Path

import pytest

from spkit.errors import SpkitError
from spkit.sweeps import units as of_sweep
from spkit.sweeps.points import expand
from spkit.sweeps.resources import on_gpu
from spkit.sweeps.run import plan_of
from spkit.sweeps.units import PLANNER, build
from spkit.workflow.plan import planned
from spkit.workflow.units import places

ROOT = Path(__file__).parents[2]


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """A function from the text of a sweep on micro.yaml to (sweep, its graph)."""
    monkeypatch.chdir(ROOT)

    def of(text, **given):
        path = tmp_path / "mine.yaml"
        path.write_text(f"params: params/micro.yaml\n{text}")
        sweep = expand(path, given)
        return sweep, build(sweep)

    return of


def counts(graph):
    return Counter(unit.kind for unit in graph.units)


def test_shared_notebooks_are_one_unit(graph):
    _, found = graph("""
seeds: [0, 1]
grid: {derivation.lora.r: [2, 4], patching.retention_rate: [0.3, 0.6, 1.0]}
""")
    assert counts(found) == {"backbone": 2, "derivation": 4, "importance": 4, "patching": 12}
    assert len(found.chains) == 12 and all(len(chain) == 4 for chain in found.chains)
    by_name = {unit.name: unit for unit in found.units}
    chain = found.chains[0]
    needs = by_name[chain["03_controllable_patching"]].needs
    assert needs == tuple(list(chain.values())[:3])


def test_a_sweep_over_the_evaluation_shares_the_derivation(graph):
    sweep, found = graph("""
grid: {evaluation.prompts_per_cell: [4, 8, 16], data.dev_share: [0.2, 0.3]}
""")
    # the backbone's own answers are those of each point; its patches are behind the params file's
    assert counts(found) == {"backbone": 6, "derivation": 1, "importance": 1, "patching": 6}
    alone, _ = graph("grid: {evaluation.prompts_per_cell: [16]}")
    ours = {chain["01_patch_derivation"] for chain in found.chains}
    assert ours == {build(alone).chains[0]["01_patch_derivation"]}, "whatever else is swept"
    _, parts = graph("""
parts: [{name: a}, {name: b, set: {evaluation.prompts_per_cell: 4}}]
""")
    assert counts(parts) == {"backbone": 2, "derivation": 1, "importance": 1, "patching": 2}
    _, parts = graph("""
parts: [{name: a}, {name: b, set: {evaluation.prompts_per_cell: 4}, grid: {data.pairs: [6, 8]}}]
""")
    assert counts(parts) == {"backbone": 3, "derivation": 3, "importance": 3, "patching": 3}
    _, other = graph("""
grid: {data.pairs: [8, 12], utility.batch_size: [4, 8]}
last: 04_continual_psa
""")
    # notebook 04 does not look at utility, and needs the backbone of its data alone
    assert counts(other)["derivation"] == 2 and counts(other)["continual"] == 2
    assert counts(other)["patching"] == 4 and len(sweep.points) == 6


def moved(before, after):
    """Kinds of which no unit of `before` has the same folder in `after`."""
    old, new = (places(found.units, "units") for found in (before, after))
    kinds = {unit.kind for unit in before.units}
    same = {path.parts[1] for path in set(old.values()) & set(new.values())}
    return kinds - same


def test_a_parameter_moves_the_units_that_it_decides(graph):
    text = "grid: {patching.retention_rate: [0.3, 0.6]}"
    _, before = graph(text)
    everything = {"backbone", "derivation", "importance", "patching"}
    for key, value, kinds in (
        ("patching.beta", 1.0, {"patching"}),
        ("importance.samples", 4, {"importance", "patching"}),
        ("derivation.lora.alpha", 2.0, {"derivation", "importance", "patching"}),
        ("sandbox.layers", 1, everything),
        ("threads", 2, set()),
    ):
        assert moved(before, graph(text, **{key: value})[1]) == kinds, key


def test_changed_code_moves_what_is_downstream(graph, monkeypatch):
    text = "grid: {patching.retention_rate: [0.3, 0.6]}"
    _, before = graph(text)
    real = of_sweep.code_of

    def changed(config, stage):
        more = {"spkit/method/new.py": "1"} if stage == "01_patch_derivation" else {}
        return {**real(config, stage), **more}

    monkeypatch.setattr(of_sweep, "code_of", changed)
    _, after = graph(text)
    assert [u.name for u in before.units] == [u.name for u in after.units]
    assert moved(before, after) == {"derivation", "importance", "patching"}


def test_points_that_differ_in_nothing_a_notebook_reads_are_told(graph):
    with pytest.raises(SpkitError, match="differ in nothing that a notebook up to 03_contr"):
        graph("grid: {tuning.trials: [1, 2]}")
    with pytest.raises(SpkitError, match=r"points 1 \(continual.methods=\['ga'\], seed 0"):
        graph("grid: {continual.methods: [[ga], [safepatching]]}")
    _, found = graph("grid: {continual.methods: [[ga], [safepatching]]}\nlast: 04_continual_psa")
    assert counts(found)["continual"] == 2 and counts(found)["patching"] == 1


def test_a_job_plans_the_same_folders_and_units_have_resources(graph):
    sweep, _ = graph("grid: {patching.retention_rate: [0.3, 0.6]}")
    plan = plan_of(sweep).plan
    again = planned(PLANNER, plan.given)
    assert places(again, plan.root / "units") == plan.places
    assert again == plan.units
    for unit in again:  # a job asks for its own
        few = of_sweep.planned(plan.given, unit.name)
        assert unit in few and len(few) == 4
        assert places(few, plan.root / "units").items() <= plan.places.items()
        assert unit.memory_mib >= 2048 and unit.seconds > 0 and (unit.threads, unit.gpus) == (1, 0)


def test_a_cluster_gives_a_gpu_where_the_parameters_can_use_one(graph):
    sweep, _ = graph("grid: {backbone.device: [auto, cpu, 'cuda:1']}")
    assert [on_gpu(point.config, cluster=True) for point in sweep.points] == [False, False, True]
    real = sweep.points[0].config.backbone.model_copy(update={"source": "owner/name"})
    config = sweep.points[0].config.model_copy(update={"backbone": real})
    assert on_gpu(config, cluster=True)
