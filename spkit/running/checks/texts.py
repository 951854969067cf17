"""The data of a run: every source that its parameters name can be had and read.

First each source by itself, so that all that is missing is told at once; then, where nothing is
missing, what the run makes of them: D_h, the prompts, the stages of continual PSA.
"""

from collections.abc import Iterator

from spkit.config import Config, SourceConfig
from spkit.errors import SpkitError
from spkit.running.checks.finding import Finding, looked
from spkit.system import hub, pypi

SANDBOX = "sandbox"


def named(config: Config) -> dict[str, str]:
    """{parameter: name or path} of every data source that is used."""
    data, align, utility = config.data, config.align, config.utility
    prompts = [data.evaluation] if isinstance(data.evaluation, str) else data.evaluation
    found = {"data.harmful": data.harmful}
    if data.responses is not None and not data.responses.startswith("unaligned"):
        found["data.responses"] = data.responses
    found |= {f"data.evaluation ({name})": name for name in prompts}
    if align.harmful is not None:
        found |= {"align.harmful": align.harmful, "align.instructions": align.instructions}
        found |= {f"align.over_safety ({name})": name for name in align.over_safety}
    found["utility.perplexity"] = utility.perplexity
    if utility.kl is not None:
        found["utility.kl"] = utility.kl
    return {key: name for key, name in found.items() if name != SANDBOX}


def sources(config: Config, fetch: bool) -> Iterator[Finding]:
    """Each source by itself: there, reachable, readable. fetch: whether a pypi: file is fetched."""
    seen: dict[tuple[str, str], Finding] = {}
    for key, name in named(config).items():
        place = name, _role(key)
        if place not in seen:
            seen[place] = _source(config, key, name, fetch)
        if seen[place].key == key or seen[place].ok is False:
            yield Finding(key, seen[place].said, seen[place].ok)


def _role(key: str) -> str:
    """As what a parameter's source is read: its columns differ."""
    roles = {"data.harmful": "D_h", "data.responses": "responses", "utility.perplexity": "texts"}
    return roles.get(key, "evaluation")


def _source(config: Config, key: str, name: str, fetch: bool) -> Finding:
    from spkit.data.readers.source import is_local, resolve

    parameter = key.partition(" ")[0]
    try:
        source = resolve(config.data, name, parameter, fetch=False)
    except SpkitError as error:
        return Finding(key, str(error), ok=False)
    if pypi.is_pypi(source.path):
        if not fetch and not pypi.cached(source.path, source.sha256, parameter).is_file():
            return Finding(key, f"{source.path} is fetched when it is first needed", ok=None)
    elif not is_local(source.path) and (
        said := hub.problem(source.path, "dataset", source.revision)
    ):
        said = f"{said}; save it as a file and name that as the path of {name!r}"
        return Finding(key, said, ok=False)
    return looked(key, lambda: _read(source, key))


def _read(source: SourceConfig, key: str) -> str:
    from spkit.data.readers import read
    from spkit.data.readers.source import load_rows

    role = _role(key)
    if role == "texts":
        return f"{len(load_rows(source, ['text']))} texts in {source.path}"
    if role == "responses":
        return f"{len(load_rows(source, ['prompt', 'response']))} responses in {source.path}"
    return f"{len(read(source, role))} records in {source.path}"


def chosen(config: Config) -> Iterator[Finding]:
    """What the run makes of its sources; call it where all of them can be read."""
    from spkit.data.readers.wrappers import read_wrappers
    from spkit.evaluation.utility.first_token import kl_prompts
    from spkit.evaluation.utility.likelihood import perplexity_texts

    data = config.data
    yield looked("data.harmful (D_h)", lambda: f"{len(pairs(config))} pairs")
    if data.wrappers != "none":
        yield looked("data.wrappers", lambda: f"{len(read_wrappers(data.wrappers))} phrasings")
    yield looked("data.evaluation", lambda: f"{len(_prompts(config))} prompts")
    if config.align.harmful is not None:
        yield looked("align", lambda: f"{len(_to_align(config))} harmful prompts")
    for number, stage in enumerate(config.continual.stages, start=1):
        key = f"continual.stages ({number})"
        yield looked(key, lambda stage=stage: f"{len(pairs(config, stage))} pairs")
    yield looked("utility.perplexity", lambda: f"{len(perplexity_texts(config))} texts")
    if config.utility.kl is not None:
        yield looked("utility.kl", lambda: f"{len(kl_prompts(config))} instructions")


def pairs(config: Config, categories: list[str] | None = None) -> list:
    """D_h, or what it will be drawn from where responses are still to be said."""
    from spkit.data import selection

    if config.data.responses == selection.UNALIGNED:
        data = config.data
        if categories is not None:
            data = data.model_copy(update={"categories": categories})
        return selection.load_harmful_prompts(data)
    return selection.load_harmful_pairs(config.data, seed=config.seed, categories=categories)


def _prompts(config: Config) -> list:
    from spkit.data.selection import load_eval_prompts

    return load_eval_prompts(config.data, config.evaluation)


def _to_align(config: Config) -> list:
    from spkit.data.selection import load_align_prompts

    return load_align_prompts(config.data, config.align, config.seed)
