"""What given parameters change, and which of them change nothing beside the others.

    without_effect(config, given)      a sentence for each that has no effect
    changed(config, before)            {dotted key: (value before, value now)}
    file_of(config)                    the params file of a run by its name

A notebook is given values, not a file. So what differs from the params file of the same run_name is
shown at its top: papermill's `-y 'patching: {beta: 2}'` replaces the whole section, and the rates
of the file are gone.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from spkit.config import Config, ContinualMethod, SandboxConfig, load_params
from spkit.data.inputs import of_data
from spkit.errors import SpkitError
from spkit.running.runs import run_folder
from spkit.validation import dotted_keys, flattened, read_yaml

PARAMS = Path("params")
OWNER = "params_file.txt"  # in the run's log folder: which params file made what is there
METHOD = ("derivation", "importance", "patching")
# of a run, not of what it computes
PLACES = ("run_name", "seed", "outputs", "mirror", "threads")
LM_EVAL = ("include_path", "sources", "limit", "limit_seed", "num_fewshot", "chat_template")

# behind a reason: notebook 04 derives at every stage, also beside adapters
CONTINUAL = "; notebook 04 alone, which derives its own, goes by it"
REVISIONS = (  # (section, the name in it, what is of the hub alone)
    ("judges.classifier.", "model", "revision"),
    ("judges.generative.", "model", "revision"),
    ("utility.mt_bench.", "prompts", "revision"),
    ("utility.mt_bench.", "judge", "judge_revision"),
)


def _is_local(c: Config, key: str) -> bool:
    """Whether the place that this parameter names is a folder or a file here."""
    value: Any = c
    for name in key.split("."):
        value = getattr(value, name)
    return value is not None and Path(value).exists()


def _judges(c: Config) -> set[str]:
    return {*c.judges.harmful, *c.judges.over_safety}


# (a dotted key, or with a dot at its end all that is in it; whether it counts; why it does not)
RULES: list[tuple[str, Callable[[Config], bool], str]] = [
    (
        "patching.alpha",
        lambda c: c.patching.balance is None,
        "alpha is found, because patching.balance is {c.patching.balance}; set patching.balance to "
        "null to use it",
    ),
    (
        "sandbox.",
        lambda c: c.backbone.source == "sandbox",
        "the backbone is {c.backbone.source}",
    ),
    ("backbone.revision", lambda c: not Path(c.backbone.source).is_dir(), "its source is a folder"),
    ("data.responses", lambda c: c.data.harmful != "sandbox", "the sandbox's D_h has responses"),
    (
        "data.response_tokens",
        lambda c: (c.data.responses or "").startswith("unaligned"),
        "data.responses is not 'unaligned'",
    ),
    ("data.as_questions", lambda c: c.data.harmful != "sandbox", "D_h is the sandbox's"),
    ("data.dev_share", lambda c: c.data.evaluation != "sandbox", "the prompts are the sandbox's"),
    ("align.", lambda c: c.align.harmful is not None, "align.harmful is null"),
    (
        "derivation.ascent.",
        lambda c: c.derivation.se is None,
        f"derivation.se is an adapter{CONTINUAL}",
    ),
    (
        "derivation.descent.",
        lambda c: c.derivation.osm is None,
        f"derivation.osm is an adapter{CONTINUAL}",
    ),
    (
        "derivation.shared_init",
        lambda c: c.derivation.se is None and c.derivation.osm is None,
        f"a patch is an adapter of one's own{CONTINUAL}",
    ),
    *(
        (
            f"derivation.lora.{key}",
            lambda c: c.derivation.se is None or c.derivation.osm is None,
            f"both patches are adapters of one's own{CONTINUAL}",
        )
        for key in ("r", "alpha", "dropout")
    ),
    *(
        (
            f"{model}{revision}",
            lambda c, key=f"{model}{name}": not _is_local(c, key),
            f"{model}{name} is a folder or a file",
        )
        for model, name, revision in REVISIONS
    ),
    ("judges.classifier.", lambda c: "classifier" in _judges(c), "no judge is 'classifier'"),
    ("judges.generative.", lambda c: "generative" in _judges(c), "no judge is 'generative'"),
    *(
        (
            f"judges.{key}",
            lambda c: bool(_judges(c) & {"classifier", "generative"}),
            "no judge is a model",
        )
        for key in ("batch_size", "max_tokens")
    ),
    (
        "judges.keywords",
        lambda c: bool(_judges(c) & {"keywords", "classifier", "generative"}),
        "no judge looks for phrases",
    ),
    *(
        (f"utility.{key}", lambda c: bool(c.utility.tasks), "utility.tasks is empty")
        for key in LM_EVAL
    ),
    ("utility.kl_prompts", lambda c: c.utility.kl is not None, "utility.kl is null"),
    (
        "utility.mt_bench.",
        lambda c: c.utility.mt_bench.prompts is not None,
        "utility.mt_bench.prompts is null",
    ),
    (
        "utility.mt_bench.judge_revision",
        lambda c: c.utility.mt_bench.judge is not None,
        "utility.mt_bench.judge is null",
    ),
    ("baselines.npo.", lambda c: "npo" in c.continual.methods, "continual.methods has no npo"),
    *(
        (
            f"continual.settings.{method}",
            lambda c, method=method: method in c.continual.methods,
            f"continual.methods has no {method}",
        )
        for method in get_args(ContinualMethod)
    ),
    ("tuning.", lambda c: False, "`spkit tune` alone reads it"),
    *(
        (
            key,
            lambda c: c.backbone.source != "sandbox" or c.sandbox.weights == "train",
            "sandbox.weights is shipped, so nothing is trained",
        )
        for key in dotted_keys(SandboxConfig, "sandbox.")
        if key != "sandbox.weights"
    ),
]
SWITCHES = ("align.harmful", "utility.mt_bench.prompts")  # to null: that is their effect


def without_effect(config: Config, given: Iterable[str]) -> list[str]:
    """A sentence for each of these dotted keys that changes nothing beside the other parameters.

    given: the keys of overrides, or of values that differ from the params file's.
    """
    return [
        f"{key} has no effect here: {reason}"
        for key in given
        if key not in SWITCHES and (reason := _reason(config, key))
    ]


def _reason(config: Config, key: str) -> str | None:
    if key.startswith("data.sources."):
        return _of_source(config, *key.split(".")[2:])
    for name, counts, reason in RULES:
        inside = key.startswith(name if name.endswith(".") else f"{name}.")
        if (key == name or inside) and not counts(config):
            return reason.format(c=config)
    return None


def _of_source(config: Config, name: str, field: str = "") -> str | None:
    if name not in of_data(config)["sources"]:
        return f"no parameter names the source {name}"
    source = config.data.sources[name]
    if field == "revision" and Path(source.path).exists():
        return "its path is a local file"
    return None


def changed(config: Config, before: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in `before`, value in `config`)} of what differs, but for PLACES."""
    old, new = (flattened(c.model_dump(mode="json")) for c in (before, config))
    keys = [key for key in {**old, **new} if key.partition(".")[0] not in PLACES]
    missing = "(not there)"
    return {
        key: (old.get(key, missing), new.get(key, missing))
        for key in keys
        if old.get(key, missing) != new.get(key, missing)
    }


