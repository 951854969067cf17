"""The training loop of every derivation: LoRA factors on a frozen backbone, step after step.

It is our own and short, not a Trainer: ascent needs a clamp on every token's loss and a stop rule
on the mean loss. Both are in derivation.py; `Loop.backward` and `Loop.run` call them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pandas as pd
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import get_constant_schedule_with_warmup

from spkit.config import DerivationConfig, DescentConfig, LoraConfig
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair, fingerprint
from spkit.method.patch import Factors
from spkit.models.chat import (
    answer_loss,
    collate,
    encode_pair,
    length_bucketed_batches,
    mean_per_sample,
)
from spkit.models.heads import answer_logits
from spkit.models.optimizers import adamw
from spkit.models.prompt_checks import check_pairs
from spkit.models.weights import target_weights
from spkit.system import processes, progress, resume
from spkit.system.out_of_memory import explained

OVERFLOWS_IN_A_ROW = 20  # each halves the scale of the loss, from 65536 to less than 1
_ADVICE = "lower its learning_rate or max_grad_norm, or check the backbone's dtype."


# ---- what goes into a training -------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSet:
    """D_h as the loop reads it.

    encoded: (input ids, labels) of every pair, as chat.encode_pair gives them. fingerprint: names
    the text without showing it. max_tokens: longer pairs were cut.
    """

    encoded: list[tuple[list[int], list[int]]]
    pad_id: int
    fingerprint: str
    max_tokens: int | None = None

    @classmethod
    def of(cls, tokenizer, pairs: Sequence[HarmfulPair], max_tokens: int | None = None) -> Self:
        """SpkitError for an empty D_h or a pair that does not fit into `max_tokens`; a warning for
        pairs of which the tokenizer does not know half of the words."""
        if not pairs:
            raise SpkitError("D_h is empty; deriving a patch needs at least one harmful pair.")
        check_pairs(tokenizer, pairs)
        texts = [(p.prompt, p.response, "answer", max_tokens, p.ends) for p in pairs]
        encoded = [encode_pair(tokenizer, *text) for text in texts]
        return cls(encoded, tokenizer.pad_token_id, fingerprint(pairs), max_tokens)


@dataclass(frozen=True)
class Task:
    """What is trained.

    name: of the patch. direction: its name in progress bars and errors. settings: learning rate,
    steps, batch size ... objective(losses, mask, indices): the scalar to minimise, a *mean* over
    the B pairs `indices`, with losses fp32 and mask bool [B, T] as chat.answer_loss gives them.
    stop(means): asked before each step, with the mean loss of every batch so far; True ends it.
    """

    name: str
    direction: str
    objective: Callable[[Tensor, Tensor, list[int]], Tensor]
    settings: DescentConfig
    stop: Callable[[list[float]], bool] | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its state every `derivation.checkpoint_steps` steps and at its end.

    The same training resumes from it, to the same bits on the same device. saved: called after each
    write.
    """

    folder: str | Path
    saved: Callable[[], object] = lambda: None


# ---- the loop ------------------------------------------------------------------------------------


def train_lora(
    model,
    data: TrainingSet,
    task: Task,
    config: DerivationConfig,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> tuple[Factors, pd.DataFrame]:
    """(patch, loss curve) of one task; the model is wrapped while it trains and given back bare.

    In fp16 the loss is scaled against underflow; a step whose gradient overflows is left out, and
    too many in a row are an error. SpkitError for a loss or gradient that is not finite.
    """
    manifest = _manifest(data, task, config, seed)
    identity = _identity(manifest, data, task, config, str(model.dtype))
    found = None if checkpoints is None else resume.load(checkpoints.folder, identity)
    was_training = model.training
    wrapped = add_lora(model, config.lora, lora_seed(config, seed, task.name))
    try:
        wrapped.train()
        if config.gradient_checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        loop = Loop(wrapped, data, task, config)
        loop.restore(found)

        def keep(done: bool) -> None:
            every = config.checkpoint_steps if loop.group.first else None
            if checkpoints is not None and every and (done or loop.step % every == 0):
                resume.save(checkpoints.folder, identity, loop.state())
                checkpoints.saved()

        with explained(f"deriving by {task.direction}", loop.memory_advice()):
            loop.run(seed, keep)
        factors = _factors(wrapped, config.lora.targets)
    finally:
        if config.gradient_checkpointing:
            wrapped.gradient_checkpointing_disable()
        wrapped.unload().train(was_training)
    scaling = config.lora.alpha / config.lora.r
    return Factors(task.name, factors, scaling, manifest | loop.summary()), pd.DataFrame(loop.rows)


class Loop:
    """One training: batches, gradients, steps, and all that changes from step to step."""

    def __init__(self, wrapped, data: TrainingSet, task: Task, config: DerivationConfig):
        self.wrapped, self.data, self.task, self.group = wrapped, data, task, processes.here()
        self.settings, self.max_tokens = task.settings, data.max_tokens
        self.at_once = config.micro_batch_size or task.settings.batch_size
        self.checkpointing = config.gradient_checkpointing
        self.device = wrapped.get_input_embeddings().weight.device
        self.weights = [p for p in wrapped.parameters() if p.requires_grad]
        self.optimizer = adamw(config.optimizer, self.weights, task.settings.learning_rate)
        warmup = task.settings.warmup_steps
        self.schedule = get_constant_schedule_with_warmup(self.optimizer, warmup)
        half = wrapped.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.step, self.overflows, self.in_a_row = 0, 0, 0
        self.rows: list[dict] = []
        self.reason = ""

    def run(self, seed: int, keep: Callable[[bool], None]) -> None:
        """Steps until the stop rule or the step limit ends it. keep(done): after every step."""
        limit = self.settings.max_steps
        batches = _endless(self.data.encoded, self.settings.batch_size, seed, self.step)
        bar = progress.bar(total=limit, initial=self.step, desc=self.task.direction, unit="step")
        with bar:
            while not self.reason:
                self.group.set_seed(seed, self.step)
                indices = next(batches)
                row = {"patch": self.task.name, "step": self.step, "loss": self.backward(indices)}
                self.rows.append({**row, "grad_norm": 0.0, "stop": ""})
                # measured before the step: where it ends here, the last step is not taken
                if self.task.stop is not None and self.task.stop([r["loss"] for r in self.rows]):
                    self.reason = "mean loss reached"
                elif self.step == limit:
                    self.reason = "step limit"
                if self.reason:
                    self.rows[-1]["stop"] = self.reason
                else:
                    self.rows[-1]["grad_norm"] = self.update()
                    bar.update()
                    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                keep(bool(self.reason))
            progress.complete(bar, f"loss={self.rows[-1]['loss']:.3f}, {self.reason}")

    def backward(self, indices: list[int]) -> float:
        """Add up the gradient of one batch, `at_once` pairs at a time; its mean loss in nats."""
        self.optimizer.zero_grad()
        means = []
        for chosen, share in self.group.passes(indices, self.at_once):
            batch = collate([self.data.encoded[i] for i in chosen], self.data.pad_id)
            losses, mask = answer_loss(answer_logits(self.wrapped, batch), batch["labels"])
            mean = mean_per_sample(losses, mask).detach()
            if not bool(torch.isfinite(mean).all()):
                what = f"The {self.task.direction} loss is {mean.mean().item()}"
                raise SpkitError(f"{what} at step {self.step}; {_ADVICE}")
            means += [mean] if share else []
            loss = self.task.objective(losses, mask, chosen) * share
            self.scaler.scale(loss).backward()
        self.group.add_gradients(self.weights)
        return self.group.batch_losses(means, len(indices)).mean().item()

    def update(self) -> float:
        """One optimiser step; the gradient's norm before it was clipped."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.max_grad_norm).item()
        if math.isfinite(norm):
            self.in_a_row = 0
        elif self.scaler.is_enabled() and self.in_a_row < OVERFLOWS_IN_A_ROW:
            self.overflows, self.in_a_row = self.overflows + 1, self.in_a_row + 1
        else:
            what = f"The {self.task.direction} gradient is {norm} at step {self.step}"
            raise SpkitError(f"{what}; {_ADVICE}")
        self.scaler.step(self.optimizer)  # leaves the step out where the gradient overflowed
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        return norm

    def summary(self) -> dict:
        """How it ended, for the patch's manifest."""
        steps = {"steps": self.rows[-1]["step"], "stop": self.reason}
        return steps | ({"overflows": self.overflows} if self.scaler.is_enabled() else {})

    def memory_advice(self) -> dict:
        """The parameters that make it smaller, with their values."""
        return {
            "derivation.micro_batch_size": self.at_once,
            "data.max_tokens": self.max_tokens,
            "derivation.gradient_checkpointing": self.checkpointing,
        }

    def state(self) -> dict:
        """All that a resumed training needs, as system/resume.py stores it."""
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
        """Put back what `state` gave; nothing for None."""
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


def _endless(encoded, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Batches of similar length, epoch after epoch, each epoch in a new order."""
    lengths = [len(ids) for ids, _ in encoded]
    epochs = (length_bucketed_batches(lengths, batch_size, (seed, epoch)) for epoch in count())
    yield from islice(chain.from_iterable(epochs), skip, None)


def _manifest(data: TrainingSet, task: Task, config: DerivationConfig, seed: int) -> dict:
    found = {
        "direction": task.direction,
        "seed": seed,
        "pairs": len(data.encoded),
        "data_fingerprint": data.fingerprint,
        "quantization": config.quantization,
        "lora": config.lora.model_dump(),
        "settings": task.settings.model_dump(),
    }
    return found if config.shared_init else {**found, "shared_init": False}


def _identity(manifest: dict, data: TrainingSet, task: Task, config, dtype: str) -> dict:
    """All that decides a training's bits: where any of it differs, it starts anew."""
    return {
        **manifest,
        "name": task.name,
        # the tokenizer, its chat template and system prompt, and max_tokens
        "tokens": hashlib.sha256(json.dumps(data.encoded).encode()).hexdigest(),
        "dtype": dtype,
        **config.model_dump(exclude={"lora", "ascent", "descent", "checkpoint_steps"}),
    }


# ---- LoRA factors on a backbone ------------------------------------------------------------------


def lora_seed(config: DerivationConfig, seed: int, name: str) -> int:
    """The seed of the factors A: one for SE and OSM with `derivation.shared_init`, or their own.

    The shared start makes much of the cosine between the two patches.
    """
    if config.shared_init:
        return seed
    return int.from_bytes(hashlib.sha256(f"lora|{seed}|{name}".encode()).digest()[:4], "little")


def add_lora(model, lora: LoraConfig, seed: int, name: str = "default"):
    """The backbone wrapped by PEFT with fresh LoRA factors: B = 0, A drawn from `seed`.

    `lora` has r, alpha, dropout and targets (models/targets.py; PEFT is given the whole paths).
    name: the adapter's; a backbone that is wrapped already gets one more.
    """
    layers = target_weights(model, lora.targets)
    torch.manual_seed(seed)
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[name.removesuffix(".weight") for name in layers],
        task_type="CAUSAL_LM",
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def attach(model, *patches: Factors):
    """The backbone as theta + P: wrapped by PEFT with the factors of `patches`, in eval mode.

    Each patch is an adapter of its own name. The first is active, `.set_adapter(name)` activates
    another, and `.unload()` gives the bare backbone back. SpkitError where a patch does not fit.
    """
    shapes = [SimpleNamespace(**{**p.manifest["lora"], "dropout": 0.0}) for p in patches]
    for patch, lora in zip(patches, shapes, strict=True):
        _check_fit(model, patch, lora)  # before wrapping, so that the backbone stays bare
    wrapped = model
    for patch, lora in zip(patches, shapes, strict=True):
        wrapped = add_lora(wrapped, lora, seed=0, name=patch.name)
        with torch.no_grad():
            for tensor, module in target_weights(wrapped, lora.targets).items():
                a, b = patch.factors[tensor]
                module.lora_A[patch.name].weight.copy_(a)
                module.lora_B[patch.name].weight.copy_(b)
    wrapped.set_adapter(patches[0].name)
    return wrapped.eval()


def _check_fit(model, patch: Factors, lora) -> None:
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


def _factors(wrapped, targets) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        tensor: tuple(
            layer["default"].weight.detach().float().cpu().clone()
            for layer in (module.lora_A, module.lora_B)
        )
        for tensor, module in target_weights(wrapped, targets).items()
    }
