"""What IPython does in a notebook of the kit: errors are one sentence, `patching.alpha = 2` is one.

papermill's `-p patching.alpha 2` writes the line `patching.alpha = 2` into the notebook. A section
is a dict, so Python would say that a dict has no attribute alpha, and not what to write instead.
"""

import ast
import sys
from typing import Any, NoReturn

from spkit.config import Config
from spkit.errors import SpkitError


def show_errors_as_sentences() -> None:
    """In IPython, show a SpkitError as its sentence; the traceback would bury it."""
    shell = _shell()
    if shell is None:
        return

    def show(shell, kind, error, traceback, tb_offset=None):
        sentence = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, sentence)
        return sentence

    shell.set_custom_exc((SpkitError,), show)


def refuse_dotted_names() -> None:
    """From now on a cell that assigns to an attribute of a section is a SpkitError."""
    shell = _shell()
    if shell is not None and not any(isinstance(t, Dotted) for t in shell.ast_transformers):
        show_errors_as_sentences()
        shell.ast_transformers.append(Dotted())


class Dotted(ast.NodeTransformer):
    """Puts `raise` in the place of `section.key = value`."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Only where the name is a section's and the value a literal."""
        (target, *_), value = node.targets, node.value
        key = ast.unparse(target) if isinstance(target, ast.Attribute) else ""
        if key.partition(".")[0] not in Config.model_fields:
            return node
        try:
            literal = ast.literal_eval(value)
        except ValueError:
            return node
        call = f"__import__({__name__!r}, fromlist=['refuse']).refuse({key!r}, {literal!r})"
        return ast.copy_location(ast.parse(call).body[0], node)


def refuse(key: str, value: Any) -> NoReturn:
    """What stands in the place of such a line."""
    raise SpkitError(
        f"{key} = {value!r} sets nothing: a section is a dict. Give single values as overrides, "
        f"papermill's -y '{{overrides: {{{key}: {value!r}}}}}', or spkit run's -o {key}={value}"
    )


def _shell():
    if "IPython" not in sys.modules:
        return None
    return sys.modules["IPython"].get_ipython()
