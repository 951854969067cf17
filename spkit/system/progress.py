"""Progress bars that end as they should."""


def complete(bar, why: str) -> None:
    """Show a tqdm bar as finished where it stopped before its limit, and say why it stopped."""
    bar.total = bar.n
    if hasattr(bar, "container"):  # a notebook's bar keeps a maximum of its own
        bar.container.children[1].max = bar.n
    bar.set_postfix_str(why)
