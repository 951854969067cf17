"""Chat templates: the checkpoint's own or one that is brought, and the arguments that it is given.

Every prompt of the kit is rendered here, so that all of them get the same arguments. They are kept
on the tokenizer, as its system prompt is. `check_template` reads and tries a template when its
tokenizer is loaded, so that a bad one is told then and not at the first answer.
"""

import hashlib
import inspect
import json
import os
import re
import traceback
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables

from spkit.errors import SpkitError, first_line
from spkit.system.files import atomic

ARGUMENTS = "chat_template_arguments"  # the tokenizer's attribute
BROUGHT = "chat_template_is_brought"  # another: whether it is not the checkpoint's
ASKED, ANSWERED = "spkit asks where this is shown", "spkit also asks where this is said"
# published marks of thoughts, each with its bracket: <think>, [Thinking], <|begin_of_thought|>
NAMES = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)"
OPENED = rf"(?:<{NAMES}>|\[{NAMES}\]|<\|begin_of_{NAMES}\|>)"
CLOSED = rf"(?:</{NAMES}>|\[/{NAMES}\]|<\|end_of_{NAMES}\|>)"
JINJA_FILE = "chat_template.jinja"  # what transformers calls it, beside the tokenizer's files


def rendered(tokenizer, turns, **options):
    """apply_chat_template with the tokenizer's own arguments: a text, or token ids.

    turns: [{"role", "content"}, ...]. options: as apply_chat_template takes them.
    """
    options = {"return_dict": False, **options, **arguments_of(tokenizer)}
    shown = tokenizer.apply_chat_template(turns, **options)
    return list(shown) if options.get("tokenize", True) else shown


def arguments_of(tokenizer) -> dict[str, Any]:
    """`backbone.chat_template_arguments`, as they are kept on the tokenizer."""
    return getattr(tokenizer, ARGUMENTS, None) or {}


def messages(tokenizer, prompt: str | Sequence[str]) -> list[dict[str, str]]:
    """The turns up to the user's last, with `tokenizer.system_prompt` where one is set.

    The rule: a system turn where the chat format has a system role; else (Gemma, Mistral v0.1) the
    system prompt stands at the beginning of the user's first turn, with an empty line after it.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    system = getattr(tokenizer, "system_prompt", None)
    if not system:
        return turns
    if has_system_role(tokenizer):
        return [{"role": "system", "content": system}, *turns]
    return [{"role": "user", "content": f"{system}\n\n{texts[0]}"}, *turns[1:]]


def has_system_role(tokenizer) -> bool:
    """Whether the chat template takes a system turn *and* shows what it says.

    Templates differ: some refuse one with an error, some drop it without a word.
    """
    turns = [{"role": "system", "content": ASKED}, {"role": "user", "content": "x"}]
    try:
        shown = rendered(tokenizer, turns, add_generation_prompt=True, tokenize=False)
    except Exception:  # the template's own raise_exception, or whatever else it raises
        return False
    return ASKED in shown


def opening_at_end(prompt: str) -> str:
    """The mark of a thought, with the blanks after it, that a rendered prompt ends with; or ""."""
    found = re.search(rf"{OPENED}\s*$", prompt, re.IGNORECASE)
    return "" if found is None else found[0]


# ---- a template of one's own ---------------------------------------------------------------------


def set_template(tokenizer, template: str | None, arguments: Mapping[str, Any] | None) -> None:
    """Give the tokenizer a template of one's own (None: it keeps its own) and its arguments.

    template: Jinja text, or the path of a file with it. SpkitError for a file that cannot be read,
    and an argument whose name the kit or transformers uses itself.
    """
    if template is not None:
        tokenizer.chat_template = template_text(template)
    setattr(tokenizer, BROUGHT, template is not None)
    arguments = json.loads(json.dumps(dict(arguments or {}), default=str))  # a date is a text
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
    if not os.path.isfile(path):  # which knows of texts that are too long for a path
        raise SpkitError(
            f"backbone.chat_template is {template[:80]!r}, which is neither a file nor Jinja text"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SpkitError(f"backbone.chat_template: {path} cannot be read: {reason}") from None
    if "{" not in text:
        raise SpkitError(f"backbone.chat_template: {path} holds no Jinja text")
    return text


def _reserved(tokenizer) -> set[str]:
    """Names that apply_chat_template takes for itself, or that transformers gives the template."""
    own = inspect.signature(type(tokenizer).apply_chat_template).parameters
    special = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    return {*own, *special, "messages", "raise_exception", "strftime_now"} - {"kwargs"}


# ---- whether it works ----------------------------------------------------------------------------


def check_template(tokenizer) -> None:
    """SpkitError where the template cannot be used: a mistake in its Jinja, or it fails on a
    prompt or on a prompt with an answer, or does not show one of them.

    Warnings: an argument that it does not read, today's date in every prompt, a bos token that it
    writes twice or not at all.
    """
    own = template_of(tokenizer)
    asked = messages(tokenizer, ASKED)  # with the system prompt, which some templates must have
    answered = [*asked, {"role": "assistant", "content": ANSWERED}]
    prompt = _tried(tokenizer, asked, add_generation_prompt=True)
    whole = _tried(tokenizer, answered)
    for text, words, what in ((prompt, ASKED, "user"), (whole, ANSWERED, "assistant")):
        if words not in text:
            raise SpkitError(
                f"{_named(tokenizer)} does not show what the {what} says; give one that does as "
                "backbone.chat_template"
            )
    known = _variables(own)
    for name in arguments_of(tokenizer):
        if name not in known:
            _warn(f"{_named(tokenizer)} reads no {name!r}: this argument has no effect")
    if "strftime_now" in known and f"{datetime.now():%Y}" in prompt:
        fix = "{date_string: '26 Jul 2024'}" if "date_string" in known else "a template without it"
        key = "chat_template_arguments" if "date_string" in known else "chat_template"
        _warn(
            f"{_named(tokenizer)} writes today's date into every prompt, so that another day gives "
            f"other answers; fix it with backbone.{key}: {fix}"
        )
    _warn_of_bos(tokenizer, asked)


def template_of(tokenizer) -> str:
    """The text of the template that prompts are rendered with. SpkitError if there is none."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if "default" not in own:
            raise SpkitError(
                f"The tokenizer of {_source(tokenizer)!r} has chat templates named "
                f"{', '.join(own)} and no default; give the text of one as backbone.chat_template."
            )
        own = own["default"]
    if own is None:
        raise SpkitError(
            f"The tokenizer of {_source(tokenizer)!r} has no chat template; use an "
            "instruction-tuned model, or give a template as backbone.chat_template."
        )
    return own


