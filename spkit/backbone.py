"""The backbone: load a causal language model with its tokenizer, and find its weight matrices.

Everything later names a weight matrix by its tensor name in the checkpoint, for instance
"model.layers.0.self_attn.q_proj.weight", whether the model in memory is bare, in 4-bit NF4, or
wrapped by PEFT. This file is where the two worlds meet.

What it does not do: train (derivation.py), score (importance.py), choose weights (patching.py),
or render chats (chat.py). It runs no code from a checkpoint and reads no pickle.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from spkit.deltas import LowRankDelta, SparseDelta
from spkit.errors import SpkitError
from spkit.out_of_memory import explained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "nf4")
DEVICES = ("auto", "cpu", "cuda")
Delta = torch.Tensor | SparseDelta | LowRankDelta


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    device: str = "auto",
    system_prompt: str | None = None,
):
    """(model, tokenizer) from a folder written by save_pretrained or from a hub id.

    The model is in eval mode. quantization="nf4": the linear layers are kept in NF4 with double
    quantisation (QLoRA, arXiv 2305.14314) and compute in `dtype`; the rest is in `dtype`.
    Raises SpkitError, in one sentence, for what cannot be loaded or does not fit together.
    """
    from transformers import AutoModelForCausalLM

    _require("quantization", quantization, QUANTIZATIONS)
    place = resolve_device(device)
    options = {"dtype": resolve_dtype(dtype, place), "quantization": quantization, "device": place}
    tokenizer = load_tokenizer(source, revision=revision, system_prompt=system_prompt)
    model = read_model(AutoModelForCausalLM, source, revision=revision, **options)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def read_model(
    auto_class,
    source: str | Path,
    *,
    revision: str | None,
    dtype: str,
    quantization: str,
    device: str,
) -> nn.Module:
    """The model alone, of any of transformers' auto classes, in eval mode; see `load`.

    dtype, device: resolved, no longer "auto". SpkitError also for a checkpoint that lacks a tensor.
    """
    from transformers import BitsAndBytesConfig

    source = _check_source(source)
    if revision is None and not Path(source).is_dir():
        warnings.warn(
            f"{source} is loaded in its latest revision, which may change: pin one to repeat a run",
            stacklevel=2,
        )
    options = {"dtype": DTYPES[dtype], "device_map": {"": device}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    lower = {"quantization": quantization} if quantization == "none" else {}
    try:
        with explained(f"loading {source}", lower):
            model, report = auto_class.from_pretrained(
                source,
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, ImportError) as error:
        raise SpkitError(f"No model can be loaded from {source!r}: {_first_line(error)}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise SpkitError(f"The checkpoint {source!r} lacks the tensor {name!r}; is it complete?")
    guard_nf4(model)
    return model.eval()


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, system_prompt: str | None = None
):
    """The tokenizer alone; it must have a chat template. A missing pad token becomes unk or eos.

    system_prompt: kept on the tokenizer, where chat.py finds it for every prompt.
    """
    source = _check_source(source)
    tokenizer = read_tokenizer(source, revision=revision)
    if tokenizer.chat_template is None:
        raise SpkitError(
            f"The tokenizer of {source!r} has no chat template; use an instruction-tuned model."
        )
    if tokenizer.eos_token is None:
        raise SpkitError(f"The tokenizer of {source!r} has no eos token to end an answer with.")
    if tokenizer.pad_token is None:
        # padding is masked everywhere, so any known token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.system_prompt = system_prompt
    return tokenizer


def read_tokenizer(source: str | Path, *, revision: str | None):
    """The tokenizer as it is, whatever it lacks."""
    from transformers import AutoTokenizer

    source = _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise SpkitError(
            f"No tokenizer can be loaded from {source!r}: {_first_line(error)}"
        ) from error


def check_tokenizer(model: nn.Module, tokenizer) -> None:
    """SpkitError if the tokenizer can emit an id for which the model has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise SpkitError(
            f"The tokenizer of {tokenizer.name_or_path!r} has token ids up to {highest}, but the "
            f"model has {rows} embeddings (ids 0 to {rows - 1}): it belongs to another model."
        )


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda"; "auto" takes the GPU where there is one."""
    _require("device", device, DEVICES)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SpkitError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'.")
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """A key of DTYPES; "auto" takes what the device computes in natively.

    float32 on a CPU; on a GPU bfloat16 where it has it (compute capability 8.0 and above), else
    float16, with which a derivation checks for overflow (a T4 only emulates bfloat16).
    """
    _require("compute_dtype", dtype, ("auto", *DTYPES))
    if dtype != "auto":
        return dtype
    if device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def guard_nf4(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place. No effect on other models.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a layer's packed weight at its first
    forward in eval mode; after that dequantising gives other numbers, and training loses the
    gradient with a mere warning. Nothing may run the model before this.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def target_weights(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """{checkpoint tensor name: linear layer} of every layer whose last name is in `targets`.

    In the model's own order. On a PEFT model the value is the LoRA wrapper where there is one
    (its forward is the layer's forward), and the name is still the bare checkpoint's.
    SpkitError for a target that names no linear layer, or whose weight is tied to another.
    """
    found = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf == "base_layer" or ".lora_" in path or not isinstance(_base(module), nn.Linear):
            continue  # the inside of a LoRA wrapper, or not a linear layer
        found[path.removeprefix("base_model.model.") + ".weight"] = (leaf, module)
    known = list(dict.fromkeys(leaf for leaf, _ in found.values()))
    for target in targets:
        if target not in known:
            raise SpkitError(
                f"The target {target!r} is no linear layer of this model; it has "
                f"{', '.join(known)}."
            )
    chosen = {name: module for name, (leaf, module) in found.items() if leaf in set(targets)}
    embeddings = model.get_input_embeddings().weight
    for name, module in chosen.items():
        if _base(module).weight is embeddings:
            raise SpkitError(
                f"The weight {name!r} is tied to the input embeddings and cannot be a target."
            )
    return chosen


def effective_weight(module: nn.Module) -> torch.Tensor:
    """The matrix that the layer multiplies with, fp32 [out, in], without gradient.

    Dense: the weight. NF4: dequant(W4). LoRA wrapper: that plus B @ A * lora_alpha / r for every
    active adapter [docs/method.md, section 3]. SpkitError for variants that are no sum (DoRA).
    """
    base = _base(module)
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        total = weight.detach().float().clone()
    else:
        if getattr(state, "packing_format_for_cpu", False):
            raise SpkitError(
                "A 4-bit weight was repacked by bitsandbytes; call guard_nf4 right after loading."
            )
        from bitsandbytes.functional import dequantize_4bit

        total = dequantize_4bit(weight.data, state).float()
    if module is base or module.disable_adapters or module.merged:
        return total
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in getattr(module, "lora_variant", {}):
            raise SpkitError(
                f"The adapter {adapter!r} is a LoRA variant (DoRA, ...), not a plain LoRA."
            )
        a = module.lora_A[adapter].weight.detach().float()
        b = module.lora_B[adapter].weight.detach().float()
        total += (b @ a) * module.scaling[adapter]
    return total


@contextmanager
def patched(model: nn.Module, deltas: Mapping[str, Delta]) -> Iterator[nn.Module]:
    """Inside the `with` the model is W + delta; afterwards it is exactly as before.

    deltas: {checkpoint tensor name: [out, in]} for a bare model; read one matrix at a time, so a
    mapping that computes them will do. Restored also when the body raises.

    Full-precision weights: only positions where the delta is not 0 are written, in fp32 and then
    rounded to the weight's dtype, exactly as patching.compose does; all others keep their bits.
    4-bit weights stay as they are, and the unquantised delta's product is added to the layer's
    output (deltas.py); a mapping with `factors` may give whole patches by their factors.
    SpkitError, before the body runs, for an unknown name, another shape, or a non-finite result.
    """
    with ExitStack() as undo:
        for name in deltas:
            layer = _layer(model, name)
            factors = getattr(deltas, "factors", lambda name: None)(name)
            if getattr(layer.weight, "quant_state", None) is None:
                _write(layer.weight, name, deltas[name], undo)
            else:
                _add_output(layer, name, factors or deltas[name], undo)
        yield model


def _write(weight: nn.Parameter, name: str, delta: Delta, undo: ExitStack) -> None:
    """Add the delta to a full-precision weight in place; `undo` puts the old bits back."""
    if not weight.is_floating_point():
        raise SpkitError(f"{name!r} is neither a full-precision weight nor NF4.")
    _check_shape(name, delta, tuple(weight.shape))
    if isinstance(delta, LowRankDelta):
        delta = delta.dense()
    sparse = (SparseDelta.of(delta.detach()) if isinstance(delta, torch.Tensor) else delta).to(
        weight.device
    )
    where, flat = sparse.positions.long(), weight.data.view(-1)
    old = flat[where]
    new = (old.float() + sparse.values.float()).to(weight.dtype)
    if not bool(torch.isfinite(new).all()):
        raise SpkitError(f"Adding the delta to {name!r} gives values that are not finite.")
    flat[where] = new

    def restore(where=sparse.positions, old=old):
        weight.data.view(-1)[where.long()] = old

    undo.callback(restore)


def _add_output(layer: nn.Module, name: str, delta: Delta, undo: ExitStack) -> None:
    """Let a 4-bit layer answer W4 x + D x; `undo` takes the hook off."""
    _check_shape(name, delta, (layer.out_features, layer.in_features))
    device = layer.weight.device
    if isinstance(delta, torch.Tensor):
        delta = SparseDelta.of(delta.detach())
    dtype = getattr(layer, "compute_dtype", None) or torch.float32
    held = delta.to(device, dtype)
    parts = [held.values] if isinstance(held, SparseDelta) else [x for t in held.terms for x in t]
    if not all(bool(torch.isfinite(torch.as_tensor(part)).all()) for part in parts):
        raise SpkitError(f"The delta of {name!r} has values that are not finite in {dtype}.")
    hook = layer.register_forward_hook(
        lambda module, inputs, output: output + held.output(inputs[0].to(dtype)).to(output.dtype)
    )
    undo.callback(hook.remove)


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight  # noqa: B018
    except AttributeError:
        raise SpkitError(f"The model has no weight matrix {name!r}.") from None
    return layer


def _check_shape(name: str, delta: Delta, shape: tuple[int, ...]) -> None:
    if tuple(delta.shape) != shape:
        raise SpkitError(
            f"The delta of {name!r} has shape {list(delta.shape)}, its weight {list(shape)}."
        )


def _base(module: nn.Module) -> nn.Module:
    """The wrapped linear layer of a PEFT layer, else the module itself (no PEFT import needed)."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _check_source(source: str | Path) -> str:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpkitError(f"The folder {str(source)!r} has no config.json; it is no checkpoint.")
    elif folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SpkitError(f"{str(source)!r} is neither a folder with a checkpoint nor a hub id.")
    return str(source)


def _require(key: str, value: str, allowed) -> None:
    if value not in allowed:
        raise SpkitError(f"{key} is {value!r}; allowed are {', '.join(allowed)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
