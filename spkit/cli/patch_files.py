"""The commands of patch files. They need the core alone, but `make`, which reads a run.

    spkit make params/x.yaml PATCH           the patch of a finished run
    spkit inspect PATCH                      what, how much, where
    spkit apply PATCH BACKBONE TARGET        backbone + patch, as a new folder
    spkit verify PATCH [--backbone] [--checkpoint]
    spkit revert PATCH CHECKPOINT TARGET     the exact original bytes back
    spkit stack TARGET PATCH PATCH... --backbone B   several stages as one patch
    spkit lora PATCH TARGET --rank N         a LoRA adapter, with its error
    spkit card PATCH README.md               a model card

A backbone is a checkpoint folder, a hub id, or "sandbox": the shipped one of seed 0.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from spkit.cli.front import DONE, NO, PATCH_FILES, command
from spkit.errors import SpkitError
from spkit.paths import at_root

WHOLE = ("patch", "folder", "path", "card", "D_h fingerprint")  # ids and paths
FIGURES = (".png", ".svg", ".pdf")
SANDBOX = Path(__file__).parents[1] / "sandbox" / "weights"


def _place(text: str) -> str:
    """A path or hub id as it was given, ~ expanded: the shell does not do it behind a "="."""
    if text.startswith("~") and text == os.path.expanduser(text):
        raise typer.BadParameter(f"{text!r} cannot be expanded: there is no such user")
    return os.path.expanduser(text)


def _path(text: str) -> Path:
    return Path(_place(text))


Patch = Annotated[Path, typer.Argument(help="a patch file", parser=_path)]
Backbone = Annotated[
    str, typer.Argument(help="a checkpoint folder, a hub id, or sandbox", parser=_place)
]
BackboneOption = Annotated[
    str | None, typer.Option(help="a checkpoint folder, a hub id, or sandbox", parser=_place)
]
Original = Annotated[
    str | None,
    typer.Option(help="the patch's own backbone, where this one was rounded", parser=_place),
]
Revision = Annotated[
    str | None, typer.Option(help="of the backbone on the hub; default: the patch's")
]
Target = Annotated[
    Path, typer.Argument(help="the new folder; nothing is there until it is whole", parser=_path)
]
NewPatch = Annotated[Path, typer.Argument(help="the new patch file", parser=_path)]
Threads = Annotated[int | None, typer.Option(min=1, max=64, help="default: up to 4")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there already")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="read and check everything, write nothing")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]
Json = Annotated[bool, typer.Option("--json", help="the result as JSON; no progress bar")]
Revertible = Annotated[
    bool, typer.Option("--revertible", help="carry the original weights, so that it can be undone")
]


@command(PATCH_FILES, "the patch of a finished run again, revertible or shorter", "notebooks")
def make(
    params: Annotated[
        Path, typer.Argument(help="params file of a run whose notebook 03 is done", parser=_path)
    ],
    target: NewPatch,
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
    place = target.resolve()
    config = load_params(at_root(params), {k: v for k, v in given.items() if v is not None})
    options = {"values": values, "revertible": revertible}
    manifest = make_from_run(config, place, progress=not (quiet or as_json), **options)
    parts = ("positions", "values", "replaced", "originals")
    rows = {
        "patch": str(target),
        "matrices": len(manifest.tensors),
        "kept": manifest.kept,
        "lost": manifest.lost,
        "relative_rms": manifest.error.relative_rms,
        "changed": manifest.error.changed,
        "bytes": place.stat().st_size,
        **{f"bytes_{part}": manifest.size(part) for part in parts},
    }
    _show(rows, as_json)


@command(PATCH_FILES, "what a patch holds, how much it changes, and where")
def inspect(
    patch: Patch,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="write the map of layers and modules there (png, svg, pdf)", parser=_path
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What a patch is: rates, strengths, results, how much it changes, where."""
    from spkit.patchfile.summary import inspect as run

    if figure is not None and figure.suffix not in FIGURES:
        raise SpkitError(f"{figure} cannot be written: a figure ends with {', '.join(FIGURES)}")
    found = run(patch)
    if figure is not None:
        from spkit.system.files import atomic

        drawn = found.figure()
        with atomic(figure) as temporary:
            drawn.savefig(temporary, bbox_inches="tight", dpi=150)
    if as_json:
        manifest = found.manifest.model_dump(mode="json", exclude={"tensors"})
        print(json.dumps({"summary": found.facts(), "manifest": manifest, "where": found.rows}))
        return
    _show({key: value for key, value in found.summary().items() if value != ""}, False)
    models = dict.fromkeys(key for row in found.results() for key in row)
    _rows([{key: _rate(row.get(key, "")) for key in models} for row in found.results()])
    sums = found.modules()
    _rows([{**s, "share": _percent(s["share"]), "norm": round(s["norm"], 4)} for s in sums])
    _show_layers(found.shares())


@command(PATCH_FILES, "backbone + patch, written as a new folder")
def apply(
    patch: Patch,
    backbone: Backbone,
    target: Target,
    revision: Revision = None,
    original: Original = None,
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

    A run that was cut resumes at the last finished shard. The backbone may be a copy in another
    dtype: then its values are compared, and where the copy was rounded, with those of --original.
    """
    from spkit.patchfile.apply import apply as run

    done = run(
        patch,
        _checkpoint(backbone),
        None if dry_run else target,
        revision=revision,
        original=_checkpoint(original),
        dtype=dtype,
        threads=threads,
        overwrite=overwrite,
        progress=not (quiet or as_json),
    )
    _show_written(done, target, as_json)


@command(PATCH_FILES, "is it whole, does it fit, was a checkpoint made with it?")
def verify(
    patch: Patch,
    backbone: BackboneOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="a folder that is said to be made with this patch", parser=_path),
    ] = None,
    revision: Revision = None,
    original: Original = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Is the patch whole, does it fit the backbone, was the checkpoint made from both?

    Exit code 3 where the answer is no.
    """
    from spkit.patchfile.verify import verify as run

    options = {"revision": revision, "threads": threads, "progress": not (quiet or as_json)}
    options["original"] = _checkpoint(original)
    found = run(patch, _checkpoint(backbone), checkpoint, **options)
    if as_json:
        print(json.dumps({**asdict(found), "ok": found.ok}))
    else:
        table = Table("compared", "agrees", Column("where it does not", overflow="fold"))
        for finding in found.findings:
            answer = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}[finding.ok]
            table.add_row(escape(finding.what), answer, escape(finding.detail))
        Console().print(table)
    raise typer.Exit(DONE if found.ok else NO)


