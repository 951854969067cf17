"""The rule behind derivation.lora.targets: which linear layers get factors, by their paths alone.

    [q_proj, mlp.up_proj]   every linear layer whose path ends in one of these names, as in PEFT
    auto                    attention and MLP of the decoder layers, without the routers of a MoE
    all-linear              every linear layer of the decoder layers
    .*layers\\.[0-3]\\..*_proj    another text: a regular expression of the whole path, as in PEFT

models/weights.py asks it about a model, running/shape.py about sizes without a model.
"""

import re
from collections.abc import Mapping, Sequence

from spkit.errors import SpkitError

AUTO, ALL = "auto", "all-linear"
KEY = "derivation.lora.targets"
ROUTER = re.compile(r"(.*_)?(gate|router)")  # a last name; LLaMA's gate_proj is none


def leaf(path: str) -> str:
    """ "q_proj" of "model.layers.0.self_attn.q_proj"."""
    return path.rpartition(".")[2]


def is_named(path: str, names: Sequence[str]) -> bool:
    """Whether a path is one of these names or ends in one, in whole parts: "mlp.up_proj"."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def chosen(
    linear: Sequence[str], targets: Sequence[str] | str, stack: str, others: Mapping[str, str]
) -> list[str]:
    """The paths among `linear` that `targets` names, in the order of `linear`.

    linear: paths of the language model's linear layers. stack: path of its list of decoder layers.
    others: {path: class} of its other modules with weights: norms, embeddings, experts.
    SpkitError for a name, a rule or a regular expression that hits nothing, or another module.
    """
    if not isinstance(targets, str):
        unknown = [n for n in targets if not any(is_named(path, [n]) for path in linear)]
        if unknown:
            raise SpkitError(_unknown(unknown, linear, others))
        return [path for path in linear if is_named(path, targets)]
    if targets in (AUTO, ALL):
        inside = [path for path in linear if path.startswith(stack + ".")]
        found = [p for p in inside if targets == ALL or not ROUTER.fullmatch(leaf(p))]
        if not found:
            what = f"{KEY} is {targets!r}, and the decoder layers have no linear layer"
            raise SpkitError(f"{what}; {_there(linear, others)}.")
        return found
    return _matching(linear, targets, others)


def _matching(linear: Sequence[str], pattern: str, others: Mapping[str, str]) -> list[str]:
    try:
        rule = re.compile(pattern)
    except re.error as error:
        said = f"{KEY} is {pattern!r}, which is no regular expression: {error}"
        raise SpkitError(f"{said}. Allowed are a list of names, {AUTO}, {ALL}, or one.") from None
    found = [path for path in linear if rule.fullmatch(path)]
    wrong = next((path for path in others if rule.fullmatch(path)), None)
    if wrong is not None:
        what = f"matches {wrong!r}, which is {others[wrong]} and gets no factors"
    elif not found:
        what = "matches no whole path of a linear layer of the language model"
    else:
        return found
    raise SpkitError(f"{KEY} is {pattern!r}, which {what}; {_there(linear, others, example=True)}.")


def _unknown(unknown: Sequence[str], linear: Sequence[str], others: Mapping[str, str]) -> str:
    names = ", ".join(map(repr, unknown))
    one = len(unknown) == 1
    said = (
        f"The target {names} is no linear layer"
        if one
        else f"The targets {names} are no linear layers"
    )
    there = _there(linear, others)
    advice = "" if "Conv1D" in there else f" ({KEY}: {AUTO} takes those of attention and MLP)"
    return f"{said} of this model; {there}{advice}."


def _there(linear: Sequence[str], others: Mapping[str, str], example: bool = False) -> str:
    """What there is instead: last names, and where they are transposed, that."""
    said = f"it has {', '.join(dict.fromkeys(map(leaf, linear))) or 'no linear layer'}"
    transposed = dict.fromkeys(leaf(path) for path, kind in others.items() if kind == "Conv1D")
    if transposed:
        said += f", and as Conv1D, whose weights this kit cannot patch, {', '.join(transposed)}"
    if example and linear:
        said += f"; a whole path is {linear[0]!r}, and a list of names matches the ends of paths"
    return said
