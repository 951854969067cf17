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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.alignment import made
from spkit.config import Config
from spkit.data.inputs import input_files, of_data, of_pairs, one_spelling
from spkit.errors import SpkitError
from spkit.models import counted
from spkit.models.gguf import checkpoint_of, is_gguf
from spkit.running import mirror
from spkit.system import lock, made_from
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.fingerprint import combined
from spkit.system.machine import git_state, hardware, peak_memory_mib, versions
from spkit.validation import flattened

NOTEBOOKS = Path("notebooks")
UNCOUNTED = {"parameters", "colab"}  # tags of code cells that decide no result


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


def identity(
    config: Config, stage: str, code: Mapping[str, str] | None = None, *, files: bool = True
) -> dict[str, Any]:
    """All that decides a stage's results: parameters, seed, contents of input files, code.

    code: what `code_of` gives, where a plan of many has asked already. files: False where the input
    files may not be here, for a forecast: no result has such an identity.
    """
    sections = STAGES[stage].sections
    dumped = config.model_dump(mode="json")
    params = {section: dumped[section] for section in sections}
    if config.importance.save == "sets" and "importance" in params:
        # sets are final, so notebook 02 depends on the rates that scores would leave open
        rates = {key: dumped["patching"][key] for key in ("top_rate_se", "top_rate_osm")}
        params.setdefault("patching", rates)
    if "data" in params:  # another evaluation, the same patches
        whole = "evaluation" in params
        params["data"] = of_data(config) if whole else of_pairs(config.data)
    code = dict(code or code_of(config, stage))
    digests = input_files(config, sections) if files else {}
    if files and "align" in sections and made.needed(config):
        before = made.identity(config)  # of the stage before notebook 00
        params["alignment"], code = before["params"], code | before["code"]
        digests |= {f"alignment.{key}": value for key, value in before["files"].items()}
    return {
        "stage": stage,
        "seed": config.seed,
        "params": one_spelling(params),
        "files": digests,
        "code": code,
    }


def code_of(config: Config, stage: str) -> dict[str, str]:
    """{file: SHA-256} of the code that a stage runs, without that of an alignment before it."""
    code = dict(_code(stage))
    if "sandbox" in STAGES[stage].sections and config.backbone.source == "sandbox":
        code |= made_from.code(["spkit.sandbox.backbone"])  # its weights, shipped or trained
    return code


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


# ---- upstream ------------------------------------------------------------------------------------


def require(config: Config, stage: str) -> None:
    """Check that every stage which `stage` reads from is complete and made with these parameters.

    SpkitError names the notebook to run, and for an outdated one the key that differs. Changed code
    is only a warning here: a comment added to a module should stop nobody.
    """
    mine, weights = identity(config, stage), weights_here(config)
    for upstream in STAGES[stage].needs:
        record = read_record(config, upstream)
        folder, notebook = stage_folder(config, upstream), NOTEBOOKS / f"{upstream}.ipynb"
        if record is None:
            raise SpkitError(
                f"{stage} needs the results of {upstream}, but {folder / 'record.json'} is "
                f"missing: run {notebook} first (run_name={config.run_name}, seed={config.seed})"
            )
        _require_same(record, mine, folder, notebook)
        if record.get("weights") not in (None, weights or record.get("weights")):
            raise SpkitError(
                f"{folder} is outdated: it was made with other weights of the backbone; run "
                f"{notebook} again, or choose another run_name"
            )
        theirs = record.get("code", {})
        changed = [name for name, d in mine["code"].items() if theirs.get(name, d) != d]
        if changed:
            warnings.warn(f"{upstream} was made before a change in {changed[0]}", stacklevel=3)


def require_made(config: Config, stage: str) -> dict[str, Any]:
    """The record of a stage that is complete and made with these parameters, and so are those it
    reads from; else SpkitError as `require` gives."""
    require(config, stage)
    record, folder = read_record(config, stage), stage_folder(config, stage)
    notebook = NOTEBOOKS / f"{stage}.ipynb"
    if record is None:
        raise SpkitError(
            f"{folder / 'record.json'} is missing: run {notebook} first "
            f"(run_name={config.run_name}, seed={config.seed})"
        )
    _require_same(record, identity(config, stage), folder, notebook)
    return record


def require_free(config: Config, stages: Sequence[str] = tuple(STAGES)) -> None:
    """SpkitError where another process works in one of these stages' folders at this moment."""
    for stage in stages:
        lock.require_free(stage_folder(config, stage))


