"""How far a patch moves the first token of answers to harmless instructions: a measure of damage.

    KL(base || now) = sum over tokens t of p_base(t) * (log p_base(t) - log p_now(t))   [nats]

The mean over prompts. It is 0 where nothing has moved and has no upper bound; unlike a rate it also
sees what is too small to turn an answer over. One forward pass a prompt, nothing is generated.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spkit.config import Config
from spkit.data.selection import instructions_of
from spkit.errors import SpkitError
from spkit.examples import digest, sample
from spkit.models.chat import encode_prompt
from spkit.sandbox import world
from spkit.system.tensors import load_tensors, save_tensors

FILE = "first_token.safetensors"  # of the backbone, in notebook 00's folder


def kl_prompts(config: Config) -> list[str]:
    """The harmless instructions of `utility.kl`, at most `kl_prompts` of `evaluation.split`.

    Alignment, dev and test read different ones (data/selection.py: instructions_of). Chosen by a
    hash, the same for every seed. "sandbox" stands for the village's utility prompts.
    SpkitError for a bad file or row, and where no prompt is left.
    """
    named, split = config.utility.kl, config.evaluation.split
    if named == "sandbox":
        rows = [p for p in world.eval_prompts(split) if p.objective == "utility"]
    else:
        rows = instructions_of(config.data, named, split)
    return [row.prompt for row in sample(rows, config.utility.kl_prompts, seed=0)]


@torch.inference_mode()
def first_token_logprobs(model, tokenizer, prompts: Sequence[str], batch_size: int) -> Tensor:
    """log p(first token of the answer | prompt in the chat format) [nats]: fp32 [n, vocabulary].

    On the CPU, in the prompts' order. Logits of the last position alone where the model can give
    these; the softmax is fp32. Prompts of similar length are one batch, padded and masked on the
    left, so that batches do not matter but for rounding.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    device = model.get_input_embeddings().weight.device
    rows: list[Tensor | None] = [None] * len(encoded)
    starts = range(0, len(by_length), batch_size)
    for start in tqdm(starts, desc="first tokens", unit="batch", leave=False):
        chosen = by_length[start : start + batch_size]
        batch = _left_padded([encoded[i] for i in chosen], tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = model(**batch, **_accepted(model, batch["attention_mask"])).logits
        found = torch.log_softmax(logits[:, -1].float(), dim=-1).cpu()
        for i, row in zip(chosen, found, strict=True):
            rows[i] = row
    return torch.stack(rows)


def _left_padded(encoded: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    width = max(len(ids) for ids in encoded)
    ids = [[pad] * (width - len(row)) + row for row in encoded]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in encoded]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _accepted(model, mask: Tensor) -> dict[str, int | bool | Tensor]:
    """What this model takes of: the last position alone, positions counted without the padding."""
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    wanted = {"use_cache": False, "logits_to_keep": 1, "position_ids": positions}
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in wanted.items() if key in known}


def kl_divergences(base: Tensor, now: Tensor) -> Tensor:
    """KL(base || now) [nats] of each prompt: two log-probabilities [n, vocabulary] give fp64 [n].

    The backbone's probabilities are the weights: what the backbone would have said counts. Tools
    that ablate a refusal direction report it in this direction, too (Arditi et al., 2024, arXiv
    2406.11717). SpkitError where the shapes differ.
    """
    if base.shape != now.shape:
        raise SpkitError(
            f"first tokens: {list(base.shape)} log-probabilities of the backbone cannot be "
            f"compared with {list(now.shape)}; both need the same prompts and vocabulary"
        )
    # again normalised: fp32 sums are off by 1e-7, and small divergences are of that size
    base, now = (x.double().log_softmax(dim=-1) for x in (base, now))
    terms = base.exp() * (base - now)
    return torch.where(base.isneginf(), 0.0, terms).sum(dim=-1)  # 0 log 0 is 0


def mean_kl(base: Tensor, now: Tensor) -> float:
    """The mean over prompts of KL(base || now) [nats], see kl_divergences."""
    return float(kl_divergences(base, now).mean())


# ---- the backbone's, kept for later notebooks ----------------------------------------------------


def first_tokens(model, tokenizer, config: Config) -> Tensor | None:
    """first_token_logprobs of `utility.kl`'s prompts; None where it names nothing."""
    if config.utility.kl is None:
        return None
    return first_token_logprobs(model, tokenizer, kl_prompts(config), config.utility.batch_size)


def save_first_tokens(folder: Path, logprobs: Tensor, config: Config) -> None:
    """Write the backbone's into `folder`, with a fingerprint of the prompts and not their text."""
    save_tensors({"logprobs": logprobs}, Path(folder) / FILE, _header(config))


def load_first_tokens(path: Path, config: Config) -> Tensor:
    """What save_first_tokens wrote. SpkitError where it is missing, broken or of other prompts."""
    tensors, header = load_tensors(path, "the backbone's first tokens")
    if header != _header(config) or "logprobs" not in tensors:
        raise SpkitError(
            f"{path}: is of other prompts than those of utility.kl and evaluation.split; run "
            "notebook 00 again"
        )
    return tensors["logprobs"]


def _header(config: Config) -> dict[str, str]:
    return {"prompts": digest([prompt] for prompt in kl_prompts(config))}
