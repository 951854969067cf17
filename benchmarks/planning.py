"""Planned, not measured: memory and hours for 13, 70 and 405 billion weights. Nothing is loaded.

    python benchmarks/planning.py                      the tables of docs/planning.md, in a second
    python benchmarks/planning.py --device a100 --set evaluation.max_new_tokens=128
    python benchmarks/planning.py --measured           predictions beside what was measured
    python benchmarks/planning.py --cpu                this machine's numbers, for the model of time
    python benchmarks/planning.py --into docs/planning.md      fill the page's tables

The parameters are those of params/llama2-7b-chat.yaml, but for LARGE. The assumptions stand in
spkit/running/memory.py and spkit/running/forecast.py, and on the page.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from spkit.config import Config, load_params
from spkit.running import memory
from spkit.running.forecast import DEVICES, STAGES, device_named, forecast, seconds
from spkit.running.widths import planned_shape
from spkit.sweeps.forecast import gpus_for
from spkit.sweeps.run import forecast as plan
from spkit.validation import read_value

SHAPES = ("llama2-13b", "llama2-70b", "llama3.1-405b")
PARAMS = "params/llama2-7b-chat.yaml"
LARGE = {  # one pair and one layer at a time
    "backbone.revision": None,
    "backbone.device": "balanced",
    "derivation.micro_batch_size": 1,
    "importance.layers_per_pass": 1,
}
# Seconds in the records of runs on two cores (AMD EPYC) while nothing else ran: the sandbox at
# commit bcd82d0, SmolLM2 at 3e694cc. steps: of the ascent, which ended at its ceiling.
MEASURED = {
    "params/sandbox.yaml": (112, (7.3, 20.4, 6.3, 22.6, 64.3)),
    "params/smollm2-135m.yaml": (21, (89.9, 99.6, 56.7, 232.1, 758.7)),
}


def planned(device: str, overrides: dict) -> list[dict]:
    """A row for each shape and notebook."""
    rows = []
    for name in SHAPES:
        config = load_params(PARAMS, {**LARGE, **overrides, "backbone.source": name})
        shape, on = planned_shape(config), device_named(device)
        for stage in STAGES:
            gpus, each = gpus_for(config, shape, stage, on)
            host = memory.predict(config, shape, stage, "balanced", max(1, gpus) * on.memory)
            parts = forecast(config, shape, on, max(1, gpus))[stage]
            own = sum(part.seconds for part in parts if part.host)
            rows.append(
                {
                    "shape": name,
                    "notebook": stage[:2],
                    "GPUs": gpus or "none",
                    "GiB a GPU": round(each, 1),
                    "GiB host": round(host.loc[memory.PEAK, "host GiB"], 1),
                    "hours": round(seconds(parts) / 3600, 1),
                    "of them the host's": round(own / 3600, 1),
                    "longest part": max(parts, key=lambda part: part.seconds).name,
                }
            )
    return rows


def shared(device: str, overrides: dict) -> list[dict]:
    """A row for each shape and number of GPUs: GiB of each in the derivation, both ways."""
    rows, on = [], device_named(device)
    for name in SHAPES:
        config = load_params(PARAMS, {**LARGE, **overrides, "backbone.source": name})
        for gpus in (1, 2, 4, 8):
            own = {
                how: memory.of_each_gpu(
                    config, planned_shape(config), "01_patch_derivation", gpus, on.memory, how
                )
                for how in memory.SPLIT
            }
            rows.append({"shape": name, "GPUs": gpus, **{k: round(v, 1) for k, v in own.items()}})
    return rows


def beside_measured() -> list[dict]:
    """Seconds of every notebook that was measured, predicted for the same steps and threads."""
    rows = []
    for params, (steps, measured) in MEASURED.items():
        config: Config = load_params(params, {"derivation.ascent.max_steps": steps})
        found = forecast(config, planned_shape(config), device_named("cpu", config.threads))
        for (stage, parts), took in zip(found.items(), measured, strict=True):
            own = seconds(parts)
            row = {"run": config.run_name, "notebook": stage[:2], "predicted s": round(own)}
            rows.append(row | {"measured s": round(took), "ratio": round(own / took, 2)})
    return rows


def paper(device: str) -> str:
    """The plan of the paper's grid, as `spkit sweep --plan` prints it."""
    return plan("params/sweeps/paper.yaml", {}, device=device, cores=2)


def publish(page: Path) -> None:
    """Fill the marked blocks of a page, <!-- table: NAME --> to <!-- end -->."""
    blocks = {name: markdown(rows) for name, rows in TABLES.items()}
    blocks["paper"] = f"```\n{paper('a100')}\n```"
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, after = text.partition(start)
        if not found:
            raise SystemExit(f"{page} has no block {name}")
        text = before + found + f"\n{block}\n\n" + end + after.partition(end)[2]
    page.write_text(text, encoding="utf-8")


