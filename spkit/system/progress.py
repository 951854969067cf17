"""Progress bars that end as they should, and that another process can show."""

from collections.abc import Callable

from tqdm.auto import tqdm

_made: Callable = tqdm


def bar(**how):
    """A tqdm bar, given what tqdm takes."""
    return _made(**how)


def shown_by(made: Callable) -> None:
    """From now on `bar` makes these instead; they have tqdm's methods."""
    global _made
    _made = made


def complete(bar, why: str) -> None:
    """Show a tqdm bar as finished where it stopped before its limit, and say why it stopped."""
    bar.total = bar.n
    if hasattr(bar, "container"):  # a notebook's bar keeps a maximum of its own
        bar.container.children[1].max = bar.n
    bar.set_postfix_str(why)
