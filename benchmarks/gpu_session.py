"""The parts of a GPU session one after another, each in a process of its own: see gpu.sh.

A part that fails, or is not done after its ten minutes, leaves its reason, and the next one runs.
What is measured is added at once to results.jsonl, one figure a line, and table.md and table.csv
are written again. Parts that are done on this device are skipped; those that nobody has tried come
first. What a part prints is in log/<part>.txt.

This file needs nothing but the standard library, so that a missing package costs one line.
"""

import argparse
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

PARTS = {  # the most worth first
    "environment": "device, driver, versions, missing packages, one matrix product",
    "nf4": "bitsandbytes' 4-bit layers against the decoding in plain torch",
    "tests": "the tests that need a GPU",
    "loading": "random checkpoint; loading in 4 bits: seconds, peak, predicted peak",
    "derivation": "ascent and descent: milliseconds a step, peak, predicted peak",
    "importance": "seconds beside plain passes over the same samples, ranking, peaks",
    "patching": "a patch file of some layers: seconds, bytes, apply, verify",
    "evaluation": "tokens a second, in batches and one by one, bare and patched, peaks",
    "unquantised": "a derivation in bf16 without 4 bits; not held within 16 GB",
    "notebooks": "spkit run of notebooks 00 to 03 with few prompts: seconds, peaks",
}
FACTS = ("device", "driver", "cuda", "torch", "commit")
COLUMNS = ("part", "figure", "value", "unit", *FACTS)
NEEDED = (  # the notebooks' in the second line
    "accelerate bitsandbytes blake3 pandas peft pydantic pytest safetensors tabulate transformers "
    "ipykernel matplotlib papermill psutil seaborn snakemake statsmodels typer zstandard"
).split()
LIMIT = 600  # seconds a part
SECONDS_TO_END = 20  # after the limit, before a part is killed
BEGUN, DONE, FAILED = "begun", "done", "failed"
RUNNER = Path(__file__).with_name("gpu_parts.py")


class Results:
    """results.jsonl of one folder, and the tables made of it."""

    def __init__(self, folder: str | Path, facts: dict):
        self.folder, self.facts = Path(folder), facts
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.jsonl"

    def add(self, part: str, **fields) -> None:
        """One line, with this session's facts; then the tables anew."""
        line = json.dumps({"part": part, **fields, **self.facts})
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.write_tables()

    def figure(self, part: str, figure: str, value: float | int | str, unit: str = "") -> None:
        """One thing that was measured."""
        shown = round(value, 4) if isinstance(value, float) else value
        print(f"{part}: {figure}: {shown} {unit}", flush=True)
        self.add(part, figure=figure, value=value, unit=unit)

    def lines(self) -> list[dict]:
        """All lines; one that was cut while it was written is left out."""
        found = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return found

    def states(self) -> dict[str, str]:
        """{part: BEGUN, DONE or FAILED} of those that were tried on this device."""
        own = [x for x in self.lines() if "state" in x and x["device"] == self.facts["device"]]
        return {line["part"]: line["state"] for line in own}

    def todo(self, parts: Iterable[str]) -> list[str]:
        """Those that are not done on this device: first what was never tried, then the others."""
        states = self.states()
        left = [part for part in parts if states.get(part) != DONE]
        return sorted(left, key=lambda part: part in states)  # stable: the order stays

    def rows(self) -> list[dict]:
        """A row for each figure of a device, its latest value, and one for each part undone."""
        figures, states = {}, {}
        for line in self.lines():
            where = (line["device"], line["part"])
            if "state" in line:
                states[where] = line
            else:
                figures[(*where, line["figure"])] = line
        for where, line in states.items():
            if line["state"] == DONE:
                row = {"figure": "the whole part", "value": line["seconds"], "unit": "s"}
            elif line["state"] == FAILED:
                row = {"figure": "FAILED", "value": line["reason"], "unit": ""}
            else:
                row = {"figure": "NOT FINISHED", "value": "it has begun and not ended", "unit": ""}
            figures[(*where, "")] = {**line, **row}
        order = [*PARTS, *(line["part"] for line in figures.values())]
        rows = sorted(figures.values(), key=lambda line: order.index(line["part"]))
        return [{column: row.get(column, "") for column in COLUMNS} for row in rows]

    def write_tables(self) -> None:
        """table.csv with all digits, table.md to read."""
        rows, text = self.rows(), io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        replace(self.folder / "table.csv", text.getvalue())
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cell(row[column]) for column in COLUMNS) + " |" for row in rows]
        replace(self.folder / "table.md", "\n".join(lines) + "\n")


