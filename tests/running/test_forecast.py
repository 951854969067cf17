"""The forecast of times: passes, steps, windows and answers, each counted by hand."""

import math
from dataclasses import replace

import pytest

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.method import balancing
from spkit.models import heads
from spkit.running import memory
from spkit.running.forecast import (
    DEVICES,
    OTHER_TASK,
    STAGES,
    TASKS,
    Clock,
    Device,
    device_named,
    forecast,
    prompts,
    seconds,
    seconds_of,
    sized,
)
from spkit.running.widths import PUBLIC, Widths, planned_shape

INF = math.inf
# a layer: q, o 8 x 8; k, v 4 x 8; three of 16 x 8: 576 weights, so 1152; lm_head 10 x 8
TINY = Widths(8, 2, 16, 2, 1, 4, 10).shape()
FLOPS = Device("one", 1.0, 1.0, 1.0, INF, INF, 0.0, 0.0)  # counts FLOPs
BYTES = Device("one", INF, INF, 1.0, 1.0, INF, 0.0, 0.0)  # counts bytes
LAYERS = Device("one", INF, INF, 1.0, INF, INF, 1.0, 0.0)  # counts layers
PLAIN = {"derivation.quantization": "none", "data.harmful": "pairs.jsonl", "data.max_tokens": 16}


def clock(device, **over):
    config = Config.from_sources({}, {**PLAIN, **over})
    return Clock(replace(sized(config, TINY, device), free=10**9), device)


def test_a_pass_is_flops_bytes_and_layers():
    # 5 tokens: 2 a weight of 1152 + 80, and attention: 4 x length 3 x width 8 in 2 layers
    assert clock(FLOPS).passed(5, 3) == 5 * 2 * 1232 + 5 * 4 * 3 * 8 * 2
    assert clock(FLOPS).passed(5, 3, times=3) == 3 * clock(FLOPS).passed(5, 3)
    assert clock(BYTES).passed(5, 3) == 4 * 1152 + 4 * 80  # fp32
    nf4 = clock(BYTES, **{"derivation.quantization": "nf4"})
    assert nf4.passed(5, 3, times=1) == pytest.approx((memory.NF4 + 8) * 1152 + 4 * 80)
    assert nf4.passed(5, 3) == 4 * 1152 + 4 * 80  # the model that answers is not quantised
    assert clock(LAYERS).passed(5, 3) == 2


def test_the_model_that_answers_has_a_dtype_of_its_own():
    device = replace(FLOPS, half=2.0)
    half = clock(device, **{"evaluation.dtype": "bfloat16"})
    assert half.passed(5, 3) == clock(FLOPS).passed(5, 3) / 2
    assert half.passed(5, 3, times=1) == clock(FLOPS).passed(5, 3)


def test_steps_are_micro_batches_of_forward_backward_and_once_more():
    plain = clock(LAYERS, **{"derivation.micro_batch_size": 4})
    assert plain.trained(10, 16) == 10 * 4 * 2 * 2  # micro-batches x passes x layers
    again = {"derivation.micro_batch_size": 4, "derivation.gradient_checkpointing": True}
    assert clock(LAYERS, **again).trained(10, 16) == 10 * 4 * 3 * 2
    assert clock(LAYERS).trained(10, 16) == 10 * 2 * 2


def test_windows_start_from_what_was_stored():
    own = {"importance.samples": 6, "importance.batch_size": 2}
    assert clock(LAYERS, **own).scored() == 2 * 3 * 2 * 2  # patches x batches x passes x layers
    windows = clock(LAYERS, **own, **{"importance.layers_per_pass": 1})
    assert windows.scored() == 2 * 3 * 2 * (2 + 1)  # the second window passes one layer
    backbone = clock(LAYERS, **own, **{"importance.scored_model": "backbone"})
    assert backbone.scored() == 3 * 2 * 2


def test_each_sample_has_a_product_for_every_weight():
    own = {"importance.samples": 1, "importance.batch_size": 1}
    passes = clock(FLOPS, **own).passed(16, 16, times=2)
    assert clock(FLOPS, **own).scored() == 2 * (passes + 2 * 16 * 1152)
    read = clock(BYTES, **own).passed(16, 16, times=2)
    assert clock(BYTES, **own).scored() == 2 * (read + 24 * 1152)


def test_answers_are_a_prefill_and_a_pass_for_every_token():
    assert clock(LAYERS).asked(10, 4, 7, 5) == 3 * (1 + 5) * 2  # three batches
    own = clock(BYTES)
    weights, cache = 4 * 1152 + 4 * 80, 4 * (7 + 2.5) * 2 * 2 * 4 * 4  # rows, tokens, layers, k v
    assert own.asked(4, 4, 7, 5) == weights + 5 * (weights + cache)
    nf4 = clock(BYTES, **{"evaluation.quantization": "nf4"})
    more = 2 * 4 * 1152 + (4 + 4) * 0.25 * 1152  # the delta is made dense, and read
    assert nf4.asked(4, 4, 7, 0, 0.25) == pytest.approx(nf4.asked(4, 4, 7, 0) + more)


