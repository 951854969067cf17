"""The commands of runs: notebooks from a params file, the experiment, memory, and questions.

spkit run params/x.yaml -o patching.beta=1.5     the notebooks, then the table of results
spkit seeds params/x.yaml 0 1 2                  the same for several seeds
spkit experiment params/sandbox.yaml --budget quick
spkit report docs/experiment --into README.md
spkit check params/x.yaml                        can this run end? all that is missing, at once
spkit memory params/x.yaml                       what each notebook needs, predicted
spkit ask sandbox -p "how do i dye the scarf ?"
"""

from pathlib import Path
from typing import Annotated

import typer

from spkit.cli.front import RUN, command
from spkit.errors import SpkitError
from spkit.paths import at_root

Params = Annotated[Path, typer.Argument(help="a params file, such as params/sandbox.yaml")]
Seed = Annotated[int | None, typer.Option(help="instead of that of the params file")]
RunName = Annotated[str | None, typer.Option(help="instead of that of the params file")]
Cores = Annotated[int, typer.Option(min=1, help="cores that the notebooks share")]
Override = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", help="one value, such as -o patching.beta=1.5; repeatable"),
]
Profile = Annotated[
    Path | None,
    typer.Option(help="folder with Snakemake's options for a cluster, such as profiles/slurm"),
]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going/--stop", help="after a failure: the rest, or no more")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="replace results that another params file made")
]


@command(RUN, "all notebooks of a params file, then the table of results", "run")
def run(
    params: Params,
    seed: Seed = None,
    run_name: RunName = None,
    cores: Cores = 2,
    override: Override = None,
    overwrite: Overwrite = False,
) -> None:
    """Run the notebooks of a params file, then print the table of results.

    What is done already is kept; after an interruption the same command resumes.
    """
    from spkit.running import summary, walkthrough
    from spkit.running.runs import run_folder

    params = at_root(params)
    given = walkthrough.overrides(override or [], seed=seed, run_name=run_name)
    config = walkthrough.run(params, given, cores=cores, overwrite=overwrite)
    table = summary.short_table(summary.collect(config), config.patching)
    print(f"\n{table}\n\nAll rows, with intervals: {run_folder(config) / 'results.csv'}")


@command(RUN, "can this run end? what is missing, before any work", "notebooks")
def check(
    params: Params, seed: Seed = None, run_name: RunName = None, override: Override = None
) -> None:
    """Look at everything that a params file names; load and write nothing. Exit code 1: no."""
    from spkit.config import load_params
    from spkit.running import checks, effects, walkthrough

    given = walkthrough.overrides(override or [], seed=seed, run_name=run_name)
    params = at_root(params)
    config = load_params(params, given)
    if said := effects.remarks(config, given, params):
        print(said, end="\n\n")
    found = checks.findings(config)
    print(checks.table(found))
    if wrong := checks.problems(found):
        what = "1 thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
        raise SpkitError(f"{what} in the way; `spkit run` would begin nothing")
    print("\nNothing is in the way.")


@command(RUN, "the same for several seeds: means, intervals, differences", "run")
def seeds(
    params: Params,
    seeds: Annotated[list[int] | None, typer.Argument(help="default: 0 1 2 3 4")] = None,
    run_name: RunName = None,
    cores: Cores = 2,
    override: Override = None,
    overwrite: Overwrite = False,
) -> None:
    """Run several seeds; print means, intervals and differences from base."""
    from spkit.running import seeds as over_seeds
    from spkit.running import walkthrough

    numbers = seeds or [0, 1, 2, 3, 4]
    if len(numbers) < 2:
        raise SpkitError(f"an interval over seeds needs two seeds at least; there is {numbers[0]}")
    params = at_root(params)
    for seed in numbers:
        given = walkthrough.overrides(override or [], seed=seed, run_name=run_name)
        walkthrough.run(params, given, cores=cores, overwrite=overwrite)
    common = walkthrough.overrides(override or [], run_name=run_name)
    print(over_seeds.report(params, numbers, common))


@command(RUN, "all methods, ablations and sweeps: tables, notebook 05", "run")
def experiment(
    params: Params,
    budget: Annotated[str, typer.Option(help="micro, quick or full")] = "quick",
    jobs: Annotated[int, typer.Option(min=1, help="processes, each with its own threads")] = 2,
    profile: Profile = None,
    keep_going: KeepGoing = True,
) -> None:
    """Run all methods, ablations and sweeps; write the tables and notebook 05."""
    from spkit.comparison import run as comparison
    from spkit.config import load_params

    profile = profile and profile.resolve()
    config = load_params(at_root(params))
    made = comparison.run(config, budget, jobs, profile, keep_going)
    print(f"Tables: {made}", flush=True)
    shown = comparison.show(config, made) or "notebooks/05_comparison.ipynb, on comparison.tables"
    print(f"Figures and conclusions: {shown}")


@command(RUN, "the tables of a finished experiment as markdown", "notebooks", hidden=True)
def report(
    tables: Annotated[Path, typer.Argument(help="the folder of an experiment's tables")] = Path(
        "docs/experiment"
    ),
    into: Annotated[
        list[Path] | None, typer.Option(help="a page whose marked blocks to fill; repeatable")
    ] = None,
) -> None:
    """Print the tables of a finished experiment as markdown."""
    from spkit.comparison import publish

    if into:
        publish.publish(tables, into)
    else:
        print(publish.markdown(publish.read_tables(tables)))


@command(RUN, "what each notebook will need here, predicted", "notebooks")
def memory(params: Params, override: Override = None) -> None:
    """Predict what each notebook needs of this machine; load nothing."""
    from spkit.config import load_params
    from spkit.running import memory as prediction
    from spkit.running import walkthrough

    config = load_params(at_root(params), walkthrough.overrides(override or []))
    print(prediction.overview(config))


@command(RUN, "talk to a model: patched, unpatched, or the sandbox's", "notebooks")
def ask(
    folder: Annotated[str, typer.Argument(help="a checkpoint folder, a hub id, or sandbox")],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="ask this once; without it: a dialogue")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of an answer")] = 128,
    system_prompt: Annotated[str | None, typer.Option(help="before every question")] = None,
    quantization: Annotated[str, typer.Option(help="none or nf4")] = "none",
) -> None:
    """Ask a model, patched or not, and read its greedy answers."""
    from spkit.running.ask import Asked

    asked = Asked(folder, max_new_tokens, system_prompt=system_prompt, quantization=quantization)
    if prompt is not None:
        print(asked.answer(prompt))
        return
    print("One question a line; an empty line or Ctrl-D ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        print(asked.answer(question))
