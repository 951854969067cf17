"""Pages with tables in them: what stands between two marks is made from the tables.

<!-- table: name -->
...
<!-- end -->
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError
from spkit.system.files import atomic
from spkit.validation import nearest


def filled(page: str, mark: str, blocks: Mapping[str, Callable[[Any], str]], tables: Any) -> str:
    """The page with every block of this mark made anew; SpkitError for one that is not known."""

    def made(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in blocks:
            raise SpkitError(f"no block {name!r}{nearest(name, list(blocks))}")
        return f"{start}\n{blocks[name](tables)}\n\n{end}"

    pattern = rf"(<!-- {mark}: (.+?) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, made, page, flags=re.DOTALL)


def fill_pages(pages: Iterable[str | Path], fill: Callable[[str], str]) -> None:
    """Write what `fill` makes of each page in its place."""
    for page in map(Path, pages):
        text = fill(page.read_text(encoding="utf-8"))
        with atomic(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
