"""SNIP importance of every weight, per sample, in one pass over the calibration samples.

    I(W_ij) = mean over samples of | W_ij * dL(sample) / dW_ij |           docs/method.md, section 3

(Lee et al. 2019, as used by Wei et al. 2024.) The absolute value is *inside* the mean, so the
gradient of each sample is needed by itself, for every weight. For a linear layer it is g.T @ x: x
is the layer's input, g the gradient of the loss at its output. During one backward pass a hook on
each layer forms this product and adds its absolute value to an fp32 sum. No weight needs a gradient
of its own, so 4-bit weights can be scored; with a LoRA on them W is the effective weight.

All importances of a 7 B model would take 26 GB. `snip_windows` scores some layers at a time; the
output of the layers below is computed once and kept on the host. importance.py decides which model
and which pairs are scored.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from spkit.errors import SpkitError
from spkit.models.chat import answer_loss, mean_per_sample
from spkit.models.devices import check_in_memory
from spkit.models.heads import answer_logits
from spkit.models.weights import decoder_layers, effective_weight, target_weights
from spkit.system import processes


def snip(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    targets: Sequence[str] | str,
    *,
    only: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """{tensor name: importance fp32 [out, in]} in the model's order, on the model's device.

    model: bare or PEFT-wrapped, dense or NF4. It is scored in eval mode (no dropout), and left as
    it was found: modes, gradient flags and hooks are restored, also after an error.
    batches: what chat.collate makes (input_ids, attention_mask, labels, right-padded), on any
    device. The result does not depend on how samples are batched, up to fp32 rounding.
    targets: as in derivation.lora (models/targets.py). only: score just these tensor names.
    Of several processes the first has all scores, the others none (system/processes.py).
    SpkitError for an empty calibration set, a loss or score that is not finite, or an unknown name.
    """
    layers = target_weights(model, targets)
    if only is not None:
        wanted = set(only)
        for name in sorted(wanted - set(layers)):
            raise SpkitError(f"The tensor {name!r} is not among the targets to be scored.")
        layers = {name: layer for name, layer in layers.items() if name in wanted}
    return _score(model, layers, batches)


def snip_windows(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    targets: Sequence[str] | str,
    layers_per_pass: int,
) -> Iterator[dict[str, Tensor]]:
    """The same scores as `snip`, of so many decoder layers at a time, from the lowest layer up.

    One pass over `batches` for each window: it starts from the stored input of the window's first
    layer, its backward pass ends there, and it stores the next window's input on the host: 67 MB in
    fp16 for 64 samples of 128 tokens and width 4096. Matrices outside of the decoder layers belong
    to the last window. Bits are those of `snip`; between windows the model is as it was found.
    """
    decoder = decoder_layers(model)
    names = {id(module): index for index, layer in enumerate(decoder) for module in layer.modules()}
    wanted = target_weights(model, targets)
    stored: list = []
    for start in range(0, len(decoder), layers_per_pass):
        stop = min(start + layers_per_pass, len(decoder))
        last = stop == len(decoder)
        window = {
            name: layer
            for name, layer in wanted.items()
            if start <= names.get(id(layer), len(decoder)) < stop
            or (last and id(layer) not in names)
        }
        following: list = []
        with (
            _from_stored(decoder, start, stored),
            _storing(None if last else decoder[stop - 1], following),
        ):
            scores = _score(model, window, batches)
        stored = following
        yield scores


def _score(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    sums = processes.here().sums(batches)
    rows: list[Tensor] = []  # of the present batch: which positions of each sample are real
    device = model.get_input_embeddings().weight.device
    check_in_memory(model.named_parameters())

    def add(name: str, x: Tensor, g: Tensor) -> None:
        x, g = (t.reshape(len(rows), -1, t.shape[-1]) for t in (x, g))  # OPT's MLP flattens them
        for sample, real in enumerate(row.to(g.device) for row in rows):
            # fp32 before the product: a bf16 product would round away what the mean is made of
            sums.add(name, (g[sample, real].float().T @ x[sample, real].float()).abs_())
        sums.batch_done(name)

    with _scoring(model, layers, add):
        for batch in batches:
            if not sums.mine(len(batch["input_ids"])):
                continue  # another process computes it
            rows[:] = [row.nonzero().squeeze(1) for row in batch["attention_mask"].to(device)]
            logits = answer_logits(model, batch, watched=layers.values())
            losses = mean_per_sample(*answer_loss(logits, batch["labels"]))
            if not bool(torch.isfinite(losses).all()):
                row = sums.samples - len(rows) + int((~torch.isfinite(losses)).nonzero()[0])
                raise SpkitError(f"The loss of calibration sample {row} is not finite.")
            losses.sum().backward()  # a sum: sample i's gradient at its own rows is that of L_i
    if sums.samples == 0:
        raise SpkitError("There are no calibration samples to score the weights with.")

    scores = {}
    for name, layer in layers.items():
        if sums.seen[name] != sums.own:
            raise SpkitError(
                f"The weight {name!r} got gradients of {sums.seen[name]} of {sums.own} samples; "
                "is the layer unused, or its 4-bit weight repacked?"
            )
        if not sums.whole:
            continue
        scores[name] = effective_weight(layer).abs_().mul_(sums.pop(name)).div_(sums.samples)
        if not bool(torch.isfinite(scores[name]).all()):
            raise SpkitError(f"The importance of {name!r} is not finite.")
    return scores


@contextmanager
def _from_stored(decoder: nn.ModuleList, start: int, stored: Sequence) -> Iterator[None]:
    """Inside, layers below `start` compute nothing; the last of them returns what was stored."""
    if start == 0:
        yield
        return
    device, left = next(decoder[start].parameters()).device, iter(stored)

    def stored_output(hidden, *args, **kwargs):
        value = next(left)
        whole = value if isinstance(value, tuple) else (value,)
        leaf = whole[0].to(device).detach().requires_grad_(True)
        return (leaf, *whole[1:]) if isinstance(value, tuple) else leaf

    with ExitStack() as stack:
        for index, layer in enumerate(decoder[:start]):
            own = layer.__dict__.get("forward")  # accelerate's hooks replace it there
            if own is None:
                stack.callback(layer.__dict__.pop, "forward")
            else:
                stack.callback(setattr, layer, "forward", own)
            layer.forward = stored_output if index == start - 1 else lambda hidden, *_, **__: hidden
        yield


@contextmanager
def _storing(layer: nn.Module | None, into: list) -> Iterator[None]:
    """Inside, the output of `layer` is copied to the host, batch by batch."""
    if layer is None:
        yield
        return

    def store(module, inputs, output):
        whole = output if isinstance(output, tuple) else (output,)
        host = whole[0].detach().to("cpu", copy=True)
        into.append((host, *whole[1:]) if isinstance(output, tuple) else host)

    handle = layer.register_forward_hook(store)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scoring(model: nn.Module, layers: Mapping[str, nn.Module], add) -> Iterator[None]:
    """Eval mode, all parameters frozen, the embeddings' output as the leaf, and the hooks."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def watch(name: str):
        def hook(module, inputs, output):
            if output.requires_grad:  # the first pass of gradient checkpointing has none
                x = inputs[0].detach().to(output.device)
                output.register_hook(lambda g: add(name, x, g))

        return hook

    with ExitStack() as stack, torch.enable_grad():
        # handles are removed, and flags put back, in reverse order whatever happens inside
        for parameter, flag in flags:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        model.eval()
        # nothing else requires a gradient now, so backward starts here and stores none on weights
        embeddings = model.get_input_embeddings()
        leaf = embeddings.register_forward_hook(lambda m, i, output: output.requires_grad_(True))
        stack.callback(leaf.remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield
