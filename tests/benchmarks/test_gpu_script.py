"""benchmarks/gpu.sh: its order, what it keeps when it ends early, and its parts in a tiny shape."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spkit.errors import SpkitError

ROOT = Path(__file__).parents[2]
FACTS = {"device": "X1", "driver": "5", "cuda": "13", "torch": "2.9", "commit": "abc"}


@pytest.fixture(scope="module")
def modules():
    """gpu_session, gpu_parts and gpu_bench, imported as the script does."""
    path, environment = list(sys.path), dict(os.environ)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu_bench
        import gpu_parts
        import gpu_session

        yield gpu_session, gpu_parts, gpu_bench
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def results(modules, tmp_path):
    return modules[0].Results(tmp_path / "out", FACTS)


def table(results):
    with (results.folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return [
            (row["part"], row["figure"], row["value"], row["unit"]) for row in csv.DictReader(file)
        ]


# ---- results and tables --------------------------------------------------------------------------


def test_every_figure_is_at_once_in_the_file_and_in_both_tables(results):
    results.figure("importance", "plain", 2.0, "s")
    results.figure("nf4", "wrong", "a | b\nc")
    results.figure("importance", "plain", 1234.5678, "s")  # measured again: the latest counts
    assert len(results.path.read_text().splitlines()) == 3
    # in the order of the parts, not of their times
    assert table(results) == [
        ("nf4", "wrong", "a | b\nc", ""),
        ("importance", "plain", "1234.5678", "s"),
    ]
    lines = (results.folder / "table.md").read_text().splitlines()
    assert lines[0] == "| part | figure | value | unit | device | driver | cuda | torch | commit |"
    assert lines[2] == "| nf4 | wrong | a \\| b c |  | X1 | 5 | 13 | 2.9 | abc |"
    assert lines[3] == "| importance | plain | 1,235 | s | X1 | 5 | 13 | 2.9 | abc |"


def test_a_line_that_was_cut_costs_that_line_alone(results):
    results.figure("nf4", "first", 1)
    with results.path.open("a") as file:
        file.write('{"part": "nf4", "figu')
    results.figure("nf4", "second", 2)
    assert [row[1:3] for row in table(results)] == [("first", "1"), ("second", "2")]


def test_done_parts_are_skipped_and_what_was_never_tried_comes_first(modules, results):
    parts = list(modules[0].PARTS)
    assert parts[:3] == ["environment", "nf4", "tests"] and parts[-1] == "notebooks"
    assert results.todo(parts) == parts
    results.add("environment", state="done", seconds=1.0)
    results.add("nf4", state="failed", seconds=1.0, reason="no")
    results.add("tests", state="begun")  # the machine was taken away
    assert results.todo(parts) == [*parts[3:], "nf4", "tests"]
    results.add("nf4", state="done", seconds=2.0)
    assert results.todo(parts) == [*parts[3:], "tests"]
    assert ("tests", "NOT FINISHED", "it has begun and not ended", "") in table(results)
    other = modules[0].Results(results.folder, FACTS | {"device": "X2"})
    assert other.todo(parts) == parts
    other.figure("nf4", "wrong", "none")
    assert len([row for row in table(other) if row[0] == "nf4"]) == 2  # a row of each device


# ---- a part's process ----------------------------------------------------------------------------

PART = """
import sys, time
sys.path.insert(0, {folder!r})
from gpu_session import Results
Results({out!r}, {facts!r}).figure({part!r}, "early", 7, "s")
print("\\n\\rhalf\\rwhole", file=sys.stderr, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then, limit, reason",
    [
        ("pass", 60, None),
        (
            "sys.exit('The GPU ran out of memory: lower x')",
            60,
            "The GPU ran out of memory: lower x",
        ),
        ("1 / 0", 60, "ZeroDivisionError: division by zero"),
        ("time.sleep(60)", 0.7, "it was not done after 0.7 s; its last line: whole"),
        ("import os; os.abort()", 60, "signal 6; its last line: "),
    ],
    ids=["done", "one sentence", "an error", "too long", "a signal"],
)
def test_a_part_that_ends_wrongly_leaves_its_reason_and_its_figures(
    then, limit, reason, modules, results
):
    facts = {"folder": str(ROOT / "benchmarks"), "out": str(results.folder), "facts": FACTS}
    command = [sys.executable, "-c", PART.format(part="loading", then=then, **facts)]
    assert modules[0].run_part(command, "loading", results, limit) == (reason is None)
    rows = table(results)
    assert rows[0] == ("loading", "early", "7", "s")
    if reason is None:
        assert rows[1][1] == "the whole part" and results.todo(["loading"]) == []
    else:
        assert rows[1][1] == "FAILED" and rows[1][2].startswith(reason)
        assert results.todo(["loading"]) == ["loading"]


