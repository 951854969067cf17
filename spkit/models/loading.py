"""Load a causal language model with its tokenizer, and say in one sentence why one cannot be.

No code from a checkpoint is run and no pickle is read.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spkit.errors import SpkitError, first_line
from spkit.models.devices import ALL_GPUS, is_gpu
from spkit.models.lengths import CONTEXT, context_length
from spkit.models.nf4 import check_nf4
from spkit.models.prompt_checks import check_ids, check_vocabulary
from spkit.models.templates import check_template, set_template, template_of
from spkit.models.weights import guard_nf4
from spkit.system.machine import free_memory
from spkit.system.out_of_memory import explained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "nf4")
DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps", ALL_GPUS)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    device: str = "auto",
    gpus: Sequence[int] | None = None,
    **prompts: Any,
):
    """(model, tokenizer) from a folder written by save_pretrained or from a hub id.

    gpus: the numbers of those that "balanced" spreads it over; None: all.
    prompts: system_prompt, chat_template and chat_template_arguments, as in `load_tokenizer`.

    The model is in eval mode. quantization="nf4": the linear layers are kept in NF4 with double
    quantisation (QLoRA, arXiv 2305.14314) and compute in `dtype`; the rest is in `dtype`.
    Raises SpkitError, in one sentence, for what cannot be loaded or does not fit together.
    """
    from transformers import AutoModelForCausalLM

    _require("quantization", quantization, QUANTIZATIONS)
    place = resolve_device(device)
    options = {"dtype": resolve_dtype(dtype, place), "quantization": quantization, "device": place}
    options["gpus"] = gpus
    tokenizer = load_tokenizer(source, revision=revision, **prompts)
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
    gpus: Sequence[int] | None = None,
) -> nn.Module:
    """The model alone, of any of transformers' auto classes, in eval mode; see `load`.

    dtype, device: resolved, no longer "auto". SpkitError also for a checkpoint that lacks a tensor,
    and for one that does not fit on the GPUs together ("balanced").
    In NF4 every layer is checked, and a warning says where bitsandbytes computes wrongly (nf4.py).
    """
    check_quantization(quantization, device)
    source = _check_source(source)
    if revision is None and not Path(source).is_dir():
        warnings.warn(
            f"{source} is loaded in its latest revision, which may change: pin one to repeat a run",
            stacklevel=2,
        )
    place = ALL_GPUS if device == ALL_GPUS else {"": device}
    options = {"dtype": DTYPES[dtype], "device_map": place}
    if gpus is not None:  # the others belong to other processes
        options["max_memory"] = {number: free_memory(f"cuda:{number}") for number in gpus}
    if quantization == "nf4":
        options["quantization_config"] = _nf4(DTYPES[dtype])
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
        raise SpkitError(f"No model can be loaded from {source!r}: {first_line(error)}") from error
    if report["missing_keys"]:
        name = sorted(report["missing_keys"])[0]
        raise SpkitError(f"The checkpoint {source!r} lacks the tensor {name!r}; is it complete?")
    if device == ALL_GPUS:
        _check_places(model, source)
    guard_nf4(model)
    check_nf4(model)
    return model.eval()


def _nf4(dtype: torch.dtype):
    """QLoRA's NF4 with double quantisation; `dtype` is what the layers compute in."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_arguments: Mapping[str, Any] | None = None,
):
    """The tokenizer alone; it must have a chat template. A missing pad token becomes unk or eos.

    system_prompt: kept on the tokenizer, where chat.py finds it for every prompt. chat_template:
    Jinja text or a file of it, instead of the checkpoint's. chat_template_arguments: what every
    rendering gets besides. SpkitError for what cannot be used, see templates.py.
    """
    source = _check_source(source)
    tokenizer = read_tokenizer(source, revision=revision)
    set_template(tokenizer, chat_template, chat_template_arguments)
    template_of(tokenizer)
    if tokenizer.eos_token is None:
        raise SpkitError(f"The tokenizer of {source!r} has no eos token to end an answer with.")
    if tokenizer.pad_token is None:
        # padding is masked everywhere, so any known token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.system_prompt = system_prompt
    check_vocabulary(tokenizer)
    check_template(tokenizer)
    _fit(source, revision, tokenizer)
    return tokenizer


