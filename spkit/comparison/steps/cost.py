"""Seconds and memory of one method, in a process of its own: the peak of a process never falls."""

import json
import os
import subprocess
import sys
from pathlib import Path

from spkit.comparison import cost as measurement
from spkit.comparison.steps.shared import Places, Site, chosen


def cost(folder: Path, places: Places, site: Site, tuned: str, method: str) -> None:
    """cost.json: seconds and peak memory from backbone to deltas, in a fresh process."""
    question = {
        "model": str(places[site.backbone] / "model"),
        "config": site.config.model_dump(mode="json"),
        "method": method,
        "setting": chosen(places[tuned]),
    }
    done = subprocess.run(
        [sys.executable, "-m", measurement.__name__],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    (folder / "cost.json").write_text(done.stdout.splitlines()[-1] + "\n", encoding="utf-8")
