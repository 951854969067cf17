"""A finished bench into the page that shows it: `python -m spkit.bench.publish FOLDER PAGE...`.

FOLDER: of `spkit bench`. The page's marked blocks are made anew; figures and bench.json are copied
by `make publish-bench`.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from spkit.bench import tables
from spkit.bench.bench import read
from spkit.comparison.blocks import fill_pages, filled

BLOCKS = {
    "table": lambda found: tables.markdown(*found),
    "machine": lambda found: tables.about(found[2]),
}


def publish(file: str | Path, pages: Iterable[str | Path]) -> None:
    """Fill the blocks `<!-- bench: table -->` and `machine` of these pages."""
    rows, about = read(file)
    found = rows, about["notes"], about["made_from"]
    fill_pages(pages, lambda page: filled(page, "bench", BLOCKS, found))


if __name__ == "__main__":
    publish(sys.argv[1], sys.argv[2:])
