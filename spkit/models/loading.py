"""Load a causal language model with its tokenizer, and say in one sentence why one cannot be.

No code from a checkpoint is run and no pickle is read.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spkit.errors import SpkitError, first_line
from spkit.models.lengths import CONTEXT, context_length
from spkit.models.nf4 import check_nf4
from spkit.models.prompt_checks import check_vocabulary
from spkit.models.templates import check_template, set_template, template_of
from spkit.models.weights import guard_nf4
from spkit.system.out_of_memory import explained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "nf4")
DEVICES = ("auto", "cpu", "cuda")


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    device: str = "auto",
    **prompts: Any,
):
    """(model, tokenizer) from a folder written by save_pretrained or from a hub id.

    prompts: system_prompt, chat_template and chat_template_arguments, as in `load_tokenizer`.

    The model is in eval mode. quantization="nf4": the linear layers are kept in NF4 with double
    quantisation (QLoRA, arXiv 2305.14314) and compute in `dtype`; the rest is in `dtype`.
    Raises SpkitError, in one sentence, for what cannot be loaded or does not fit together.
    """
    from transformers import AutoModelForCausalLM

    _require("quantization", quantization, QUANTIZATIONS)
    place = resolve_device(device)
    options = {"dtype": resolve_dtype(dtype, place), "quantization": quantization, "device": place}
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
) -> nn.Module:
    """The model alone, of any of transformers' auto classes, in eval mode; see `load`.

    dtype, device: resolved, no longer "auto". SpkitError also for a checkpoint that lacks a tensor.
    In NF4 every layer is checked, and a warning says where bitsandbytes computes wrongly (nf4.py).
    """
    source = _check_source(source)
    if revision is None and not Path(source).is_dir():
        warnings.warn(
            f"{source} is loaded in its latest revision, which may change: pin one to repeat a run",
            stacklevel=2,
        )
    options = {"dtype": DTYPES[dtype], "device_map": {"": device}}
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
    setattr(tokenizer, CONTEXT, _context(source, revision, tokenizer))
    return tokenizer


def _context(source: str, revision: str | None, tokenizer) -> int | None:
    """How many tokens the model reads, by its config.json; see lengths.py."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError):  # told by what loads the model
        return None
    return context_length(config, tokenizer)


def read_tokenizer(source: str | Path, *, revision: str | None):
    """The tokenizer as it is, whatever it lacks."""
    from transformers import AutoTokenizer

    source = _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise SpkitError(
            f"No tokenizer can be loaded from {source!r}: {first_line(error)}"
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
