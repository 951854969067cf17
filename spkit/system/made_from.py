"""Which code a result was made by, read off the imports: the files that decide whether it is stale.

    code(["spkit.method.derivation"])        {"spkit/method/derivation.py": sha256, ...}
    code(imported_by(notebook_source))       the same for the code cells of a notebook

A module counts with all that it imports, whether at its top or inside a function, and so on. What
cannot change a result is named in PLUMBING, and is neither counted nor followed. What no import
statement shows is named in DATA.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

# how mistakes are told, where files are written, what a run may cost, which parameters there are
# (their values are compared by themselves)
PLUMBING = frozenset(
    f"spkit.{name}"
    for name in (
        *("cli", "config", "errors", "paths", "validation"),
        *("running.checks", "running.dotted", "running.effects"),
        *(
            "running.colab",
            "running.display",
            "running.memory",
            "running.mirror",
            "running.notebook",
        ),
        *("models.counted", "data.inputs", "evaluation.stored"),
        *("running.runs", "running.seeds", "running.shape", "running.summary"),
        *("running.sizes", "running.widths", "running.forecast"),
        *("system.collector", "system.files", "system.fingerprint", "system.lock"),
        *("system.machine", "system.made_from", "system.out_of_memory"),
        *("system.hub", "system.progress", "system.record", "system.store"),
        *("distributed.launch", "system.accelerate_file"),
        *("comparison.plan", "comparison.budget"),
        "comparison.run",
        *(f"workflow.{part}" for part in ("child", "engine", "job", "plan", "units")),
        "workflow",
    )
)
# module -> files beside it that it reads
DATA = {
    "spkit.sandbox.backbone": ("sandbox/weights/*",),
    "spkit.evaluation.judges.refusal": ("evaluation/judges/refusal_weights.json",),
    "spkit.evaluation.judges.refusal_phrases": ("evaluation/judges/refusal_phrases.yaml",),
}


def code(roots: Iterable[str]) -> dict[str, str]:
    """{file: SHA-256 in hex} of these modules and all that they import."""
    modules = closure(roots)
    files = {_file(module) for module in modules}
    for module in modules:
        files |= {path for glob in DATA.get(module, ()) for path in PACKAGE.glob(glob)}
    return {
        f"spkit/{path.relative_to(PACKAGE).as_posix()}": _digest(path, path.stat().st_mtime_ns)
        for path in sorted(files)
    }


def closure(roots: Iterable[str]) -> set[str]:
    """The modules and, over and over, what they import, without PLUMBING."""
    found: set[str] = set()
    left = list(roots)
    while left:
        module = left.pop()
        if module in found or module in PLUMBING:
            continue
        found.add(module)
        path = _file(module)
        left += _imports(path, path.stat().st_mtime_ns)
        # a folder's __init__ runs before its module does; spkit's own does not count, because the
        # front door imports what this module does not use
        left += [parent for parent in (module.rpartition(".")[0],) if "." in parent]
    return found


def imported_by(source: str) -> set[str]:
    """The modules of spkit that a piece of Python imports; IPython's own lines are passed over."""
    lines = source.split("\n")
    plain = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
    return set(_walk(ast.parse(plain)))


@cache
def _imports(path: Path, stamp: int) -> frozenset[str]:
    return frozenset(_walk(ast.parse(path.read_text(encoding="utf-8"))))


def _walk(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from spkit.method import importance` is a module, `... import snip` a name in one
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _exists(name) else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "spkit" and _exists(name))


def _exists(module: str) -> bool:
    return module.partition(".")[0] == "spkit" and _file(module).is_file()


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _digest(path: Path, stamp: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
