"""Files out of wheels: fetched by the user's pip, once, with their hash, or one clear sentence.

pip runs for real, with a folder of wheels instead of a registry.
"""

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import registry, sha256, wheel

from spkit.errors import SpkitError
from spkit.system import files, pypi

TEXT = b'{"text": "the goat is red ."}\n'
FILES = {"some_data/sets/texts.jsonl": TEXT, "some_data/sets/more.jsonl": TEXT * 2}
SOURCE, KEY = "pypi:some-data==1.0/some_data/sets/texts.jsonl", "data.sources.texts.path"

RUN = subprocess.run

__all__ = ["registry"]


@pytest.fixture
def data(registry) -> Path:
    """The wheel that most tests fetch from."""
    return wheel(registry, "some-data", "1.0", FILES)


@pytest.fixture
def kept(data, monkeypatch) -> Path:
    """The same wheel, in the cache already: pip is not called, which takes a second or more."""
    folder = files.cache_folder() / "pypi" / "wheels" / "some-data-1.0"
    folder.mkdir(parents=True)
    without_pip(monkeypatch)
    return Path(shutil.copy(data, folder))


def without_pip(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", fail)


def sentence(source=SOURCE, digest=None) -> str:
    """What fetching says; one sentence that names the parameter, and nothing is left behind."""
    with pytest.raises(SpkitError) as error:
        pypi.fetch(source, digest or sha256(TEXT), KEY)
    said = str(error.value)
    assert said.startswith(KEY) and "\n" not in said
    left = [p for p in files.cache_folder().rglob("*") if files.TEMPORARY in p.name]
    assert left == [], "a temporary file stays"
    assert not list(files.cache_folder().rglob("*.jsonl"))
    return said


# ---- what goes well ------------------------------------------------------------------------------


def test_a_file_is_fetched_once(data, monkeypatch, capfd, tmp_path):
    path = pypi.fetch(SOURCE, sha256(TEXT), KEY)
    assert path.read_bytes() == TEXT and path.name == "texts.jsonl"
    assert path.is_relative_to(tmp_path / "cache" / "spkit" / "pypi" / "some-data-1.0")
    said = capfd.readouterr()
    assert said.err == "Fetching some-data==1.0 by pip, once\n" and said.out == ""
    without_pip(monkeypatch)
    assert pypi.fetch(SOURCE, sha256(TEXT), KEY) == path
    assert capfd.readouterr().err == ""


def test_two_files_of_a_wheel_need_one_download(data, monkeypatch):
    pypi.fetch(SOURCE, sha256(TEXT), KEY)
    without_pip(monkeypatch)
    more = pypi.fetch(SOURCE.replace("texts.j", "more.j"), sha256(TEXT * 2), KEY)
    assert more.read_bytes() == TEXT * 2


def test_another_spelling_of_the_package_is_the_same_one(data, monkeypatch):
    pypi.fetch(SOURCE, sha256(TEXT), KEY)
    without_pip(monkeypatch)
    assert pypi.fetch(SOURCE.replace("some-data", "Some_Data"), sha256(TEXT), KEY).is_file()


def test_nothing_is_installed_or_run(registry):
    code = b"raise SystemExit('it was run')\n"
    wheel(registry, "some-data", "1.0", {**FILES, "some_data/__init__.py": code, "a.pth": code})
    pypi.fetch(SOURCE, sha256(TEXT), KEY)
    found = subprocess.run(
        [sys.executable, "-m", "pip", "show", "some-data"], capture_output=True, text=True
    )
    assert found.returncode != 0
    assert not list(files.cache_folder().rglob("*.py")) + list(files.cache_folder().rglob("*.pth"))


def test_where_it_will_lie_is_known_without_fetching(data, monkeypatch):
    without_pip(monkeypatch)
    place = pypi.cached(SOURCE, sha256(TEXT), KEY)
    assert not place.exists() and not files.cache_folder().exists()


def test_a_relative_cache_folder_does_not_count(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert files.cache_folder() == Path.home() / ".cache" / "spkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == Path.home() / ".cache" / "spkit"


def _fetch(start, results):
    start.wait()
    try:
        results.put(str(pypi.fetch(SOURCE, sha256(TEXT), KEY)))
    except BaseException as error:
        results.put(repr(error))


def test_several_processes_at_once(data):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=_fetch, args=(start, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    found = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {str(pypi.cached(SOURCE, sha256(TEXT), KEY))}
    assert [p for p in files.cache_folder().rglob("*") if files.TEMPORARY in p.name] == []


def test_whoever_is_first_stays(tmp_path):
    for name in ("file", "folder"):
        with files.once(tmp_path / name) as mine:
            with files.once(tmp_path / name) as theirs:
                _make(theirs, name, "theirs")
            _make(mine, name, "theirs")
        assert [p.name for p in tmp_path.glob(".*")] == []
        assert (tmp_path / name).exists()


def _make(path, kind, text):
    if kind == "folder":
        path.mkdir()
        path /= "inside"
    path.write_text(text)


# ---- what does not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "pypi:some-data",
        "pypi:some-data==1.0",
        "pypi:some-data==1.0/",
        "pypi:some-data>=1.0/a.txt",
        "pypi:some-data==1.*/a.txt",
        "pypi:some data==1.0/a.txt",
        "pypi:--index-url==1.0/a.txt",
        "pypi:some-data==--pre/a.txt",
        "pypi:some-data==1.0/../a.txt",
        "pypi:some-data==1.0/some_data/../../a.txt",
        "pypi:some-data==1.0//etc/passwd",
        "pypi:some-data==1.0/a\\..\\b.txt",
        "pypi:some-data==1.0/some_data/",
        "pypi:some-data==1.0/./a.txt",
    ],
)
def test_wrong_spelling_and_ways_out_of_the_folder(source, registry, monkeypatch):
    without_pip(monkeypatch)
    assert sentence(source) == f"{KEY} is {source!r}, must be pypi:PACKAGE==VERSION/PATH/IN/WHEEL"


@pytest.mark.parametrize("digest", [None, "abc", sha256(TEXT).upper()])
def test_no_hash(digest, data, monkeypatch):
    without_pip(monkeypatch)
    with pytest.raises(SpkitError, match="its sha256 is .*, must be the SHA-256 of the file"):
        pypi.fetch(SOURCE, digest, KEY)


def test_wrong_hash_names_both(kept):
    said = sentence(digest="0" * 64)
    assert sha256(TEXT) in said and "0" * 64 in said and "some_data/sets/texts.jsonl" in said


def test_a_wrong_hash_is_wrong_beside_a_cached_file_too(kept):
    path = pypi.fetch(SOURCE, sha256(TEXT), KEY)
    nearly = sha256(TEXT)[:-1] + ("0" if sha256(TEXT)[-1] != "0" else "1")
    with pytest.raises(SpkitError, match="has the SHA-256"):
        pypi.fetch(SOURCE, nearly, KEY)
    assert path.read_bytes() == TEXT


def test_no_such_file_in_the_wheel(kept):
    said = sentence(SOURCE.replace("texts", "text"))
    assert "the wheel of some-data==1.0 has no some_data/sets/text.jsonl (nearest: " in said
    assert "some_data/sets/texts.jsonl" in said
    assert "(it has 5 files)" in sentence("pypi:some-data==1.0/zzz")


def test_no_such_version_and_no_such_package(data):
    said = sentence(SOURCE.replace("1.0", "2.0"))
    assert said.endswith(
        "pip cannot fetch some-data==2.0: No matching distribution found for some-data==2.0"
    )
    assert "No matching distribution" in sentence("pypi:no-such-data==1.0/a.txt")


def test_offline(registry, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert sentence().endswith("; the registry could not be reached")


def test_python_without_pip(registry, monkeypatch):
    fake = registry / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert sentence().endswith("pip cannot fetch some-data==1.0: python: No module named pip")


def test_damaged_wheel_is_deleted_and_fetched_anew(kept, data, monkeypatch):
    whole, name = data.read_bytes(), b"some_data/sets/texts.jsonl"
    place = whole.index(name) + len(name)
    kept.write_bytes(whole[:place] + b"\0\0\0" + whole[place + 3 :])
    assert "the wheel some_data-1.0-py3-none-any.whl is damaged (" in sentence()
    assert not kept.exists()
    kept.write_bytes(whole[: len(whole) // 2])
    assert sentence().endswith(") and was deleted: run again, and it is fetched anew")
    monkeypatch.setattr(subprocess, "run", RUN)
    assert pypi.fetch(SOURCE, sha256(TEXT), KEY).read_bytes() == TEXT


def test_full_disk_while_the_file_is_taken_out(kept, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pypi, "_copy", full)
    said = sentence()
    assert "the disk is full" in said and "XDG_CACHE_HOME" in said


def test_full_disk_while_pip_fetches(data, monkeypatch):
    line = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    done = subprocess.CompletedProcess([], 1, stderr=f"{line}\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert sentence().endswith("pip cannot fetch some-data==1.0: the disk is full")


def test_a_file_where_the_cache_should_be(data, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(SpkitError, match=f"^{KEY}: cannot write .*XDG_CACHE_HOME"):
        pypi.fetch(SOURCE, sha256(TEXT), KEY)
