"""The plan of a sweep: what is shared, and sums over units, by numbers that can be checked."""

import pytest

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running.forecast import DEVICES, forecast, seconds
from spkit.running.sizes import written_by
from spkit.running.widths import planned_shape
from spkit.sweeps.forecast import Work, duration, gpus_for, left_by, planned, table

SANDBOX = Config()
SEVEN = Config.from_sources(
    {"derivation": {"micro_batch_size": 1}},
    {"backbone.source": "llama2-7b", "data.max_tokens": 512},
)


def test_what_points_share_is_counted_once():
    work = [Work("00_backbone", SANDBOX, 3), Work("01_patch_derivation", SANDBOX, 2)]
    work.append(Work("01_patch_derivation", SANDBOX, 1))
    said = table("mine", range(3), work, "cpu")
    assert said.startswith("mine: 3 points, 3 notebooks to run (6 if points shared nothing)")
    line = next(line for line in said.splitlines() if "01 patch derivation" in line)
    assert line.split()[3:5] == ["2", "1"]  # units, shared


def test_each_backbone_has_a_section():
    work = [Work("00_backbone", config) for config in (SANDBOX, SEVEN, SANDBOX)]
    first, sandbox, seven, sums = table("mine", work, work).split("\n\n")
    assert sandbox.startswith("sandbox, 1,887,168 weights, on cpu, 1 threads")
    assert seven.startswith("llama2-7b, 6.74 billion weights, on a100")
    assert sums.startswith("a100: ") and "\ncpu: " in sums


def test_rows_are_sums_and_largest_ones():
    shape, device = planned_shape(SANDBOX), DEVICES["cpu"]
    longer = Config.from_sources({}, {"derivation.descent.max_steps": 600, "seed": 7})
    work = [Work("01_patch_derivation", c) for c in (SANDBOX, longer, longer)]
    (row,) = planned(work, shape, device).values()
    one, other = (
        seconds(forecast(c, shape, device)["01_patch_derivation"]) for c in (SANDBOX, longer)
    )
    assert other > one and row.longest == other
    assert row.seconds == pytest.approx(one + 2 * other)
    assert row.bytes == 3 * written_by(SANDBOX, shape)["01_patch_derivation"]
    assert (row.units, row.gpus, row.device) == (3, 1, 0.0)


def test_a_sweep_keeps_patches_and_no_patched_models():
    shape = planned_shape(SEVEN)
    whole = 2 * 6_738_415_616
    assert left_by("03_controllable_patching", SEVEN, shape) == pytest.approx(0.05 * whole)
    # two methods: the last model of each, and one that is being written
    assert left_by("04_continual_psa", SEVEN, shape) == 3 * whole
    assert left_by("00_backbone", SEVEN, shape) == 0


def test_gpu_hours_are_hours_times_gpus():
    shape = planned_shape(SEVEN)
    hours = seconds(forecast(SEVEN, shape, DEVICES["a100"])["01_patch_derivation"]) / 3600
    work = [Work("01_patch_derivation", SEVEN)] * 100
    said = table("mine", work, work, "a100")
    assert f"a100: {100 * hours:,.0f} GPU-hours" in said and "cpu:" not in said
    assert table("mine", work, work) == said  # auto: too large for a CPU
    assert "h100:" in table("mine", work, work, "h100")


def test_only_what_needs_more_gpus_is_counted_with_more():
    shape, device = planned_shape(SEVEN), DEVICES["t4"]
    whole = Config.from_sources(SEVEN.model_dump(), {"derivation.quantization": "none"})
    work = [Work("01_patch_derivation", c) for c in (SEVEN, whole)]
    (row,) = planned(work, shape, device).values()
    gpus = gpus_for(whole, shape, "01_patch_derivation", device)[0]
    one = seconds(forecast(SEVEN, shape, device)["01_patch_derivation"])
    other = seconds(forecast(whole, shape, device, gpus)["01_patch_derivation"])
    assert row.gpus == gpus > 1 and row.used == pytest.approx(one + gpus * other)


def test_a_model_too_large_for_one_gpu_gets_more_of_them():
    large = Config.from_sources(SEVEN.model_dump(), {"backbone.source": "llama3.1-405b"})
    gpus, each = gpus_for(large, planned_shape(large), "01_patch_derivation", DEVICES["h100"])
    assert 2 < gpus < 8 and each < 79
    assert gpus_for(SEVEN, planned_shape(SEVEN), "01_patch_derivation", DEVICES["h100"])[0] == 1


def test_cores_shorten_a_cpus_time_down_to_the_longest_point():
    work = [Work("00_backbone", SANDBOX)] * 100
    one = seconds(forecast(SANDBOX, planned_shape(SANDBOX), DEVICES["cpu"])["00_backbone"])
    assert f"cpu: {duration(50 * one)} on 2 cores, 2 at a time" in table("x", work, work, cores=2)
    assert f"cpu: {duration(one)} on 500 cores, 500 at a time" in table("x", work, work, cores=500)


def test_what_cannot_be_planned_is_told():
    unknown = Config.from_sources({}, {"backbone.source": "who/knows"})
    with pytest.raises(SpkitError, match="'who/knows', whose sizes are not known"):
        table("x", [], [Work("00_backbone", unknown)])
    with pytest.raises(SpkitError, match="device is 'abacus', allowed"):
        table("x", [], [Work("00_backbone", SANDBOX)], "abacus")
