"""What each part of a GPU session measures; gpu_session.py runs one part a process.

    python benchmarks/gpu_parts.py derivation --rehearse

Parameters are those of params/llama2-7b-chat.yaml with few steps, samples and prompts; the weights
are random. Every part can run alone: what an earlier one would have left is made where it is
missing (gpu_bench.py).
"""

import argparse
import copy
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_bench import (
    GIB,
    RANKED_LAYERS,
    ROOT,
    Bench,
    Marks,
    bench_of,
    checkpoint,
    first_layers,
    layers_of,
    loaded,
    patches,
    peaks,
    safepatching,
    seconds,
)
from gpu_session import PARTS, missing
from torch.optim.optimizer import register_optimizer_step_post_hook

from spkit.errors import SpkitError
from spkit.running.memory import CONTEXT, PEAK, kept_share, predict
from spkit.system.machine import hardware, versions

ONE_BY_ONE = 2  # prompts
NOTEBOOKS = (
    "00_backbone 01_patch_derivation 02_importance_analysis 03_controllable_patching".split()
)
ENDS = ("pad", "bos", "eos")


def environment(bench: Bench) -> None:
    """What the figures are of."""
    if bench.cuda:
        found = torch.cuda.get_device_properties(0)
        bench.figure("GPU memory", found.total_memory / GIB, "GiB")
        bench.figure("compute capability", f"{found.major}.{found.minor}")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        bench.figure("bfloat16 in hardware", "yes" if native else "no")
        bench.figure("GPUs", torch.cuda.device_count())
    machine = hardware()
    bench.figure("CPU", f"{machine['cpu']}, {machine['cores']} cores")
    bench.figure("host memory", machine["memory_gib"] or "unknown", "GiB")
    bench.figure("free disk", shutil.disk_usage(bench.folder).free / GIB, "GiB")
    bench.figure("versions", ", ".join(f"{name} {found}" for name, found in versions().items()))
    bench.figure("missing packages", ", ".join(missing()) or "none")
    size, dtype = (256, torch.float32) if bench.tiny else (8192, torch.bfloat16)
    a, marks = torch.randn(size, size, device=bench.device).to(dtype), Marks(bench.cuda)
    for _ in range(13):
        marks.mark()
        a @ a
    marks.mark()
    took = statistics.median(marks.milliseconds()[3:])
    what = f"a product of two {dtype} matrices of {size} x {size}".replace("torch.", "")
    bench.figure(what, 2 * size**3 / took / 1e9, "TFLOP/s")


