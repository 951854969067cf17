"""The work of a unit: one notebook, in a run folder of its own.

    <unit>/run/seed-0/02_importance_analysis/     what the notebook writes
    <unit>/run/seed-0/01_patch_derivation         a link to the unit that it reads from
    <unit>/02_importance_analysis.ipynb           the executed notebook

So a finished unit is a run folder that every command can read, but for notebook 03's checkpoint,
which patch.safetensors can be made into. All paths in it are relative.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spkit.alignment import made
from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running import checks
from spkit.running.notebook import differing, why_failed
from spkit.running.runs import NOTEBOOKS, run_folder
from spkit.system.files import TEMPORARY, atomic

RUN_NAME = "run"
CHECKPOINTS = "checkpoints"
ALIGN = "align"  # beside the notebooks' folders, where the backbone is aligned here
DERIVES, PATCHES = "01_patch_derivation", "03_controllable_patching"


def stage_of(unit: Path, stage: str, seed: int) -> Path:
    """Where a unit's folder holds a stage, its own or one that it reads from."""
    return unit / RUN_NAME / f"seed-{seed}" / stage


def run_notebook(
    folder: Path,
    places: Mapping[str, Path],
    *,
    config: Config,
    stage: str,
    upstream: Mapping[str, str],
    root: Path,
    name: str,
) -> None:
    """Fill `folder`; upstream: {stage: its unit}. SpkitError says why the notebook failed.

    root: the sweep's folder. name: the unit's, of its checkpoints and of a failed notebook.
    """
    own = config.model_copy(update={"outputs": str(folder), "run_name": RUN_NAME, "mirror": None})
    home, final = run_folder(own), root / "units" / Path(name).parent / folder.name
    links = {up: places[unit] for up, unit in upstream.items()}
    if upstream and made.needed(config):
        links[ALIGN] = places[upstream["00_backbone"]]
    home.mkdir(parents=True)
    _link(home, home, links, config.seed)
    failed = root / "failed" / f"{name}.ipynb"
    with _checkpoints(home / stage, root / CHECKPOINTS / name, stage == DERIVES):
        _execute(own, stage, folder / f"{stage}.ipynb", failed)
    if stage == PATCHES:  # a checkpoint for each point would fill the disk; its patch is kept
        shutil.rmtree(home / stage / "model", ignore_errors=True)
    _link(home, stage_of(final, "", config.seed), links, config.seed)
    failed.unlink(missing_ok=True)


def _link(home: Path, seen_from: Path, links: Mapping[str, Path], seed: int) -> None:
    """Links in `home` that lead to other units' stages from where this folder will be."""
    for stage, unit in links.items():
        (home / stage).unlink(missing_ok=True)
        target = os.path.relpath(stage_of(unit, stage, seed), seen_from)
        (home / stage).symlink_to(target, target_is_directory=True)


def _execute(own: Config, stage: str, executed: Path, failed: Path) -> None:
    """The notebook in a kernel of its own; where it fails its copy is at `failed`."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    # the sweep has looked at everything once, before its first unit
    before, os.environ[checks.CHECKED] = os.environ.get(checks.CHECKED), checks.mark_of(own)
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{stage}.ipynb",
            executed,
            parameters=differing(own),
            kernel_name="python3",
            progress_bar=False,
        )
    except Exception as error:
        if not executed.is_file():
            raise SpkitError(f"{stage} did not run: {error}") from error
        with atomic(failed) as path:
            shutil.copyfile(executed, path)
        if isinstance(error, DeadKernelError):
            said = f"{stage}: its kernel was killed, often for want of memory (see {failed})"
            raise SpkitError(said) from None
        raise SpkitError(why_failed(failed).replace(failed.stem, stage, 1)) from None
    finally:
        os.environ.pop(checks.CHECKED)
        if before is not None:
            os.environ[checks.CHECKED] = before


@contextmanager
def _checkpoints(stage: Path, kept: Path, used: bool) -> Iterator[None]:
    """The stage's checkpoints are kept outside of its folder, which a killed process leaves behind.

    Each process writes into a folder of its own, after copying the newest of what is there: so two
    that do the same unit do not meet. kept: of this unit.
    """
    if not used:
        yield
        return
    kept.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=kept))
    for path in _newest(kept.glob("*/*/*/")):
        copied = own / path.relative_to(path.parents[1])
        try:
            shutil.copytree(path, copied)
        except (OSError, shutil.Error):  # its process has just replaced it
            shutil.rmtree(copied, ignore_errors=True)
    stage.mkdir(parents=True)
    link = stage / CHECKPOINTS
    link.symlink_to(own.resolve(), target_is_directory=True)
    yield
    link.unlink()
    shutil.rmtree(kept, ignore_errors=True)  # they hold patches: none is kept that is not needed


def _newest(folders: Iterable[Path]) -> list[Path]:
    """Of folders <process>/<what it was made from>/<which training> one for each training."""
    found = {}
    for path in sorted(folders, key=lambda path: path.stat().st_mtime_ns):
        if not path.name.startswith(TEMPORARY):
            found[path.parts[-2:]] = path
    return list(found.values())
