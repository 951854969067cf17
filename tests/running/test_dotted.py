"""`patching.alpha = 2` in a notebook is one sentence that says what to write instead."""

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.testing.globalipapp import start_ipython

from spkit.running import dotted


@pytest.fixture(scope="module")
def shell():
    yield start_ipython() or InteractiveShell.instance()


def test_an_attribute_of_a_section_is_refused_with_what_to_write(shell, capsys):
    dotted.refuse_dotted_names()
    dotted.refuse_dotted_names()  # the cell may run twice
    assert sum(isinstance(t, dotted.Dotted) for t in shell.ast_transformers) == 1
    # what papermill writes for -p patching.alpha 2
    done = shell.run_cell("# Parameters\npatching = {}\nseed = 1\npatching.alpha = 2\n")
    said = str(done.error_in_exec)
    assert said.startswith("patching.alpha = 2 sets nothing")
    assert "-y '{overrides: {patching.alpha: 2}}'" in said and "-o patching.alpha=2" in said
    assert "Traceback" not in capsys.readouterr().out


def test_other_attributes_are_none_of_its_business(shell):
    dotted.refuse_dotted_names()
    code = "from types import SimpleNamespace\nx = SimpleNamespace()\nx.seed = 3\n"
    assert shell.run_cell(code).success
    data = "data = SimpleNamespace()\nhow = 3\ndata.x = how"  # a variable of the user's own
    assert shell.run_cell(data).success
