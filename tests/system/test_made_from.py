"""Which files a result is made by, in a package made up for the test and in this one."""

import os
from hashlib import sha256

import pytest

from spkit.system import made_from
from spkit.system.made_from import DATA, PACKAGE, PLUMBING, closure, code, imported_by

FILES = {
    "__init__.py": "from spkit.door import everything",
    "door.py": "everything = 1",
    "errors.py": "import spkit.hidden",  # plumbing
    "hidden.py": "",
    "alone.py": "import numpy\nimport os.path\nfrom math import sqrt",
    "method/__init__.py": "",
    "method/top.py": "from spkit.method import middle\nfrom spkit.errors import SpkitError",
    "method/middle.py": "def f():\n    from spkit.models.deep import number\n    return number",
    "models/__init__.py": "import spkit.alone",
    "models/deep.py": "number = 1\nfrom spkit.method.top import f",  # a circle ends, too
    "data/__init__.py": "",
    "data/reads.py": "",
    "data/rows.txt": "one",
    "data/rows.csv": "two",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """FILES as a package; write(name, text) changes one of them."""
    root = tmp_path / "spkit"

    def write(name, text):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_mtime_ns if path.exists() else 0
        path.write_text(text)
        os.utime(path, ns=(before + 1, before + 1))  # another time, however fast the test is

    for name, text in FILES.items():
        write(name, text)
    monkeypatch.setattr(made_from, "PACKAGE", root)
    monkeypatch.setattr(made_from, "DATA", {"spkit.data.reads": ("data/*.txt",)})
    return write


WHOLE = {
    *("spkit.method", "spkit.method.top", "spkit.method.middle"),
    *("spkit.models", "spkit.models.deep", "spkit.alone"),
}


def test_imports_are_followed_wherever_they_stand(package):
    """At the top, in a function, of a module or of a name in one, and in the folder's __init__."""
    assert closure(["spkit.method.top"]) == WHOLE
    assert closure(["spkit.method.middle"]) == WHOLE
    assert closure(["spkit.alone"]) == {"spkit.alone"}
    assert closure([]) == set()


def test_the_front_door_is_no_part_of_what_stands_behind_it(package):
    """spkit/__init__.py counts where it is imported itself, and not for every module below it."""
    assert closure(["spkit"]) == {"spkit", "spkit.door"}
    assert imported_by("import spkit") == {"spkit"}
    assert imported_by("from spkit import everything") == {"spkit"}
    assert imported_by("from spkit import alone, door") == {"spkit.alone", "spkit.door"}


def test_plumbing_is_neither_counted_nor_followed(package):
    assert "spkit.errors" in PLUMBING
    assert not {"spkit.errors", "spkit.hidden"} & closure(["spkit.method.top", "spkit.errors"])
    package("method/top.py", "import spkit.hidden")
    assert closure(["spkit.method.top"]) == {"spkit.method", "spkit.method.top", "spkit.hidden"}


def test_files_and_their_digests(package, tmp_path):
    found = code(["spkit.alone", "spkit.data.reads"])
    names = ["alone.py", "data/__init__.py", "data/reads.py", "data/rows.txt"]
    assert list(found) == [f"spkit/{name}" for name in names]
    for name, digest in found.items():
        assert digest == sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name, text, counts",
    [
        ("models/deep.py", "number = 2\nfrom spkit.method.top import f", True),
        ("models/__init__.py", "import spkit.alone  #", True),
        ("alone.py", FILES["alone.py"] + "\n", True),
        ("errors.py", "x = 1", False),
        ("hidden.py", "x = 1", False),
        ("door.py", "everything = 2", False),
        ("__init__.py", "", False),
        ("data/rows.txt", "three", True),
        ("data/rows.csv", "three", False),
    ],
)
def test_a_changed_byte_changes_the_digest_of_what_uses_it(name, text, counts, package):
    roots = ["spkit.method.top", "spkit.data.reads"]
    before = code(roots)
    package(name, text)
    after = code(roots)
    assert (before != after) is counts
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed == ({f"spkit/{name}"} if counts else set())


def test_a_new_import_brings_its_file(package):
    assert "spkit/hidden.py" not in code(["spkit.method.top"])
    package("alone.py", "import spkit.hidden")
    assert "spkit/hidden.py" in code(["spkit.method.top"])


def test_a_notebooks_magics_are_no_python(package):
    source = "\n".join(
        [
            "%matplotlib inline",
            "%load_ext autoreload",
            "!ls",
            "import numpy as np",
            "for _ in range(3):",
            "    %time from spkit.hidden import x",
            "    from spkit.alone import sqrt",
            "from spkit.method import middle",
            "import spkit.models.deep as deep",
            "from spkitten import alone",
            "import spkit.nowhere",
        ]
    )
    found = imported_by(source)
    assert found == {"spkit.alone", "spkit.method.middle", "spkit.models.deep"}


# ---- this package


def test_every_name_of_plumbing_and_data_is_there():
    for module in (*PLUMBING, *DATA):
        path = PACKAGE.joinpath(*module.split(".")[1:])
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
    for globs in DATA.values():
        assert all(any(PACKAGE.glob(glob)) for glob in globs)


def test_the_method_is_made_by_the_files_that_decide_its_bits():
    """What the hand-kept lists lacked: sets and deltas, which produce every answer."""
    found = code(["spkit.method.safepatching"])
    assert {
        *("spkit/method/safepatching.py", "spkit/method/patching.py", "spkit/method/sets.py"),
        *("spkit/method/patch.py", "spkit/models/deltas.py"),
    } <= set(found)
    assert not [name for name in found if "sandbox" in name or "comparison" in name]
    assert not {"spkit/errors.py", "spkit/config.py", "spkit/system/files.py"} & set(found)


def test_the_shipped_sandbox_is_made_by_its_weights():
    assert "spkit/sandbox/weights/model.safetensors" in code(["spkit.sandbox.backbone"])
    assert "spkit/sandbox/weights/model.safetensors" not in code(["spkit.sandbox.world"])
