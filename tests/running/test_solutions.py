"""The exercises' solutions: there is one for each exercise, it runs, and it answers in words.

All of them run on one run folder of params/micro.yaml, whose numbers mean nothing, in one kernel.
"""

import re

import nbformat
import pytest
from one_kernel import FORGET, NOTEBOOKS, ROOT, code, parameters, read, run

from spkit.config import load_params
from spkit.running.runs import STAGES

SOLUTIONS = sorted(path.stem for path in (NOTEBOOKS / "solutions").glob("*.ipynb"))
MICRO = ROOT / "params" / "micro.yaml"
LONGEST_CELL = 20  # lines of code

every_solution = pytest.mark.parametrize("stage", SOLUTIONS)


def solution(stage):
    return read(NOTEBOOKS / "solutions" / f"{stage}.ipynb")


def exercises(notebook):
    """The numbers under which exercises stand in the last cell of a notebook."""
    return re.findall(r"^(\d+)\. \S", notebook.cells[-1].source, re.M)


def parts(notebook):
    """{number of the exercise: its cells}; what stands before the first is left out."""
    found, number = {}, None
    for cell in notebook.cells:
        heading = re.match(r"## (\d+) · \S|[^#]*\n## (\d+) · \S", cell.source)
        if cell.cell_type == "markdown" and heading:
            number = heading[1] or heading[2]
            found[number] = []
        elif number is not None:
            found[number].append(cell)
    return found


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """{stage: its solution as it was executed}, after the notebooks themselves."""
    config = load_params(MICRO, {"outputs": str(tmp_path_factory.mktemp("run") / "outputs")})
    needed = [stage for stage in STAGES if stage != "05_comparison" or stage in SOLUTIONS]
    cells = []
    for stage in needed:
        cells += code(read(NOTEBOOKS / f"{stage}.ipynb"), parameters(config))
    before = len(cells)
    overrides = {"outputs": config.outputs}
    for stage in SOLUTIONS:
        cells += code(solution(stage), f"params = {str(MICRO)!r}\noverrides = {overrides!r}")
    run(cells, NOTEBOOKS / "solutions", allow_errors=True)
    failed = [(errors(cell), cell.source) for cell in cells[:before] if errors(cell)]
    assert failed == []
    ran, stages = {}, iter(SOLUTIONS)
    for cell in cells[before:]:
        if cell.source == FORGET:
            stage = next(stages)
            ran[stage] = []
        else:
            ran[stage].append(cell)
    return {stage: with_outputs(solution(stage), done) for stage, done in ran.items()}


def with_outputs(notebook, done):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = done.pop(0).outputs
    assert done == []
    return notebook


def errors(cell):
    return [o.evalue for o in cell.outputs if o.output_type == "error"]


def said(cells):
    return "".join(
        output.text
        for cell in cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )


@every_solution
def test_a_solution_is_valid_and_stored_without_outputs(stage):
    notebook = solution(stage)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith(
        f"# Solutions to the exercises of notebook {stage[:2]}"
    )
    assert f"(../{stage}.ipynb)" in notebook.cells[0].source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source
            assert len(cell.source.splitlines()) <= LONGEST_CELL or tagged(cell), cell.source


def tagged(cell):
    return "hide-input" in cell.metadata.get("tags", [])


@every_solution
def test_every_exercise_has_its_solution(stage):
    notebook = read(NOTEBOOKS / f"{stage}.ipynb")
    assert list(parts(solution(stage))) == exercises(notebook) != []
    assert f"(solutions/{stage}.ipynb)" in notebook.cells[-1].source


@every_solution
def test_a_solution_runs_and_answers_in_words(executed, stage):
    for cell in executed[stage].cells:
        if cell.cell_type == "code":
            assert (errors(cell), cell.source) == ([], cell.source)
    for number, cells in parts(executed[stage]).items():
        words = re.findall(r"[a-z]{2,}", said(cells))
        assert len(words) >= 4, f"exercise {number} prints no sentence"
        assert re.search(r"\d", said(cells)), f"exercise {number} prints no number"