def _tried(tokenizer, turns, **options) -> str:
    """The rendered text; whatever a template raises becomes one sentence with its line."""
    try:
        return rendered(tokenizer, turns, tokenize=False, **options)
    except Exception as error:  # a template is code: it raises what it likes
        said = template_error(tokenizer, error)
        if turns[0]["role"] != "system" and has_system_role(tokenizer):
            said = SpkitError(f"{said}; with a backbone.system_prompt it can be rendered")
        raise said from error


def template_error(tokenizer, error: Exception) -> SpkitError:
    """One sentence on why a template could not be rendered, with the line in it."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == "<template>" and line is None else line
    where = "" if line is None else f", line {line}"
    reason = first_line(error) or type(error).__name__
    kind = "is no valid Jinja" if isinstance(error, jinja2.TemplateSyntaxError) else "fails"
    return SpkitError(f"{_named(tokenizer)} {kind}{where}: {reason}")


def _variables(template: str) -> set[str]:
    """The names that a template reads and does not set itself; loops and tags as transformers'."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    return find_undeclared_variables(environment.parse(template))


class Generation(Extension):
    """transformers' own tag, {% generation %}...{% endgeneration %}: here its content alone."""

    tags = {"generation"}

    def parse(self, parser):
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _warn_of_bos(tokenizer, turns) -> None:
    """A second bos token, or none where the tokenizer begins each plain text with one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    ids = rendered(tokenizer, turns, add_generation_prompt=True)
    if ids[:2] == [bos, bos]:
        _warn(f"{_named(tokenizer)} begins a prompt with two {tokenizer.bos_token}; one is usual")
    elif bos not in ids and tokenizer.encode("a")[:1] == [bos]:
        _warn(
            f"{_named(tokenizer)} writes no {tokenizer.bos_token}, with which its tokenizer begins "
            "every text; let the template begin with {{ bos_token }}"
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def _named(tokenizer) -> str:
    return f"The chat template of {_source(tokenizer)!r}"


def _source(tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", "") or "?"


# ---- what is recorded ----------------------------------------------------------------------------


def template_record(tokenizer) -> dict[str, Any]:
    """{"sha256" of the template's text, "arguments", "system_prompt", "example"}, for JSON.

    example: a prompt rendered as a text, with "{prompt}" for the user's words.
    """
    turns = messages(tokenizer, "{prompt}")
    return {
        "sha256": hashlib.sha256(template_of(tokenizer).encode()).hexdigest(),
        "arguments": arguments_of(tokenizer),
        "system_prompt": getattr(tokenizer, "system_prompt", None),
        "example": rendered(tokenizer, turns, tokenize=False, add_generation_prompt=True),
    }


def write_template(tokenizer, folder: str | Path) -> None:
    """Give a checkpoint's folder the template that its answers were measured with.

    Nothing is written where that is the checkpoint's own, without arguments. The arguments become
    defaults at the template's beginning, so whoever renders it gets the same prompts.
    """
    if not getattr(tokenizer, BROUGHT, False) and not arguments_of(tokenizer):
        return
    known = _variables(template_of(tokenizer))
    defaults = [
        f"{{%- set {name} = {name} if {name} is defined else {value!r} %}}"
        for name, value in arguments_of(tokenizer).items()
        if name in known
    ]
    # a line end after a tag is not shown; without it, the template's own first one would be lost,
    # and blanks before its first tag would be shown
    text = "\n".join([*defaults, template_of(tokenizer)])
    with atomic(Path(folder) / JINJA_FILE) as path:
        path.write_text(text, encoding="utf-8")