def _fit(source: str, revision: str | None, tokenizer) -> None:
    """Check the tokenizer against config.json, and keep on it how much the model reads."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception:  # told by what loads the model
        return
    check_ids(tokenizer, config)
    setattr(tokenizer, CONTEXT, context_length(config, tokenizer))


def check_pair(source: str | Path, tokenizer) -> None:
    """`check_tokenizer` from config.json alone; worth calling before a model is loaded."""
    _fit(str(source), None, tokenizer)


def read_tokenizer(source: str | Path, *, revision: str | None = None):
    """The tokenizer as it is, whatever it lacks."""
    from transformers import AutoTokenizer

    source = _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers raises a bare Exception, JSON a KeyError
        if "custom code" in str(error):
            raise SpkitError(
                f"The tokenizer of {source!r} needs Python code of its own (auto_map in "
                "tokenizer_config.json), and none is run: take a copy with a tokenizer.json and "
                "without that key."
            ) from error
        said = first_line(error)
        if said.startswith("Couldn't instantiate the backend tokenizer"):
            said = "it has neither a tokenizer.json nor another vocabulary that can be read"
        elif not isinstance(error, OSError | ValueError | ImportError):
            said = f"{type(error).__name__}: {said}"
        raise SpkitError(f"No tokenizer can be loaded from {source!r}: {said}") from error


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
    """ "cpu", "cuda", "cuda:1", "mps" or "balanced"; "auto" takes the first GPU where there is one.

    SpkitError, which says what there is, for a device that this machine has not.
    """
    if not re.fullmatch(r"cuda:[0-9]+", device):
        _require("device", device, DEVICES)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device == "mps" and not torch.backends.mps.is_available():
        raise SpkitError("device is 'mps', but torch sees no Apple GPU; use 'auto' or 'cpu'.")
    if device in ("cpu", "mps"):
        return device
    if not gpus:
        raise SpkitError(f"device is {device!r}, but torch sees no GPU; use 'auto' or 'cpu'.")
    if device.startswith("cuda:") and int(device.partition(":")[2]) >= gpus:
        there = "cuda:0 alone" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise SpkitError(f"device is {device!r}, but torch sees {there}.")
    return device


def check_quantization(quantization: str, device: str) -> None:
    """SpkitError for NF4 on a resolved device that bitsandbytes has no kernels for."""
    if quantization == "nf4" and device == "mps":
        raise SpkitError(
            "quantization is 'nf4', which cannot be computed on 'mps'; set quantization to none "
            "in derivation, evaluation and judges.generative, or backbone.device to cpu."
        )


def _check_places(model: nn.Module, source: str) -> None:
    """SpkitError for weights that accelerate had to put on the host or the disk."""
    places = getattr(model, "hf_device_map", None) or {}
    outside = [name for name, place in places.items() if str(place) in ("cpu", "disk")]
    if outside:
        raise SpkitError(
            f"{source!r} does not fit on the GPUs together: {outside[0]!r} and "
            f"{len(outside) - 1} more parts would be offloaded, and can then be neither scored nor "
            "patched; take NF4, a smaller backbone or device: cpu."
        )


def resolve_dtype(dtype: str, device: str) -> str:
    """A key of DTYPES; "auto" takes what the device computes in natively.

    float32 on a CPU; on a GPU bfloat16 where it has it (compute capability 8.0 and above), else
    float16, with which a derivation checks for overflow (a T4 only emulates bfloat16). SpkitError
    for bfloat16 on mps, which has float32 and float16.
    """
    _require("compute_dtype", dtype, ("auto", *DTYPES))
    if device == "mps" and dtype == "bfloat16":
        raise SpkitError("compute_dtype is 'bfloat16', but 'mps' takes float32 or float16 only.")
    if dtype != "auto":
        return dtype
    if not is_gpu(device):
        return "float16" if device == "mps" else "float32"
    every = range(torch.cuda.device_count()) if device == ALL_GPUS else [torch.device(device)]
    for gpu in every:
        with torch.cuda.device(gpu):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "float16"
    return "bfloat16"


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