def test_a_session_that_is_ended_ends_its_part(results, tmp_path):
    """It shall not go on in the background with the GPU's memory in its hands."""
    pid = tmp_path / "pid"
    part = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    session = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_session, signal;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"results = gpu_session.Results({str(results.folder)!r}, {FACTS!r});"
        f"gpu_session.run_part([sys.executable, '-c', {part!r}], 'nf4', results)"
    )
    with subprocess.Popen([sys.executable, "-c", session]) as child:
        while not pid.exists() or not pid.read_text():
            assert child.poll() is None
            time.sleep(0.02)
        child.terminate()
        assert child.wait() == 143
    # an orphan may be a zombie for a moment
    status = Path(f"/proc/{pid.read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    assert results.states() == {"nf4": "begun"}


def test_one_part_after_another_whatever_becomes_of_them(modules, tmp_path, monkeypatch, capsys):
    session = modules[0]
    asked = []

    def run_part(command, part, results, limit):
        asked.append((part, limit, command[command.index("--work") + 1], "--rehearse" in command))
        results.add(part, state="failed" if part == "nf4" else "done", seconds=1.0, reason="broken")
        return part != "nf4"

    monkeypatch.setattr(session, "ask_facts", lambda options: FACTS)
    monkeypatch.setattr(session, "run_part", run_part)
    given = ["gpu.sh", "--rehearse", "--out", str(tmp_path), "--work", "w", "--limit", "5"]

    def run(*more):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [*given, *more])
        with pytest.raises(SystemExit) as ended:
            session.main()
        return ended.value.code, [part for part, *_ in asked]

    assert run("nf4", "environment") == (1, ["environment", "nf4"])  # the order is the script's
    assert asked[0] == ("environment", 5.0, "w", True)
    assert run() == (1, [*list(session.PARTS)[2:], "nf4"])
    assert "FAILED" in capsys.readouterr().out
    assert run("tests", "--again") == (0, ["tests"])
    assert run("no-part") == (2, [])


def test_the_script_itself_names_its_parts_and_refuses_a_machine_without_a_gpu(tmp_path, modules):
    def run(*arguments):
        command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
        environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    listed = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(modules[0].PARTS)
    refused = run("nf4", "--out", str(tmp_path / "out"))
    assert refused.returncode == 1 and not (tmp_path / "out").exists()
    assert refused.stderr == ("gpu.sh: torch sees no GPU; --rehearse runs every part on the CPU\n")


# ---- the parts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearse(modules, tmp_path_factory):
    """Run a part in this process; returns {figure: value} of what it has measured."""
    session, parts, _ = modules
    root = tmp_path_factory.mktemp("rehearsal")
    before = torch.are_deterministic_algorithms_enabled()

    def run(part, folder="work", *more):
        out = root / f"{part}-{folder}"
        given = ["--out", str(out), "--work", str(root / folder), "--facts", json.dumps(FACTS)]
        bench = parts.bench_of(parts.parser().parse_args([part, "--rehearse", *given, *more]))
        getattr(parts, part)(bench)
        return {line["figure"]: line["value"] for line in bench.results.lines()}

    yield run
    torch.use_deterministic_algorithms(before)


def test_the_parts_hand_on_what_they_make(rehearse):
    found = rehearse("environment")
    assert found["missing packages"] == "none" and "torch" in found["versions"]
    found = rehearse("loading")
    assert found["its weights"] > 0 and found["loading"] > 0 and found["host peak, predicted"] > 0
    found = rehearse("derivation")
    assert "making the random checkpoint" not in found
    assert found["ascent, a step of 4 pairs"] > 0
    assert found["descent, loss at the end"] < found["descent, loss at the start"]
    found = rehearse("importance")
    assert found["patches"] == "of the parts before" and found["layers a window"] == 2
    assert found["ranking on the host, 2 of 2 layers"] > 0
    found = rehearse("patching")
    assert (
        found["patches"] == "of the parts before"
        and found["sets of weights"] == "of the parts before"
    )
    assert found["verify says"] == "all is right" and 0 < found["kept weights"] < 0.05


