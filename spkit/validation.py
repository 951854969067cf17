"""How a mistake in the parameters becomes one sentence: full dotted key, value, what is allowed.

Here are the base class of all sections, the reading of YAML, the refusal of tokens, overrides by
dotted key, and the words for pydantic's errors. config.py says which parameters there are.
"""

import difflib
import json
import re
from collections.abc import Hashable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from spkit.errors import SpkitError
from spkit.paths import expanded, settled

TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")


TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
NUMBERS = (f"{TAG}int", f"{TAG}float")
AS_WRITTEN = ("run_name", "revision", "judge_revision")  # names: 2024_01 or 1e5 is no number there
NULLS = ("", "null", "Null", "NULL", "~")
NO_NULLS = ("none", "null")  # what Python's None becomes where it is written into YAML

# parameters that had another name in an earlier version of the kit
RENAMED = {"backbone.dtype": "backbone.compute_dtype"}


class Section(BaseModel):
    """Common to all sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        # `patching:` with nothing under it is None in YAML and means the defaults.
        # True counts as 1 in Python, so `pairs: true` would silently mean one pair.
        if values is None:
            return {}
        if isinstance(values, Mapping):
            for key, value in values.items():
                field = cls.model_fields.get(key)
                if isinstance(value, bool) and field is not None and field.annotation is not bool:
                    raise Wrong(key, value, f"allowed: {_allowed(cls, key)}")
                none = isinstance(value, str) and value.strip().lower() in NO_NULLS
                if none and field is not None and type(None) in get_args(field.annotation):
                    raise Wrong(key, value, "a text; where nothing is meant, write null")
        return values


class Wrong(ValueError):
    """A value that breaks a rule between fields: (key below its section, value, the rule)."""

    def __init__(self, key: str, value: Any, rule: str):
        self.key, self.value, self.rule = key, value, rule
        super().__init__(f"{key} is {value!r}, {rule}")


def placed(text: str, info: ValidationInfo) -> str:
    """For fields that name a file or folder, or something else: see spkit/paths.py."""
    text = expanded(text)
    return text if info.context is None else settled(text, info.context)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's top-level mapping; SpkitError for an unreadable file, bad YAML or a key twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SpkitError(f"{path}: cannot read the params file ({reason})") from None
    try:
        values = yaml.load(text, Loader=_Plain)
        json.dumps(values, default=str, skipkeys=True)  # a value that holds itself has no end
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "unreadable"
        raise SpkitError(f"{path}{where}: not valid YAML: {what}") from None
    except (ValueError, RecursionError):
        raise SpkitError(f"{path}: not valid YAML: a value holds itself, or is too deep") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SpkitError(f"{path}: found a {type(values).__name__}, must hold sections of keys")
    return values


def read_value(key: str, text: str) -> Any:
    """The value of one dotted key, read as it would be in a params file; yaml.YAMLError if bad."""
    if key.rpartition(".")[2] in AS_WRITTEN and text not in NULLS:
        return text.strip()
    return yaml.load(text, Loader=_Plain)


class _Plain(yaml.SafeLoader):
    """YAML without what it does unasked.

    PyYAML lets the last of two equal keys win, makes 8 of 010, 90 of 1:30, a date of 2024-01-02 and
    202401 of a run's name 2024_01. Here the first three are errors or texts, and a name stays as it
    is written. Merge keys (`<<: *a`) are taken as YAML means them.
    """

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)
        keys = set()
        for key_node, value_node in node.value:
            key = MERGE
            if key_node.tag != MERGE:
                key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                problem = "a key is a list or a mapping, must be a text"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in keys:
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            keys.add(key)
            if key in AS_WRITTEN and value_node.tag in NUMBERS:
                value_node.tag = TAG + "str"
        return super().construct_mapping(node, deep)

    def number(self, node):
        """A whole number. 010 and 1:30 are other numbers in YAML than they seem."""
        plain = node.value.lstrip("+-").replace("_", "")
        if ":" in plain or (len(plain) > 1 and plain.isdecimal() and plain[0] == "0"):
            problem = f"{node.value} is {self.construct_yaml_int(node)} there, write what you mean"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return self.construct_yaml_int(node)


EXPONENT = re.compile(
    r"[-+]?[0-9]+[eE][-+]?[0-9]+$"
)  # 1e-4 is a text in YAML 1.1, for want of a dot
_Plain.add_implicit_resolver(TAG + "float", EXPONENT, list("-+0123456789"))
_Plain.add_constructor(TAG + "int", _Plain.number)
_Plain.add_constructor(TAG + "timestamp", _Plain.construct_yaml_str)  # no parameter is a date


# ---- secrets -------------------------------------------------------------------------------------


def refuse_tokens(values: Any, key: str = "") -> None:
    """SpkitError if a text anywhere in `values` holds what looks like a Hugging Face token.

    Parameters are written into the run folder and into executed notebooks. The sentence names the
    key and not the value, so it comes before all messages that would show it.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_tokens(name, f"{key}, a name in it," if key else "a name")
            # a name that passed: it may be shown
            refuse_tokens(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple | set | frozenset):
        for value in values:
            refuse_tokens(value, key)
    elif isinstance(values, str) and TOKEN.search(values):
        raise SpkitError(
            f"{key} looks like a Hugging Face token, which is never a parameter (they are written "
            f"to disk): set the environment variable HF_TOKEN, or log in with `hf auth login`"
        )