def file_of(config: Config) -> Path | None:
    """The params file that the run folder was made with by `spkit run`, else the one in params/ of
    the same run_name; None where there is none, or several."""
    note = run_folder(config) / "log" / OWNER
    if os.path.isfile(note):  # which knows of names that are too long
        owner = note.read_text(encoding="utf-8").strip()
        if os.path.isfile(owner):
            return Path(owner)
    found = []
    for path in sorted(PARAMS.glob("*.yaml")):
        try:
            if read_yaml(path).get("run_name", "sandbox") == config.run_name:
                found.append(path)
        except SpkitError:
            continue
    return found[0] if len(found) == 1 else None


def differences(config: Config, params: Path | None = None) -> str:
    """A table of what differs from the params file, with its name; "" where nothing does.

    params: None is the file in params/ of the same run_name. One that cannot be read is no file.
    """
    params = params or file_of(config)
    try:
        found = {} if params is None else changed(config, load_params(params))
    except SpkitError:
        return ""
    if not found:
        return ""
    rows = [
        ("parameter", f"in {params}", "here"),
        *((k, *map(_short, v)) for k, v in found.items()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([*lines, *without_effect(config, found)])


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def left_out(config: Config, namespace: Mapping[str, Any]) -> list[str]:
    """A sentence for each section of the method of which a real backbone's run names a part only.

    namespace: a notebook's variables. What is not named is as in the sandbox, which is seldom meant
    for another model. Nothing is said where the run's params file is known: there is the table.
    """
    if config.backbone.source == "sandbox" or file_of(config) is not None:
        return []
    said = []
    for section in METHOD:
        named, fields = namespace.get(section) or {}, type(getattr(config, section)).model_fields
        missing = [key for key in fields if key not in named]
        if missing and isinstance(named, Mapping):
            said.append(f"{section}: as in the sandbox, for they are not named: {listed(missing)}")
    return said


def listed(names: list[str], most: int = 6) -> str:
    """ "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def remarks(config: Config, given: Mapping[str, Any], params: Path | None = None) -> str:
    """What is printed at the top of a run: the differences, then overrides without effect."""
    table = differences(config, params)
    said = [line for line in without_effect(config, given) if line not in table]
    return "\n".join([*([table] if table else []), *said])
