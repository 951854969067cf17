"""One stage in a process of its own: `python -m spkit.bench.stage STAGE FOLDER JSON` (run.py)."""

import json
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from spkit.bench import bench as results
from spkit.bench import stages
from spkit.bench.peers import Peers
from spkit.bench.run import as_asked
from spkit.errors import SpkitError, first_line
from spkit.running.notebook import without_loading_bars
from spkit.system import progress
from spkit.system.determinism import make_deterministic


def main(stage: str, folder: Path, given: dict) -> int:
    """Returns 1 where the stage failed; the rows that it has by then are kept."""
    asked, file = as_asked(given["asked"]), folder / "stages" / f"{stage}.json"
    threads = asked.threads or os.cpu_count()
    make_deterministic(0, threads)
    without_loading_bars()
    progress.shown_by(lambda **how: tqdm(**how, disable=True))  # of the stages; not the rounds'
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    work = folder / "work" / stage
    work.mkdir(parents=True)
    file.parent.mkdir(exist_ok=True)
    peers = Peers(folder / "peers" if asked.peers else None)
    how = (asked.rounds, asked.sizes, asked.device, threads, asked.backbone)
    bench = results.Bench(stage, work, *how, peers)

    def told(rows, finished: bool = False) -> None:
        about = {"made_from": given["made_from"], "notes": bench.notes, "finished": finished}
        results.write(file, rows, about)

    bench.told = told
    try:
        stages.measure(bench)
    except (SpkitError, RuntimeError, OSError, ImportError) as error:
        bench.notes.append(f"{stage}: ended early: {first_line(error)}")
        told(bench.rows)
        print(f"  {stage} ended early: {first_line(error)}", file=sys.stderr)
        return 1
    told(bench.rows, finished=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))