def nf4(bench: Bench) -> None:
    """Whether bitsandbytes computes with the weights behind its codes, and in which time."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    from spkit.models.nf4 import check_nf4, decoded
    from spkit.models.weights import guard_nf4

    # 7B's and grouped queries'; a width with a fault on some CPUs; blocks across the ends of rows
    shapes = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (24, 432), (33, 65)]
    if bench.tiny:
        shapes = [(64, 64), (96, 128), (24, 432)]
    layers = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in shapes:
            layer = bnb.nn.Linear4bit(
                width, rows, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            weights = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
            made = bnb.nn.Params4bit(weights.to(dtype), requires_grad=False, quant_type="nf4")
            layer.weight = made
            layers[f"{rows} x {width} {dtype}".replace("torch.", "")] = layer.to(bench.device)
    same_place, same_kernel, largest = 0, 0, 0.0
    for layer in layers.values():
        guard_nf4(layer)
        here, theirs = (
            decoded(layer.weight),
            dequantize_4bit(layer.weight, layer.weight.quant_state),
        )
        same_place += torch.equal(here.cpu(), decoded(on_cpu(layer.weight)))
        same_kernel += torch.equal(here, theirs)
        largest = max(largest, float((here.float() - theirs.float()).abs().max()))
    bench.figure("4-bit layers looked at", len(layers))
    bench.figure("decoded to the same bits on this device and on the CPU", same_place)
    bench.figure("decoded to bitsandbytes' own bits", same_kernel)
    bench.figure("largest difference between the two", largest)
    wrong = []
    for name, layer in layers.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            check_nf4(layer)
        wrong += [name] if any("computes wrongly" in str(w.message) for w in told) else []
    bench.figure("layers that bitsandbytes computes wrongly", ", ".join(wrong) or "none")
    largest_layer = layers[f"{shapes[1][0]} x {shapes[1][1]} bfloat16"].weight
    for what, decode in (
        ("spkit", lambda: decoded(largest_layer)),
        ("bitsandbytes", lambda: dequantize_4bit(largest_layer, largest_layer.quant_state)),
    ):
        marks = Marks(bench.cuda)
        for _ in range(8):
            marks.mark()
            decode()
        marks.mark()
        name = f"decoding {shapes[1][0]} x {shapes[1][1]} by {what}"
        bench.figure(name, statistics.median(marks.milliseconds()[3:]), "ms")


def on_cpu(weight):
    """A copy of a 4-bit weight on the CPU."""
    packed, state = weight.data.cpu().clone(), copy.deepcopy(weight.quant_state)
    state.to("cpu")
    packed.quant_state = state
    return packed


def tests(bench: Bench) -> None:
    """The tests with the mark "cuda", in one process; on a GPU none of them is skipped."""
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text(encoding="utf-8")
        or "on_devices" in path.read_text("utf-8")
    ]
    report = bench.folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", f"--junitxml={report}", *map(str, files)]
    subprocess.run(command, cwd=ROOT)
    if not report.is_file():
        raise SpkitError("pytest has left no report")
    counts, failures = counted(report.read_text(encoding="utf-8"))
    for what, count in counts.items():
        bench.figure(f"tests {what}", count)
    for name, said in failures.items():
        bench.figure(f"failed: {name}", said)
    if failures:
        raise SpkitError(f"{len(failures)} tests failed, first {next(iter(failures))}")
    if bench.cuda and (counts["skipped"] or not counts["passed"]):
        raise SpkitError(f"{counts['skipped']} tests were skipped and {counts['passed']} passed")


def counted(report: str) -> tuple[dict[str, int], dict[str, str]]:
    """({"passed", "failed", "skipped": number}, {test: what it said}) of a JUnit report."""
    counts, failures = dict.fromkeys(("passed", "failed", "skipped"), 0), {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failures[case.get("name")] = (bad.get("message") or "no message")[:300]
        counts["failed" if bad is not None else "skipped" if len(case) else "passed"] += 1
    return counts, failures


def loading(bench: Bench) -> None:
    """The checkpoint, once; the backbone in 4 bits, in a process that has loaded nothing before."""
    checkpoint(bench)
    quantization = bench.config.derivation.quantization
    with peaks(bench, "load"):
        bench.figure("loading", seconds(bench, lambda: loaded(bench, quantization)), "s")


def derivation(bench: Bench) -> None:
    """Both directions, one after the other, on the longest pairs that data.max_tokens allows."""
    derived(bench, ("ascent", "descent"))


def unquantised(bench: Bench) -> None:
    """The same in 16 bits without bitsandbytes: what QLoRA is compared with."""
    plain = {"derivation__quantization": "none", "derivation__optimizer": "adamw"}
    derived(bench.changed(**plain), ("descent",))


def derived(bench: Bench, directions: tuple[str, ...]) -> None:
    """Steps of a derivation: milliseconds each, tokens a second, peaks. Keeps the patches."""
    from memory_budget import pairs_for

    from spkit.method.derivation import derive
    from spkit.method.training import TrainingSet

    config = bench.config
    model, tokenizer = loaded(bench, config.derivation.quantization)
    data = TrainingSet.of(tokenizer, pairs_for(config, tokenizer), config.data.max_tokens)
    for direction in directions:
        settings, marks = getattr(config.derivation, direction), Marks(bench.cuda)
        with peaks(bench, "derivation", direction):
            hook = register_optimizer_step_post_hook(lambda *_, m=marks: m.mark())
            try:
                patch, curve = derive(model, data, direction, config.derivation, config.seed)
            finally:
                hook.remove()
        each = statistics.median(marks.milliseconds())
        tokens = settings.batch_size * config.data.max_tokens
        bench.figure(f"{direction}, a step of {settings.batch_size} pairs", each, "ms")
        bench.figure(f"{direction}, tokens", 1000 * tokens / each, "1/s")
        bench.figure(f"{direction}, loss at the start", float(curve["loss"].iloc[0]), "nats")
        bench.figure(f"{direction}, loss at the end", float(curve["loss"].iloc[-1]), "nats")
        if config.derivation.quantization == "nf4":
            patch.save(bench.folder / f"{patch.name}.safetensors")


def importance(bench: Bench) -> None:
    """Both patches' scores of all layers, beside plain passes; the first layers' are ranked."""
    from memory_budget import calibration

    from spkit.method.importance import score_windows, top_rate_bits
    from spkit.method.snip import snip

    pair, bench = patches(bench), bench.scored_by_windows()
    config = bench.config
    model, tokenizer = loaded(bench, config.derivation.quantization)
    samples, targets = calibration(config, tokenizer), config.derivation.lora.targets
    batches = samples.batches(tokenizer)
    for _ in range(2):  # the first warms up
        plain = seconds(bench, lambda: snip(model, batches, targets, only=()))
    bench.figure("layers a window", config.importance.layers_per_pass)
    bench.figure("samples", config.importance.samples)
    bench.figure("plain forward and backward of the samples", plain, "s")
    spent = [0.0]
    with peaks(bench, "importance"):
        windows = timed(score_windows(model, tokenizer, pair, samples), spent)
        start = time.perf_counter()
        sets = top_rate_bits(map(ranked, windows), config.patching)
        whole = time.perf_counter() - start
    bench.figure("scoring both patches", spent[0], "s")
    bench.figure("scoring / two plain passes", spent[0] / (2 * plain))
    bench.figure("scoring, one sample", spent[0] / config.importance.samples, "s")
    layers = f"{min(RANKED_LAYERS, bench.shape.layers)} of {bench.shape.layers} layers"
    bench.figure(f"ranking on the host, {layers}", whole - spent[0], "s")
    for name, found in sets.items():
        found.save(bench.folder / f"top_{name}.safetensors")


def ranked(window: dict) -> dict:
    """Of a window's scores those of the first layers."""
    return {
        patch: {name: scores[name] for name in first_layers(scores)}
        for patch, scores in window.items()
    }


