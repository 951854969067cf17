"""The new folder of a checkpoint: there when all of it is written and synced, or not at all.

    .tmp-<name>/                what is on its way; locked while a process works in it
    .tmp-<name>/spkit-journal.jsonl    what decides the result, then a line for each finished shard
    .tmp-old-<name>             what was there before, between the last two renames

The next run with the same inputs resumes from the journal; one with others begins again.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import INDEX, load_json, other_files, read_small
from spkit.patchfile import floats
from spkit.system import store
from spkit.system.files import TEMPORARY, sync_folder_entry, write_error
from spkit.system.lock import exclusive

JOURNAL = "spkit-journal.jsonl"


@contextmanager
def new_folder(
    target: str | Path, about: Mapping, inputs: Sequence[Path], size: int, overwrite: bool
):
    """(temporary folder, {shard finished in it: its count}); in the end it becomes `target`.

    about: what decides the result. inputs: what must not be replaced; the first one is the
    checkpoint that is read. size: bytes that will be written. overwrite: whether `target` may be a
    checkpoint that is replaced.

    After a SpkitError (a wrong tensor) the temporary folder is deleted. After anything else, such
    as a full disk or Ctrl-C, it stays for the next run.
    """
    target = Path(os.path.abspath(target))  # "." has no name
    temporary = target.parent / (TEMPORARY + target.name)
    if target.resolve() == inputs[0].resolve():
        raise SpkitError(f"{target} is the checkpoint itself: choose another folder.")
    aside = target.parent / f"{TEMPORARY}old-{target.name}"
    if aside.is_dir() and not aside.is_symlink():  # a run was killed between the two renames
        shutil.rmtree(aside) if target.exists() else aside.rename(target)
    full = target.is_symlink() or (target.exists() and not _is_empty_folder(target))
    if full:
        _require_replaceable(target, inputs, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()  # never followed
        temporary.mkdir(exist_ok=True)
        with _alone(temporary):
            done = _resume(temporary, about)
            free = shutil.disk_usage(temporary).free + sum(_size(temporary / x) for x in done)
            if free < size:
                raise OSError(f"{size:,} bytes are needed and {free:,} are free")
            yield temporary, done
            (temporary / JOURNAL).unlink()
            for path in temporary.iterdir():
                _fsync(path)
            sync_folder_entry(temporary)
            if full:
                target.rename(aside)
            os.replace(temporary, target)  # a folder can replace an empty one
            sync_folder_entry(target.parent)
            if full:
                shutil.rmtree(aside)
    except (SpkitError, OSError) as error:
        cause = error.__cause__ if isinstance(error, SpkitError) else error
        if isinstance(cause, OSError):  # the journal's, too
            advice = "choose another place"
            advice += f"; {temporary} holds what the same command goes on from"
            raise write_error(target, cause, advice) from cause
        if not isinstance(error, _Busy):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _require_replaceable(target: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """SpkitError unless `target` is a checkpoint's folder that may be deleted as a whole."""
    if target.is_symlink() or not target.is_dir():
        raise SpkitError(f"{target} exists already and is no folder: choose another one.")
    if not overwrite:
        what = "choose another folder, or overwrite it (--overwrite)"
        raise SpkitError(f"{target} exists already: {what}.")
    for path in (*inputs, Path.cwd()):
        if path.resolve().is_relative_to(target.resolve()):
            raise SpkitError(
                f"{target} exists already, and {path} is in it: choose another folder."
            )
    folders = sorted(path.name for path in target.iterdir() if path.is_dir())
    if folders or not any(path.suffix == ".safetensors" for path in target.iterdir()):
        what = f"it has the folder {folders[0]!r}" if folders else "it has no safetensors file"
        raise SpkitError(
            f"{target} exists already and is no checkpoint ({what}), so it is not overwritten: "
            "choose another folder, or delete it."
        )


def _resume(temporary: Path, about: Mapping) -> dict[str, int]:
    """The shards that are finished; everything else is deleted."""
    journal = temporary / JOURNAL
    rows = [] if journal.is_symlink() else store.stored(journal, about)
    kinds = {"shard": str, "size": int, "count": int}  # of rows that we wrote
    rows = [row for row in rows if {key: type(value) for key, value in row.items()} == kinds]
    rows = {row["shard"]: row for row in rows if row["shard"] in about["source"]}
    sizes = {name: _size(temporary / name) for name in rows}  # -1 where there is no such file
    done = {n: row["count"] for n, row in rows.items() if row["size"] == sizes[n] >= 0}
    for path in temporary.iterdir():
        if path.name not in done and path != journal:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not done:
        journal.unlink(missing_ok=True)
        store.begin(journal, about, [])
    return done


def note_shard(made: Path, shard: str, count: int) -> None:
    """Sync one shard, then note it: what the journal names is whole."""
    _fsync(made / shard)
    row = {"shard": shard, "size": _size(made / shard), "count": count}
    store.append(made / JOURNAL, [row])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock on the folder that ends with the process; SpkitError where another one holds it."""
    if os.name != "posix":  # Windows has no handle of a folder
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not exclusive(handle):
            raise _Busy(f"another process is writing {folder}: wait for it.")
        yield
    finally:
        os.close(handle)


class _Busy(SpkitError):
    """Another process works in the temporary folder, which is therefore not deleted."""


def copy_others(source: Path, made: Path, dtype: str | None, total: int) -> None:
    """Copy what lies beside the weights. dtype, total: what it says of them, where that changes."""
    for path in other_files(source):
        if path.name == JOURNAL:
            continue
        shutil.copyfile(path, made / path.name)
        if dtype is not None and path.name in ("config.json", INDEX):
            _rewrite_json(made / path.name, dtype, total)


def _rewrite_json(path: Path, dtype: str, total: int) -> None:
    """The dtype in config.json, the total size in the index."""
    try:
        tree = load_json(read_small(path))
        if path.name == INDEX:
            if "total_size" in tree.get("metadata", {}):
                tree["metadata"]["total_size"] = total
        else:
            name = next(n for n, short in floats.TORCH_NAMES.items() if short == dtype)
            keys = [key for key in ("dtype", "torch_dtype") if key in tree] or ["dtype"]
            tree |= dict.fromkeys(keys, name)
        text = json.dumps(tree, indent=2) + "\n"
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SpkitError(f"{path.name} of the checkpoint is no JSON object: {error}") from None
    path.write_text(text, encoding="utf-8")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