def markdown(rows: Callable[[], list[dict]]) -> str:
    """A table of the page."""
    return tabulate(rows(), "keys", "pipe", disable_numparse=True)


TABLES = {
    "planned": lambda: planned("h100", {}),
    "shared": lambda: shared("h100", {}),
    "measured": beside_measured,
}


# ---- this machine --------------------------------------------------------------------------------


def best(work: Callable[[], object], times: int = 5) -> float:
    """The shortest of some runs, in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def of_products() -> list[dict]:
    """What one thread of this CPU computes and reads."""
    import torch

    torch.set_num_threads(1)
    one, rows = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)), []
    for matrix in (one, one.bfloat16()):
        rate = 2 * 2048**3 / best(lambda m=matrix: m @ m)
        rows.append({"what": f"products, {matrix.dtype}", "value": rate / 1e9, "unit": "GFLOP/s"})
    long = torch.ones(2**27)
    rate = 4 * len(long) / best(long.sum)
    return [*rows, {"what": "reading", "value": rate / 1e9, "unit": "GB/s"}]


def of_weights() -> list[dict]:
    """What notebooks 02 and 03 do with a weight, on one thread: a matrix of 2048 x 2048."""
    import torch

    from spkit.comparison.ablations import IN_NOTEBOOK_03, ablated
    from spkit.config import PatchingConfig
    from spkit.method.overlap import ImportanceSummary
    from spkit.method.patch import Factors
    from spkit.method.patching import top_rate_set
    from spkit.method.safepatching import SafePatching
    from spkit.method.sets import BitSets

    name, size, generator = "model.layers.0.self_attn.q_proj.weight", 2048, torch.Generator()
    generator.manual_seed(0)

    def factors(patch: str) -> Factors:
        both = (torch.randn(shape, generator=generator) for shape in ((8, size), (size, 8)))
        return Factors(patch, {name: tuple(both)}, 2.0, {"lora": {"r": 8}})

    scores = [{name: torch.rand(size, size, generator=generator)} for _ in ("se", "osm")]
    own = {"retention_rate": 0.3, "top_rate_se": 0.03, "top_rate_osm": 0.02}
    patching = PatchingConfig(**own, balance=None, alpha=1, beta=1)
    sets = []  # a bit a weight, as importance.save: sets keeps them
    for score, rate in zip(scores, (0.03, 0.02), strict=True):
        sets.append(BitSets(about={"top_rate": rate}))
        sets[-1].add(name, top_rate_set(score[name], rate))
    method = SafePatching(factors("se"), factors("osm"), tuple(sets), patching, 0)

    def summed() -> None:
        window = dict(zip(("se", "osm"), scores, strict=True))
        list(ImportanceSummary(used=(0.03, 0.02)).watch(x for x in [window]))

    def variants() -> None:
        for variant in IN_NOTEBOOK_03:
            taken = ablated(method, variant)
            kept = taken.kept()
            taken.strengths(kept)
            [int(part[name].sum()) for part in kept]
            taken.deltas()[name]

    took = {
        "SUMMARY_SECONDS, of each patch": best(summed, 3) / 2,
        "RANK_SECONDS, of each patch": best(lambda: top_rate_set(scores[0][name], 0.03)),
        "VARIANTS_SECONDS": best(variants, 2),
        "DELTA_SECONDS": best(lambda: method.deltas()[name], 3),
        "WHOLE_SECONDS": best(lambda: ablated(method, "plain sum").deltas()[name]),
    }
    return [
        {"what": what, "value": taken / size**2 * 1e9, "unit": "ns a weight"}
        for what, taken in took.items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), default="h100")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--measured", action="store_true", help="predicted beside measured")
    parser.add_argument("--cpu", action="store_true", help="measure this machine's numbers")
    parser.add_argument("--into", type=Path, help="a page whose tables to fill")
    given = parser.parse_args()
    if given.into:
        publish(given.into)
        return
    pairs = (text.partition("=") for text in given.set)
    overrides = {key: read_value(key, value) for key, _, value in pairs}
    if given.cpu:
        tables = [of_products() + of_weights()]
    elif given.measured:
        tables = [beside_measured()]
    else:
        tables = [planned(given.device, overrides), shared(given.device, overrides)]
    for rows in tables:
        print(tabulate(rows, "keys", "pipe", floatfmt=".1f" if given.cpu else "g") + "\n")


if __name__ == "__main__":
    main()
