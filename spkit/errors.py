"""The one exception type that the kit raises for a mistake a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 3_000  # characters; about a page


class SpkitError(ValueError):
    """A single sentence: what was found, where (key, file, row or tensor), and what is allowed.

    It may quote a file that nobody trusts, and goes to a terminal: control characters in it are
    written as escapes, and of a text of more than a page the middle is left out.
    """

    def __init__(self, message: object = ""):
        super().__init__(_cut("".join(map(_visible, _cut(str(message))))))


def _cut(text: str) -> str:
    short = len(text) <= LONGEST
    return text if short else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


def _visible(character: str) -> str:
    shown = character == "\n" or character.isprintable()
    return character if shown else character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """The first line of another library's message: a sentence of ours ends with it."""
    return str(error).strip().split("\n")[0]


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """`with needs("spkit ask", "notebooks"): import torch`: a missing library becomes a sentence.

    extra: the group of pyproject.toml's optional dependencies that brings it. A module of spkit's
    own that is missing is a fault of the kit, and stays what it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "spkit":
            raise
        raise SpkitError(
            f"{what} needs {error.name.partition('.')[0]}, which is not installed here: "
            f"pip install '.[{extra}]' in the folder of spkit's pyproject.toml"
        ) from None