def timed(windows: Iterator, spent: list[float]) -> Iterator:
    """The same windows; spent[0] grows by the seconds that they took to be made."""
    try:
        while True:
            start = time.perf_counter()
            window = next(windows, None)
            spent[0] += time.perf_counter() - start
            if window is None:
                return
            yield window
    finally:
        windows.close()


def patching(bench: Bench) -> None:
    """A patch file of the first layers, which computes on the CPU; whole checkpoints are copied."""
    from spkit.patchfile.apply import apply
    from spkit.patchfile.make import About, make_patch
    from spkit.patchfile.summary import inspect
    from spkit.patchfile.verify import verify

    method = safepatching(bench)
    source, file = checkpoint(bench), bench.folder / "patch.safetensors"
    target = bench.folder / "patched"
    shutil.rmtree(target, ignore_errors=True)
    what = f"{min(RANKED_LAYERS, bench.shape.layers)} of {bench.shape.layers} layers"
    took = seconds(bench, lambda: make_patch(source, method.deltas(), file, About("random")))
    bench.figure(f"making the patch file, {what}", took, "s")
    found = inspect(file)
    bench.figure(f"patch file, {what}", found.size / 1e6, "MB")
    bench.figure("kept weights", found.manifest.kept / found.manifest.weights)
    bench.figure("bits a kept weight", 8 * found.size / found.manifest.kept, "bits")
    try:
        took = seconds(bench, lambda: apply(file, source, target))
        bench.figure("apply, the whole checkpoint", took, "s")
        start = time.perf_counter()
        fine = verify(file, source, target).ok
        bench.figure("verify, the whole checkpoint", time.perf_counter() - start, "s")
        bench.figure("verify says", "all is right" if fine else "NO")
    finally:
        shutil.rmtree(target, ignore_errors=True)


