# The units of a plan (spkit/workflow/plan.py), one rule for each kind. `spkit experiment` and
# `spkit sweep` call it; by hand:
#
#   snakemake -s spkit/workflow/units.smk --config plan=outputs/experiment/quick/plan.json --cores 2
#
# Whether a unit is done is told by its folder's name, which is a digest of all that it was made
# from, and by unit.json in it. Dates decide nothing: hence `ancient`.
#
# A profile can give a kind what it needs on a cluster, by the rule's name:
#
#   set-resources: { derivation: { slurm_partition: gpu } }

import math
import shlex
import sys
from pathlib import Path

from spkit.workflow.plan import read
from spkit.workflow.units import DONE

PLAN = Path(config["plan"])
ROOT = PLAN.parent
UNITS = read(PLAN)["units"]
UNIT_AT = {  # by its folder, which stands in the names of files
    Path(unit["folder"]).relative_to(ROOT / "units").as_posix(): name
    for name, unit in UNITS.items()
}
PYTHON = shlex.quote(sys.executable)
SLACK = 3  # a unit may take so many times what was predicted before a cluster ends it


def done(name):
    # `local`: all machines see the folder, also where Snakemake holds that they share nothing
    return local(f"{UNITS[name]['folder']}/{DONE}")


def value(key):
    return lambda wildcards: UNITS[UNIT_AT[wildcards.unit]][key]


def minutes(wildcards, attempt):
    seconds = UNITS[UNIT_AT[wildcards.unit]]["seconds"]
    return attempt * max(10, math.ceil(SLACK * seconds / 60))


rule all:
    input:
        [done(name) for name in UNITS],


for kind in dict.fromkeys(name.partition("/")[0] for name in UNITS):

    rule:
        name:
            kind
        input:
            lambda wildcards: [ancient(done(n)) for n in UNITS[UNIT_AT[wildcards.unit]]["needs"]],
        output:
            # `update`: Snakemake does not take it out before a job, which may have done it before
            local(update(ROOT / "units" / "{unit}" / DONE)),
        wildcard_constraints:
            unit=f"{kind}/.+",
        params:
            name=lambda wildcards: UNIT_AT[wildcards.unit],
        log:
            local(ROOT / "log" / "{unit}.txt"),
        threads: value("threads")
        resources:
            mem_mb=value("memory_mib"),
            runtime=minutes,
            gpu=value("gpus"),
            attempt=lambda wildcards, attempt: attempt,
        shell:
            "TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error"  # no bars in a log
            " {PYTHON} -m spkit.workflow.job {PLAN:q} {params.name:q} {resources.attempt}"
            " > {log:q} 2>&1"
