"""The command `spkit`: a patch file from the terminal. Every command is also a function.

    spkit make params/x.yaml PATCH           the patch of a finished run
    spkit inspect PATCH                      what, how much, where
    spkit apply PATCH BACKBONE TARGET        backbone + patch, as a new folder
    spkit verify PATCH [--backbone] [--checkpoint]
    spkit revert PATCH CHECKPOINT TARGET     the exact original bytes back
    spkit stack TARGET PATCH PATCH... --backbone B   several stages as one patch
    spkit card PATCH README.md               a model card

Exit codes: 0 done, or yes; 1 an error, in one sentence; 2 a wrong command line; 3 verify says no;
130 interrupted. With --json the result, or the error, is one JSON object on standard output.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from spkit.errors import SpkitError

DONE, FAILED, NO, INTERRUPTED = 0, 1, 3, 130
WHOLE = ("patch", "folder", "path", "card", "D_h fingerprint")  # ids and paths
FIGURES = (".png", ".svg", ".pdf")
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A safety patch is a file: make, inspect, apply, verify, revert and stack it.",
    epilog="Exit codes: 0 done or yes, 1 an error, 2 a wrong command line, 3 verify says no.",
)

Patch = Annotated[Path, typer.Argument(help="a patch file")]
Backbone = Annotated[str, typer.Argument(help="a checkpoint folder, or a hub id")]
BackboneOption = Annotated[str | None, typer.Option(help="a checkpoint folder, or a hub id")]
Revision = Annotated[
    str | None, typer.Option(help="of the backbone on the hub; default: the patch's")
]
Target = Annotated[Path, typer.Argument(help="the new folder; nothing is there until it is whole")]
Threads = Annotated[int | None, typer.Option(min=1, max=64, help="default: up to 4")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there already")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="read and check everything, write nothing")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]
Json = Annotated[bool, typer.Option("--json", help="the result as JSON; no progress bar")]
Revertible = Annotated[
    bool, typer.Option("--revertible", help="carry the original weights, so that it can be undone")
]


def command(function: Callable) -> Callable:
    """Register a command whose errors are one sentence, and an exit code."""

    @wraps(function)  # typer reads the signature
    def guarded(*args, **options):
        try:
            return function(*args, **options)
        except SpkitError as error:
            if options.get("as_json"):
                print(json.dumps({"error": str(error)}))
            else:
                console = Console(stderr=True)
                console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where it was cut", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return app.command()(guarded)


@command
def apply(
    patch: Patch,
    backbone: Backbone,
    target: Target,
    revision: Revision = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the target: bfloat16, float16 or float32")
    ] = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write backbone + patch to a new folder, tensor by tensor, without loading a model.

    A run that was cut goes on at the last finished shard.
    """
    from spkit.patchfile.apply import apply as run

    done = run(
        patch,
        backbone,
        None if dry_run else target,
        revision=revision,
        dtype=dtype,
        threads=threads,
        overwrite=overwrite,
        progress=not (quiet or as_json),
    )
    _show_written(done, target, as_json)


@command
def revert(
    patch: Patch,
    checkpoint: Annotated[Path, typer.Argument(help="the folder that `apply` wrote")],
    target: Target,
    backbone: BackboneOption = None,
    revision: Revision = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take a patch back: the backbone's exact bytes in a new folder.

    Needs a patch that was made --revertible, or the backbone.
    """
    from spkit.patchfile.revert import revert as run

    done = run(
        patch,
        checkpoint,
        None if dry_run else target,
        backbone=backbone,
        revision=revision,
        threads=threads,
        overwrite=overwrite,
        progress=not (quiet or as_json),
    )
    _show_written(done, target, as_json)


@command
def inspect(
    patch: Patch,
    figure: Annotated[
        Path | None, typer.Option(help="write the map of layers and modules there (png, svg, pdf)")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a patch is, how much it changes, and where."""
    from spkit.patchfile.summary import inspect as run

    if figure is not None and figure.suffix not in FIGURES:
        raise SpkitError(f"{figure} cannot be written: a figure ends with {', '.join(FIGURES)}")
    found = run(patch)
    if figure is not None:
        from spkit.system.files import atomic

        with atomic(figure) as temporary:
            found.figure().savefig(temporary, bbox_inches="tight", dpi=150)
    if as_json:
        where = found.where.to_dict("records")
        manifest = found.manifest.model_dump(mode="json", exclude={"tensors"})
        print(json.dumps({"summary": found.summary(), "manifest": manifest, "where": where}))
        return
    _show(found.summary(), False)
    console = Console()
    modules = found.by_module()
    _frame(modules.assign(share=_percent(modules["share"]), norm=modules["norm"].round(4)))
    layers = found.layers()
    if len(layers):
        title = "share of each matrix kept, %: layers down, modules across"
        largest = layers.max().max() or 1.0
        table = Table("layer", *layers.columns, title=title, title_justify="left")
        for layer, row in layers.iterrows():
            cells = (f"[{_shade(share / largest)}]{100 * share:.2f}[/]" for share in row)
            table.add_row(str(layer), *cells)
        console.print(table)


@command
def verify(
    patch: Patch,
    backbone: BackboneOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="a folder that is said to be made with this patch")
    ] = None,
    revision: Revision = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Is the patch whole, does it fit the backbone, was the checkpoint made from both?

    Exit code 3 where the answer is no.
    """
    from spkit.patchfile.verify import verify as run

    options = {"revision": revision, "threads": threads, "progress": not (quiet or as_json)}
    found = run(patch, backbone, checkpoint, **options)
    if as_json:
        print(json.dumps({**asdict(found), "ok": found.ok}))
    else:
        table = Table("compared", "agrees", Column("where it does not", overflow="fold"))
        for finding in found.findings:
            answer = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}[finding.ok]
            table.add_row(escape(finding.what), answer, escape(finding.detail))
        Console().print(table)
    raise typer.Exit(DONE if found.ok else NO)


@command
def stack(
    target: Annotated[Path, typer.Argument(help="the new patch file")],
    patches: Annotated[list[Path], typer.Argument(help="two or more patches, in their order")],
    backbone: Annotated[str, typer.Option(help="what the first one was made for")],
    revision: Revision = None,
    revertible: Revertible = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Several patches, each made on what the last one left, as one patch for the backbone."""
    from spkit.patchfile.stack import stack as run

    _require_free(target, overwrite, patches)
    options = {"revision": revision, "revertible": revertible}
    done = run(patches, backbone, target, progress=not (quiet or as_json), **options)
    rows = {key: value for key, value in vars(done).items() if key != "overlaps"}
    if as_json:
        print(json.dumps({**rows, "overlaps": done.overlaps.to_dict("records")}))
        return
    _show(rows, False)
    _frame(done.overlaps.assign(share=_percent(done.overlaps["share"])))


