"""Run folders: which stages there are, what each depends on, and the record beside its results.

A stage is one notebook. It writes into outputs/<run_name>/seed-<seed>/<stage>/ and is complete when
its `record.json` is there, which is written last. Times, commit and hardware stand in the record
alone, so that all other files of a run are the same bytes for the same seed.

All relative paths are relative to the repository's root, into which `notebook.start` and the
Snakefile change. This file does not know what the stages compute.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.alignment import made
from spkit.config import Config
from spkit.data.readers.source import local_files, resolve
from spkit.data.readers.wrappers import wrappers_file
from spkit.data.selection import is_unaligned
from spkit.errors import SpkitError
from spkit.models.gguf import checkpoint_of, is_gguf
from spkit.running import mirror
from spkit.system import made_from
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.machine import git_state, hardware, peak_memory_mib, versions
from spkit.validation import flattened

NOTEBOOKS = Path("notebooks")
UNCOUNTED = {"parameters", "colab"}  # tags of code cells that decide no result
WHOLE_FILE_BYTES = 64 * 2**20  # larger input files (weights) are known by name and size alone


@dataclass(frozen=True)
class Stage:
    """One notebook in the graph.

    sections: the sections of the parameters that it depends on (its upstream stages' included).
    needs: the stages whose files it reads.
    results: whether it writes a results.csv, a part of the run's.
    """

    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    results: bool = False


_MODEL = ("backbone", "sandbox", "data", "align")
_EVALUATION = ("evaluation", "judges", "utility")
STAGES = {
    "00_backbone": Stage((*_MODEL, *_EVALUATION), results=True),
    "01_patch_derivation": Stage((*_MODEL, "derivation"), ("00_backbone",)),
    "02_importance_analysis": Stage(
        (*_MODEL, "derivation", "importance"), ("00_backbone", "01_patch_derivation")
    ),
    "03_controllable_patching": Stage(
        (*_MODEL, "derivation", "importance", "patching", *_EVALUATION),
        ("00_backbone", "01_patch_derivation", "02_importance_analysis"),
        results=True,
    ),
    "04_continual_psa": Stage(
        (
            *(*_MODEL, "derivation", "importance", "patching"),
            *("evaluation", "judges", "continual", "baselines"),
        ),
        ("00_backbone",),  # so it runs beside 01-03
        results=True,
    ),
    # it reads the tables of a finished experiment (spkit/comparison), not the other stages
    "05_comparison": Stage(("comparison",)),
}


# ---- places --------------------------------------------------------------------------------------


def run_folder(config: Config) -> Path:
    """outputs/<run_name>/seed-<seed>: everything of one run with one seed."""
    return Path(config.outputs) / config.run_name / f"seed-{config.seed}"


def stage_folder(config: Config, stage: str) -> Path:
    """The folder of one stage; SpkitError for a stage that is not in STAGES."""
    if stage not in STAGES:
        raise SpkitError(f"unknown stage {stage!r}, allowed: {', '.join(STAGES)}")
    return run_folder(config) / stage


def stamp(config: Config, stage: str) -> Path:
    """An empty file whose *name* tells what the stage was made from; the Snakefile looks for it.

    Another parameter, another input file or other code is another name. So a second run does
    nothing, and a changed parameter reruns exactly the stages that depend on it.
    """
    text = json.dumps(identity(config, stage), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return stage_folder(config, stage) / f"made-from-{digest[:12]}"


# ---- what a stage is made from -------------------------------------------------------------------


def identity(config: Config, stage: str) -> dict[str, Any]:
    """All that decides a stage's results: parameters, seed, contents of input files, code."""
    sections = STAGES[stage].sections
    dumped = config.model_dump(mode="json")
    params = {section: dumped[section] for section in sections}
    if config.importance.save == "sets" and "importance" in params:
        # sets are final, so notebook 02 depends on the rates that scores would leave open
        rates = {key: dumped["patching"][key] for key in ("top_rate_se", "top_rate_osm")}
        params.setdefault("patching", rates)
    return {
        "stage": stage,
        "seed": config.seed,
        "params": params,
        "files": dict(_input_files(config, sections)),
        "code": dict(_code(stage)) | _code_of_alignment(config),
    }


def _input_files(config: Config, sections: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(parameter, digest) of the user's own files, also of those behind names in data.sources.

    A missing one is an error already here. Only of the experiment's tables it is not: all other
    stages can do without them.
    """
    if "comparison" in sections:
        tables = sorted(Path(config.comparison.tables).glob("*.csv"))
        yield "comparison.tables", _digest(tables)
    if "backbone" not in sections:
        return
    data = config.data
    responses = [] if data.responses is None or is_unaligned(data) else data.responses
    named = {"data.harmful": data.harmful, "data.responses": responses}
    if config.align.harmful is not None:
        align = config.align
        named |= {"align.harmful": align.harmful, "align.over_safety": align.over_safety}
        named["align.instructions"] = align.instructions
    if "evaluation" in sections:
        named["data.evaluation"] = data.evaluation
        if data.wrappers != "none":  # the shipped file, too: it is no code
            yield "data.wrappers", _digest([wrappers_file(data.wrappers)])
    if "utility" in sections:
        named["utility.perplexity"] = config.utility.perplexity
        named["utility.kl"] = config.utility.kl or []
        for task, source in config.utility.sources.items():
            if files := local_files(source):  # one by pypi: is named by its hash, a parameter
                yield f"utility.sources.{task}", _digest(files)
        tasks, questions = config.utility.include_path, config.utility.mt_bench.prompts
        if tasks is not None and Path(tasks).is_dir():
            files = sorted(p for p in Path(tasks).rglob("*") if p.is_file())
            yield "utility.include_path", _digest(files)
        if questions is not None and Path(questions).is_file():
            yield "utility.mt_bench.prompts", _digest([Path(questions)])
    for key, names in named.items():
        names = [names] if isinstance(names, str) else names
        sources = [resolve(data, name, key, fetch=False) for name in names if name != "sandbox"]
        # a hub id is named by its path and revision, a pypi: source by its hash: parameters
        files = [file for source in sources for file in local_files(source)]
        if files:
            yield key, _digest(files)
    source = Path(config.backbone.source)
    if config.backbone.source != "sandbox" and source.is_dir():
        yield "backbone.source", _digest(sorted(p for p in source.rglob("*") if p.is_file()))
    elif is_gguf(config.backbone) and source.is_file():
        yield "backbone.source", _digest([source])


def _code(stage: str) -> Iterator[tuple[str, str]]:
    """The notebook's code cells alone, without text or saved outputs, and what they import."""
    notebook = NOTEBOOKS / f"{stage}.ipynb"
    if notebook.is_file():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        source = "\n".join(
            "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "code"
            and not UNCOUNTED.intersection(cell.get("metadata", {}).get("tags", []))
        )
        yield from made_from.code(made_from.imported_by(source)).items()
        yield notebook.as_posix(), hashlib.sha256(source.encode()).hexdigest()


def _code_of_alignment(config: Config) -> dict[str, str]:
    """Of the stage before notebook 00, where these parameters ask for it."""
    return made.identity(config)["code"] if made.needed(config) else {}


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        if size <= WHOLE_FILE_BYTES:
            total.update(path.read_bytes())
    return total.hexdigest()


# ---- upstream ------------------------------------------------------------------------------------


def require(config: Config, stage: str) -> None:
    """Check that every stage which `stage` reads from is complete and made with these parameters.

    SpkitError names the notebook to run, and for an outdated one the key that differs. Changed code
    is only a warning here: a comment added to a module should stop nobody.
    """
    mine = identity(config, stage)
    for upstream in STAGES[stage].needs:
        record = read_record(config, upstream)
        folder, notebook = stage_folder(config, upstream), NOTEBOOKS / f"{upstream}.ipynb"
        if record is None:
            raise SpkitError(
                f"{stage} needs the results of {upstream}, but {folder / 'record.json'} is "
                f"missing: run {notebook} first (run_name={config.run_name}, seed={config.seed})"
            )
        # only what both depend on: the evaluation's settings do not make a backbone outdated
        for kind in ("params", "files"):
            theirs = flattened(record.get(kind, {}))
            for key, value in flattened(mine[kind]).items():
                if key in theirs and theirs[key] != value:
                    change = f"{theirs[key]!r} there and {value!r} here"
                    change = change if kind == "params" else "a file that has changed since"
                    raise SpkitError(
                        f"{folder} is outdated: {key} is {change}; run {notebook} again with the "
                        f"present parameters, or choose another run_name"
                    )
        theirs = record.get("code", {})
        changed = [name for name, d in mine["code"].items() if theirs.get(name, d) != d]
        if changed:
            warnings.warn(f"{upstream} was made before a change in {changed[0]}", stacklevel=3)


def input_path(config: Config, stage: str, upstream: str, name: str) -> Path:
    """The path of an upstream stage's file or folder; SpkitError names the notebook to run."""
    if upstream not in STAGES[stage].needs:
        needs = ", ".join(STAGES[stage].needs) or "nothing"
        raise SpkitError(f"{stage} reads from {upstream!r}, allowed: {needs}")
    path = stage_folder(config, upstream) / name
    if not path.exists():
        raise SpkitError(f"{path} is missing: run {NOTEBOOKS / upstream}.ipynb again")
    return path


def backbone_source(config: Config, run) -> Path | str:
    """What notebook 00 prepared in this run: the folder or hub id to load the backbone from."""
    if config.backbone.source != "sandbox":
        return checkpoint_of(config.backbone)
    return run.input("00_backbone", "model")


def read_record(config: Config, stage: str) -> dict[str, Any] | None:
    """The record of a complete stage, or None."""
    path = stage_folder(config, stage) / "record.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpkitError(f"{path}: cannot be read ({error}); delete it and run again") from None


# ---- one stage's work ----------------------------------------------------------------------------


class Run:
    """The open folder of one stage: read upstream files from it, write results to it, finish it."""

    def __init__(self, config: Config, stage: str):
        if config.mirror is not None:
            mirror.check(config.mirror, config.outputs)
            stage_folder(config, stage)  # an unknown stage is an error before anything is copied
            # not other stages: one that runs at this moment would get its old files back
            self.restore(config, (*STAGES[stage].needs, stage))
        require(config, stage)
        self.config, self.stage = config, stage
        self.folder = make_folder(stage_folder(config, stage))
        self._identity, self._stamp = identity(config, stage), stamp(config, stage)
        self._began = time.monotonic()
        # from here on until `finish` the stage is incomplete, also if this process is killed
        (self.folder / "record.json").unlink(missing_ok=True)
        for old in self.folder.glob("made-from-*"):
            old.unlink()
        if config.mirror is not None:  # there, too, it is incomplete from now on
            mirror.push(self.folder, self._in_mirror(config, stage))

    @staticmethod
    def restore(config: Config, stages: tuple[str, ...] = tuple(STAGES)) -> list[Path]:
        """Copy back from the mirror what is missing in these stages' folders; returns the files.

        Nothing where no mirror is set. For the whole run before any of its stages is running.
        """
        found = []
        for stage in stages if config.mirror is not None else ():
            folder = stage_folder(config, stage)
            found += [folder / x for x in mirror.pull(Run._in_mirror(config, stage), folder)]
        return found

    @staticmethod
    def _in_mirror(config: Config, stage: str) -> Path:
        return Path(config.mirror) / stage_folder(config, stage).relative_to(config.outputs)

    def push(self) -> None:
        """Copy what is new in this stage's folder to the mirror, if one is set: after a checkpoint.

        A mirror that fails now is a warning: the results are here, and hours of work go on. The
        copy holds the OSM patch, too, and must stay as private as the run folder (mirror.py).
        """
        if self.config.mirror is not None:
            try:  # an unmounted drive's folder must not be made anew on this disk
                mirror.check(self.config.mirror, self.config.outputs)
                mirror.push(self.folder, self._in_mirror(self.config, self.stage))
            except SpkitError as error:
                warnings.warn(f"not mirrored: {error}", stacklevel=2)

    def input(self, stage: str, name: str) -> Path:
        """The path of an upstream stage's file or folder; SpkitError names the notebook."""
        return input_path(self.config, self.stage, stage, name)

    def write(self, name: str) -> AbstractContextManager[Path]:
        """`with run.write("model") as path:` a file or folder written to `path` becomes `name`."""
        return atomic(self.folder / name)

    def save_frame(self, name: str, frame) -> Path:
        """A pandas data frame as CSV, the same bytes for the same values."""
        return save_csv(self.folder / name, frame)

    def save_json(self, name: str, value: Any) -> Path:
        """A value as indented JSON."""
        with self.write(name) as path:
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return self.folder / name

    def save_figure(self, name: str, figure) -> Path:
        """A matplotlib figure as figures/<name>.png and .svg, without a date inside."""
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "spkit"}):
            for suffix, inside in (("png", {"Software": None}), ("svg", {"Date": None})):
                with self.write(f"figures/{name}.{suffix}") as path:
                    figure.savefig(path, bbox_inches="tight", dpi=150, metadata=inside)
        return self.folder / "figures" / f"{name}.png"

    def finish(self, **notes: Any) -> None:
        """Write the record, last of all: now the stage is complete. `notes` go into the record.

        Then the folder goes to the mirror, if one is set, and what the stage took is printed.
        """
        record = {
            **self._identity,
            "notes": notes,
            "run_name": self.config.run_name,
            "threads": self.config.threads,
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - self._began, 1),
            "peak_memory_mib": peak_memory_mib(),
        }
        with atomic(self._stamp) as path:
            path.touch()
        self.save_json("record.json", record)
        self.push()
        peaks = [f"{x / 2**10:.2f} GiB ({k})" for k, x in record["peak_memory_mib"].items()]
        print(f"{self.stage} took {record['seconds']:.0f} s and at most {', '.join(peaks)}")
