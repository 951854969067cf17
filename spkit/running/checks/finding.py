"""One line of the table: a parameter, what was found there, and whether the run can end so."""

from collections.abc import Callable
from dataclasses import dataclass

from spkit.errors import SpkitError


@dataclass(frozen=True)
class Finding:
    """ok: None where it could not be looked at now, and nothing speaks against it."""

    key: str
    said: str
    ok: bool | None = True


def looked(key: str, look: Callable[[], str]) -> Finding:
    """What `look` found, in words; its SpkitError is a problem."""
    try:
        return Finding(key, look())
    except SpkitError as error:
        return Finding(key, str(error), ok=False)
