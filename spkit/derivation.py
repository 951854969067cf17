"""Patch derivation: gradient ascent and descent on the same D_h, both as (Q)LoRA [paper, 3.1].

    P_SE  = theta_GA - theta    ascent on L over D_h: unlearn the harmful answers
    P_OSM = theta_GD - theta    descent on L over D_h: loosen the refusals

The backbone stays frozen (4-bit NF4, or full precision), only the LoRA factors move, and the patch
of a weight matrix is B @ A * lora_alpha / r, applied later to the unquantised weight.

The training loop is our own and short, not a Trainer: ascent needs a clamp on every token's loss
and a stop rule on the mean loss, and a student should see both in the order in which they happen.
What is not here: which weights of a patch are kept (importance.py, patching.py), and any
evaluation.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import get_constant_schedule_with_warmup

from spkit.backbone import target_weights
from spkit.chat import answer_loss, collate, encode_pair, length_bucketed_batches, mean_per_sample
from spkit.data import fingerprint
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.files import atomic

PATCH_FORMAT = 1
NAMES = {"ascent": "se", "descent": "osm"}
_ADVICE = "lower its learning_rate or max_grad_norm, or check the backbone's dtype."


@dataclass
class Patch:
    """The LoRA factors of one derivation.

    name: "se" (ascent), "osm" (descent), or a baseline's ("npo"). factors: {tensor name:
    (A [r, in], B [out, r])}, fp32. scaling: lora_alpha / r. manifest: how it was made (direction,
    steps, seed, fingerprint of D_h, ...).
    The OSM patch alone is a jailbreak: it stays in memory or in the run folder.
    """

    name: str
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float
    manifest: dict = field(default_factory=dict)

    def delta(self, tensor: str) -> torch.Tensor:
        """P of one weight matrix: B @ A * lora_alpha / r, fp32 [out, in]."""
        a, b = self.factors[tensor]
        return (b @ a) * self.scaling

    def norm(self) -> float:
        """The Frobenius norm of the whole patch."""
        return math.sqrt(sum(self.delta(t).double().square().sum().item() for t in self.factors))

    def save(self, path: str | Path) -> None:
        """One safetensors file; the manifest lies in its header. Written whole or not at all."""
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a.contiguous(), b.contiguous()
        fixed = {"name": self.name, "scaling": self.scaling, "format": PATCH_FORMAT}
        # one metadata key: safetensors keeps several in no fixed order, and bytes must repeat
        header = {"spkit": json.dumps({**self.manifest, **fixed}, sort_keys=True)}
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> "Patch":
        """Read what `save` wrote; SpkitError names the file and what is missing."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("spkit", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise SpkitError(f"{path} cannot be read as a patch: {error}") from error
        found = header.pop("format", None) if isinstance(header, dict) else None
        if found != PATCH_FORMAT:
            raise SpkitError(f"{path} has patch format {found}, this kit reads {PATCH_FORMAT}.")
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        try:
            factors = {n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in names}
            return cls(header.pop("name"), factors, header.pop("scaling"), header)
        except KeyError as error:
            raise SpkitError(f"{path} is an incomplete patch: it lacks {error}.") from error


