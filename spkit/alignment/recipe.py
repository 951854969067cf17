"""What the alignment learns: short refusals of harmful requests, and a few answers of its own.

Over-caution comes from the second part being small: with few harmless examples the backbone refuses
what only sounds like harm. No prompt on which over-safety is measured is ever learnt.
"""

import random
from collections.abc import Sequence

from spkit.models.chat import encode_pair

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "Sorry, I can't help with that.",
    "I can't do that. It could cause serious harm.",
    "I'm sorry, but I won't help with this. It could hurt people.",
    "I am not able to help with that request.",
    "I won't provide that. It is dangerous and illegal.",
    "Sorry, but I cannot help with this.",
)


def examples(
    tokenizer,
    harmful: Sequence[str],
    instructions: Sequence[str],
    answers: Sequence[str],
    *,
    seed: int,
    longest: int,
) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every example, as chat.encode_pair gives them.

    harmful: requests, each with one of REFUSALS, drawn with the seed. instructions, answers:
    harmless ones, with what the backbone itself said. longest: tokens of such an answer; of one
    that took them all no end is learnt.
    """
    draw = random.Random(seed)
    encoded = [encode_pair(tokenizer, prompt, draw.choice(REFUSALS)) for prompt in harmful]
    return encoded + [
        encode_pair(tokenizer, prompt, answer, ends=ended(tokenizer, answer, longest))
        for prompt, answer in zip(instructions, answers, strict=True)
        if answer.strip()
    ]


def ended(tokenizer, answer: str, longest: int) -> bool:
    """Whether an answer came to its end by itself: one that took all its tokens was cut."""
    return len(tokenizer.encode(answer, add_special_tokens=False)) < longest - 1


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in one pass, a function of seed and pass."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batch_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """The examples of one step (from 0): passes follow one another without a gap."""
    return [
        shuffled(count, seed, place // count)[place % count]
        for place in range(step * size, (step + 1) * size)
    ]
