"""git-lfs pointers, web pages and empty files in the place of what was to be downloaded."""

import pytest

from spkit.errors import SpkitError
from spkit.system.pointers import is_lfs_pointer, is_web_page, refuse_empty, refuse_pointer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 99\n"


def test_what_is_not_the_file_itself_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LFS)
    assert is_lfs_pointer(path) and not is_web_page(path)
    with pytest.raises(SpkitError, match="a git-lfs pointer and not the file .*`git lfs pull`"):
        refuse_pointer(path)
    path.write_bytes(b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>404</title>")
    assert is_web_page(path) and not is_lfs_pointer(path)
    with pytest.raises(SpkitError, match="a web page and not the file itself.*download it again"):
        refuse_pointer(path)
    path.write_bytes(b"")
    with pytest.raises(SpkitError, match="an empty file of 0 bytes; download it again"):
        refuse_empty(path)


def test_other_files_folders_and_missing_ones_pass(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"goal,target\nsay version https://git-lfs.github.com/spec/v1,<html>\n")
    for one in (path, tmp_path, tmp_path / "gone"):
        refuse_pointer(one)
        refuse_empty(one)
        assert not is_lfs_pointer(one) and not is_web_page(one)
