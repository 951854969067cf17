"""What the model will read: prompts and pairs in its chat format, no longer than its context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spkit.config import Config
from spkit.data.selection import load_eval_prompts
from spkit.errors import SpkitError
from spkit.evaluation.answers import check_prompts
from spkit.evaluation.utility.mt_bench import mt_bench_questions
from spkit.models.chat import encode_pair, encode_prompt
from spkit.models.loading import load_tokenizer
from spkit.models.prompt_checks import check_rendered
from spkit.running.checks.finding import Finding, looked
from spkit.running.checks.texts import pairs


def found(config: Config, folder: Path) -> Iterator[Finding]:
    """In the chat format of the tokenizer in `folder`, without the model."""
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
    prompts = load_eval_prompts(config.data, config.evaluation)
    length = config.evaluation.max_new_tokens
    names = [prompt.id for prompt in prompts]
    encoded = check_prompts(tokenizer, [prompt.prompt for prompt in prompts], length, names)
    return f"at most {max(map(len, encoded))} tokens, and {length} for the answer"


def _questions(config: Config, tokenizer) -> str:
    own = config.utility.mt_bench
    asked = [(question.turns[0],) for question in mt_bench_questions(own)]
    encoded = check_prompts(tokenizer, asked, own.max_new_tokens)
    return f"at most {max(map(len, encoded))} tokens, first turns"


def _pairs(config: Config, tokenizer) -> str:
    d_h = pairs(config)
    if isinstance(d_h[0], str):  # the responses are still to be said
        check_rendered(tokenizer, d_h)
        return f"at most {max(len(encode_prompt(tokenizer, text)) for text in d_h)} tokens, asked"
    check_rendered(tokenizer, [pair.prompt for pair in d_h])
    longest = config.data.max_tokens
    encoded = [
        encode_pair(tokenizer, pair.prompt, pair.response, "answer", longest, pair.ends)
        for pair in d_h
    ]
    return f"at most {max(len(ids) for ids, _ in encoded)} tokens with their responses"
