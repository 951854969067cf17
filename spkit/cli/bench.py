"""How fast each stage is here, beside its peer and its limit.

spkit bench                                    all stages; about 25 minutes on two cores
spkit bench importance top_sets --peers        these stages, peers installed where they are needed
spkit bench --small                            a minute or two, for continuous integration
spkit bench --compare old.json new.json        what has become slower
"""

from pathlib import Path
from typing import Annotated

import typer

from spkit.cli.front import FAILED, NO, RUN, command


@command(RUN, "how fast each stage is here, beside peer and limit", "run")
def bench(
    stages: Annotated[list[str] | None, typer.Argument(help="default: all")] = None,
    size: Annotated[list[str] | None, typer.Option(help='"10 M", say; repeatable')] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each; medians are shown")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="default: all cores")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[bool, typer.Option(help="install peers (network), and time them")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="params file; its model's answers are timed, too")
    ] = None,
    small: Annotated[bool, typer.Option(help="the smallest size only")] = False,
    out: Annotated[Path | None, typer.Option(help="default: outputs/bench")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="two bench.json: before, after")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="of compare: slower by this share counts")
    ] = 0.25,
) -> None:
    """Time each stage in turn with its peer and its limit; table, figures, bench.json."""
    if compare is not None:
        from spkit.bench.compare import compare as compared

        table, slower = compared(*compare, threshold)
        print(table)
        raise typer.Exit(NO if slower else 0)
    from spkit.bench import run
    from spkit.paths import repository_root

    sizes = run.SMALL if small else tuple(size) if size else None
    asked = run.Asked(run.only(stages), rounds, sizes, threads, device, peers, backbone)
    if run.run(asked, (out or repository_root() / "outputs" / "bench").resolve()):
        raise typer.Exit(FAILED)
