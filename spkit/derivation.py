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

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import get_constant_schedule_with_warmup

from spkit import resume
from spkit.backbone import target_weights
from spkit.chat import answer_loss, collate, encode_pair, length_bucketed_batches, mean_per_sample
from spkit.data import fingerprint
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair
from spkit.files import atomic
from spkit.out_of_memory import explained

PATCH_FORMAT = 1
NAMES = {"ascent": "se", "descent": "osm"}
OVERFLOWS_IN_A_ROW = 20  # each halves the scale of the loss, from 65536 to less than 1
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


def add_lora(model, lora, seed: int, name: str = "default"):
    """The backbone wrapped by PEFT with fresh LoRA factors: B = 0, A drawn from `seed`.

    `lora` has r, alpha, dropout and targets (the last names of linear layers, checked by
    target_weights). name: the adapter's; a backbone that is wrapped already gets one more.
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
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


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


def derive(
    model,
    tokenizer,
    pairs: list[HarmfulPair],
    *,
    direction: str,
    config,
    seed: int,
    max_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    saved: Callable[[], object] | None = None,
):
    """One patch and its loss curve.

    model: a bare backbone, dense or NF4; it is wrapped while we train and given back bare.
    direction: "ascent" or "descent". config: the `derivation` parameters. max_tokens: `data`'s.
    checkpoint, saved: as in train_lora. Returns (Patch, DataFrame with the columns patch, step,
    loss [nats, unclamped mean over the answer tokens], grad_norm, stop). Raises SpkitError for an
    empty D_h, and for a loss or gradient that is no number, naming the step.
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
        max_tokens=max_tokens,
        checkpoint=checkpoint,
        saved=saved,
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
    max_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    saved: Callable[[], object] | None = None,
):
    """The loop of `derive` for any objective: (Patch, loss curve), the model given back bare.

    objective(losses, mask, indices): the scalar to minimise, a *mean* over the B samples, so that
    `micro_batch_size` of them at once give the same gradient; losses fp32 and mask bool [B, T] as
    answer_loss gives them, indices: which of `pairs` the B rows are. stop(means): called before
    each step with the mean loss of every batch so far; True ends the training.
    name: the patch's. direction: its manifest's, and what progress and errors call it. settings:
    learning_rate, max_steps, batch_size, warmup_steps, max_grad_norm. config: the `derivation`
    parameters, of which those outside of ascent and descent count here.
    checkpoint: a folder; every `config.checkpoint_steps` steps, and at the end, the whole state is
    written there, and a training with the same settings goes on from it, to the same bits on the
    same device. saved: called after each write.
    In fp16 the loss is scaled against underflow; a step whose gradient overflows is left out, and
    too many in a row are an error. Other errors as in `derive`.
    """
    if not pairs:
        raise SpkitError("D_h is empty; deriving a patch needs at least one harmful pair.")
    encoded = [encode_pair(tokenizer, p.prompt, p.response, max_tokens=max_tokens) for p in pairs]
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    manifest = {
        "direction": direction,
        "seed": seed,
        "pairs": len(pairs),
        "data_fingerprint": fingerprint(pairs),
        "quantization": config.quantization,
        "lora": config.lora.model_dump(),
        "settings": settings.model_dump(),
    }
    identity = {
        **manifest,
        "name": name,
        # the tokenizer, its chat template and system prompt, and max_tokens
        "tokens": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(),
        "dtype": str(model.dtype),
        **config.model_dump(exclude={"lora", "ascent", "descent", "checkpoint_steps"}),
    }
    found = resume.load(checkpoint, identity) if checkpoint is not None else None
    wrapped = add_lora(model, config.lora, seed)
    try:
        wrapped.train()
        if config.gradient_checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        weights = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[config.optimizer](weights, settings.learning_rate)
        schedule = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
        scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
        loop = _Loop(weights, optimizer, schedule, scaler)
        loop.restore(found)
        size = config.micro_batch_size or settings.batch_size
        lower = {
            "derivation.micro_batch_size": size,
            "data.max_tokens": max_tokens,
            "derivation.gradient_checkpointing": config.gradient_checkpointing,
        }
        bar = {"total": settings.max_steps, "initial": loop.step, "desc": direction, "unit": "step"}
        with explained(f"deriving by {direction}", lower), tqdm(**bar) as progress:
            batches = _endless(encoded, settings.batch_size, seed, loop.step)
            for indices in () if loop.reason else batches:
                optimizer.zero_grad()
                means = []
                for start in range(0, len(indices), size):
                    chosen = indices[start : start + size]
                    batch = collate([encoded[i] for i in chosen], tokenizer.pad_token_id)
                    batch = {key: value.to(device) for key, value in batch.items()}
                    labels = batch.pop("labels")
                    losses, mask = answer_loss(wrapped(**batch, use_cache=False).logits, labels)
                    means.append(mean_per_sample(losses, mask).detach())
                    if not bool(torch.isfinite(means[-1]).all()):
                        what = f"The {direction} loss is {means[-1].mean().item()}"
                        raise SpkitError(f"{what} at step {loop.step}; {_ADVICE}")
                    share = len(chosen) / len(indices)
                    loss = objective(losses, mask, chosen) * share
                    scaler.scale(loss).backward()
                mean = torch.cat(means).mean().item()
                row = {"patch": name, "step": loop.step, "loss": mean, "grad_norm": 0.0, "stop": ""}
                loop.rows.append(row)
                if stop is not None and stop([row["loss"] for row in loop.rows]):
                    loop.reason = "mean loss reached"  # measured before the step: the last is kept
                elif loop.step == settings.max_steps:
                    loop.reason = "step limit"
                if loop.reason:
                    row["stop"] = loop.reason
                else:
                    row["grad_norm"] = loop.update(settings.max_grad_norm, direction)
                    progress.update()
                    progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
                every = config.checkpoint_steps
                if checkpoint is not None and every and (loop.reason or loop.step % every == 0):
                    resume.save(checkpoint, identity, loop.state())
                    if saved is not None:
                        saved()
                if loop.reason:
                    break
        factors = _factors(wrapped, config.lora.targets)
    finally:
        if config.gradient_checkpointing:
            wrapped.gradient_checkpointing_disable()
        wrapped.unload().train(was_training)
    steps = {"steps": loop.rows[-1]["step"], "stop": loop.reason}
    if scaler.is_enabled():
        steps["overflows"] = loop.overflows
    patch = Patch(name, factors, config.lora.alpha / config.lora.r, {**manifest, **steps})
    return patch, pd.DataFrame(loop.rows)


