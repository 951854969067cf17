"""The commands that find the settings, and patch with them.

spkit tune params/x.yaml --trials 100     on the dev prompts: trials, a figure, a params file
spkit patch params/x.yaml                 tune, patch, evaluate on test, one page
"""

from typing import Annotated

import typer

from spkit.cli.front import RUN, command
from spkit.cli.run import Cores, Override, Params, RunName, Seed
from spkit.paths import at_root


@command(RUN, "find the settings of a method for a backbone, on dev", "run")
def tune(
    params: Params,
    seed: Seed = None,
    run_name: RunName = None,
    override: Override = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="instead of tuning.trials; more keep those there are")
    ] = None,
) -> None:
    """Find the settings of `tuning.method` for a backbone, on its dev prompts.

    Many settings are tried by a fast objective, the best are answered and judged, one is chosen by
    a stated rule and written as a params file. After an interruption the same command resumes.
    """
    from spkit.running import walkthrough
    from spkit.tuning.run import tune as run

    given = walkthrough.overrides(override or [], seed=seed, run_name=run_name)
    run(at_root(params), given if trials is None else given | {"tuning.trials": trials})


@command(RUN, "all of it: tune, patch, evaluate on test, a report", "run")
def patch(
    params: Params,
    seed: Seed = None,
    run_name: RunName = None,
    cores: Cores = 2,
    override: Override = None,
) -> None:
    """Tune on dev, patch, evaluate on test; write patch file, checkpoint and a report page."""
    from spkit.running import walkthrough
    from spkit.tuning.patch import patch as run

    given = walkthrough.overrides(override or [], seed=seed, run_name=run_name)
    run(at_root(params), given, cores=cores)
