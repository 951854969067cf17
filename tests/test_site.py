"""The pages: recipes are followed, the reading order is whole, only the sandbox is shown, links.

Checks of the built site are skipped where `make docs` has not been run.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "site"
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.M | re.S)


def text_of(path):
    return path.read_text(encoding="utf-8")


# ---- "add a method" and "add a reader", followed literally ---------------------------------------


def blocks(page):
    """(language, title, text) of the blocks that have a title."""
    return BLOCK.findall(text_of(DOCS / page))


def followed(page, folder):
    """A copy of the repository in which every titled block of the page has been carried out."""
    wanted = ("spkit", "tests", "params")
    for name in wanted:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for language, title, text in blocks(page):
        path = folder / title
        if language == "diff":
            path.write_text(changed(text_of(path), text), encoding="utf-8")
        else:
            assert not path.exists(), title
            path.write_text(text, encoding="utf-8")
    return folder


def changed(text, diff):
    """`text` with the lines of one hunk taken out and put in; its context must be there once."""
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert f"\n{text}".count(f"\n{before}\n") == 1, f"not there, or not once:\n{before}"
    return f"\n{text}".replace(f"\n{before}\n", f"\n{after}\n")[1:]


def python(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_method_is_added_as_the_page_says(tmp_path):
    folder = followed("add_method.md", tmp_path)
    (command,) = re.findall(r"^python -m (pytest .+)$", text_of(DOCS / "add_method.md"), re.M)
    done = python(folder, "-m", *shlex.split(command), "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    for module, least in (("test_methods", 5), ("test_magnitude", 1)):
        passed = re.search(rf"{module}\.py (\.+) ", done.stdout)
        assert len(passed[1]) >= least, done.stdout


def test_a_reader_is_added_as_the_page_says(tmp_path):
    folder = followed("add_reader.md", tmp_path)
    done = python(folder, "try_it.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(folder / "output")
    page = text_of(DOCS / "add_reader.md")
    (params,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    check = "from spkit.config import load_params; print(load_params('params.yaml').data.harmful)"
    assert python(folder, "-c", check).stdout == "news\n"


def test_a_page_that_does_not_fit_the_code_is_noticed():
    assert changed("a\nb\nc\n", " a\n+x\n b\n") == "a\nx\nb\nc\n"
    assert changed("a\nb\n", "-a\n+x\n") == "x\nb\n"
    for diff in (" a\n+x\n c\n", " d\n+x\n"):
        with pytest.raises(AssertionError, match="not there"):
            changed("a\nb\nc\n", diff)


# ---- "read the code in an evening" ---------------------------------------------------------------


def stated(text):
    """{file: lines} of the page's numbered list, in its order."""
    found = re.findall(r"^\d+\. `(spkit/method/\w+\.py)`, (\d+) lines", text, re.M)
    return {path: int(lines) for path, lines in found}


def wrong_counts(text):
    """Files of spkit/method that are missing, unknown, or much longer or shorter than stated."""
    files = {f"spkit/method/{p.name}": p for p in (ROOT / "spkit" / "method").glob("*.py")}
    files.pop("spkit/method/__init__.py")
    said = stated(text)
    wrong = sorted(set(files) ^ set(said))
    for path in set(files) & set(said):
        lines = len(text_of(files[path]).splitlines())
        if abs(lines - said[path]) > max(10, 0.1 * lines):
            wrong.append(f"{path} has {lines} lines, stated {said[path]}")
    return wrong


def test_the_reading_order_names_every_file_with_its_length():
    text = text_of(DOCS / "reading.md")
    assert wrong_counts(text) == []
    (total,) = re.findall(r"about ([\d,]+) lines", text)
    assert abs(int(total.replace(",", "")) - sum(stated(text).values())) <= 50
    package = ast.get_docstring(ast.parse(text_of(ROOT / "spkit" / "method" / "__init__.py")))
    order = re.findall(r"^ +(\w+\.py)", package, re.M)
    assert [Path(path).name for path in stated(text)] == order


def test_a_wrong_reading_order_is_noticed():
    text = text_of(DOCS / "reading.md")
    assert wrong_counts(text.replace("snip.py`, ", "snipp.py`, ")) != []
    assert wrong_counts(re.sub(r"snip.py`, \d+", "snip.py`, 20", text)) != []


# ---- what may become a page ----------------------------------------------------------------------