def test_every_part_can_run_alone(rehearse):
    """In the order in which each makes itself what is missing."""
    found = rehearse("evaluation", "alone")
    assert found["its weights"] > 0 and found["bare, in a batch of 2"] > 0
    assert found["patched, one by one"] > 0
    assert found["share of the targeted weights with a delta"] == pytest.approx(0.05)
    found = rehearse("patching", "alone")
    assert found["patches"] == found["sets of weights"] == "random"
    assert found["verify says"] == "all is right"
    found = rehearse("unquantised", "alone", "--set", "derivation.descent.max_steps=2")
    assert found["descent, a step of 4 pairs"] > 0 and not any("ascent" in name for name in found)
    assert rehearse("patching", "alone")["patches"] == "random"  # bf16's are no patches of NF4


class Event:
    """Of a GPU that is not there: a second passes from one to the next."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, other):
        return 1000.0 * (other.at - self.at)


def test_what_only_a_gpu_is_asked(rehearse, modules, monkeypatch):
    """The calls to torch.cuda, answered here; the tensors stay on the CPU."""
    peak = {"max_memory_allocated": 2**27, "max_memory_reserved": 2**28}
    told = {name: (lambda value=value: value) for name, value in peak.items()}
    told |= dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda: None)
    about = {"total_memory": 80 * 2**30, "major": 9, "minor": 0}
    told |= {"get_device_properties": lambda number: type("Properties", (), about)}
    told |= {"is_bf16_supported": lambda including_emulation: True, "device_count": lambda: 1}
    for name, answer in told.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(modules[1].Bench, "cuda", True)
    found = rehearse("environment", "gpu")
    assert found["GPU memory"] == 80 and found["compute capability"] == "9.0"
    found = rehearse("derivation", "gpu")
    assert found["descent, a step of 4 pairs"] == 1000 and found["descent, tokens"] == 4 * 32
    assert found["ascent, GPU peak, allocated"] == 1 / 8
    assert found["ascent, GPU peak, reserved by torch"] == 1 / 4
    ratio = found["ascent, GPU peak, predicted / allocated"]
    assert ratio == pytest.approx(8 * found["ascent, GPU peak, predicted"]) and ratio > 0
    assert found["ascent, host peak, predicted"] > 0


def test_4_bit_layers_are_compared(rehearse):
    found = rehearse("nf4")
    assert found["decoded to the same bits on this device and on the CPU"] == 9
    assert found["4-bit layers looked at"] == 9


def test_windows_are_those_of_the_bound_and_not_of_the_machine(modules):
    """By hand: a layer of LLaMA-2-7B scores 202 M weights in fp32, three times: 2.43 GB."""
    parts = modules[2]
    config = parts.load_params(parts.PARAMS)
    from spkit.bench import random_checkpoint
    from spkit.running.shape import shape_of_model

    architecture, values = random_checkpoint.SHAPES["llama2-7b"]
    sizes = dict(zip(random_checkpoint.SIZES, values, strict=True))
    model = random_checkpoint.meta_model(random_checkpoint.configuration(architecture, sizes))
    bench = parts.Bench("importance", None, config, Path("."), 14 * parts.GIB, False)
    bench.__dict__["shape"] = shape_of_model(model)
    # 14 GiB less 3.9 of the backbone, 40 % of it: 4.0 GiB, which is less than two layers' 4.5
    assert bench.scored_by_windows().config.importance.layers_per_pass == 1
    larger = parts.replace(bench, cap=40 * parts.GIB)
    larger.__dict__["shape"] = bench.shape
    assert larger.scored_by_windows().config.importance.layers_per_pass == 6


def test_the_report_of_the_tests_is_read(modules):
    report = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>
    <testcase name="c"><failure message="E  assert 1 == 2"/></testcase>
    <testcase name="d"><error message="boom"/></testcase></testsuite></testsuites>"""
    counts, failures = modules[1].counted(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == {"c": "E  assert 1 == 2", "d": "boom"}


def test_a_full_disk_is_told_before_30_gb_are_written(modules, tmp_path, results, monkeypatch):
    parts = modules[2]
    config = parts.load_params(parts.PARAMS)
    bench = parts.Bench("loading", results, config, tmp_path, None, False)
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SpkitError, match="has 1 GiB free, 30 are needed"):
        parts.checkpoint(bench)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_notebooks_part_brings_a_tokenizer_that_reads_any_sentence(modules, tmp_path):
    from spkit.bench import random_checkpoint
    from spkit.models.loading import load

    parts, folder = modules[1], tmp_path / "model"
    sizes = dict(zip(random_checkpoint.SIZES, modules[2].TINY_SIZES, strict=True))
    random_checkpoint.write(folder, sizes)
    model, tokenizer = load(parts.with_bytes(folder), device="cpu")
    assert (
        tokenizer.decode(tokenizer.encode("how do i dye the scarf ?")) == "how do i dye the scarf ?"
    )
    assert model.config.eos_token_id == tokenizer.eos_token_id
