"""The mirror of a run: whole files in a safe order, nothing behind links, and what a stage does."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.running import mirror
from spkit.running.runs import STAGES, Run, identity, read_record, require, stage_folder, stamp

BACKBONE, DERIVATION, *_, CONTINUAL, COMPARISON = STAGES
HERE, THERE = Path("here"), Path("there")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in its own empty folder, as if that were the repository's root."""
    monkeypatch.chdir(tmp_path)


def write(path, text, seconds=0):
    """A file that was last changed so many seconds after some moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(0, 1_700_000_000_123_456_789 + seconds * 10**9))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# ---- push ----------------------------------------------------------------------------------------


def test_push_copies_what_is_new_or_changed_and_removes_what_is_gone():
    write(HERE / "a.txt", "a")
    write(HERE / "model" / "b.txt", "b")
    assert sorted(mirror.push(HERE, THERE)) == ["a.txt", "model/b.txt"]
    assert contents(THERE) == contents(HERE)
    assert mirror.push(HERE, THERE) == []
    write(HERE / "a.txt", "A", seconds=1)  # as long as before
    write(HERE / "c.txt", "c")
    shutil.rmtree(HERE / "model")
    assert sorted(mirror.push(HERE, THERE)) == ["a.txt", "c.txt"]
    assert contents(THERE) == {"a.txt": "A", "c.txt": "c"}
    assert {path.name for path in THERE.iterdir()} == {"a.txt", "c.txt"}  # nor an empty folder


def test_another_size_at_the_same_time_is_a_change():
    write(HERE / "a.txt", "a")
    mirror.push(HERE, THERE)
    write(HERE / "a.txt", "longer")
    assert mirror.push(HERE, THERE) == ["a.txt"]


def test_a_file_may_take_the_place_of_a_folder_and_the_other_way_round():
    write(HERE / "x" / "a.txt", "a")
    write(HERE / "y", "y")
    mirror.push(HERE, THERE)
    shutil.rmtree(HERE / "x")
    (HERE / "y").unlink()
    write(HERE / "x", "x")
    write(HERE / "y" / "a.txt", "a")
    mirror.push(HERE, THERE)
    assert contents(THERE) == {"x": "x", "y/a.txt": "a"}


def test_files_become_visible_in_the_order_of_writing_and_records_last():
    write(HERE / "record.json", "{}", seconds=0)
    write(HERE / "z.txt", "z", seconds=1)
    write(HERE / "a.txt", "a", seconds=2)
    assert mirror.push(HERE, THERE) == ["z.txt", "a.txt", "record.json"]
    assert mirror.pull(THERE, Path("back")) == ["z.txt", "a.txt", "record.json"]


def test_a_push_that_is_cut_leaves_the_mirror_as_it_was(monkeypatch):
    write(HERE / "step.json", "1")
    write(HERE / "weights", "of step 1")
    mirror.push(HERE, THERE)
    write(HERE / "step.json", "2", seconds=1)
    write(HERE / "weights", "of step 2", seconds=2)
    copy, copied = mirror._copy, []

    def full(source, target, state):
        if copied:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(source)
        copy(source, target, state)

    monkeypatch.setattr(mirror, "_copy", full)
    with pytest.raises(SpkitError, match="cannot write to the mirror there: the disk is full"):
        mirror.push(HERE, THERE)
    assert contents(THERE) == {"step.json": "1", "weights": "of step 1"}
    monkeypatch.setattr(mirror, "_copy", copy)
    mirror.push(HERE, THERE)
    assert contents(THERE) == contents(HERE)


def test_what_a_killed_push_left_is_neither_a_result_nor_kept():
    write(HERE / "a.txt", "a")
    mirror.push(HERE, THERE)
    write(THERE / ".tmp-push" / "0", "half")
    write(THERE / "model" / ".tmp-b.txt", "half")
    assert mirror.pull(THERE, Path("back")) == ["a.txt"]
    assert mirror.push(HERE, THERE) == []
    assert contents(THERE) == {"a.txt": "a"}


def test_temporary_names_and_links_stay_where_they_are():
    write(HERE / "a.txt", "a")
    write(HERE / ".tmp-b.txt", "half")
    write(HERE / ".tmp-model" / "c.txt", "half")
    write(Path("private") / "secret.txt", "secret")
    (HERE / "link.txt").symlink_to(Path("private/secret.txt").resolve())
    (HERE / "linked").symlink_to(Path("private").resolve())
    assert mirror.push(HERE, THERE) == ["a.txt"]
    assert contents(THERE) == {"a.txt": "a"}


def test_nothing_is_written_or_removed_behind_a_link_in_the_mirror():
    write(Path("other") / "a.txt", "other's")
    THERE.mkdir()
    (THERE / "model").symlink_to(Path("other").resolve())
    write(HERE / "model" / "a.txt", "mine")
    with pytest.raises(SpkitError, match="model/a.txt lies behind a symbolic link"):
        mirror.push(HERE, THERE)
    assert contents(Path("other")) == {"a.txt": "other's"}
    shutil.rmtree(HERE / "model")
    mirror.push(HERE, THERE)
    assert contents(Path("other")) == {"a.txt": "other's"}


def test_a_drive_that_keeps_neither_times_nor_rights_is_copied_to_every_time(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    write(HERE / "a.txt", "a")
    monkeypatch.setattr(os, "utime", refuse)
    assert mirror.push(HERE, THERE) == mirror.push(HERE, THERE) == ["a.txt"]
    assert contents(THERE) == {"a.txt": "a"}


@pytest.mark.skipif(os.name != "posix", reason="access rights")
def test_a_private_file_stays_private():
    write(HERE / "osm.safetensors", "x")
    (HERE / "osm.safetensors").chmod(0o600)
    mirror.push(HERE, THERE)
    mirror.pull(THERE, Path("back"))
    for folder in (THERE, Path("back")):
        assert (folder / "osm.safetensors").stat().st_mode & 0o777 == 0o600


# ---- pull ----------------------------------------------------------------------------------------


def test_pull_brings_back_what_is_missing_and_nothing_else():
    write(HERE / "a.txt", "a")
    write(HERE / "model" / "b.txt", "b")
    mirror.push(HERE, THERE)
    shutil.rmtree(HERE / "model")
    write(HERE / "mine.txt", "mine")
    kept = (HERE / "a.txt").stat().st_ino
    assert mirror.pull(THERE, HERE) == ["model/b.txt"]
    assert contents(HERE) == {"a.txt": "a", "model/b.txt": "b", "mine.txt": "mine"}
    assert (HERE / "a.txt").stat().st_ino == kept
    assert mirror.pull(THERE, HERE) == []
    shutil.rmtree(HERE)
    assert sorted(mirror.pull(THERE, HERE)) == ["a.txt", "model/b.txt"]
    assert mirror.push(HERE, THERE) == []  # times came back, too


def test_pull_without_a_mirror_does_nothing():
    assert mirror.pull(THERE, HERE) == [] and not HERE.exists()


def test_old_files_are_not_put_among_those_of_a_newer_run():
    write(HERE / "results.csv", "old")
    write(HERE / "record.json", "old")
    mirror.push(HERE, THERE)
    (HERE / "record.json").unlink()
    write(HERE / "results.csv", "new", seconds=5)
    assert mirror.pull(THERE, HERE) == []
    assert contents(HERE) == {"results.csv": "new"}


def test_a_pull_that_is_cut_goes_on(monkeypatch):
    for number in range(3):
        write(HERE / f"{number}.txt", str(number), seconds=number)
    mirror.push(HERE, THERE)
    shutil.rmtree(HERE)
    copy, copied = mirror._copy, []

    def cut(source, target, state):
        copy(source, target, state)
        copied.append(source)
        if len(copied) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mirror, "_copy", cut)
    with pytest.raises(SpkitError, match="here cannot be restored from mirror there: Input/outp"):
        mirror.pull(THERE, HERE)
    assert contents(HERE) == {"0.txt": "0"}
    monkeypatch.setattr(mirror, "_copy", copy)
    assert mirror.pull(THERE, HERE) == ["1.txt", "2.txt"]


def test_pull_writes_nothing_behind_a_link():
    write(HERE / "model" / "a.txt", "a")
    mirror.push(HERE, THERE)
    shutil.move(HERE / "model", "moved")
    (HERE / "model").symlink_to(Path("moved").resolve())
    (Path("moved") / "a.txt").unlink()
    assert mirror.pull(THERE, HERE) == []
    assert list(Path("moved").iterdir()) == []


# ---- a mirror that cannot be one -----------------------------------------------------------------


def config(overrides=None, mirrored="drive/spkit"):
    return Config.from_sources({"mirror": mirrored}, overrides)


def test_a_drive_that_is_not_mounted_is_an_error_before_any_work():
    with pytest.raises(SpkitError, match="mirror is 'drive/spkit', but there is no folder drive: "):
        Run(config(), BACKBONE)
    assert not Path("outputs").exists() and not Path("drive").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_drive_is_an_error_before_any_work():
    Path("drive/spkit").mkdir(parents=True)
    Path("drive/spkit").chmod(0o555)
    with pytest.raises(SpkitError, match="cannot write to the mirror drive/spkit: no permission"):
        Run(config(), BACKBONE)
    assert not Path("outputs").exists()


def test_a_file_system_that_is_read_only(monkeypatch):
    Path("drive").mkdir()

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", fail)
    with pytest.raises(SpkitError, match="mirror drive/spkit: the file system is read-only"):
        Run(config(), BACKBONE)


@pytest.mark.parametrize("place", ["outputs", "outputs/mirror", ".", "./outputs/../outputs"])
def test_a_mirror_in_or_around_the_outputs_is_an_error(place):
    Path("outputs").mkdir()
    with pytest.raises(SpkitError, match="expected: a folder on another disk, neither outputs ="):
        Run(config(mirrored=place), BACKBONE)


# ---- what a stage does with it -------------------------------------------------------------------


def complete(stage, text="1", overrides=None):
    run = Run(config(overrides), stage)
    run.save_json("result.json", text)
    run.finish()
    return run


@pytest.fixture
def drive():
    Path("drive").mkdir()
    return Path("drive/spkit/sandbox/seed-0")


def test_no_mirror_no_copies():
    run = Run(config(mirrored=None), BACKBONE)
    run.push()
    run.finish()
    assert Run.restore(run.config) == []
    assert [path.name for path in Path().iterdir()] == ["outputs"]


def test_a_run_goes_on_on_a_machine_that_has_the_mirror_alone(drive):
    complete(BACKBONE)
    run = Run(config(), DERIVATION)
    run.save_json("checkpoint.json", "step 10")
    run.push()
    run.save_json("lost.json", "step 15")
    shutil.rmtree("outputs")
    run = Run(config(), DERIVATION)
    assert run.input(BACKBONE, "result.json").read_text() == '"1"\n'
    assert contents(run.folder) == {"checkpoint.json": '"step 10"\n'}
    require(run.config, DERIVATION)
    assert stamp(run.config, BACKBONE).exists()


def test_finish_pushes_and_the_record_says_nothing_of_the_mirror(drive):
    run = complete(BACKBONE)
    assert contents(drive / BACKBONE) == contents(run.folder)
    assert "drive" not in str(read_record(run.config, BACKBONE))
    assert identity(run.config, BACKBONE) == identity(config(mirrored=None), BACKBONE)


def test_a_stage_that_starts_again_is_incomplete_in_the_mirror_too(drive):
    complete(BACKBONE)
    Run(config(), BACKBONE)
    assert set(contents(drive / BACKBONE)) == {"result.json"}


def test_no_record_of_an_older_run_comes_back_beside_a_newer_one(drive):
    complete(BACKBONE)
    without = Run(config({"data.pairs": 5}, mirrored=None), BACKBONE)  # the mirror keeps the old
    without.save_json("result.json", "2")
    with pytest.raises(SpkitError, match="record.json is missing"):
        Run(config(), DERIVATION)
    without.finish()
    assert Run.restore(config()) == []
    assert len(list(without.folder.glob("made-from-*"))) == 1


def test_only_what_a_stage_reads_is_restored_for_another_may_be_running(drive):
    for stage in (BACKBONE, DERIVATION):
        complete(stage)
    shutil.rmtree("outputs")
    Run(config(), CONTINUAL)
    assert {path.name for path in Path("outputs/sandbox/seed-0").iterdir() if path.is_dir()} == {
        BACKBONE,
        CONTINUAL,
    }
    restored = {path.name for path in Run.restore(config())}
    assert restored == {"result.json", "record.json", stamp(config(), DERIVATION).name}


def test_another_run_and_another_seed_are_other_folders_of_the_mirror(drive):
    complete(BACKBONE)
    complete(BACKBONE, overrides={"seed": 1})
    complete(BACKBONE, overrides={"run_name": "mine"})
    folders = {path.parent.as_posix() for path in Path("drive").rglob("record.json")}
    assert folders == {
        f"drive/spkit/{run}/{BACKBONE}"
        for run in ("sandbox/seed-0", "sandbox/seed-1", "mine/seed-0")
    }


def test_a_mirror_that_fails_later_costs_no_results(drive):
    run = Run(config(), BACKBONE)
    run.save_json("result.json", "1")
    shutil.rmtree("drive")  # unmounted
    with pytest.warns(UserWarning, match="not mirrored: .* there is no folder drive"):
        run.finish()
    assert read_record(run.config, BACKBONE) is not None
    assert not Path("drive").exists()  # or the drive could not be mounted there again


def test_an_unknown_stage_restores_nothing(drive):
    with pytest.raises(SpkitError, match="unknown stage '07_more'"):
        Run(config(), "07_more")
    assert not stage_folder(config(), BACKBONE).exists()