def evaluation(bench: Bench) -> None:
    """Greedy answers to the longest prompts, bare and with a delta as large as notebook 03 has."""
    from memory_budget import prompt_text

    from spkit.evaluation.utility.likelihood import perplexity
    from spkit.examples import EvalPrompt
    from spkit.models.patched import patched

    config = bench.config
    pair = loaded(bench, config.evaluation.quantization)
    kind = ("harmful", "seen", "any", "plain", "")
    prompts = [
        EvalPrompt(str(i), prompt_text(pair[1], config.data.max_tokens, i), *kind)
        for i in range(config.evaluation.batch_size)
    ]
    texts = [prompt.prompt for prompt in prompts[: config.utility.batch_size]]
    answered(bench, "warm-up", pair, prompts)
    answered(bench, "bare", pair, prompts)
    with peaks(bench, "evaluation", "patched"), patched(pair[0], random_delta(bench)):
        answered(bench, "patched", pair, prompts)
        options = {"batch_size": config.utility.batch_size}
        took = seconds(bench, lambda: perplexity(*pair, texts, **options))
        bench.figure(f"patched, perplexity of {len(texts)} texts", took, "s")
        torch.use_deterministic_algorithms(False)
        answered(bench, "patched, kernels in any order", pair, prompts)


def random_delta(bench: Bench) -> dict:
    """{tensor: SparseDelta} on as many weights as SafePatching keeps without retention.

    The method's own sets are the CPU's work; a random delta takes the same room and time.
    """
    from spkit.models.deltas import SparseDelta

    share, made = kept_share(bench.config, 1.0), {}
    for name, layer in layers_of(bench).items():
        shape = (layer.out_features, layer.in_features)
        count = int(share * shape[0] * shape[1])
        spread = torch.arange(count, dtype=torch.float64, device=bench.device) / share
        values = 1e-3 * torch.randn(count, device=bench.device)
        made[name] = SparseDelta(spread.int(), values.to(torch.bfloat16), shape)
    bench.figure("share of the targeted weights with a delta", share)
    return made


def answered(bench: Bench, what: str, pair: tuple, prompts: list) -> None:
    """Tokens a second of all prompts in one batch, and of the first ones one by one."""
    from spkit.evaluation.answers import generated, respond

    own = bench.config.evaluation
    warm = what == "warm-up"
    for some, batch, how in (
        (prompts, own.batch_size, f"in a batch of {own.batch_size}"),
        (prompts[:ONE_BY_ONE], 1, "one by one"),
    ):
        start = time.perf_counter()  # the answers are on the host in the end
        limits = {"max_new_tokens": 2 if warm else own.max_new_tokens, "batch_size": batch}
        tokens = generated(respond(*pair, some, name="any", **limits))
        if not warm:
            rate = tokens / (time.perf_counter() - start)
            bench.figure(f"{what}, {how}", rate, "tokens/s")


