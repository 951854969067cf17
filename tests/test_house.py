"""The plan of the package: which folder may import which, how long the method is, and its names.

The tests read the source and import nothing of it, so they hold for every line, also for those that
no other test runs.
"""

import ast
import json
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports from those before it only. The ground comes first: what every room may use. At the
# top are the experiment, the small door, the package's own __init__ and the command line.
ORDER = (
    *("errors", "paths", "validation", "config", "examples"),
    *("system", "models", "sandbox", "data", "method", "evaluation", "figures"),
    *(
        "alignment",
        "patchfile",
        "workflow",
        "distributed",
        "running",
        "comparison",
        "tuning",
        "study",
    ),
    *("sweeps", "bench"),
    *("api", "spkit", "cli"),
)
METHOD_LINES = 1900
FUNCTION_LINES, ARGUMENTS = 45, 6
REFERENCE = re.compile(r"`(spkit/[\w/]+\.py): ([\w.]+)`")


@cache
def modules():
    """{module: its syntax tree}, a folder's __init__ under the folder's name."""
    found = {}
    for path in sorted((ROOT / "spkit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree, known):
    """The modules of spkit that a tree imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "spkit")


@cache
def arrows():
    """{module: the modules that it imports}."""
    return {name: set(imports(tree, modules())) - {name} for name, tree in modules().items()}


def room(module):
    """The folder or top-level module that it belongs to; "spkit" for the package's __init__."""
    return module.split(".")[1] if "." in module else module


def circles(graph):
    """Sets of nodes that import each other, directly or around some corners."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            part = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(part)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def functions(tree):
    """(name, node) of every function and method, also of those inside others."""
    return [
        (node.name, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def arguments(node):
    """How many arguments a call may give, without self and cls."""
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    more = [a for a in (given.vararg, given.kwarg) if a is not None]
    return len([name for name in names if name not in ("self", "cls")]) + len(more)


def method_modules():
    return {name: tree for name, tree in modules().items() if room(name) == "method"}


# ---- the checks can fail -------------------------------------------------------------------------


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [{"a", "b"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"d", "a"}, "d": set()}) == [{"a", "b", "c"}]


def test_imports_are_read_wherever_they_are():
    source = "import spkit.a.b\ndef f():\n    from spkit.a import c, d\nfrom json import loads"
    assert set(imports(ast.parse(source), {"spkit.a.c"})) == {"spkit.a.b", "spkit.a.c", "spkit.a"}


def test_arguments_are_counted():
    (_, node), *_ = functions(ast.parse("def f(self, a, /, b, *c, d=1, **e): pass"))
    assert arguments(node) == 5


# ---- rooms ---------------------------------------------------------------------------------------


def test_every_room_is_in_the_order():
    assert {room(name) for name in modules()} == set(ORDER)


def test_rooms_import_downwards_only():
    upwards = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in sorted(others)
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert upwards == []


def test_what_is_imported_is_there():
    assert [f"{n}: {o}" for n, others in arrows().items() for o in others - set(modules())] == []


def test_no_circle_between_rooms_nor_between_modules():
    rooms = defaultdict(set)
    for name, others in arrows().items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    assert circles(rooms) == []
    assert circles(arrows()) == []


def test_no_module_has_the_name_of_one_of_the_standard_library():
    names = {part for module in modules() for part in module.split(".")}
    assert sorted(names & sys.stdlib_module_names) == []


# ---- the method ----------------------------------------------------------------------------------


def test_the_method_can_be_read_in_an_evening():
    files = sorted((ROOT / "spkit" / "method").rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= METHOD_LINES


@pytest.mark.parametrize("module", sorted(method_modules()))
def test_functions_of_the_method_are_short_and_take_few_arguments(module):
    found = functions(modules()[module])
    long = {name: node.end_lineno - node.lineno + 1 for name, node in found}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}
    many = {name: arguments(node) for name, node in found}
    assert {name: count for name, count in many.items() if count > ARGUMENTS} == {}


def test_the_method_takes_values_and_sections_and_knows_no_run():
    """Neither sandbox, run folders nor the experiment, nor the whole of the parameters."""
    for name, tree in method_modules().items():
        rooms = {room(other) for other in arrows()[name]}
        assert not rooms & {"sandbox", "data", "evaluation", "running", "comparison", "patchfile"}
        assert "Config" not in {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "spkit.config"
            for alias in node.names
        }, name
        whole = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
        assert "spkit.config" not in {alias.name for node in whole for alias in node.names}, name


# ---- docs/method.md ------------------------------------------------------------------------------


def named():
    """(file, name) of every function that docs/method.md names."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    return sorted(set(REFERENCE.findall(text)))


@cache
def definitions(file):
    """Functions, classes, methods as "Class.method", and constants of one file of spkit."""
    found = set()
    path = ROOT / file
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def notebook_code(path):
    """The code cells of a notebook as a syntax tree."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    lines = ["" if re.match(r"\s*[%!]", line) else line for line in code.split("\n")]
    return ast.parse("\n".join(lines))


@cache
def uses():
    """{name: how often the code of spkit and of the notebooks mentions it, outside its def}."""
    counts = defaultdict(int)
    notebooks = [notebook_code(p) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for tree in (*modules().values(), *notebooks):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                counts[node.id] += 1
            elif isinstance(node, ast.Attribute):
                counts[node.attr] += 1
    return counts


def test_the_page_names_functions():
    assert len(named()) > 20 and any(file.startswith("spkit/method/") for file, _ in named())


@pytest.mark.parametrize("file, name", named())
def test_what_the_page_names_exists_and_is_what_runs(file, name):
    assert name in definitions(file)
    if file.startswith("spkit/method/"):
        assert uses()[name.rpartition(".")[2]] > 0, f"nothing but a test runs {name}"


def test_no_test_asserts_a_time():
    clocks = re.compile(r"assert .*\b(perf_counter|process_time|monotonic|time\.time)\(\)")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if clocks.search(line)
    ]
    assert found == []