@pytest.fixture
def hooks(monkeypatch):
    """The functions that MkDocs calls, without MkDocs' own run."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    import notebook_pages

    yield notebook_pages
    for name in ("notebook_pages", "page_text", "raw"):
        sys.modules.pop(name, None)


def run_folder(folder, **backbone):
    stage = folder / "01_patch_derivation"
    stage.mkdir(parents=True)
    params = {"backbone": {"source": "sandbox"} | backbone, "data": {"harmful": "sandbox"}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (stage / "record.json").write_text('{"params": {"derivation": {}}}')
    return folder


def test_notebooks_of_a_real_model_are_refused(hooks, tmp_path):
    from mkdocs.exceptions import PluginError

    stage = "01_patch_derivation"
    hooks.refuse_real(run_folder(tmp_path / "good"), stage)
    with pytest.raises(PluginError, match="'org/model': only notebooks of the sandbox"):
        hooks.refuse_real(run_folder(tmp_path / "real", source="org/model"), stage)
    folder = run_folder(tmp_path / "data")
    (folder / stage / "record.json").write_text('{"params": {"data": {"harmful": "beavertails"}}}')
    with pytest.raises(PluginError, match="data.harmful 'beavertails'"):
        hooks.refuse_real(folder, stage)
    with pytest.raises(PluginError, match="make walkthrough"):
        hooks.refuse_real(tmp_path / "none", stage)


def test_an_executed_notebook_must_be_whole_and_of_the_sandbox(hooks, tmp_path):
    import nbformat.v4 as v4
    from mkdocs.exceptions import PluginError
    from nbformat import write

    def saved(*cells, **parameters):
        notebook = v4.new_notebook(cells=list(cells))
        notebook.metadata["papermill"] = {"parameters": parameters}
        write(notebook, tmp_path / "one.ipynb")
        return tmp_path / "one.ipynb"

    hooks.executed(saved(backbone={"source": "sandbox"}, overrides={}))
    for given in ({"backbone": {"source": "org/model"}}, {"overrides": {"data.harmful": "x"}}):
        with pytest.raises(PluginError, match="must not be a page"):
            hooks.executed(saved(**given))
    for text in ('backbone = {"source": "org/model"}', 'params = "params/mine.yaml"'):
        cell = v4.new_code_cell(text, metadata={"tags": ["parameters"]})
        with pytest.raises(PluginError, match="must not be a page"):
            hooks.executed(saved(cell))
    failed = v4.new_code_cell("1 / 0")
    failed.outputs = [v4.new_output("error", ename="E", evalue="", traceback=[])]
    with pytest.raises(PluginError, match="ended in an error"):
        hooks.executed(saved(failed))


def test_cells_become_markdown(hooks):
    import nbformat.v4 as v4

    tags = {"tags": ["hide-input"]}
    hidden = [v4.new_code_cell(text, metadata=tags) for text in ("a\n\nb", "c", "d")]
    hidden[1].outputs = [v4.new_output("stream", name="stdout", text="seen\n")]
    cells = [*hidden, v4.new_code_cell("e"), v4.new_markdown_cell("text")]
    pages = hooks.notebook_page(v4.new_notebook(cells=cells), "notebooks/x", "notebooks/x.ipynb")
    fold, py, end = '??? code "Code"\n\n', "```python\n", "\n```\n\n"
    inner, close = "    ```python\n    ", "\n    ```\n\n"
    output = f'<div class="raw">raw-{len(hooks.Raw.kept) - 1}-raw</div>\n\n'
    assert pages["notebooks/x.md"] == (
        f"{fold}{inner}a\n\n    b{close}{inner}c{close}{output}"
        f"{fold}{inner}d{close}{py}e{end}text\n"
    )
    assert hooks.Raw.kept[-1] == '<pre class="output">seen</pre>'
    picture = v4.new_output("display_data", {"image/png": "aGk="})
    picture.metadata = {"image/png": {"alt": 'a "map"', "width": 300}}
    pictures = {}
    hooks.shown(picture, "notebooks/x", pictures)
    assert pictures == {"notebooks/x/0.png": b"hi"}
    assert 'src="x/0.png" alt="a &quot;map&quot;" width="300"' in hooks.Raw.kept[-1]
    bar = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    assert hooks.shown(bar, "notebooks/x", pictures) == ""


def test_links_of_the_repository_become_links_of_the_site(hooks):
    text = "\n".join(
        [
            "[a](../docs/method.md#8-hazards) [b](01_patch_derivation.ipynb)",
            "![c](../docs/figures/x.png) [d](../tests/plain.py) [`plain.py`](../tests/plain.py)",
            "[e](https://arxiv.org) [f](#here)",
            "```",
            "[g](../docs/method.md)",
            "```",
        ]
    )
    found = hooks.rewritten(text, "notebooks/00_backbone.ipynb", "notebooks/00_backbone.md")
    assert found.split("\n") == [
        "[a](../method.md#8-hazards) [b](01_patch_derivation.md)",
        "![c](../figures/x.png) d (`tests/plain.py`) `plain.py`",
        "[e](https://arxiv.org) [f](#here)",
        "```",
        "[g](../docs/method.md)",
        "```",
    ]


def test_markdown_is_read_as_github_reads_it(hooks):
    import page_text

    text = "words\n$$a = b$$\nCode: `x`.\n* one\n  * two\n| a |\n```\n* three\n```"
    found = page_text.as_github_reads(text)
    assert re.sub(r"\n{2,}", "\n\n", found) == (
        "words\n\n$$a = b$$\n\nCode: `x`.\n\n* one\n    * two\n| a |\n```\n* three\n```"
    )
    table = "<table><td>1.5 [1.0, 2.0] *</td><td>1.5</td></table>"
    assert page_text.on_page_content(table, None, None, None) == (
        '<div class="scroll"><table><td class="interval">1.5 [1.0, 2.0] *</td><td>1.5</td></table>'
        "</div>"
    )


# ---- the built site ------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page links to, shows or loads, and the anchors it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors, self.blind = [], [], set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "img" and not given.get("alt"):
            self.blind += 1
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical",):
            self.loaded.append(given["href"])


def faults(site):
    """Dead links and anchors, missing files, and whatever a page would fetch from a network."""
    pages = {path: Links(text_of(path)) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        here = path.relative_to(site)
        wrong += [f"{here}: a picture without a text" for _ in range(page.blind)]
        for link in page.loaded:
            if re.match(r"(https?:)?//", link):
                wrong.append(f"{here} loads {link}")
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:|//", link) or here.name == "404.html":
                continue
            target, _, anchor = unquote(link).partition("#")
            goal = (path.parent / target.partition("?")[0]).resolve() if target else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                wrong.append(f"{here}: {link} is not there")
            elif anchor and goal in pages and anchor not in pages[goal].anchors:
                wrong.append(f"{here}: {link} has no such place")
    for path in sorted(site.rglob("*.css")):
        wrong += [
            f"{path.name} loads {url}"
            for url in re.findall(r"url\((https?:[^)]+)\)", text_of(path))
        ]
    return wrong


built = pytest.mark.skipif(not SITE.is_dir(), reason="no site: run `make docs`")


@built
def test_the_site_has_no_dead_link_no_missing_picture_and_fetches_nothing():
    assert faults(SITE.resolve()) == []


@built
def test_the_site_has_its_pages():
    nav = yaml.load(text_of(ROOT / "mkdocs.yml"), Loader=yaml.BaseLoader)["nav"]
    for page in leaves(nav):
        assert (SITE / page).with_suffix(".html").is_file(), page
    figures = [path for path in (SITE / "notebooks").rglob("*.png")]
    assert len(figures) >= 20
    assert text_of(SITE / "method.html").count('class="arithmatex"') > 60


def leaves(tree):
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def test_a_faulty_site_is_noticed(tmp_path):
    page = (
        '<h1 id="top">x</h1><a href="#top">1</a><a href="#bottom">2</a><a href="other.html#y">3</a>'
        '<a href="gone.html">4</a><img src="gone.png" alt="x"><img src="here.png">'
        '<script src="https://cdn.example/x.js"></script><a href="https://arxiv.org">5</a>'
    )
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "other.html").write_text('<p id="z"></p>')
    (tmp_path / "here.png").write_text("")
    (tmp_path / "x.css").write_text("@import url(https://fonts.example/a.css)")
    assert faults(tmp_path.resolve()) == [
        "index.html: a picture without a text",
        "index.html loads https://cdn.example/x.js",
        "index.html: #bottom has no such place",
        "index.html: other.html#y has no such place",
        "index.html: gone.html is not there",
        "index.html: gone.png is not there",
        "x.css loads https://fonts.example/a.css",
    ]