@command(PATCH_FILES, "take a patch back: the exact original bytes")
def revert(
    patch: Patch,
    checkpoint: Annotated[Path, typer.Argument(help="the folder that `apply` wrote", parser=_path)],
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
        backbone=_checkpoint(backbone),
        revision=revision,
        threads=threads,
        overwrite=overwrite,
        progress=not (quiet or as_json),
    )
    _show_written(done, target, as_json)


@command(PATCH_FILES, "several patches, one after another, as one")
def stack(
    target: NewPatch,
    patches: Annotated[
        list[Path], typer.Argument(help="two or more patches, in their order", parser=_path)
    ],
    backbone: Annotated[str, typer.Option(help="what the first one was made for", parser=_place)],
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
    done = run(patches, _checkpoint(backbone), target, progress=not (quiet or as_json), **options)
    rows = {key: value for key, value in vars(done).items() if key != "pairs"}
    if as_json:
        print(json.dumps({**rows, "overlaps": done.pairs}))
        return
    _show(rows, False)
    _rows([{**pair, "share": _percent(pair["share"])} for pair in done.pairs])


@command(PATCH_FILES, "a LoRA adapter of rank N, with the error that this makes")
def lora(
    patch: Patch,
    target: Annotated[Path, typer.Argument(help="the new folder, for PEFT", parser=_path)],
    rank: Annotated[int, typer.Option(min=1, help="of the factors of each matrix")],
    prefix: Annotated[
        str | None, typer.Option(help="before layers.0 in the model, where the files differ")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="where the patch stores weights as patched", parser=_place),
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the patch as a LoRA adapter: the truncated SVD of what it adds to each matrix.

    A patch is not low-rank: look at the error before you use the adapter.
    """
    from spkit.patchfile.lora import lora as run

    options = {"revision": revision, "overwrite": overwrite, "progress": not (quiet or as_json)}
    done = run(patch, target, rank, prefix=prefix, backbone=_checkpoint(backbone), **options)
    rows = asdict(done)
    if as_json:
        print(json.dumps(rows))
        return
    matrices = [{**row, "shape": "x".join(map(str, row["shape"]))} for row in rows.pop("rows")]
    _rows(matrices)
    _show(rows, False)


@command(PATCH_FILES, "a model card: results, limits, hazards, licence")
def card(
    patch: Patch,
    target: Annotated[
        Path, typer.Argument(help="a file, or a folder: README.md in it", parser=_path)
    ],
    base_model: Annotated[str | None, typer.Option(help="hub id of the backbone")] = None,
    license: Annotated[str | None, typer.Option(help="licence id for the card's head")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model card: results, limits, hazards, licence notes."""
    from spkit.patchfile.card import card as run

    path = run(patch, target, overwrite=overwrite, base_model=base_model, license=license)
    _show({"card": str(path)}, as_json)


def _require_free(target: Path, overwrite: bool, inputs: list[Path] = ()) -> None:
    """SpkitError where a file would be lost."""
    if any(target.resolve() == path.resolve() for path in inputs):
        raise SpkitError(f"{target} is one of the patches: choose another name.")
    if target.exists() and not (overwrite and target.is_file()):
        raise SpkitError(f"{target} exists already: choose another name, or --overwrite a file.")


def _checkpoint(backbone: str | None) -> str | None:
    """The shipped weights for "sandbox", unless there is a folder of that name."""
    if backbone == "sandbox" and not Path(backbone).is_dir():
        return str(SANDBOX)
    return backbone


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
        table.add_row(key, escape(_text(value)))
    if table.row_count:
        console.print(table)


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _rows(rows: list[dict]) -> None:
    if not rows:
        return
    table = Table(*(escape(str(key).replace("_", " ")) for key in rows[0]))
    for row in rows:
        table.add_row(*(escape(_text(cell)) for cell in row.values()))
    Console().print(table)


def _show_layers(layers: dict[int, dict[str, float]]) -> None:
    """The kept shares as a map: a line a layer, a column a module."""
    if not layers:
        return
    modules = dict.fromkeys(module for row in layers.values() for module in row)
    title = "share of each matrix kept, %: layers down, modules across"
    names = (escape(name.replace("_proj", "")) for name in modules)
    table = Table("layer", *names, title=title, title_justify="left")
    largest = max(share for row in layers.values() for share in row.values()) or 1.0
    for layer, row in layers.items():
        shares = (row.get(module) for module in modules)
        cells = (
            "" if share is None else f"[{_shade(share / largest)}]{100 * share:.2f}[/]"
            for share in shares
        )
        table.add_row(str(layer), *cells)
    Console().print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"


def _rate(cell) -> str:
    return f"{100 * cell:.1f} %" if isinstance(cell, float | int) else str(cell)


def _shade(share: float) -> str:
    """White on a darker blue the larger the share is."""
    return (
        f"white on rgb({round(60 - 40 * share)},{round(70 - 10 * share)},{round(60 + 140 * share)})"
    )
