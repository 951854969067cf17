"""Checks on single rows: a text that is not empty, one of several words, true or false, ids.

Each names the row ("file, row 3"), the column, what was found and what is expected. A long value is
cut, so that no error shows a whole text. source.py reads the rows.
"""

import ast
import difflib
import json
from collections.abc import Sequence
from typing import Any

from spkit.config import SourceConfig
from spkit.data.readers.record import Record
from spkit.errors import SpkitError

SHOWN = 40  # characters of a wrong value that an error may show
MESSAGE = (("role", "content"), ("from", "value"))  # keys of one message of a chat
CHATS = ("messages", "conversations", "conversation")  # columns that hold chats
TURNS = (  # how a prompt begins that a chat template was put around already
    *("Human:", "### Human:", "USER:", "User:", "### Instruction:", "Below is an instruction"),
    *("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<start_of_turn>", "<bos>"),
    *("[INST]", "<s>[INST]", "<s> [INST]", "<|user|>", "<|system|>", "<|endoftext|>"),
)


def text(
    row: dict[str, Any], key: str, where: str, default: str | None = None, empty: bool = False
) -> str:
    """The text under `key`; SpkitError where it is no text or, unless `empty`, blank."""
    value = row.get(key, default)
    if _is_chat(value):
        raise SpkitError(
            f"{where}: {key} is a list of chat messages ({shown(value)}), must be one text: what "
            f"the user says in it"
        )
    if not isinstance(value, str) or not (value.strip() or empty):
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        said = "half a character (a lone surrogate), must be UTF-8"
        raise SpkitError(f"{where}: {key} holds {said}") from None
    return value


def _is_chat(value: Any) -> bool:
    """A list of messages (MESSAGE), or the text that a CSV file makes of it; also a message."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = literal(value) if any(key in value for key, _ in MESSAGE) else None
    messages = [value] if isinstance(value, dict) else value
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and any(set(keys) <= set(m) for keys in MESSAGE) for m in messages
        )
    )


def literal(value: str) -> Any:
    """What a text says as JSON or, as pandas writes it, as a Python literal; None for neither."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None


def choice(
    row: dict[str, Any], key: str, allowed: Sequence[str], where: str, default: str | None = None
) -> str:
    """The value under `key`; SpkitError where it is none of `allowed`."""
    value = row.get(key, default)
    if value not in allowed:
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: {', '.join(allowed)}")
    return value


def truth(value: Any, key: str, where: str) -> bool:
    """A boolean, also as the text that a CSV file makes of it; SpkitError for anything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise SpkitError(f"{where}: {key} is {shown(value)}, allowed: true or false")
    return value


def identifier(row: dict[str, Any], keys: Sequence[str], number: int, where: str) -> str:
    """The first of the id columns that is there, as a text; else the row's number."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return str(number)
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(row, key, where)


def unique(path: Any, records: Sequence[Record]) -> tuple[Record, ...]:
    """The records; SpkitError where two have one id, or where the columns hold something else.

    A column of numbers is no column of prompts; a prompt in a chat template would get a second one.
    """
    for what in ("prompt", "response"):
        _refuse_numbers(path, what, [t for t in (getattr(r, what) for r in records) if t])
    if len(records) > 1 and all(r.prompt.lstrip().startswith(TURNS) for r in records):
        raise SpkitError(
            f"{path}: each prompt begins with a mark of a chat template (the first: "
            f"{shown(records[0].prompt[:16])}), must be what the user says: the backbone's own "
            f"template is put around it"
        )
    seen = set()
    for record in records:
        if record.id in seen:
            raise SpkitError(f"{path}: the id {record.id!r} stands twice, ids must differ")
        seen.add(record.id)
    return tuple(records)


def _refuse_numbers(path: Any, what: str, texts: list[str]) -> None:
    """SpkitError where every text of a column is a number or true or false: it is another column.

    One such text among others is let through, and so is a single row.
    """
    if len(texts) > 1 and all(_is_number(text) for text in texts):
        raise SpkitError(
            f"{path}: each {what} is a number or true or false (the first: {shown(texts[0])}), "
            f"must be texts: is it the right column?"
        )


def _is_number(text: str) -> bool:
    if text.strip().lower() in ("true", "false", "none", "null"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def misspelt(names: Sequence[str], found: Sequence[Any]) -> str:
    """ ", did you mean ...?" where one of the `found` names is near; "" where none is.

    A column of chats is said, too: there is one prompt in a row.
    """
    for name in names:
        plain = {"".join(c for c in str(one).lower() if c.isalnum()): one for one in found}
        key = "".join(c for c in name.lower() if c.isalnum())
        near = [key] if key in plain else difflib.get_close_matches(key, list(plain), 1, 0.8)
        if near:
            return f", did you mean {plain[near[0]]!r}? It must be named {name!r}"
    chats = next((name for name in CHATS if name in found), None)
    return f"; chats ({chats}) are not read: what the user says is {names[0]!r}" if chats else ""


def shown(value: Any) -> str:
    """A value as an error shows it, cut at SHOWN characters."""
    said = repr(value)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]}..."


def without_responses(source: SourceConfig) -> SpkitError:
    """The error of a reader whose data set has prompts alone, where D_h is asked for."""
    return SpkitError(
        f"data.harmful: {source.path} (reader {source.reader}) has prompts without responses, so "
        f"it cannot be D_h; allowed readers: advbench, beavertails, jailbreakbench, wildguardmix, "
        f"own, and with data.responses harmbench, orbench, pyrit, sorrybench and strongreject"
    )
