"""The one exception type that the kit raises for a mistake a user can mend."""

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
