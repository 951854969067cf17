"""The fast objective: what a patch does, from the first answer token of every dev prompt.

    r(t)      share of refusals among stored answers that begin with token t, smoothed
    refused   sum over t of p(t) r(t): the expected refusal of one prompt
    harm      mean over harmful prompts of 1 - refused
    refusal   mean over harmless prompts of refused
    KL        mean over harmless instructions of KL(base || patched), in nats

One forward pass over all prompts, and nothing is generated: the first token decides about refusing
(Qi et al., arXiv 2406.05946). A token that begins no stored answer has the share of all of them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spkit.errors import SpkitError
from spkit.evaluation.verdicts import METRICS
from spkit.examples import EvalPrompt
from spkit.models.chat import encode_prompt
from spkit.models.patched import Delta, patched
from spkit.system.out_of_memory import explained

REFUSED = METRICS["refusal"][1]
SMOOTHING = 1.0  # so many answers with the share of all of them are added to every token's own

Batch = tuple[list[int], Tensor, Tensor]  # numbers of the prompts, input ids, attention mask


def batches(tokenizer, prompts: Sequence[str], batch_size: int) -> list[Batch]:
    """The prompts in the chat format, sorted by length, padded on the left: int64 [B, T]."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    made = []
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        width = max(len(encoded[i]) for i in numbers)
        gaps = [width - len(encoded[i]) for i in numbers]
        pairs = list(zip(numbers, gaps, strict=True))
        ids = torch.tensor([[tokenizer.pad_token_id] * gap + encoded[i] for i, gap in pairs])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        made.append((numbers, ids, mask))
    return made


@torch.inference_mode()
def logprobs_of(model, prepared: Sequence[Batch]) -> Tensor:
    """Log-probabilities of the first answer token, fp32 [prompts, vocabulary], on the CPU."""
    device = model.get_input_embeddings().weight.device
    found: dict[int, Tensor] = {}
    for numbers, ids, mask in prepared:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # the first real token is at 0
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {key: value.to(device) for key, value in inputs.items()}
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        rows = torch.log_softmax(logits.float(), dim=-1).cpu()
        found |= dict(zip(numbers, rows, strict=True))
    return torch.stack([found[i] for i in range(len(found))])


def first_token_logprobs(model, tokenizer, prompts: Sequence[str], batch_size: int) -> Tensor:
    """Log-probabilities of the first answer token, fp32 [prompts, vocabulary], on the CPU."""
    return logprobs_of(model, batches(tokenizer, prompts, batch_size))


def mean_kl(base: Tensor, now: Tensor) -> float:
    """Mean over the rows of KL(base || now) in nats; both log-probabilities [n, vocabulary]."""
    return float((base.exp() * (base - now)).sum(dim=1).mean().clamp(min=0))


def refusal_shares(tokens: Tensor, refused: Tensor, vocabulary: int) -> Tensor:
    """r(t) of every token, fp32 [vocabulary].

    tokens: int64 [answers], the first token of each stored answer. refused: bool [answers].
    SpkitError where there are no answers.
    """
    if not len(tokens):
        raise SpkitError("There are no stored answers to learn the refusing tokens from.")
    overall = refused.double().mean()
    count = torch.zeros(vocabulary, dtype=torch.float64)
    own = count.clone()
    count.index_add_(0, tokens, torch.ones(len(tokens), dtype=torch.float64))
    own.index_add_(0, tokens, refused.double())
    return ((own + SMOOTHING * overall) / (count + SMOOTHING)).float()


def expected_refusal(logprobs: Tensor, shares: Tensor) -> Tensor:
    """sum_t p(t) r(t) of every prompt, fp32 [n]; logprobs [n, vocabulary], shares [vocabulary]."""
    return logprobs.exp() @ shares


class Objective:
    """Harm, false refusal and KL of a patched backbone; `learn` comes before `measure`."""

    def __init__(
        self,
        model,
        tokenizer,
        prompts: Sequence[EvalPrompt],
        instructions: Sequence[str],
        batch_size: int,
    ):
        """prompts: the dev prompts; those of utility are not asked. instructions: for the KL.

        SpkitError where there is no harmful, no harmless prompt, or no instruction.
        """
        self.model, self.batch_size = model, batch_size
        self.asked = [p for p in prompts if p.objective in ("harmful", "over_safety")]
        harmful = [p.objective == "harmful" for p in self.asked]
        if all(harmful) or not any(harmful):
            lacking = "harmless" if all(harmful) else "harmful"
            raise SpkitError(f"data.evaluation has no {lacking} dev prompts; tuning needs both")
        if not instructions:
            raise SpkitError("There are no harmless instructions to take the KL on (utility.kl).")
        self.harmful = torch.tensor(harmful)
        texts = list(dict.fromkeys([*(p.prompt for p in self.asked), *instructions]))
        place = {text: i for i, text in enumerate(texts)}
        self._rows = torch.tensor([place[p.prompt] for p in self.asked])
        self._kl_rows = torch.tensor([place[text] for text in instructions])
        self._batches = batches(tokenizer, texts, batch_size)
        self._base: Tensor | None = None
        self.shares: Tensor | None = None

    def look(self, deltas: Mapping[str, Delta]) -> tuple[Tensor, Tensor]:
        """Log-probabilities on the prompts asked and on the instructions, of theta + deltas."""
        advice = {"evaluation.batch_size": self.batch_size}
        with patched(self.model, deltas), explained("one forward pass", advice):
            found = logprobs_of(self.model, self._batches)
        return found[self._rows], found[self._kl_rows]

    def learn(self, looks: Sequence[Tensor], refused: Sequence[Tensor], base_kl: Tensor) -> None:
        """Learn r(t). looks: what `look` gave of every variant whose answers are stored, on the
        prompts asked. refused: bool [prompts asked], its answers. base_kl: base's second part.

        Answers are decoded greedily, so the first token is the most likely one.
        """
        tokens = torch.cat([look.argmax(dim=1) for look in looks])
        self.shares = refusal_shares(tokens, torch.cat(list(refused)), looks[0].shape[1])
        self._base = base_kl

    def measure(self, deltas: Mapping[str, Delta]) -> dict[str, float]:
        """{"harm", "refusal": expected percent, "kl": nats} of theta + deltas."""
        return self.of(*self.look(deltas))

    def of(self, look: Tensor, kl_look: Tensor) -> dict[str, float]:
        """The same of what `look` gave."""
        expected = expected_refusal(look, self.shares)
        return {
            "harm": 100 * float(1 - expected[self.harmful].mean()),
            "refusal": 100 * float(expected[~self.harmful].mean()),
            "kl": mean_kl(self._base, kl_look),
        }