# ---- overrides -----------------------------------------------------------------------------------


def dotted_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Every single value's full key, such as "derivation.lora.r"."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from dotted_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings {"a": {"b": value}}, in their order."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_overrides(
    model: type[Section], values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """A copy of nested `values` in which each dotted key of `overrides` is set; keys must exist."""
    if not isinstance(overrides, Mapping):
        text = isinstance(overrides, str)  # papermill's -p gives texts
        how = "; papermill takes them by -y 'overrides: {patching.beta: 2}'" if text else ""
        raise SpkitError(f"overrides is {overrides!r}, allowed: dotted keys with values{how}")
    result = deepcopy(dict(values))
    known = list(dotted_keys(model))
    for key, value in overrides.items():
        if key not in known and not _inside_a_mapping(model, str(key)):
            below = next((name for name in known if name.startswith(f"{key}.")), None)
            if below:
                raise SpkitError(f"overrides: {key} is a section, name one value in it: {below}")
            if key in RENAMED:
                raise SpkitError(f"overrides: {key} is called {RENAMED[key]} now")
            same = [name for name in known if name.endswith(f".{key}")]  # the section was forgotten
            near = f", did you mean {' or '.join(same)}?" if same else ""
            near = near or nearest(str(key), known, otherwise=f"a key such as {known[-1]}")
            raise SpkitError(f"overrides: unknown key {key}{near}")
        *sections, last = key.split(".")
        place = result
        for section in sections:
            if not isinstance(place.get(section), Mapping):
                if place.get(section) is not None:
                    break  # not a section: the validation below says so
                place[section] = {}
            place = place[section]
        else:
            place[last] = value
    return result


def _inside_a_mapping(model: type[Section], key: str) -> bool:
    """Whether a key is below one that holds names of the user's own, as data.sources.xstest.path.

    An optional section counts, too. What is in there is checked with the whole.
    """
    first, _, rest = key.partition(".")
    field = model.model_fields.get(first)
    if field is None or not rest:
        return False
    if _is_section(field.annotation):
        return _inside_a_mapping(field.annotation, rest)
    parts = get_args(field.annotation)
    return get_origin(field.annotation) is dict or any(_is_section(part) for part in parts)


# ---- one sentence for each mistake ---------------------------------------------------------------


def checked(model: type[Section], values: Mapping[str, Any], params: Path | None = None) -> Any:
    """The validated `model`, or a SpkitError that tells every mistake.

    params: the file of the values, for relative paths.
    """
    try:
        return model.model_validate(values, context=params)
    except ValidationError as error:
        told: dict[str, str] = {}  # by the words before the rule: a field of two kinds is told once
        for mistake in error.errors():
            sentence = _sentence(model, mistake)
            told.setdefault(sentence.partition(", allowed: ")[0], sentence)
        raise SpkitError("; ".join(told.values())) from None