def cell(value) -> str:
    """A value as it stands in the Markdown table."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def run_part(command: Sequence[str], part: str, results: Results, limit: float = LIMIT) -> bool:
    """Run one part's process to its end or its limit; whether it is done."""
    results.add(part, state=BEGUN)
    log = results.folder / "log" / f"{part}.txt"
    log.parent.mkdir(exist_ok=True)
    held = ["timeout", f"--kill-after={SECONDS_TO_END}", str(limit), *command]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = ended(subprocess.Popen(held, stdout=file, stderr=subprocess.STDOUT))
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        results.add(part, state=DONE, seconds=seconds)
    else:
        reason = why(code, log.read_text(encoding="utf-8", errors="replace"), limit)
        results.add(part, state=FAILED, seconds=seconds, reason=reason)
    return code == 0


def ended(child: subprocess.Popen) -> int:
    """Its exit code; where this process is told to end, the part ends first and frees the GPU."""
    try:
        return child.wait()
    except BaseException:
        child.terminate()  # `timeout` hands it on to all that the part has started
        child.wait()
        raise


def why(code: int, said: str, limit: float) -> str:
    """One sentence: the limit, a signal, or the last thing that the part said."""
    if code == 124:
        return f"it was not done after {limit:g} s; its last line: {last_line(said)}"
    if code in (137, -9):
        return f"it was killed, for memory or after {limit:g} s; its last line: {last_line(said)}"
    if code < 0 or code > 128:
        return f"signal {-code if code < 0 else code - 128}; its last line: {last_line(said)}"
    return last_line(said)


def last_line(said: str) -> str:
    """The last line that is not empty, at most 300 characters; of a progress bar its last state."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def missing() -> list[str]:
    """The packages that some part needs and this interpreter lacks."""
    return [name for name in NEEDED if find_spec(name) is None]


def ask_facts(options: Sequence[str]) -> dict:
    """What gpu_facts.py tells: device, driver, CUDA, torch and commit."""
    command = [sys.executable, str(RUNNER.with_name("gpu_facts.py")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"gpu.sh: {last_line(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def parser() -> argparse.ArgumentParser:
    """The command line's options; those behind `--work` are handed to the parts."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these; default: all")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a part")
    parser.add_argument("--out", help="folder of results and tables; default: outputs/gpu")
    for name, about in (
        ("work", "folder of the checkpoint (30 GB); default: outputs/gpu-work"),
        ("commit", "where this is no clone: what the table shows as commit"),
        ("cap-gib", "bound of torch's allocator; 0: none"),
    ):
        parser.add_argument(f"--{name}", help=about)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on the CPU")
    return parser


def handed_on(given: argparse.Namespace) -> list[str]:
    """The options that every part's process gets."""
    options = ["--rehearse"] if given.rehearse else []
    for name in ("work", "cap_gib"):
        if getattr(given, name) is not None:
            options += [f"--{name.replace('_', '-')}", getattr(given, name)]
    return options + [word for pair in given.set for word in ("--set", pair)]


def main() -> None:
    """The command line; exit code 1 where a part failed."""
    options = parser()
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.list:
        print("\n".join(f"{part:<12} {about}" for part, about in PARTS.items()))
        return
    for part in given.parts:
        if part not in PARTS:
            options.error(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    told = ["--commit", given.commit] if given.commit else []
    facts = ask_facts(["--rehearse"] * given.rehearse + told)
    out = given.out or ("outputs/gpu-rehearsal" if given.rehearse else "outputs/gpu")
    results = Results(out, facts)
    parts = [part for part in PARTS if part in (given.parts or PARTS)]
    todo = parts if given.again else results.todo(parts)
    print(f"{facts['device']}: {', '.join(todo) or 'nothing'} to be done; results in {out}")
    if lacking := missing():
        print(f"missing packages, without which some parts fail: {', '.join(lacking)}")
    fine = True
    for part in todo:
        print(f"\n{part} ...", flush=True)
        more = ["--out", str(out), "--facts", json.dumps(facts)]
        command = [sys.executable, str(RUNNER), part, *handed_on(given), *more]
        done = run_part(command, part, results, given.limit)
        own = [row for row in results.rows() if row["part"] == part]
        for row in (row for row in own if row["device"] == facts["device"]):
            print(f"  {row['figure']:<52} {cell(row['value'])} {row['unit']}", flush=True)
        fine = fine and done
    print(f"\n{Path(out) / 'table.md'}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
