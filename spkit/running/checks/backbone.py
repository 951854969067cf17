"""The backbone: its files, its tensors, the layers that get a patch, its chat format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation.answers import check_prompts
from spkit.models.adapters import check_adapter, linear_shapes
from spkit.models.chat import encode_pair, encode_prompt
from spkit.models.checkpoint_check import checkpoint_problems
from spkit.models.gguf import checkpoint_of, gguf_file, is_gguf
from spkit.models.loading import load_tokenizer
from spkit.models.prompt_checks import check_rendered
from spkit.running.checks.finding import Finding, looked
from spkit.running.checks.texts import pairs
from spkit.running.shape import model_on_meta, shape_of
from spkit.system import hub, pypi

PLACEHOLDER = "your-name/your-model"  # in params/template.yaml


def place(config: Config) -> tuple[Finding, Path | None]:
    """Where the backbone's files are; None where they are not on this machine yet."""
    own, key = config.backbone, "backbone.source"
    if own.source == PLACEHOLDER:
        return Finding(
            key, f"{own.source!r} is the template's: name your own model", ok=False
        ), None
    if is_gguf(own):
        if pypi.is_pypi(own.source) and not gguf_file(own, fetch=False).is_file():
            return Finding(key, f"{own.source} is fetched when it is first needed", ok=None), None
        try:
            return Finding(key, own.source), Path(checkpoint_of(own))
        except SpkitError as error:
            return Finding(key, str(error), ok=False), None
    if Path(own.source).exists():
        return Finding(key, own.source), Path(own.source)
    folder = hub.in_cache(own.source, own.revision)
    if folder is not None:
        return Finding(key, f"{own.source}, in the hub's cache"), folder
    said = hub.problem(own.source, "model", own.revision)
    if said is None:
        return Finding(key, f"{own.source}: to be downloaded", ok=None), None
    return Finding(key, said, ok=False), None


def found(config: Config, *, derives: bool) -> Iterator[Finding]:
    """The files and their tensors; derives: also the layers that get a patch, and given patches."""
    targets = config.derivation.lora.targets if derives else "auto"
    if config.backbone.source == "sandbox":
        yield Finding("backbone.source", f"the sandbox's, {config.sandbox.weights}")
        yield from _layers(config) if derives else ()
        return
    finding, folder = place(config)
    yield finding
    if folder is None or not finding.ok:
        return
    whole = Path(config.backbone.source).exists() or is_gguf(config.backbone)
    checked = checkpoint_problems(folder, targets, whole=whole)
    yield from (Finding("backbone.source", said, ok=False) for said in checked.problems)
    yield from (Finding("backbone.source", said) for said in checked.remarks)
    if derives and not checked.problems:
        yield from _layers(config)


def _layers(config: Config) -> Iterator[Finding]:
    """The layers that get a patch, and the adapters that take a patch's place."""
    own = config.derivation
    yield looked("derivation.lora.targets", lambda: _targets(config))
    given = {key: getattr(own, key) for key in ("se", "osm")}
    for key, folder in given.items():
        if folder is not None:
            yield looked(f"derivation.{key}", lambda folder=folder: _adapter(config, folder))


def _targets(config: Config) -> str:
    matrices = shape_of(config).targeted(config.derivation.lora.targets)
    names = ", ".join(dict.fromkeys(matrix.name for matrix in matrices))
    return f"{sum(matrix.count for matrix in matrices)} matrices: {names}"


def _adapter(config: Config, folder: str) -> str:
    adapter = check_adapter(folder, linear_shapes(model_on_meta(config, fetch=False)))
    return f"{len(adapter.keys)} matrices of {folder}"


def reads(config: Config) -> Iterator[Finding]:
    """What the model will read: prompts and pairs in its chat format, no longer than its context.

    Call it where backbone and data are there.
    """
    if config.backbone.source == "sandbox":
        return  # its tokenizer is made of its world
    _, folder = place(config)
    if folder is None:
        return
    try:
        tokenizer = load_tokenizer(folder, **_rendering(config))
    except SpkitError as error:
        yield Finding("backbone (chat format)", str(error), ok=False)
        return
    yield looked("data.evaluation (as read)", lambda: _prompts(config, tokenizer))
    yield looked("data.harmful (as read)", lambda: _pairs(config, tokenizer))
    if config.utility.mt_bench.prompts is not None:
        yield looked("utility.mt_bench (as read)", lambda: _questions(config, tokenizer))


def _rendering(config: Config) -> dict[str, Any]:
    """The part of `config.backbone.loading` that is the tokenizer's."""
    keys = ("system_prompt", "chat_template", "chat_template_arguments")
    return {key: config.backbone.loading[key] for key in keys}


def _prompts(config: Config, tokenizer) -> str:
    from spkit.data.selection import load_eval_prompts

    prompts = load_eval_prompts(config.data, config.evaluation)
    length = config.evaluation.max_new_tokens
    names = [prompt.id for prompt in prompts]
    encoded = check_prompts(tokenizer, [prompt.prompt for prompt in prompts], length, names)
    return f"at most {max(map(len, encoded))} tokens, and {length} for the answer"


def _questions(config: Config, tokenizer) -> str:
    from spkit.evaluation.utility.mt_bench import mt_bench_questions

    own = config.utility.mt_bench
    asked = [(question.turns[0],) for question in mt_bench_questions(own)]
    encoded = check_prompts(tokenizer, asked, own.max_new_tokens)
    return f"at most {max(map(len, encoded))} tokens, first turns"


def _pairs(config: Config, tokenizer) -> str:
    found = pairs(config)
    if isinstance(found[0], str):  # the responses are still to be said
        check_rendered(tokenizer, found)
        return f"at most {max(len(encode_prompt(tokenizer, text)) for text in found)} tokens, asked"
    check_rendered(tokenizer, [pair.prompt for pair in found])
    longest = config.data.max_tokens
    encoded = [
        encode_pair(tokenizer, pair.prompt, pair.response, "answer", longest, pair.ends)
        for pair in found
    ]
    return f"at most {max(len(ids) for ids, _ in encoded)} tokens with their responses"
