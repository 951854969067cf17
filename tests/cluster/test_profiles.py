"""The profiles: Snakemake knows their options, and a unit that asks for a GPU goes to one.

What a profile does on a cluster is tested by slurm_on_loopback.py (make test-slurm).
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from spkit.workflow.engine import RULES
from spkit.workflow.plan import Plan

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"
EXECUTORS = {
    "local": "local",
    "slurm": "slurm",
    "slurm-without-accounting": "slurm",
    "kubernetes": "kubernetes",
}


def parsed(profile):
    """What Snakemake takes from a profile; it ends with a message where it does not know a key."""
    from snakemake import cli

    before, os.environ["SNAKEMAKE_PROFILE"] = os.environ.pop("SNAKEMAKE_PROFILE", None), ""
    try:
        return cli.parse_args(["--profile", str(profile)])[1]
    finally:
        os.environ.pop("SNAKEMAKE_PROFILE")
        if before is not None:
            os.environ["SNAKEMAKE_PROFILE"] = before


@pytest.mark.parametrize("name", EXECUTORS)
def test_snakemake_knows_every_option(name):
    found = parsed(PROFILES / name)
    keys = yaml.safe_load((PROFILES / name / "config.yaml").read_text())
    assert all(hasattr(found, key.replace("-", "_")) for key in keys)
    assert (found.executor or "local") == EXECUTORS[name]
    if name != "local":
        assert found.retries >= 1 and found.latency_wait >= 60


def test_an_unknown_option_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("executor: slurm\nslurm-partition-confg: x\n")
    with pytest.raises(SystemExit):
        parsed(tmp_path)
    assert "partition" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["slurm", "slurm-without-accounting"])
@pytest.mark.parametrize("gpus, partition", [(0, "cpu"), (1, "gpu"), (8, "gpu"), (9, None)])
def test_a_unit_that_asks_for_gpus_goes_where_they_are(name, gpus, partition):
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm.partitions")
    file = parsed(PROFILES / name).slurm_partition_config
    assert Path(file) == PROFILES / name / "partitions.yaml"
    job = SimpleNamespace(name="x", threads=1, resources={"gpu": gpus, "mem_mb": 64_000})
    quiet = SimpleNamespace(**dict.fromkeys(("debug", "info", "warning"), lambda text: None))
    assert (
        plugin.get_best_partition(plugin.read_partition_file(Path(file)), job, quiet) == partition
    )


def test_every_profile_can_plan_the_units(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
    file = Plan.of(tmp_path, "x", "work_of_units:planned", {}).write()
    command = [sys.executable, "-m", "snakemake", "-s", str(RULES), "--config", f"plan={file}"]
    command += ["--dry-run", "--nolock", "--scheduler", "greedy"]
    for name in EXECUTORS:
        if name == "kubernetes" and find_spec("snakemake_storage_plugin_fs") is None:
            continue  # Snakemake asks for it, also in a dry run
        own = [*command, "--profile", str(PROFILES / name)]
        done = subprocess.run(own, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "This was a dry-run" in done.stdout, done.stderr
