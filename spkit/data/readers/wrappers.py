"""Jailbreak phrasings: templates that are put around a harmful prompt.

A file of lines "name: template" with {prompt} in each template; blank lines and lines that start
with # are left out. The kit ships six plain ones (wrappers.txt); published attack strings are not
among them. This file decides neither which prompts are wrapped nor how an answer is judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spkit.errors import SpkitError
from spkit.examples import EvalPrompt
from spkit.system.pointers import refuse_pointer

SHIPPED = Path(__file__).parent / "wrappers.txt"
PLACE = "{prompt}"


def read_wrappers(choice: str) -> dict[str, str]:
    """{name: template} of data.wrappers: 'none' (empty), 'shipped' or a file.

    SpkitError for a file that cannot be read or has no line, a line without a name or {prompt}, and
    a name that is there twice.
    """
    if choice == "none":
        return {}
    path = wrappers_file(choice)
    refuse_pointer(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SpkitError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise SpkitError(f"{path}: cannot be read ({error.strerror})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, template = (part.strip() for part in line.partition(":"))
        where = f"{path}, line {number}"
        if not (name and colon) or PLACE in name:
            raise SpkitError(f"{where}: no name, must be 'name: template with {PLACE}'")
        if PLACE not in template:
            raise SpkitError(f"{where}: the template of {name!r} has no {PLACE} in it")
        if name in found:
            raise SpkitError(f"{where}: the name {name!r} stands twice, names must differ")
        found[name] = template
    if not found:
        raise SpkitError(f"{path}: holds no template, at least one is needed")
    return found


def wrappers_file(choice: str) -> Path | None:
    """The file behind data.wrappers, None for 'none'; SpkitError where there is no such file."""
    if choice == "none":
        return None
    path = SHIPPED if choice == "shipped" else Path(choice)
    if not path.is_file():
        raise SpkitError(
            f"data.wrappers is {choice!r}: no such file, allowed: none, shipped or a file of lines "
            f"with {PLACE}"
        )
    return path


def wrapped(prompts: Sequence[EvalPrompt], templates: Mapping[str, str]) -> list[EvalPrompt]:
    """The prompts, each harmful one followed by one more copy per template."""
    result = []
    for prompt in prompts:
        result.append(prompt)
        if prompt.objective == "harmful":
            for name, template in templates.items():
                result.append(
                    replace(
                        prompt,
                        id=f"{prompt.id}-{name.replace(' ', '-')}",
                        prompt=template.replace(PLACE, prompt.prompt),
                        phrasing=f"wrapper: {name}",
                    )
                )
    return result
