"""What the pages name exists, the equations have their code, and the paper's figures agree.

Each check takes a text and returns what is wrong with it, so that it can be seen to fail.
"""

import ast
import difflib
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from spkit.comparison import published
from spkit.config import Config
from spkit.evaluation.verdicts import METRICS
from spkit.validation import dotted_keys

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "method.md"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "outputs/README.md")),
]
SECTIONS = (
    "Derivation",
    "Random retention",
    "Importance",
    "Controllable patching",
    "Continual PSA",
    "Evaluation",
    "What the paper prescribes, and what is our choice",
    "Hazards",
    "The paper's figures for LLaMA-2-7B-Chat",
)
KEYS = set(dotted_keys(Config))
REFERENCE = re.compile(r"(spkit/[\w/]+\.py): ([\w.]+)")
FOLDERS = ("spkit", "tests", "notebooks", "params", "docs")
FILE_TYPES = "csv ipynb json md png py safetensors svg toml txt yaml yml".split()
EXAMPLE = "params/mine.yaml"  # stands for a file of the reader's own


def text_of(path):
    return path.read_text(encoding="utf-8")


# ---- what a text names ---------------------------------------------------------------------------


@cache
def names_in(module):
    """Functions, classes and their methods ("Factors.delta"), and constants of one file."""
    names = set()
    for node in ast.parse(text_of(ROOT / module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return names


def wrong_references(text):
    """`spkit/x.py: name` where there is no such file, or no such name in it."""
    found = REFERENCE.findall(text)
    return [
        f"{module}: {name}"
        for module, name in found
        if not (ROOT / module).is_file() or name not in names_in(module)
    ]


def wrong_paths(text):
    """Files of the repository, wherever they are named; a pattern must match one."""
    pattern = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]"
    made = re.findall(r'^```python title="(.+)"$', text, re.M)  # by whoever follows the page
    found = set(re.findall(pattern, text)) - {EXAMPLE, *made}
    return sorted(path for path in found if not any(ROOT.glob(path)))


def wrong_keys(text):
    """Dotted keys in backticks or quotes that are no parameters (nor files, nor `module.name`)."""
    wrong = []
    for token in re.findall(r"[`\"']([A-Za-z_]\w*(?:\.\w+)+)[`\"']", text):
        first, _, rest = token.partition(".")
        files = (ROOT / "spkit").rglob(f"{first}.py")
        code = any(rest in names_in(file.relative_to(ROOT)) for file in files)
        meant = difflib.get_close_matches(first, Config.model_fields, cutoff=0.8)
        if meant and token not in KEYS and not code and rest not in FILE_TYPES:
            wrong.append(token)
    return wrong


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wrong_links(text, page):
    """Relative links to a file, or to a heading, that is not there."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        # make walkthrough leaves an executed copy of each notebook
        path, _, anchor = link.replace("outputs/sandbox/seed-0/log/", "notebooks/").partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(target), re.M)
            if anchor not in map(slug, headings):
                wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_named_exists(page):
    text = text_of(page)
    assert wrong_references(text) == []
    assert wrong_paths(text) == []
    assert wrong_keys(text) == []
    assert wrong_links(text, page) == []


def test_a_wrong_name_is_found():
    text = """
    `spkit/method/patching.py: retention_mask`, `spkit/method/patching.py: retention_maks`,
    `spkit/patch.py: x`, `spkit/method/patch.py: Factors.delta`,
    `spkit/method/patch.py: Factors.gamma`, `params/*.yaml`, `tests/method/test_patching.py`,
    `tests/test_ptching.py`, `params/*.yml`, `patching.alpha`, `patching.aleph`,
    `derivaton.lora.r`, {"evaluation.splits": 1}, `patching.py`, `record.json`,
    `spkit.running.summary`, `backbone.prepare_backbone`, `backbone.laod`, `params/mine.yaml`,
    [a](method.md), [b](methods.md), [c](#4-hazards), [d](method.md#8-hazards),
    [e](https://arxiv.org/abs/2405.13820), [f](../LICENSE),
    [g](../outputs/sandbox/seed-0/log/00_backbone.ipynb),
    [h](../outputs/sandbox/seed-0/log/00.ipynb)
    """
    assert wrong_references(text) == [
        "spkit/method/patching.py: retention_maks",
        "spkit/patch.py: x",
        "spkit/method/patch.py: Factors.gamma",
    ]
    assert wrong_paths(text) == ["params/*.yml", "spkit/patch.py", "tests/test_ptching.py"]
    assert wrong_keys(text) == [
        "patching.aleph",
        "derivaton.lora.r",
        "evaluation.splits",
        "backbone.laod",
    ]
    log = "../outputs/sandbox/seed-0/log"
    assert wrong_links(text, METHOD) == ["methods.md", "#4-hazards", f"{log}/00.ipynb"]


# ---- equations -----------------------------------------------------------------------------------


def pinned(line):
    """Whether a line says "Code: ... Test: ...", and the tests name one of the functions."""
    code, _, tests = line.partition("Test: ")
    functions = REFERENCE.findall(code)
    files = [ROOT / path for path in re.findall(r"tests/[\w/]+\.py", tests)]
    text = "\n".join(text_of(file) for file in files if file.is_file())
    names = (name.rpartition(".")[2] for _, name in functions)
    return code.startswith("Code: ") and any(re.search(rf"\b{name}\b", text) for name in names)


def unpinned_equations(text):
    """Equations and "Code:" lines without a function beside them that a test names."""
    wrong = []
    for line, following in pairwise([*text.split("\n"), ""]):
        equation = line.startswith("$$")
        if equation and not (line.endswith("$$") and pinned(following)):
            wrong.append(line)
        if line.startswith("Code:") and not pinned(line):
            wrong.append(line)
    return wrong


def test_every_equation_names_its_function_and_the_test_that_pins_it():
    text = text_of(METHOD)
    assert text.count("\n$$") > 15
    assert unpinned_equations(text) == []


def test_an_unpinned_equation_is_found():
    code = "Code: `spkit/method/patching.py: merged_delta`. "
    assert unpinned_equations(f"$$a$$\n{code}Test: `tests/method/test_patching.py`.") == []
    for line in (code, f"{code}Test: `tests/models/test_chat.py`.", "Code: none. Test: none."):
        assert unpinned_equations(f"$$a$$\n{line}") == ["$$a$$", line]
    assert unpinned_equations(f"$$a$$\n\n{code}Test: `tests/method/test_patching.py`.") == ["$$a$$"]


def sections(text):
    """{number: (title, its text)} of the headings `## 1. Title`."""
    parts = re.split(r"^## (\d+)\. (.+)$", text, flags=re.M)[1:]
    return {int(n): (title, body) for n, title, body in zip(*[iter(parts)] * 3, strict=True)}


def test_sections_that_the_code_cites_are_about_that_code():
    found = sections(text_of(METHOD))
    assert [found[number][0] for number in sorted(found)] == list(SECTIONS)
    cited = 0
    for path in sorted((ROOT / "spkit").rglob("*.py")):
        for first, last in re.findall(
            r"docs/method\.md,\s+sections?\s+(\d)(?:\s+to\s+(\d))?", text_of(path)
        ):
            for number in range(int(first), int(last or first) + 1):
                assert path.relative_to(ROOT).as_posix() in found[number][1], (path.name, number)
                cited += 1
    assert cited >= 5


# ---- tables --------------------------------------------------------------------------------------


def tables(text):
    """Every table as a list of {column: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M):
        head, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        )
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def table(number):
    """The one table of a section of docs/method.md."""
    (rows,) = tables(sections(text_of(METHOD))[number][1])
    return rows


def default_of(key):
    value = Config().model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def test_the_table_of_choices_names_every_parameter_of_the_method_once():
    rows = table(7)
    named = [key for row in rows for key in re.findall(r"`(.+?)`", row["key"])]
    assert len(named) == len(set(named))
    of = ("data", "derivation", "importance", "patching", "evaluation", "continual")
    of = (*of, "baselines", "align", "tuning")
    assert set(named) == {"seed", *(key for key in KEYS if key.partition(".")[0] in of)}
    for row in rows:
        assert row["mark"] in ("", "[paper]", "all: [paper]"), row
        assert REFERENCE.search(row["code"]), row


def test_defaults_that_are_names_are_those_of_the_parameters():
    for row in table(7):
        values = [default_of(key) for key in re.findall(r"`(.+?)`", row["key"])]
        names = [f"`{str(v).lower()}`" for v in values if isinstance(v, str | bool)]
        assert [row["default"]] == (names or [""]), row


def test_metrics_are_those_of_the_code():
    found = {
        row["metric"].strip("`"): (row["prompts"], tuple(row["verdicts that count"].split(", ")))
        for row in table(6)
    }
    assert found == {name: (only or "all", counted) for name, (only, counted) in METRICS.items()}


# ---- published figures ---------------------------------------------------------------------------


def cells(notebook):
    nodes = json.loads(text_of(ROOT / "notebooks" / notebook))["cells"]
    return [(node["cell_type"], "".join(node["source"])) for node in nodes]


def published_in_notebook():
    """The frame `figures` of notebook 03: a row a model, a column a benchmark."""
    (source,) = (s for kind, s in cells("03_controllable_patching.ipynb") if "published.table" in s)
    names = {"published": published}
    wanted = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    exec(compile(ast.Module(wanted, []), "notebook 03", "exec"), names)  # our own cell
    assert "{published.LABEL}" in source and "LLaMA-2-7B-Chat" in published.LABEL
    return names["figures"].replace("", "nan").astype(float)


def published_in_module():
    rows = published.FIGURES.values()
    return pd.DataFrame(rows, index=list(published.FIGURES), columns=published.COLUMNS, dtype=float)


def published_in_page():
    frame = pd.DataFrame(table(9)).set_index("model")
    return frame.replace("", "nan").astype(float)


def test_published_figures_are_those_of_the_module():
    here, there = published_in_page(), published_in_module()
    assert there.notna().sum().sum() >= 35 and published.MODEL == "LLaMA-2-7B-Chat"
    pd.testing.assert_frame_equal(here, there, check_names=False)
    page = text_of(METHOD).partition("Continual PSA, after three stages")[2]
    figures = [f"{value:.2f}" for pair in published.CONTINUAL.values() for value in pair]
    assert sorted(re.findall(r"\d+\.\d+", page)) == sorted(figures)


def test_published_figures_are_those_of_notebook_03():
    here, there = published_in_page(), published_in_notebook()
    assert there.notna().sum().sum() >= 16
    same = here.loc[there.index, there.columns]
    pd.testing.assert_frame_equal(same, there, check_names=False)


def test_published_continual_figures_are_those_of_notebook_04():
    (text,) = (s for kind, s in cells("04_continual_psa.ipynb") if "The paper's figures" in s)
    figures = re.findall(r"\d+\.\d+", text.partition("The paper's figures")[2])
    page = text_of(METHOD).partition("Continual PSA, after three stages")[2]
    assert len(figures) == 4
    assert sorted(re.findall(r"\d+\.\d+", page)) == sorted(figures)


def test_published_figures_are_labelled_as_such():
    title, body = sections(text_of(METHOD))[9]
    assert "Published figures of arXiv 2405.13820; none was measured with this kit" in body
    assert "LLaMA-2-7B-Chat" in title


# ---- changelog -----------------------------------------------------------------------------------


def missing_modules(text):
    """Modules in the last column of a table "before | now" that do not exist."""
    named = {name for rows in tables(text) for row in rows for name in modules(row["now"])}
    return sorted(name for name in named if not is_module(name))


def modules(cell):
    return re.findall(r"`(spkit(?:\.\w+)+)", cell)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_what_moved_is_where_the_changelog_says():
    text = text_of(ROOT / "CHANGELOG.md")
    assert len(modules(text)) > 40
    assert missing_modules(text) == []


def test_a_wrong_place_in_the_changelog_is_found():
    table = (
        "| before | now |\n|---|---|\n| `spkit.a` | `spkit.method.snip`, `spkit.method.snap` |\n"
    )
    assert missing_modules(table) == ["spkit.method.snap"]
