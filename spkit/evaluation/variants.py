"""Several patches of one backbone, asked one after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from spkit.evaluation.answers import respond
from spkit.examples import EvalPrompt
from spkit.models.patched import Delta, patched
from spkit.models.rounded import before_rounding


def respond_as(
    model,
    tokenizer,
    variants: Iterable[tuple[str, Mapping[str, Delta]]],
    prompts: Sequence[EvalPrompt],
    *,
    folder: Path,
    checkpoint: str | Path = "",
    **settings,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, what respond gives) for every (name, deltas); the model is patched until the next.

    So a caller can measure more of the same variant in its loop. At the end the model is as it was.
    folder: where the answers are stored as they come, a file for each variant. checkpoint: what the
    model was loaded from; where it answers in a lower precision, deltas are added before the
    rounding (models/rounded.py). settings: of `respond`.
    """
    for number, (name, deltas) in enumerate(variants):
        store = folder / f"{number}.jsonl"
        with patched(model, before_rounding(deltas, checkpoint, model)):
            del deltas  # before those of the next are made
            yield name, respond(model, tokenizer, prompts, name=name, store=store, **settings)