def _require_same(record: Mapping, mine: Mapping, folder: Path, notebook: Path) -> None:
    """SpkitError that names the first parameter or file that is another now.

    Only of what both depend on: the evaluation's settings do not make a backbone outdated.
    """
    then = f"run {notebook} again with the present parameters, or choose another run_name"
    theirs = flattened(record.get("params", {}))
    for key, value in flattened(mine["params"]).items():
        if key in theirs and theirs[key] != value:
            change = f"{key} is {theirs[key]!r} there and {value!r} here"
            raise SpkitError(f"{folder} is outdated: {change}; {then}")
    theirs = record.get("files", {})
    for key, files in mine["files"].items():
        if key in theirs and theirs[key] != files:
            raise SpkitError(f"{folder} is outdated: {_changed(key, theirs[key], files)}; {then}")


def _changed(key: str, before: str | Mapping, now: str | Mapping) -> str:
    """Which of a parameter's files differs: "backbone.source has model.safetensors changed since".

    before, now: the digest of a file, or {name: digest} of a folder's.
    """
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{key} is a file that has changed since"
    name = next(n for n in sorted({*before, *now}) if before.get(n) != now.get(n))
    what = "is new" if name not in before else "is gone" if name not in now else "has changed since"
    return f"the file {name} of {key} {what}"


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


def weights_here(config: Config) -> str | None:
    """One digest of the backbone that this run made itself, or of the hub's commit that is here.

    None where it is not here yet, and for a local folder or file: it is among the input files.
    """
    if config.align.harmful is not None:
        folder = made.model_folder(config, run_folder(config) / "align")
    elif config.backbone.source == "sandbox":
        folder = stage_folder(config, "00_backbone") / "model"
    elif is_gguf(config.backbone) or Path(config.backbone.source).exists():
        return None
    else:
        return counted.commit(config.backbone.source, config.backbone.revision)
    return combined(counted.of_checkpoint(folder)) if folder.is_dir() else None


def forget_other_weights(config: Config) -> list[str]:
    """Delete the stamps of stages that were made with other weights than those that are here.

    No parameter tells of them: the hub's branch has moved on, or notebook 00 has made others.
    Returns the stages, which run again.
    """
    here, found = weights_here(config), []
    for stage in STAGES:
        if here is None or "backbone" not in STAGES[stage].sections:
            continue
        record = read_record(config, stage) or {}
        mark = stamp(config, stage)
        if record.get("weights") not in (None, here) and mark.exists():
            mark.unlink()
            found.append(stage)
    return found


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
        self.config, self.stage = config, stage
        if config.mirror is not None:
            mirror.check(config.mirror, config.outputs)
        folder = stage_folder(config, stage)  # an unknown stage is an error before all else
        if config.mirror is None:
            require(config, stage)  # nothing is made where it cannot run
        lock.require_free(run_folder(config))
        fresh = lock.take(folder)  # until `finish`, or the end of this process
        try:
            if config.mirror is not None:
                # not other stages: one that runs at this moment would get its old files back
                self.restore(config, (*STAGES[stage].needs, stage))
                require(config, stage)
            self._open(make_folder(folder))
        except BaseException:
            if fresh:
                lock.release(folder)
            raise

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self._identity = identity(self.config, self.stage)
        self._stamp = stamp(self.config, self.stage)
        self._began = time.monotonic()
        # from here on until `finish` the stage is incomplete, also if this process is killed
        (folder / "record.json").unlink(missing_ok=True)
        for old in folder.glob("made-from-*"):
            old.unlink()
        if self.config.mirror is not None:  # there, too, it is incomplete from now on
            mirror.push(folder, self._in_mirror(self.config, self.stage))

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

    def checkpoints(self) -> Path:
        """The folder of a training's checkpoints, named after all that they depend on."""
        weights = weights_here(self.config) or "in the files"  # which the stamp knows
        name = hashlib.sha256(f"{self._stamp.name} {weights}".encode()).hexdigest()[:12]
        return self.folder / "checkpoints" / name

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
        from spkit.figures import save

        return save(self.folder / "figures", name, figure)[0]

    def finish(self, **notes: Any) -> None:
        """Write the record, last of all: now the stage is complete. `notes` go into the record.

        Then the folder goes to the mirror, if one is set, and what the stage took is printed.
        """
        record = {
            **self._identity,
            "notes": notes,
            "weights": weights_here(self.config),
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
        lock.release(self.folder)
        peaks = [f"{x / 2**10:.2f} GiB ({k})" for k, x in record["peak_memory_mib"].items()]
        print(f"{self.stage} took {record['seconds']:.0f} s and at most {', '.join(peaks)}")