def notebooks(bench: Bench) -> None:
    """`spkit run` up to notebook 03: LoRA on v_proj, few prompts of few tokens."""
    from spkit.running.runs import run_folder
    from spkit.running.walkthrough import run

    source = {"backbone__source": str(with_bytes(checkpoint(bench)))}
    targets = {"derivation__lora__targets": ["v_proj"]}
    bench = bench.changed(**source, **targets).scored_by_windows()
    data = bench.folder / "data"
    write_data(data)
    sources = {
        name: {"reader": "own", "path": str(data / f"{name}.jsonl")}
        for name in ("pairs", "prompts", "texts")
    }
    bench = bench.changed(
        **{"run_name": "gpu", "outputs": str(bench.folder / "runs"), "data__sources": sources},
        **{"data__harmful": "pairs", "data__evaluation": ["prompts"], "data__pairs": 32},
        **{"data__max_tokens": 256, "judges__harmful": ["keywords"], "utility__tasks": []},
        **{"utility__perplexity_texts": 2, "evaluation__prompts_per_cell": 2},
        **{"evaluation__max_new_tokens": 16},
        continual__stages=[["even"], ["odd"]],
    )
    params = bench.folder / "run.json"  # JSON is YAML
    params.write_text(bench.config.model_dump_json(indent=1), encoding="utf-8")
    made = run_folder(bench.config)
    shutil.rmtree(made, ignore_errors=True)
    try:
        run(params, {}, cores=os.cpu_count() or 1, last=NOTEBOOKS[-1])
    finally:
        of_run(bench)
        shutil.rmtree(made / NOTEBOOKS[-1] / "model", ignore_errors=True)  # 13.5 GB


def with_bytes(folder: Path) -> Path:
    """The same weights, linked, with a tokenizer of bytes: the notebooks bring sentences."""
    from spkit.bench import random_checkpoint

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    made = folder.with_name("model-of-bytes")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for file in folder.glob("*.safetensors*"):
        os.link(file, made / file.name)
    tokens = tiny.byte_tokenizer(random_checkpoint.TEMPLATE, ("<user>", "<assistant>"))
    tokens.save_pretrained(made)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ENDS}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


def of_run(bench: Bench) -> None:
    """Seconds and peaks of the notebooks that are done, as their records tell them."""
    from spkit.running.runs import read_record

    for stage in NOTEBOOKS:
        record = read_record(bench.config, stage)
        if record is None:
            continue
        bench.figure(f"{stage}", record["seconds"], "s")
        table = predict(bench.config, bench.shape, stage, bench.place, bench.cap)
        for place, column in (("gpu", "GPU GiB"), ("host", "host GiB")):
            if column in table and place in record["peak_memory_mib"]:
                need = table.loc[PEAK, column]
                need -= table.loc[CONTEXT, column] if place == "gpu" else 0
                bench.figure(f"{stage}, {place} peak, predicted", need, "GiB")
                peak = record["peak_memory_mib"][place] / 2**10
                bench.figure(f"{stage}, {place} peak, measured", peak, "GiB")


def write_data(folder: Path) -> None:
    """Pairs, prompts and texts in the words of the random checkpoint's tokenizer."""
    from spkit.bench import random_checkpoint

    words = random_checkpoint.WORDS

    def text(number: int, length: int = 12) -> str:
        return " ".join(words[(number + i * (1 + number % 7)) % len(words)] for i in range(length))

    pairs = [
        {"prompt": text(n), "response": text(n + 50), "category": ("even", "odd")[n % 2]}
        for n in range(64)
    ]
    prompts = [
        {"prompt": text(n, 14), "objective": ("harmful", "over_safety")[n % 2], "category": "any"}
        for n in range(40)
    ]
    texts = [{"text": text(n, 40)} for n in range(4)]
    folder.mkdir(exist_ok=True)
    for name, rows in (("pairs", pairs), ("prompts", prompts), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


# ---- a part's process ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options that gpu_session.py hands on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--out", default="outputs/gpu-part")
    parser.add_argument("--work")
    parser.add_argument("--facts")
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    return parser


def interrupted(*_) -> None:
    """A part that is told to end cleans up first, and ends what it has started."""
    raise KeyboardInterrupt


def main() -> None:
    """One part; an error of the kit is one sentence in the end."""
    given = parser().parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    try:
        globals()[given.part](bench_of(given))
    except SpkitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