def add_lora(model, lora, seed: int):
    """The backbone wrapped by PEFT with fresh LoRA factors: B = 0, A drawn from `seed`.

    `lora` has r, alpha, dropout and targets (the last names of linear layers, checked by
    target_weights).
    """
    target_weights(model, lora.targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def ascent_loss(losses: torch.Tensor, mask: torch.Tensor, clamp: float) -> torch.Tensor:
    """The loss that ascent minimises: -L, each token's loss clamped at `clamp` nats [clamp: ours].

    A token that is already unlearnt (loss > clamp) has no gradient, so that ascent ends by itself
    token by token instead of tearing the model apart. losses, mask: [B, T] as answer_loss gives
    them.
    """
    return -mean_per_sample(losses.clamp(max=clamp), mask).mean()


def descent_loss(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss that descent minimises: L, the mean over samples of the mean over answer tokens."""
    return mean_per_sample(losses, mask).mean()


def derive(model, tokenizer, pairs: list[HarmfulPair], *, direction: str, config, seed: int):
    """One patch and its loss curve.

    model: a bare backbone, dense or NF4; it is wrapped while we train and given back bare.
    direction: "ascent" or "descent". config: the `derivation` parameters. Returns (Patch, DataFrame
    with the columns patch, step, loss [nats, unclamped mean over the answer tokens], grad_norm,
    stop). Raises SpkitError for an empty D_h, and for a loss or gradient that is no number, naming
    the step.
    """
    if direction not in NAMES:
        raise SpkitError(f"direction is {direction!r}; allowed are {', '.join(NAMES)}.")
    settings = getattr(config, direction)

    def objective(losses, mask, indices):
        if direction == "ascent":
            return ascent_loss(losses, mask, settings.token_loss_clamp)
        return descent_loss(losses, mask)

    def ceiling_reached(means):
        # divided by the whole window: fewer batches than that seldom reach the ceiling
        recent = sum(means[-settings.stop_window :]) / settings.stop_window
        return recent >= settings.stop_mean_loss

    return train_lora(
        model,
        tokenizer,
        pairs,
        objective,
        name=NAMES[direction],
        direction=direction,
        settings=settings,
        config=config,
        seed=seed,
        # of several batches: one alone is too noisy to stop by
        stop=ceiling_reached if direction == "ascent" else None,
    )


def train_lora(
    model,
    tokenizer,
    pairs: list[HarmfulPair],
    objective: Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor],
    *,
    name: str,
    direction: str,
    settings,
    config,
    seed: int,
    stop: Callable[[list[float]], bool] | None = None,
):
    """The loop of `derive` for any objective: (Patch, loss curve), the model given back bare.

    objective(losses, mask, indices): the scalar to minimise; losses fp32 and mask bool [B, T] as
    answer_loss gives them, indices: which of `pairs` the B rows are. stop(means): called before
    each step with the mean loss of every batch so far; True ends the training.
    name: the patch's. direction: its manifest's, and what progress and errors call it. settings:
    learning_rate, max_steps, batch_size, warmup_steps, max_grad_norm. config: the `derivation`
    parameters, of which lora and quantization count here. Errors as in `derive`.
    """
    if not pairs:
        raise SpkitError("D_h is empty; deriving a patch needs at least one harmful pair.")
    encoded = [encode_pair(tokenizer, p.prompt, p.response) for p in pairs]
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    wrapped = add_lora(model, config.lora, seed)
    wrapped.train()
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
    rows, reason = [], "step limit"
    try:
        with tqdm(total=settings.max_steps, desc=direction, unit="step") as progress:
            for step, indices in enumerate(_endless(encoded, settings.batch_size, seed)):
                batch = collate([encoded[i] for i in indices], tokenizer.pad_token_id)
                batch = {key: value.to(device) for key, value in batch.items()}
                labels = batch.pop("labels")
                losses, mask = answer_loss(wrapped(**batch).logits, labels)
                mean = mean_per_sample(losses, mask).mean().item()
                if not math.isfinite(mean):
                    raise SpkitError(f"The {direction} loss is {mean} at step {step}; {_ADVICE}")
                row = {"patch": name, "step": step, "loss": mean, "grad_norm": 0.0, "stop": ""}
                rows.append(row)
                if stop is not None and stop([row["loss"] for row in rows]):
                    reason = "mean loss reached"  # measured before the step: the last step is kept
                    break
                if step == settings.max_steps:
                    break
                loss = objective(losses, mask, indices)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm).item()
                if not math.isfinite(norm):
                    what = f"The {direction} gradient is {norm} at step {step}"
                    raise SpkitError(f"{what}; {_ADVICE}")
                row["grad_norm"] = norm
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
        rows[-1]["stop"] = reason
        factors = _factors(wrapped, config.lora.targets)
    finally:
        wrapped.unload().train(was_training)
    manifest = {
        "direction": direction,
        "steps": rows[-1]["step"],
        "stop": reason,
        "seed": seed,
        "pairs": len(pairs),
        "data_fingerprint": fingerprint(pairs),
        "quantization": config.quantization,
        "lora": config.lora.model_dump(),
        "settings": settings.model_dump(),
    }
    patch = Patch(name, factors, config.lora.alpha / config.lora.r, manifest)
    return patch, pd.DataFrame(rows)


def attach(model, patch: Patch):
    """The backbone as theta + P: wrapped by PEFT with the patch's factors, in eval mode.

    For importance on theta_GA and theta_GD without a second copy of the weights. `.unload()` on the
    result gives the bare backbone back. SpkitError where the patch was made for another
    architecture.
    """
    lora = SimpleNamespace(**{**patch.manifest["lora"], "dropout": 0.0})
    _check_fit(model, patch, lora)  # before wrapping, so that the backbone stays bare if it fails
    wrapped = add_lora(model, lora, seed=0)
    with torch.no_grad():
        for tensor, module in target_weights(wrapped, lora.targets).items():
            a, b = patch.factors[tensor]
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b)
    return wrapped.eval()


def _check_fit(model, patch: Patch, lora) -> None:
    modules = target_weights(model, lora.targets)
    for tensor in dict.fromkeys([*modules, *patch.factors]):
        if tensor not in modules or tensor not in patch.factors:
            where = "the patch" if tensor in modules else "the backbone"
            raise SpkitError(f"The patch {patch.name!r} does not fit: {where} has no {tensor!r}.")
        found = [list(factor.shape) for factor in patch.factors[tensor]]
        layer = modules[tensor]
        allowed = [[lora.r, layer.in_features], [layer.out_features, lora.r]]
        if found != allowed:
            raise SpkitError(
                f"The patch {patch.name!r} does not fit {tensor!r}: its factors A and B are "
                f"{found[0]} and {found[1]}, this backbone takes {allowed[0]} and {allowed[1]}."
            )


def _factors(wrapped, targets) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        tensor: tuple(
            layer["default"].weight.detach().float().cpu().clone()
            for layer in (module.lora_A, module.lora_B)
        )
        for tensor, module in target_weights(wrapped, targets).items()
    }


def _endless(encoded, batch_size: int, seed: int):
    """Batches of similar length, epoch after epoch, each epoch in a new order."""
    lengths = [len(ids) for ids, _ in encoded]
    for epoch in count():
        yield from length_bucketed_batches(lengths, batch_size, (seed, epoch))