def _adamw(weights, rate: float):
    return torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)


def _adamw_8bit(weights, rate: float):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=rate, weight_decay=0.0)


def _paged_adamw_8bit(weights, rate: float):
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(weights, lr=rate, weight_decay=0.0)


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
}


class _Loop:
    """What changes from step to step, and how it is written to and read from a checkpoint."""

    def __init__(self, weights, optimizer, schedule, scaler):
        self.weights, self.optimizer = weights, optimizer
        self.schedule, self.scaler = schedule, scaler
        self.step, self.overflows, self.in_a_row = 0, 0, 0
        self.rows: list[dict] = []
        self.reason = ""

    def update(self, max_grad_norm: float, direction: str) -> float:
        """One optimiser step; the gradient's norm before it was clipped."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, max_grad_norm).item()
        if math.isfinite(norm):
            self.in_a_row = 0
        elif self.scaler.is_enabled() and self.in_a_row < OVERFLOWS_IN_A_ROW:
            self.overflows, self.in_a_row = self.overflows + 1, self.in_a_row + 1
        else:
            what = f"The {direction} gradient is {norm} at step {self.step}"
            raise SpkitError(f"{what}; {_ADVICE}")
        self.scaler.step(self.optimizer)  # leaves the step out where the gradient overflowed
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        return norm

    def state(self) -> dict:
        moments = self.optimizer.state_dict()["state"]
        return {
            "weights": {str(i): weight for i, weight in enumerate(self.weights)},
            "moments": {str(i): dict(values) for i, values in moments.items()},
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": resume.random_states(),
            "rows": self.rows,
            "counts": [self.step, self.overflows, self.in_a_row],
            "reason": self.reason,
        }

    def restore(self, state: dict | None) -> None:
        if state is None:
            return
        with torch.no_grad():
            for i, weight in enumerate(self.weights):
                weight.copy_(state["weights"][str(i)])
        self.schedule.load_state_dict(state["schedule"])
        groups = self.optimizer.state_dict()["param_groups"]
        for group, rate in zip(groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        moments = {int(i): values for i, values in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        resume.set_random_states(state["random"])
        self.rows, self.reason = state["rows"], state["reason"]
        self.step, self.overflows, self.in_a_row = state["counts"]


def attach(model, *patches: Patch):
    """The backbone as theta + P: wrapped by PEFT with the factors of `patches`, in eval mode.

    For importance on theta_GA and theta_GD without a second copy of the weights. Each patch is an
    adapter of its own name; the first is active, `.set_adapter(name)` makes another so, and
    `.unload()` gives the bare backbone back. SpkitError where a patch was made for another
    architecture.
    """
    for patch in patches:
        lora = SimpleNamespace(**{**patch.manifest["lora"], "dropout": 0.0})
        _check_fit(model, patch, lora)  # before wrapping, so that the backbone stays bare
    wrapped = model
    for patch in patches:
        lora = SimpleNamespace(**{**patch.manifest["lora"], "dropout": 0.0})
        wrapped = add_lora(wrapped, lora, seed=0, name=patch.name)
        with torch.no_grad():
            for tensor, module in target_weights(wrapped, lora.targets).items():
                a, b = patch.factors[tensor]
                module.lora_A[patch.name].weight.copy_(a)
                module.lora_B[patch.name].weight.copy_(b)
    wrapped.set_adapter(patches[0].name)
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


def _endless(encoded, batch_size: int, seed: int, skip: int = 0):
    """Batches of similar length, epoch after epoch, each epoch in a new order."""
    lengths = [len(ids) for ids, _ in encoded]
    epochs = (length_bucketed_batches(lengths, batch_size, (seed, epoch)) for epoch in count())
    yield from islice(chain.from_iterable(epochs), skip, None)
