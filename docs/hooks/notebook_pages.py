"""Pages that are made when the site is built: executed notebooks, their solutions, root files.

The notebooks come from the log of a finished sandbox walkthrough, outputs/sandbox/seed-0/log (the
environment variable SPKIT_DOCS_RUN names another run folder). A notebook of a real model shows
pairs of D_h and must not become a page: any run whose parameters are not the sandbox's is refused.
"""

import ast
import base64
import html
import os
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import yaml
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from page_text import rewritten
from raw import Raw

ROOT = Path(__file__).parents[2]
RUN = "outputs/sandbox/seed-0"
PARAMS = "params/sandbox.yaml"
SOLUTIONS = "notebooks/solutions"
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "outputs/README.md": "outputs.md",
}
SANDBOX = ("backbone.source", "data.harmful", "data.evaluation", "utility.perplexity")
FOLDED = {"parameters", "injected-parameters", "hide-input"}


def on_files(files, config):
    """MkDocs calls this once, with the files it found under docs/."""
    run = ROOT / os.environ.get("SPKIT_DOCS_RUN", RUN)
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for name in names:
        refuse_real(run, name)
        notebook = executed(run / "log" / f"{name}.ipynb")
        page = notebook_page(notebook, f"notebooks/{name}", f"notebooks/{name}.ipynb")
        for path, content in page.items():
            files.append(File.generated(config, path, content=content))
    for path, content in solution_pages(run).items():
        files.append(File.generated(config, path, content=content))
    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewritten(text, source, page)))
    files.append(File.generated(config, "assets/mathjax.js", content=mathjax()))
    return files


def mathjax() -> bytes:
    """MathJax in one file, which fetches nothing: from a package that carries it."""
    package = distribution("sphinx-mathjax-offline")
    (path,) = (file for file in package.files if file.match("static/mathjax/tex-svg-full.js"))
    return Path(package.locate_file(path)).read_bytes()


# ---- which runs may be shown ---------------------------------------------------------------------


def refuse_real(run: Path, name: str) -> None:
    """PluginError unless all that the run recorded about itself says "sandbox"."""
    for path in (run / "params.yaml", run / name / "record.json"):
        if not path.is_file():
            raise PluginError(f"{path} is missing: run `make walkthrough` first")
        params = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
        if path.suffix == ".json":
            params = params.get("params")
        elif dotted(params, "backbone.source") is None:
            raise PluginError(f"{path} does not say which backbone it is about")
        for key in SANDBOX:  # a record has the sections that its stage reads
            if dotted(params, key) not in (None, "sandbox"):
                raise PluginError(
                    f"{path} has {key} {dotted(params, key)!r}: only notebooks of the sandbox may "
                    "become pages, because those of a real model show pairs of D_h"
                )


def dotted(tree: dict, key: str):
    """The value of "section.key", or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def executed(path: Path):
    """A notebook of which every code cell ran; PluginError where one did not, or was a real run."""
    if not path.is_file():
        raise PluginError(f"{path} is missing: run `make walkthrough` first")
    notebook = nbformat.read(path, 4)
    for given in parameters(notebook):
        for key in SANDBOX:
            values = (dotted(given, key), (given.get("overrides") or {}).get(key))
            if any(value not in (None, "sandbox") for value in values):
                raise PluginError(f"{path} was executed with another {key}: it must not be a page")
        if given.get("params", PARAMS) != PARAMS:  # a solution reads the run of a params file
            raise PluginError(f"{path} was executed on another params file: it must not be a page")
    for cell in notebook.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise PluginError(f"{path} ended in an error: run `make walkthrough` again")
    return notebook


def parameters(notebook) -> Iterator[dict]:
    """What papermill was given, and the literals of the cells that hold parameters."""
    yield notebook.metadata.get("papermill", {}).get("parameters", {})
    for cell in notebook.cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            lines = ast.parse(cell.source).body
            found = [line for line in lines if isinstance(line, ast.Assign)]
            yield {line.targets[0].id: ast.literal_eval(line.value) for line in found}


# ---- from a notebook to a page -------------------------------------------------------------------


def notebook_page(notebook, name: str, source: str) -> dict[str, str | bytes]:
    """{path in the site: content}: the page `<name>.md` and its pictures.

    source: the notebook's path in the repository, which its links start from.
    """
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    hidden: list[str] = []  # cells that are folded into one box
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip():
            found = [shown(output, name, pictures) for output in cell.get("outputs", [])]
            results = [part for part in found if part]
            if FOLDED & set(cell.metadata.get("tags", [])):
                hidden.append(cell.source)
            else:
                parts += [folded(hidden), block(cell.source)]
                hidden = []
            if results:
                parts += [folded(hidden), *results]
                hidden = []
        elif cell.cell_type == "markdown":
            parts += [folded(hidden), rewritten(cell.source, source, f"{name}.md")]
            hidden = []
    parts = [part for part in (*parts, folded(hidden)) if part]
    return {f"{name}.md": "\n\n".join(parts) + "\n", **pictures}


def block(source: str) -> str:
    """A cell that is shown."""
    return f"```python\n{source}\n```"


def folded(sources: list[str]) -> str:
    """Cells behind one another that nobody needs to read at first, in one folded box."""
    if not sources:
        return ""
    text = "\n\n".join(map(block, sources))
    indented = "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
    return f'??? code "Code"\n\n{indented}'


def shown(output, name: str, pictures: dict[str, bytes]) -> str:
    """One output as Markdown or HTML; progress bars and warnings are left out."""
    if output.output_type == "stream":
        text = output.text if output.name == "stdout" else ""
        return printed(text)
    data = output.get("data", {})
    if "image/png" in data:
        path = f"{name}/{len(pictures)}.png"
        pictures[path] = base64.b64decode(data["image/png"])
        about = output.metadata.get("image/png", {})
        alt = html.escape(about.get("alt") or "Figure of this notebook", quote=True)
        width = f' width="{about["width"]}"' if "width" in about else ""
        source = f"{Path(name).name}/{Path(path).name}"
        return Raw.hold(f'<div class="figure"><img src="{source}" alt="{alt}"{width}></div>')
    if "text/html" in data:
        return Raw.hold(f'<div class="output">{data["text/html"]}</div>')
    if "text/markdown" in data:
        return data["text/markdown"]
    if any("widget" in kind for kind in data):
        return ""
    return printed(data.get("text/plain", ""))


def printed(text: str) -> str:
    """Plain text in a box that scrolls; nothing where there is nothing."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return Raw.hold(f'<pre class="output">{html.escape(text)}</pre>') if text.strip() else ""


def solution_pages(run: Path) -> dict[str, str | bytes]:
    """Pages of notebooks/solutions: executed, where the run's log has them, else as they are."""
    pages: dict[str, str | bytes] = {}
    links = []
    for path in sorted((ROOT / SOLUTIONS).glob("*.ipynb")):
        done = run / "log" / "solutions" / path.name
        notebook = executed(done) if done.is_file() else nbformat.read(path, 4)
        pages |= notebook_page(notebook, f"solutions/{path.stem}", f"{SOLUTIONS}/{path.name}")
        links.append(f"* [{title_of(notebook)}]({path.stem}.md)")
    intro = "# Solutions of the exercises\n\n"
    intro += "Every notebook ends with exercises. Try them before you read on.\n\n"
    pages["solutions/index.md"] = intro + ("\n".join(links) or "There are none yet.") + "\n"
    return pages


def title_of(notebook) -> str:
    """Its first heading."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.search(r"^# (.+)$", text, re.M)
    return found[1] if found else "Solutions"
