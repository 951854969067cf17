"""Chat templates: the checkpoint's own or one that is brought, and the arguments that it is given.

Every prompt of the kit is rendered here, so that all of them get the same arguments. They are kept
on the tokenizer, as its system prompt is.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError

ARGUMENTS = "chat_template_arguments"  # the tokenizer's attribute


def rendered(tokenizer, turns, **options):
    """apply_chat_template with the tokenizer's own arguments: a text, or token ids.

    turns: [{"role", "content"}, ...]. options: as apply_chat_template takes them.
    """
    own = getattr(tokenizer, ARGUMENTS, None) or {}
    shown = tokenizer.apply_chat_template(turns, **{"return_dict": False, **options}, **own)
    return list(shown) if options.get("tokenize", True) else shown


def set_template(tokenizer, template: str | None, arguments: Mapping[str, Any] | None) -> None:
    """Give the tokenizer a template of one's own (None: it keeps its own) and its arguments.

    template: Jinja text, or the path of a file with it. SpkitError for a file that cannot be read,
    and an argument whose name the kit or transformers uses itself.
    """
    if template is not None:
        tokenizer.chat_template = template_text(template)
    arguments = dict(arguments or {})
    for name in arguments:
        if name in _reserved(tokenizer):
            raise SpkitError(
                f"backbone.chat_template_arguments has {name!r}, which the kit sets itself; give "
                "only what the template reads of its own, such as enable_thinking"
            )
    setattr(tokenizer, ARGUMENTS, arguments)


def template_text(template: str) -> str:
    """The Jinja text: as given, or read from the file that it names. SpkitError if that fails."""
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise SpkitError(
            f"backbone.chat_template is {template[:80]!r}, which is neither a file nor Jinja text"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SpkitError(f"backbone.chat_template: {path} cannot be read: {reason}") from None


def _reserved(tokenizer) -> set[str]:
    """Names that apply_chat_template takes for itself, or that transformers gives the template."""
    own = inspect.signature(type(tokenizer).apply_chat_template).parameters
    special = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    return {*own, *special, "messages", "raise_exception", "strftime_now"} - {"kwargs"}