def _sentence(model: type[Section], mistake: Mapping[str, Any]) -> str:
    path = [str(part) for part in mistake["loc"]]
    raised = mistake.get("ctx", {}).get("error")
    if isinstance(raised, Wrong):
        key = ".".join([*path, raised.key])
        return f"{key} is {raised.value!r}, {raised.rule}"
    owner, depth = _owner(model, path)
    field = owner.model_fields.get(path[depth]) if depth < len(path) else None
    if field is not None and get_origin(field.annotation) in (Union, UnionType):
        # pydantic puts the tried alternative ("str", "constrained-int") after the field's name
        path[depth + 1 :] = [part for part in path[depth + 1 :] if part.isdecimal()]
    key = ".".join(path)
    if mistake["type"] == "value_error":  # expanded's
        return f"{key} is {mistake['input']!r}, {raised}"
    if mistake["type"] == "missing":  # a key, or an entry of a list of two
        allowed = _allowed(owner, path[depth], entry=len(path) - depth - 1)
        return f"{key} is missing, allowed: {allowed}"
    if mistake["type"] in ("extra_forbidden", "invalid_key"):
        if key in RENAMED:
            return f"{key} (value {mistake['input']!r}) is called {RENAMED[key]} now"
        names = list(owner.model_fields)
        near = nearest(path[-1], names, prefix=".".join(path[:-1]))
        value = f" (value {mistake['input']!r})" if mistake["type"] == "extra_forbidden" else ""
        return f"unknown key {key}{value}{near}"
    if depth == len(path):  # a whole section is not a mapping
        return f"{key} is {mistake['input']!r}, allowed: a section with the keys {_listed(owner)}"
    # inside a list the location is longer: continual.stages.1 is an entry of the field `stages`
    allowed = _allowed(owner, path[depth], entry=len(path) - depth - 1)
    return f"{key} is {mistake['input']!r}, allowed: {allowed}"


def _owner(model: type[Section], path: list[str]) -> tuple[type[Section], int]:
    """The innermost section on the path, and how many parts of the path lead to it."""
    depth = 0
    while depth < len(path):
        field = model.model_fields.get(path[depth])
        inner = field.annotation if field is not None else None
        named = get_args(inner)[1:] if get_origin(inner) is dict else ()
        if _is_section(inner):
            model, depth = inner, depth + 1
        elif named and _is_section(named[0]) and depth + 1 < len(path):
            model, depth = named[0], depth + 2  # data.sources.<name>: a section under any name
        else:
            break
    return model, depth


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _allowed(model: type[Section], key: str, entry: int = 0) -> str:
    """What the field (or an entry, so many lists deep) may hold, in words, from its JSON schema."""
    schema = model.model_json_schema()["properties"][key]
    for _ in range(entry):
        options = schema.get("anyOf", [schema])
        lists = (option.get("items") or option.get("prefixItems", [None])[0] for option in options)
        inner = next((entries for entries in lists if entries), None)
        if inner is None:  # one kind of several that the field may hold
            break
        schema = inner
    return _words(schema)


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(repr, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if "prefixItems" in schema:
        return "a list of " + " and ".join(_words(each) for each in schema["prefixItems"])
    if kind == "array":
        return f"a list, not empty, whose entries are each {_words(schema['items'])}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "a text",
        "boolean": "true or false",
        "null": "null",
        "object": "keys with values",
    }[kind]
    bounds = [
        ("exclusiveMinimum", "above"),
        ("minimum", "at least"),
        ("exclusiveMaximum", "below"),
        ("maximum", "at most"),
    ]
    said = [f"{word} {_number(schema[name])}" for name, word in bounds if name in schema]
    if "pattern" in schema:
        said.append(f"matching {schema['pattern']}")
    if "maxLength" in schema:
        said.append(f"of at most {schema['maxLength']} characters")
    if schema.get("minLength"):
        said.append("that is not empty")
    return f"{words} {' and '.join(said)}".strip()


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _listed(model: type[Section]) -> str:
    return ", ".join(model.model_fields)


def nearest(key: str, known: list[str], prefix: str = "", otherwise: str = "") -> str:
    """Either ", did you mean ...?" or, where no known key is near, ", allowed: ..."."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f", did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    return f", allowed: {otherwise or ', '.join(known)}"
