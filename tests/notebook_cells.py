"""A notebook's code cells in this process, by plain `exec`: no kernel has to start and import.

Enough for the question whether a notebook runs to its end and what it leaves in its run folder.
What a page shows is looked at where notebooks are executed as such: a cell's last value is not
displayed here.
"""

import os
import random
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import one_kernel
import torch
import untraced

from spkit.running import display
from spkit.running.runs import Run


def run(stage, config, figures=True):
    """Execute notebooks/<stage>.ipynb with these parameters; returns what it printed.

    figures: whether they are drawn and saved, which takes half of the time; they are always made.
    An error in a cell is raised as it is, with the cell's number in a note.
    """
    notebook = one_kernel.read(one_kernel.NOTEBOOKS / f"{stage}.ipynb")
    given = {**config.model_dump(), "overrides": {}}
    names = {"__name__": "__main__", "display": lambda *shown: None}
    printed = StringIO()
    drawn = nullcontext() if figures else _undrawn()
    # what a notebook calls has tests of its own, and these are what coverage counts
    with untraced.part(), _as_before(), redirect_stdout(printed), drawn:
        for number, cell in enumerate(code_cells(notebook), start=1):
            if "parameters" in cell.metadata.get("tags", []):
                names |= given
                continue
            try:
                exec(compile(cell.source, f"{stage}, code cell {number}", "exec"), names)
            except Exception as error:
                error.add_note(f"in code cell {number} of {stage}")
                raise
    return printed.getvalue()


def code_cells(notebook: nbformat.NotebookNode):
    """Its code cells, in their order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@contextmanager
def _undrawn():
    """Figures are made by the notebook's own calls, and closed instead of saved."""

    def close(run, name, figure, alt=""):
        plt.close(figure)

    with patch.object(Run, "save_figure", close), patch.object(display, "show", close):
        yield


@contextmanager
def _as_before():
    """A notebook changes the working folder and the process's settings; afterwards all is back."""
    folder, environment = os.getcwd(), dict(os.environ)
    strict, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    state, numpy_state = random.getstate(), np.random.get_state()
    os.environ |= one_kernel.OFFLINE
    matplotlib.use("Agg")
    os.chdir(one_kernel.NOTEBOOKS)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(strict)
        torch.set_num_threads(threads)
        random.setstate(state)
        np.random.set_state(numpy_state)
