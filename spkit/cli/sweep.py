"""The command of sweeps: many runs that share what they can, on this machine or on a cluster.

spkit sweep params/sweeps/retention.yaml --cores 2
spkit sweep params/sweeps/retention.yaml --profile profiles/slurm
spkit sweep params/sweeps/paper.yaml --plan      what it would take; nothing is loaded
"""

from pathlib import Path
from typing import Annotated

import typer

from spkit.cli.front import FAILED, RUN, command
from spkit.cli.run import Cores, Override
from spkit.paths import at_root


@command(RUN, "a grid of runs, what they share done once", "run")
def sweep(
    file: Annotated[Path, typer.Argument(help="such as params/sweeps/retention.yaml")],
    cores: Cores = 2,
    profile: Annotated[
        Path | None, typer.Option(help="a folder of Snakemake's options: profiles/slurm")
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going/--stop", help="after a failure")] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="print what it would take, and run nothing")
    ] = False,
    device: Annotated[str, typer.Option(help="of the forecast of --plan, such as a100")] = "auto",
    override: Override = None,
) -> None:
    """Run the notebooks of every point of a sweep; write one table with intervals, and figures.

    A failure stops only the points that need it; they are named at the end. After an interruption,
    or a failure, the same command does what is left.
    """
    from spkit.running import walkthrough
    from spkit.sweeps import run

    given = walkthrough.overrides(override or [])
    profile = profile and profile.resolve()
    path = at_root(file)
    if plan:
        print(run.forecast(path, given, device=device, cores=cores))
        return
    if not run.run(path, given, cores=cores, profile=profile, keep_going=keep_going):
        raise typer.Exit(FAILED)
