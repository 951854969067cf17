# The graph of notebooks: one rule a notebook, run by papermill. `spkit run` calls it; by hand:
#
#   snakemake --cores 2 --config params=params/sandbox.yaml seed=1 "overrides={patching.beta: 2.0}"
#
# What reruns, and why: a stage's output is an empty file whose *name* is a digest of all that the
# stage was made from: the sections of the parameters on which it depends, the seed, the user's own
# input files, and the code (the modules of spkit that it runs and the notebook's code cells, not its
# text). If the file of today's name is there, there is nothing to do; if not, the notebook runs. Hence
# `ancient`: dates decide nothing, and a new evaluation setting reruns 00 and not the derivation.
#
# Snakemake deletes a failed rule's outputs, so the executed notebook is a log and survives. Nothing
# below is needed to run a notebook by itself.

import shlex
import sys
import time

import yaml

from spkit.config import load_params
from spkit.errors import SpkitError
from spkit.system.files import atomic
from spkit.running.notebook import differing, why_failed
from spkit.running.runs import NOTEBOOKS, STAGES, Run, run_folder, stage_folder, stamp
from spkit.validation import nearest

PYTHON = shlex.quote(sys.executable)
STARTED = time.time()
TOP_LEVEL = ("seed", "run_name", "outputs", "mirror", "threads")
KNOWN = ("params", "overrides", *TOP_LEVEL)

try:
    for key in config:
        if key not in KNOWN:
            raise SpkitError(f"--config: unknown key {key}{nearest(key, list(KNOWN))}")
    given = config.get("overrides") or {}
    if not isinstance(given, dict):
        raise SpkitError(f"--config: overrides is {given!r}, expected {{patching.beta: 2.0}}")
    CONFIG = load_params(
        config.get("params", "params/sandbox.yaml"),
        {**given, **{k: config[k] for k in TOP_LEVEL if k in config}},
    )
    Run.restore(CONFIG)  # what a mirror holds and this machine lacks, before anything is planned
    STAMPS = {stage: stamp(CONFIG, stage) for stage in STAGES}
except SpkitError as error:
    sys.exit(f"spkit: {error}")

RUN = run_folder(CONFIG)
LOG = RUN / "log"
RESOLVED = RUN / "params.yaml"
GIVEN = LOG / "parameters.yaml"  # what papermill puts into the notebooks: what is not as usual


def record(stage):
    return stage_folder(CONFIG, stage) / "record.json"


onstart:
    everything = CONFIG.model_dump(mode="json")
    for place, values in ((RESOLVED, everything), (GIVEN, differing(CONFIG))):
        with atomic(place) as path:
            path.write_text(yaml.safe_dump(values, sort_keys=False))


onerror:
    for stage in STAGES:
        notebook = LOG / f"{stage}.ipynb"
        messages = notebook.with_suffix(".txt")
        if messages.exists() and messages.stat().st_mtime >= STARTED and not STAMPS[stage].exists():
            print(f"\nspkit: {why_failed(notebook)}", file=sys.stderr)
    table = LOG / "results.txt"
    if table.exists() and table.stat().st_mtime >= STARTED and not (RUN / "results.csv").exists():
        print(f"\nspkit: results.csv failed: {table.read_text().splitlines()[-1]}", file=sys.stderr)


rule all:
    input:
        RUN / "results.csv",
        STAMPS.values(),


rule results:
    input:
        [record(stage) for stage in STAGES if STAGES[stage].results],
    output:
        RUN / "results.csv",
    log:
        LOG / "results.txt",
    shell:
        "{PYTHON} -m spkit.running.summary {RESOLVED:q} > {log:q} 2>&1"


for stage in STAGES:

    rule:
        name:
            stage.partition("_")[2]
        message:
            f"notebook {stage}"
        input:
            upstream=[ancient(record(need)) for need in STAGES[stage].needs],
            notebook=ancient(NOTEBOOKS / f"{stage}.ipynb"),
        output:
            STAMPS[stage],
            record(stage),
        log:
            notebook=LOG / f"{stage}.ipynb",
            messages=LOG / f"{stage}.txt",
        threads: CONFIG.threads or workflow.cores
        shell:
            "rm -f {log.notebook:q}; {PYTHON} -m spkit.running.execute {input.notebook:q}"
            " {log.notebook:q} -k python3 -f {GIVEN:q} --no-progress-bar > {log.messages:q} 2>&1"
