"""Where a path in the parameters leads: `~` and `$NAME` are expanded, and one place is the root.

    repository_root(params)     the clone that the working folder, the params file or spkit is in
    expanded("~/data.csv")      "/home/me/data.csv"

A relative path is looked for in the repository, then beside the params file. So a params file means
the same wherever one stands.
"""

import os
import re
import sys
from pathlib import Path

VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
JINJA = ("{{", "{%")


def repository_root(params: str | Path | None = None) -> Path:
    """The folder of spkit's pyproject.toml: at or above the working folder, then at or above the
    params file, then that of the running code; the working folder where none of them is a clone.
    """
    here = Path.cwd()
    starts = [here] if params is None else [here, Path(params).resolve().parent, Path(__file__)]
    for start in starts:
        for folder in (start, *start.parents):
            project = folder / "pyproject.toml"
            if project.is_file() and 'name = "spkit"' in project.read_text(encoding="utf-8"):
                return folder
    return here


def expanded(text: str) -> str:
    """The text with a leading ~ and $NAME replaced; a chat template (Jinja) is no path.

    ValueError for a variable that is not set, a ${ that is none, and a user that is not known.
    """
    if any(mark in text for mark in JINJA):
        return text
    for found in VARIABLE.finditer(text):
        name = found[1].strip("{}")
        if name not in os.environ:
            raise ValueError(f"but the environment variable {name} is not set")
    if "${" in VARIABLE.sub("", text):
        raise ValueError("but of variables only $NAME and ${NAME} are known")
    text = os.path.expandvars(text)
    if text.startswith("~"):
        if (home := os.path.expanduser(text)) == text:
            raise ValueError("but there is no such user's home folder")
        return home
    return text


def settled(text: str, params: Path) -> str:
    """An expanded path as it is meant in `params`: as it is where the repository has it.

    Else beside the params file, where it is there: from the repository's root if it is in it,
    otherwise absolute. What is nowhere (a hub id, a name, a text) stays as it is.
    """
    root, beside = repository_root(params), params.resolve().parent / text
    if os.path.isabs(text) or is_there(root / text) or not is_there(beside):
        return text
    return str(beside.relative_to(root) if beside.is_relative_to(root) else beside)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; a text that is too long for a name is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def at_root(params: str | Path) -> Path:
    """Change into the repository's root; the params file's path as it is from there."""
    params = Path(params).expanduser().resolve()
    root = repository_root(params)
    if root != Path.cwd():
        print(f"paths are from {root}", file=sys.stderr)
    os.chdir(root)
    return params.relative_to(root) if params.is_relative_to(root) else params
