"""Several notebooks in one kernel: most of the time of a short notebook is its imports.

Names are forgotten between two notebooks. The walkthrough's tests run each in a kernel of its own.
"""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ENVIRONMENT = os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}
FORGET = "%reset -f"


def read(path):
    return nbformat.read(path, as_version=4)


def parameters(config):
    """What stands in a notebook's parameters cell for this run."""
    values = "\n".join(f"{name} = {value!r}" for name, value in config.model_dump().items())
    return f"{values}\noverrides = {{}}"


def code(notebook, given):
    """Copies of its code cells, after a cell that forgets all names; `given` as parameters."""
    cells = [nbformat.v4.new_code_cell(FORGET)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            own = given if "parameters" in cell.metadata.get("tags", []) else cell.source
            cells.append(nbformat.v4.new_code_cell(own, metadata=cell.metadata))
    return cells


def run(cells, folder=NOTEBOOKS, **options):
    """Execute the cells in place. options: of nbclient, such as allow_errors."""
    whole = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        whole, kernel_name="python3", timeout=600, resources=resources, **options
    )
    client.execute(env=ENVIRONMENT)