def test_prompts_are_counted_without_reading_them():
    def count(**over):
        return prompts(Config.from_sources({}, over))

    named = {"data.evaluation": ["advbench", "xstest"]}
    named["data.sources"] = {
        name: {"reader": name, "path": "x.csv"} for name in named["data.evaluation"]
    }
    assert count() == 1200
    assert count(**{"evaluation.prompts_per_cell": 40}) == 160
    assert count(**named) == 416 + 200  # 80 % of 520 and of 250
    assert count(**named, **{"evaluation.split": "dev"}) == 104 + 50
    assert count(**named, **{"evaluation.prompts_per_cell": 300}) == 300 + 200
    shares = {"data.harmful": "advbench", "data.shares": {"align": 0.2, "harmful": 0.35}}
    assert count(**named, **shares) == 156 + 200  # 1 - 0.2 - 0.35 - 0.15


def test_tasks_are_limited_part_by_part():
    u = {"utility.batch_size": 1, "utility.perplexity_texts": 1}
    none = clock(LAYERS, **u)
    asked = {name: clock(LAYERS, **u, **{"utility.tasks": [name]}) for name in ("mmlu", "piqa")}
    limited = clock(LAYERS, **u, **{"utility.tasks": ["mmlu"], "utility.limit": 10})
    base = none.measured(0.0)
    assert limited.measured(0.0) - base == 57 * 10 * 2
    assert asked["mmlu"].measured(0.0) - base == 57 * math.ceil(14042 / 57) * 2
    assert asked["piqa"].measured(0.0) - base == 2 * 1838 * 2
    assert "unheard" not in TASKS and OTHER_TASK.requests == 4


def test_more_steps_take_longer_and_only_where_they_are_taken():
    shape, device = PUBLIC["llama2-7b"].shape(), DEVICES["h100"]
    source = {"backbone": {"source": "llama2-7b"}, "evaluation": {"quantization": "nf4"}}
    one = forecast(Config.from_sources(source), shape, device)
    more = {"derivation.descent.max_steps": 120}
    two = forecast(Config.from_sources(source, more), shape, device)
    assert {s for s in STAGES if seconds(one[s]) != seconds(two[s])} == {
        "01_patch_derivation",
        "04_continual_psa",
    }
    first = {part.name: part.seconds for part in one["01_patch_derivation"]}
    second = {part.name: part.seconds for part in two["01_patch_derivation"]}
    assert second["descent"] == pytest.approx(2 * first["descent"])
    given = {"derivation.se": "adapter"}
    third = forecast(Config.from_sources(source, given), shape, device)["01_patch_derivation"]
    assert [part.name for part in third] == ["start", "loading", "descent"]


def test_devices_are_named():
    assert device_named("cpu", 4).single == 4 * DEVICES["cpu"].single
    assert device_named("t4", 4) == DEVICES["t4"]
    with pytest.raises(SpkitError, match="device is 'tpu', allowed: t4"):
        device_named("tpu")


def test_seconds_of_a_notebook_whose_backbone_is_known():
    config = Config()
    parts = forecast(config, planned_shape(config), DEVICES["cpu"])["00_backbone"]
    assert seconds_of(config, "00_backbone", "cpu") == sum(part.seconds for part in parts) > 6
    unknown = Config.from_sources({}, {"backbone.source": "who/knows"})
    assert seconds_of(unknown, "00_backbone", "cpu") is None


def test_one_gpu_of_one_holds_what_the_predictor_says():
    config = Config.from_sources({}, {"backbone.source": "llama2-7b", "data.max_tokens": 512})
    config = Config.from_sources(config.model_dump(), {"importance.layers_per_pass": 2})
    shape = PUBLIC["llama2-7b"].shape()
    for stage in ("01_patch_derivation", "02_importance_analysis", "03_controllable_patching"):
        whole = memory.predict(config, shape, stage, "cuda").loc["peak", "GPU GiB"]
        assert memory.of_each_gpu(config, shape, stage, 1, 80e9) == pytest.approx(whole)
    two = memory.of_each_gpu(config, shape, "derivation", 2, 80e9)
    table = memory.predict(config, shape, "derivation", "cuda")["GPU GiB"]
    split = sum(table.get(part, 0.0) for part in memory.SPLIT["balanced"])
    alone = table["logits and loss"] if "logits and loss" in table else table[memory.MATRIX]
    assert two == pytest.approx(0.5 + 1.05 * (split / 2 + alone), rel=0.02)


def test_what_memory_says_of_the_method_without_torch_is_so():
    assert memory.AT_ONCE == balancing.AT_ONCE
    assert memory.SMALL_HEAD == heads.SMALL
