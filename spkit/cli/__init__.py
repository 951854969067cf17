"""The command `spkit`: one door for runs and for patch files. Every command is also a function.

    front.py         the app, its help, how errors and Ctrl-C end a command
    run.py           run, seeds, experiment, report, memory, ask
    study.py         align, study
    sweep.py         sweep
    tune.py          tune, patch
    bench.py         bench
    patch_files.py   make, inspect, apply, verify, revert, stack, card

A module imports what a command needs when the command runs: patch files need neither torch nor
pandas, and `spkit -h` is there at once.
"""

from spkit.cli import run, study, sweep, tune, bench, patch_files  # isort: skip  # noqa: F401  their commands register
from spkit.cli.front import app

__all__ = ["app"]