@command
def card(
    patch: Patch,
    target: Annotated[Path, typer.Argument(help="a file, or a folder: README.md in it")],
    base_model: Annotated[str | None, typer.Option(help="hub id of the backbone")] = None,
    license: Annotated[str | None, typer.Option(help="licence id for the card's head")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model card: results, limits, hazards, licence notes."""
    from spkit.patchfile.card import card as run

    path = run(patch, target, overwrite=overwrite, base_model=base_model, license=license)
    _show({"card": str(path)}, as_json)


@command
def make(
    params: Annotated[Path, typer.Argument(help="params file of a run whose notebook 03 is done")],
    target: Annotated[Path, typer.Argument(help="the new patch file")],
    values: Annotated[
        str, typer.Option(help="exact, bfloat16 (rounded) or int8 (64 values share a scale)")
    ] = "exact",
    revertible: Revertible = False,
    run_name: Annotated[str | None, typer.Option(help="instead of that of the params file")] = None,
    seed: Annotated[int | None, typer.Option(help="instead of that of the params file")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make the patch of a finished run again: revertible, or with shorter values.

    Notebook 03 makes one by itself, with exact values and without the originals.
    """
    if values not in ("exact", "bfloat16", "int8"):
        raise SpkitError(f"unknown values {values!r}, allowed: exact, bfloat16, int8")
    _require_free(target, overwrite)
    from spkit.config import load_params
    from spkit.running.patch_of_run import make_from_run

    given = {"run_name": run_name, "seed": seed}
    config = load_params(params, {key: value for key, value in given.items() if value is not None})
    options = {"values": values, "revertible": revertible}
    manifest = make_from_run(config, target, progress=not (quiet or as_json), **options)
    parts = ("positions", "values", "replaced", "originals")
    rows = {
        "patch": str(target),
        "matrices": len(manifest.tensors),
        "kept": manifest.kept,
        "lost": manifest.lost,
        "relative_rms": manifest.error.relative_rms,
        "changed": manifest.error.changed,
        "bytes": target.stat().st_size,
        **{f"bytes_{part}": manifest.size(part) for part in parts},
    }
    _show(rows, as_json)


def _require_free(target: Path, overwrite: bool, inputs: list[Path] = ()) -> None:
    """SpkitError where a file would be lost."""
    if any(target.resolve() == path.resolve() for path in inputs):
        raise SpkitError(f"{target} is one of the patches: choose another name.")
    if target.exists() and not (overwrite and target.is_file()):
        raise SpkitError(f"{target} exists already: choose another name, or --overwrite a file.")


# ---- what is printed -----------------------------------------------------------------------------


def _show_written(done, target: Path, as_json: bool) -> None:
    rows = asdict(done)
    if not as_json and done.folder is None:
        rows["folder"] = f"(dry run: {target} was not written)"
    _show(rows, as_json)


def _show(rows: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False)
    console = Console()
    for key, value in rows.items():
        if key in WHOLE:  # to be compared and copied: never broken
            console.print(f"{key} {'' if value is None else value}", soft_wrap=True, markup=False)
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        table.add_row(key, escape("" if text is None else str(text)))
    if table.row_count:
        console.print(table)


def _frame(frame) -> None:
    table = Table(*(str(column) for column in frame))
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{x:,}" if isinstance(x, int) else escape(str(x)) for x in row))
    Console().print(table)


def _percent(shares):
    return (100 * shares).round(3).astype(str) + " %"


def _shade(share: float) -> str:
    """White on a darker blue the larger the share is."""
    return (
        f"white on rgb({round(60 - 40 * share)},{round(70 - 10 * share)},{round(60 + 140 * share)})"
    )


if __name__ == "__main__":
    app()
