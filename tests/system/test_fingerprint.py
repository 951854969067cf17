"""Files by what they hold: what is read, what is remembered, and what is never believed."""

import os

import pytest
from blake3 import blake3

from spkit.errors import SpkitError
from spkit.system import fingerprint
from spkit.system.files import cache_folder
from spkit.system.fingerprint import combined, digest, digests

OLD = 1_000_000_000_000_000_000  # ns since 1970


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Names of the files that are read. With a cache of its own; no file is too young to keep."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_KNOWN", {})
    monkeypatch.setattr(fingerprint, "SETTLED", -1.0)
    monkeypatch.setattr(fingerprint, "LARGE", 8)
    found, own = [], fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda p, n: (found.append(p.name), own(p, n))[1])
    monkeypatch.chdir(tmp_path)
    return found


def written(path, data):
    path.write_bytes(data)
    return path


def test_all_bytes_count_and_neither_name_nor_date(reads, tmp_path):
    large = bytes(range(256)) * 1000
    one, other = written(tmp_path / "a", large), written(tmp_path / "b", large)
    os.utime(other, ns=(OLD, OLD))
    assert digest(one) == digest(other) == blake3(large).hexdigest()
    middle = bytearray(large)
    middle[100_000] ^= 1
    assert digest(written(tmp_path / "c", bytes(middle))) != digest(one)
    (tmp_path / "link").symlink_to(one)
    assert digest(tmp_path / "link") == digest(one) and digest(written(tmp_path / "d", b"")) != ""


def test_a_large_file_is_read_once_and_a_small_one_each_time(reads, tmp_path, monkeypatch):
    large, small = written(tmp_path / "large", b"12345678"), written(tmp_path / "small", b"1")
    first = digests({"x": large, "y": small})
    assert digests({"x": large, "y": small}) == first
    monkeypatch.setattr(fingerprint, "_KNOWN", {})  # as another process
    assert digests({"x": large, "y": small}) == first
    assert reads == ["large", "small", "small", "small"]


def test_a_replaced_file_of_the_same_size_and_date_is_read_again(reads, tmp_path):
    path = written(tmp_path / "model", b"first...")
    os.utime(path, ns=(OLD, OLD))
    first = digest(path)
    path.write_bytes(b"second..")  # the same inode, size and, set back, the same date
    os.utime(path, ns=(OLD, OLD))
    assert digest(path) != first
    other = written(tmp_path / "other", b"third...")
    os.utime(other, ns=(OLD, OLD))
    os.replace(other, path)
    assert digest(path) == blake3(b"third...").hexdigest() and reads == ["model"] * 3


def test_what_may_still_change_unseen_is_not_remembered(reads, tmp_path, monkeypatch):
    path = written(tmp_path / "model", b"12345678")
    monkeypatch.setattr(fingerprint, "SETTLED", 60.0)
    assert digest(path) == digest(path) and reads == ["model", "model"]


def test_a_damaged_or_missing_cache_only_costs_time(reads, tmp_path, monkeypatch):
    path = written(tmp_path / "model", b"12345678")
    first = digest(path)
    (kept,) = (cache_folder() / "digests").iterdir()
    kept.write_text("half")
    monkeypatch.setattr(fingerprint, "_KNOWN", {})
    assert digest(path) == first
    monkeypatch.setattr(fingerprint, "_KNOWN", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(written(tmp_path / "a file", b"")))
    assert digest(path) == first and len(reads) == 3


def test_a_user_without_a_home_folder(reads, tmp_path, monkeypatch):
    """In a container that runs under a number: `docker run --user 12345`."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert digest(written(tmp_path / "a", b"12345678")) == blake3(b"12345678").hexdigest()
    with pytest.raises(SpkitError, match="no home folder: name another cache folder in the env"):
        cache_folder()


def test_a_bar_for_much_and_one_sentence_for_what_is_not_there(
    reads, tmp_path, capsys, monkeypatch
):
    path = written(tmp_path / "model", b"12345678")
    assert digest(path) and capsys.readouterr().err == ""
    monkeypatch.setattr(fingerprint, "BAR_FROM", 8)
    assert digest(written(tmp_path / "more", b"87654321"))
    assert "weights, read once" in capsys.readouterr().err
    with pytest.raises(SpkitError, match="^gone: cannot be read .No such file or directory.$"):
        digest("gone")


def test_a_whole_depends_on_names_and_parts_and_not_on_their_order():
    assert combined({"a": "1", "b": "2"}) == combined({"b": "2", "a": "1"})
    assert (
        len({combined(x) for x in ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"a": "12"})}) == 3
    )
