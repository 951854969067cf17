"""A package registry without a network: a folder of wheels that pip is told to look into.

A wheel is a zip file, so the tests build their own, with files of any content in it.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, package: str, version: str, files: Mapping[str, bytes]) -> Path:
    """A wheel with these files ({path in it: content}) and the metadata that pip wants."""
    name = package.replace("-", "_")
    about = f"{name}-{version}.dist-info"
    plain = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for place, content in files.items():
            opened.writestr(place, content)
        # a Python that nobody has: what is not installed need not fit
        head = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        opened.writestr(f"{about}/METADATA", f"{head}Requires-Python: >=3.99\n")
        opened.writestr(f"{about}/WHEEL", plain)
        opened.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """The folder that pip finds wheels in, and nothing else; the cache is the test's own, too."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder
