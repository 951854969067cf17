"""Patch derivation: gradient ascent and gradient descent on the same D_h, both as (Q)LoRA [paper, section 3.1].

    P_SE  = theta_GA - theta    ascent on L over D_h: unlearn the harmful answers
    P_OSM = theta_GD - theta    descent on L over D_h: loosen the refusals

The backbone stays frozen (4-bit NF4, or full precision), only the LoRA factors move, and the patch of a
weight matrix is B @ A * lora_alpha / r, applied later to the unquantised weight.

The training loop is our own and short, not a Trainer: ascent needs a clamp on every token's loss and a stop
rule on the mean loss, and a student should see both in the order in which they happen. What is not here: which
weights of a patch are kept (importance.py, patching.py), and any evaluation.
"""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import get_constant_schedule_with_warmup

from spkit.backbone import target_weights
from spkit.chat import answer_loss, collate, encode_pair, length_bucketed_batches, mean_per_sample
from spkit.errors import SpkitError
from spkit.examples import HarmfulPair

PATCH_FORMAT = 1
NAMES = {"ascent": "se", "descent": "osm"}


@dataclass
class Patch:
    """The LoRA factors of one derivation.

    name: "se" (ascent) or "osm" (descent). factors: {tensor name: (A [r, in], B [out, r])}, fp32.
    scaling: lora_alpha / r. manifest: how it was made (direction, steps, seed, fingerprint of D_h, ...).
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
        path = Path(path)
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a.contiguous(), b.contiguous()
        header = {"name": self.name, "scaling": self.scaling, "format": PATCH_FORMAT, **self.manifest}
        temporary = path.with_name(path.name + ".tmp")
        # one metadata key: safetensors keeps several in no fixed order, and bytes must repeat
        save_file(tensors, temporary, metadata={"spkit": json.dumps(header, sort_keys=True)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Patch":
        """Read what `save` wrote; SpkitError names the file and what is missing."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("spkit", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own type and plain OSErrors
            raise SpkitError(f"{path} cannot be read as a patch: {error}") from error
        if not header or header.pop("format", None) != PATCH_FORMAT:
            raise SpkitError(f"{path} is no patch of format {PATCH_FORMAT}: its header has no such manifest.")
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        try:
            factors = {n: (tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in names}
        except KeyError as error:
            raise SpkitError(f"{path} lacks the tensor {error}.") from error
        return cls(header.pop("name"), factors, header.pop("scaling"), header)


def fingerprint(pairs: list[HarmfulPair]) -> str:
    """sha256 over the texts of D_h in order: it names the set without showing it."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.response, pair.category]).encode())
    return digest.hexdigest()


def add_lora(model, lora, seed: int):
    """The backbone wrapped by PEFT with fresh LoRA factors: B = 0, A drawn from `seed`.

    `lora` has r, alpha, dropout and targets (the last names of linear layers, checked by target_weights).
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
    """The loss that ascent minimises: -L, with each token's loss clamped at `clamp` nats [clamp: ours].

    A token that is already unlearnt (loss >= clamp) has no gradient, so that ascent ends by itself token by
    token instead of tearing the model apart. losses, mask: [B, T] as answer_loss gives them.
    """
    return -mean_per_sample(losses.clamp(max=clamp), mask).mean()


def descent_loss(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss that descent minimises: L, the mean over samples of the mean over answer tokens."""
    return mean_per_sample(losses, mask).mean()


def derive(model, tokenizer, pairs: list[HarmfulPair], *, direction: str, config, seed: int):
    """One patch and its loss curve.

    model: a bare backbone, dense or NF4 (it is wrapped while we train and given back bare). direction: "ascent" or
    "descent". config: the `derivation` parameters. Returns (Patch, DataFrame with the columns patch, step,
    loss [nats, unclamped mean over the answer tokens], grad_norm, stop).
    Raises SpkitError for an empty D_h, and for a loss or gradient that is no number, naming the step.
    """
    if not pairs:
        raise SpkitError("D_h is empty; patch derivation needs at least one harmful question/answer pair.")
    if direction not in NAMES:
        raise SpkitError(f"direction is {direction!r}; allowed are {', '.join(NAMES)}.")
    name, settings = NAMES[direction], getattr(config, direction)
    encoded = [encode_pair(tokenizer, p.prompt, p.response) for p in pairs]
    device = model.get_input_embeddings().weight.device
    wrapped = add_lora(model, config.lora, seed)
    wrapped.train()
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
    rows, stop = [], "step limit"
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
                rows.append({"patch": name, "step": step, "loss": mean, "grad_norm": 0.0, "stop": ""})
                if direction == "ascent" and mean >= settings.stop_mean_loss:
                    stop = "mean loss reached"  # measured before the step, so the last step is kept
                    break
                if step == settings.max_steps:
                    break
                clamp = (settings.token_loss_clamp,) if direction == "ascent" else ()
                loss = (ascent_loss if clamp else descent_loss)(losses, mask, *clamp)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm).item()
                if not math.isfinite(norm):
                    raise SpkitError(f"The {direction} gradient is {norm} at step {step}; {_ADVICE}")
                rows[-1]["grad_norm"] = norm
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
        rows[-1]["stop"] = stop
        factors = _factors(wrapped, config.lora.targets)
    finally:
        wrapped.unload()
    manifest = {
        "direction": direction,
        "steps": rows[-1]["step"],
        "stop": stop,
        "seed": seed,
        "pairs": len(pairs),
        "data_fingerprint": fingerprint(pairs),
        "quantization": config.quantization,
        "lora": config.lora.model_dump(),
        "settings": settings.model_dump(),
    }
    patch = Patch(name, factors, config.lora.alpha / config.lora.r, manifest)
    return patch, pd.DataFrame(rows)


_ADVICE = "lower derivation's learning_rate or max_grad_norm, or check the backbone's dtype."


def attach(model, patch: Patch):
    """The backbone as theta + P: wrapped by PEFT with the patch's factors, in eval mode.

    For importance on theta_GA and theta_GD without a second copy of the weights. `.unload()` on the result
    gives the bare backbone back. SpkitError where the patch was made for another architecture.
    """
    lora = copy.deepcopy(patch.manifest["lora"])
    settings = type("Lora", (), {**lora, "dropout": 0.0})
    wrapped = add_lora(model, settings, seed=0)
    modules = target_weights(wrapped, lora["targets"])
    for tensor in {*modules, *patch.factors}:
        if tensor not in modules or tensor not in patch.factors:
            where = "the patch" if tensor in modules else "the backbone"
            raise SpkitError(f"The patch {patch.name!r} does not fit: {where} has no {tensor!r}.")
    with torch.no_grad():
        for tensor, module in modules.items():
            for factor, layer in zip(patch.factors[tensor], (module.lora_A, module.lora_B), strict=True):
                target = layer["default"].weight
                if target.shape != factor.shape:
                    raise SpkitError(
                        f"The patch {patch.name!r} does not fit {tensor!r}: "
                        f"a factor is {list(factor.shape)}, the backbone takes {list(target.shape)}."
                    )
                target.copy_(factor)
    return wrapped.eval()


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
