"""The parameters cell of each notebook, written from params/sandbox.yaml and the descriptions.

    python tests/parameters_cells.py     writes them into notebooks/*.ipynb, after a change there

A test holds the two together.
"""

import subprocess
import sys
from pathlib import Path

import nbformat

from spkit.config import Config, load_params
from spkit.validation import Section

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("seed", "run_name", "outputs", "mirror", "threads")
OWN = {  # each section stands in full in one notebook, and is {} in the others
    "00_backbone": ("backbone", "sandbox", "data", "align", "evaluation", "judges", "utility"),
    "01_patch_derivation": ("derivation",),
    "02_importance_analysis": ("importance",),
    "03_controllable_patching": ("patching",),
    "04_continual_psa": ("continual", "baselines"),
    "05_comparison": ("comparison", "tuning"),
}


def parameters_cell(stage: str, config: Config | None = None) -> str:
    """The cell's text; `config` instead of params/sandbox.yaml."""
    config = config or load_params(ROOT / "params" / "sandbox.yaml")
    lines = ["# papermill replaces what stands here; {} means: as in params/sandbox.yaml"]
    for name in TOP_LEVEL:
        lines.append(f"{name} = {literal(getattr(config, name))}")
    for name in (name for name in Config.model_fields if name not in TOP_LEVEL):
        own = name in OWN[stage]
        lines += section(f"{name} = ", getattr(config, name), "") if own else [f"{name} = {{}}"]
    return "\n".join([*lines, 'overrides = {}  # single values, such as {"patching.beta": 2.0}'])


def section(opening: str, values: Section, indent: str) -> list[str]:
    """A dict literal over several lines, each key with its description as a comment."""
    lines = [f"{indent}{opening}{{"]
    for key, field in type(values).model_fields.items():
        value, inner = getattr(values, key), indent + "    "
        if isinstance(value, Section):
            lines += section(f'"{key}": ', value, inner)
            continue
        line = f'{inner}"{key}": {literal(value)},'
        comment = "# " + field.description.replace("null", "None")
        if len(f"{line}  {comment}") <= 100:
            lines.append(f"{line}  {comment}")
        else:
            lines += [f"{inner}{comment}", line]
    return [*lines, f"{indent}}}" + ("," if indent else "")]


def literal(value) -> str:
    """A literal as ruff would write it: double quotes."""
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main() -> None:
    """Write the cells, then format them."""
    for stage in OWN:
        path = ROOT / "notebooks" / f"{stage}.ipynb"
        notebook = nbformat.read(path, 4)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = parameters_cell(stage)
        nbformat.write(notebook, path)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", "notebooks"], cwd=ROOT)


if __name__ == "__main__":
    main()
