"""What a notebook shows: figures and tables that can be read in a light and in a dark theme.

    show(run, "loss_curves", figure, alt="...")    saves the figure, and shows it as a light card
    table(frame)                                   text to the left, numbers to the right

The files under figures/ are the plain figure; the card is made for the page alone.
"""

import io
import re
import zlib
from pathlib import Path

import pandas as pd
from IPython.display import Image

SHOWN = 96 / 150  # figures are saved at 150 dots per inch; a page has 96
CARD = (247, 249, 251)  # what white becomes: a soft sheet in both themes
MARGIN, ROUND = 18, 22  # dots around the figure, and of the card's corners
HASH = re.compile(r"[0-9a-f]{40,}")
HASH_DIGITS = 12
INTERVAL = re.compile(r"\d \[")  # as in "31.1 [24.1, 38.4]"


def show(run, name: str, figure, alt: str) -> Image:
    """Save `figure` in the run's figures/ as `name`, and show it with its alternative text.

    alt: what the picture says, in a sentence, for those who cannot see it.
    """
    return picture(run.save_figure(name, figure), alt)


def picture(path: str | Path, alt: str) -> Image:
    """A saved PNG as a card with round corners and no ground around it."""
    data, width = _card(Path(path))
    return Image(data=data, format="png", width=round(width * SHOWN), alt=alt)


class Table:
    """A table as a page shows it: HTML where that can be read, else plain text."""

    def __init__(self, html: str, text: str):
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def table(frame: pd.DataFrame, digits: int = 1, if_empty: str = "Nothing to show.") -> Table | None:
    """The frame for reading: text to the left, floats with so many digits, hashes cut short.

    An empty frame is not shown; the sentence `if_empty` is printed instead. Row numbers are left
    out. Nothing is changed in `frame` itself, and the same frame gives the same bytes.
    """
    if frame.empty:
        print(if_empty)
        return None
    short = frame.map(_short)
    texts = [name for name in short if not pd.api.types.is_numeric_dtype(short[name])]
    numbered = isinstance(frame.index, pd.RangeIndex)
    # a fixed name: a random one would make each executed notebook another file
    style = short.style.set_uuid(f"{zlib.crc32(short.to_csv().encode()):08x}")
    look = {"precision": digits, "thousands": ",", "na_rep": "–", "escape": "html"}
    style = style.format(**look).format_index(**look, axis=0).format_index(**look, axis=1)
    heads = {}
    for name in short:
        props = "text-align: left" if name in texts else "text-align: right"
        if short[name].astype(str).str.contains(INTERVAL).any():
            props += "; white-space: nowrap"  # an interval is not to break in the middle
        heads[name] = [{"selector": tag, "props": props} for tag in ("th", "td")]
    rows = [{"selector": "th.row_heading, th.index_name", "props": "text-align: left"}]
    style = style.set_table_styles(heads).set_table_styles(rows, overwrite=False)
    if numbered:
        style = style.hide(axis="index")
    text = short.round(digits).to_string(index=not numbered)
    return Table(style.to_html(), text)


def _short(value):
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:HASH_DIGITS]
    return "" if value is None else value


def _card(path: Path) -> tuple[bytes, int]:
    """(PNG, its width in dots)."""
    from PIL import Image as Sheet
    from PIL import ImageChops, ImageDraw

    drawn = Sheet.open(path).convert("RGB")
    size = (drawn.width + 2 * MARGIN, drawn.height + 2 * MARGIN)
    card = Sheet.new("RGB", size, "white")
    card.paste(drawn, (MARGIN, MARGIN))
    card = ImageChops.multiply(card, Sheet.new("RGB", size, CARD))
    corners = Sheet.new("L", size, 0)
    box = (0, 0, size[0] - 1, size[1] - 1)
    ImageDraw.Draw(corners).rounded_rectangle(box, radius=ROUND, fill=255)
    card.putalpha(corners)
    buffer = io.BytesIO()
    card.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), size[0]
