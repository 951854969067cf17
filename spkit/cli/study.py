"""The commands of backbones that are aligned here: the alignment, and the study of held-out ones.

spkit align params/smollm2-135m.yaml --seed 1
spkit study params/smollm2-135m.yaml 0 1 2 --derivations 2
"""

from pathlib import Path
from typing import Annotated

import typer

from spkit.cli.front import RUN, command
from spkit.cli.run import Override, Params, RunName, Seed
from spkit.paths import at_root

Derivations = Annotated[int, typer.Option(min=1, help="pairs of patches on each backbone")]
Into = Annotated[
    list[Path] | None, typer.Option(help="a page whose marked blocks to fill; repeatable")
]


@command(RUN, "align a backbone; run does it, too", "run", hidden=True)
def align(
    params: Params, seed: Seed = None, run_name: RunName = None, override: Override = None
) -> None:
    """Align the backbone of a params file, as its section align says."""
    from spkit.alignment import made
    from spkit.config import load_params
    from spkit.errors import SpkitError
    from spkit.running import aligned, walkthrough

    config = load_params(
        at_root(params), walkthrough.overrides(override or [], seed=seed, run_name=run_name)
    )
    if not made.needed(config):
        raise SpkitError(f"{params}: align.harmful is null, so there is nothing to align")
    aligned.align(config)
    print(f"The aligned backbone: {made.model_folder(config, aligned.align_folder(config))}")


@command(RUN, "held-out backbones x derivations: tables", "run")
def study(
    params: Params,
    seeds: Annotated[list[int] | None, typer.Argument(help="default: 0 1 2")] = None,
    derivations: Derivations = 2,
    run_name: RunName = None,
    override: Override = None,
    into: Into = None,
) -> None:
    """Ask base, both patches, their sum and SafePatching on held-out backbones; write tables."""
    from spkit.config import load_params
    from spkit.running import walkthrough
    from spkit.study import report, run

    into = into and [page.resolve() for page in into]
    given = walkthrough.overrides(override or [], run_name=run_name)
    config = load_params(at_root(params), given)
    made = run.run(config, seeds or run.SEEDS, derivations, given)
    found = report.read(made)
    print(f"\n{report.to_markdown(report.main_table(found))}\n\n{report.caption(found)}\n")
    print("\n".join(report.goal(found)))
    if into:
        report.publish(made, into)
