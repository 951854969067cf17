"""Greedy answers in batches against one prompt at a time, and against plain batches.

All read the same prompts in the same precision, and how many texts are the same is a row of its
own: two tokens that are as likely as each other but for rounding may change places. Peers: one
prompt after the other, which is timed on a part of the prompts and multiplied; and transformers'
`generate` on batches in the given order.

The sandbox answers and ends; random weights answer noise to the last token. Two thirds of each
prompt are the same for all, as a chat format's system block is (31 of 44 tokens of SmolLM2's). A
params file (`--backbone`) adds a real model, asked what the kit ships.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spkit.bench.bench import FIGURE, PEER, Bench
from spkit.bench.random_checkpoint import WORDS, tokenizer
from spkit.bench.sizes import SANDBOX, Named, pairs
from spkit.bench.timing import Own, Spread, seconds
from spkit.config import load_params
from spkit.data.shipped import shipped
from spkit.evaluation.answers import check_prompts, end_tokens, generate
from spkit.evaluation.greedy import GREEDY
from spkit.evaluation.thoughts import as_answer
from spkit.models.gguf import checkpoint_of
from spkit.models.loading import load
from spkit.paths import at_root
from spkit.sandbox.backbone import SHIPPED
from spkit.sandbox.world import harmful_pairs

TOKENS, BATCH = 24, 64
PROMPTS, ALONE = 64, 16
SYSTEM = " ".join(WORDS[i] for i in range(26))


@dataclass(frozen=True)
class Asked:
    """One model and what it is asked."""

    model: torch.nn.Module
    tokenizer: object
    prompts: Sequence[str]

    def ours(self) -> list[str]:
        """spkit's answers."""
        lengths = {"max_new_tokens": TOKENS, "batch_size": BATCH}
        return generate(self.model, self.tokenizer, self.prompts, **lengths)

    def plain(self, size: int, prompts: Sequence[str] | None = None) -> list[str]:
        """transformers' generate, in the given order, `size` prompts at a time."""
        model, tok = self.model, self.tokenizer
        rows = check_prompts(tok, prompts or self.prompts, TOKENS)
        ends, text, said = end_tokens(model, tok), as_answer(tok), []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            width = max(map(len, some))
            ids = [[tok.pad_token_id] * (width - len(row)) + row for row in some]
            mask = [[0] * (width - len(row)) + [1] * len(row) for row in some]
            found = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=TOKENS,
                pad_token_id=tok.pad_token_id,
                eos_token_id=ends or None,
                **GREEDY,
            )
            said += [text(row) for row in found[:, width:]]
        return said

    def alone(self) -> Own:
        """Seconds of all prompts one by one, from a part of them."""
        some = self.prompts[:: len(self.prompts) // ALONE]
        return Own(seconds(lambda: self.plain(1, some)) * len(self.prompts) / len(some))


def measure(bench: Bench) -> None:
    """The sandbox, 135 M, and the backbone of a params file."""
    if bench.sizes is None or SANDBOX.name in bench.sizes:
        model, tok = load(SHIPPED, quantization="none", device=bench.device)
        prompts = [pair.prompt for pair in harmful_pairs(count=4 * PROMPTS, seed=0)]
        _measure(bench, SANDBOX, Asked(model, tok, prompts))
    for size in bench.of("135 M"):
        prompts = [f"{SYSTEM} {pair.prompt}" for pair in pairs(PROMPTS, 13)]
        _measure(bench, size, Asked(size.model(bench.device), tokenizer(), prompts))
    if bench.backbone:
        config = load_params(at_root(bench.backbone))
        source = checkpoint_of(config.backbone)
        for dtype in dict.fromkeys(("float32", config.answering["dtype"])):
            model, tok = load(source, **config.answering | {"dtype": dtype})
            name = f"{config.run_name}, {str(model.dtype).removeprefix('torch.')}"
            own = Named(name, sum(p.numel() for p in model.parameters()))
            _measure(bench, own, Asked(model, tok, kit_prompts()[:PROMPTS]))


def kit_prompts() -> list[str]:
    """Harmless prompts that sound harmful."""
    lines = shipped("over_safety").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def _measure(bench: Bench, size, asked: Asked) -> None:
    pairs_of_texts = zip(asked.ours(), asked.plain(1), strict=True)
    same = sum(a == b for a, b in pairs_of_texts) / len(asked.prompts)
    bench.right("most texts", same > 0.5)
    share = Spread.of([same])
    bench.add(size, "one by one", FIGURE, "share of texts that are the same", share, goal=">= 1")
    goal = "<= 0.0833" if size is not SANDBOX else ""
    others = {
        "one by one": (PEER, asked.alone, goal),
        f"generate, batches of {BATCH}": (PEER, lambda: asked.plain(BATCH), ""),
    }
    bench.compare(size, asked.ours, others)
