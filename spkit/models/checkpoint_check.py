"""Can this checkpoint be loaded, patched and written again? Asked of its files; no weight is read.

    checkpoint_problems(folder, targets)      all that is wrong, and remarks
    check_checkpoint(source, revision, ...)   the same of a hub id or folder; the first wrong thing
                                              is an error

Read are the first bytes of each file, config.json and the headers of the safetensors files. Then
transformers loads tensors without content ("meta") under the files' names: what it misses now, it
would miss later, too.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spkit.errors import SpkitError, first_line
from spkit.models.checkpoint_files import (
    INDEX,
    SINGLE,
    About,
    headers,
    is_hub_id,
    load_json,
    read_header,
    read_small,
)
from spkit.models.stored_names import checked_names
from spkit.system import hub
from spkit.system.pointers import refuse_empty, refuse_pointer

LOOKED_INTO = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors")
PATCHABLE = ("F32", "F16", "BF16")  # patchfile/floats.py
MAKERS = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "Model")  # the last: without a head
ADAPTER = "adapter_config.json"
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
KINDS = {CAUSAL: "causal language model", CLASSIFIER: "classifier of texts"}
NO_TEXT = ", which writes no text: a backbone is a causal language model, such as LlamaForCausalLM"
DEQUANTISE = (
    "AutoModelForCausalLM.from_pretrained({source!r}).dequantize(dtype=torch.bfloat16)"
    ".save_pretrained(FOLDER, save_original_format=False), with the tokenizer's files copied beside"
)


@dataclass
class Checked:
    """problems: sentences, each keeps a run from its end. remarks: lines for a reader to see."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_checkpoint(
    source: str | Path, revision: str | None = None, targets: Sequence[str] | str = "auto"
) -> list[str]:
    """The remarks; SpkitError with the first problem. Of a hub id only what is in the local cache
    is looked at, without a network."""
    if Path(source).is_dir():
        found = checkpoint_problems(source, targets)
    else:
        folder = hub.in_cache(str(source), revision) if is_hub_id(str(source)) else None
        if folder is None:
            return [f"{source}: not checked: not on this machine"]
        found = checkpoint_problems(folder, targets, whole=False)
    if found.problems:
        raise SpkitError(found.problems[0])
    return found.remarks


def checkpoint_problems(
    folder: str | Path, targets: Sequence[str] | str, *, whole: bool = True
) -> Checked:
    """All that is wrong with a checkpoint's folder as a backbone, file by file.

    targets: as in derivation.lora. whole: False where files may not be downloaded yet, as in the
    hub's cache; what is not there is a remark then.
    """
    folder, found = Path(folder), Checked()
    found.problems += list(_files(folder))
    config = {}
    try:
        config = _config(folder)
    except SpkitError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))
    if config:
        found.problems += list(_stored_otherwise(folder, config))
    if found.problems:
        return found
    try:
        _refuse_missing_shards(folder)
        stored = headers(folder)
    except SpkitError as error:
        # two sets of weights are a fault of the hub's folder, too
        if whole or all((folder / name).exists() for name in (SINGLE, INDEX)):
            found.problems.append(str(error))
        else:
            found.remarks.append(f"{folder}: the weights are not on this machine: not checked")
        return found
    try:
        found.remarks += list(_fits(folder, config, stored, targets))
    except SpkitError as error:
        found.problems.append(str(error))
    return found


# ---- the files -----------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[str]:
    """A sentence for each file that is not what its name says."""
    for pattern in LOOKED_INTO:
        for path in sorted(folder.glob(pattern)):
            try:
                refuse_pointer(path)
                refuse_empty(path)
                if path.suffix == ".safetensors":
                    with path.open("rb") as file:
                        read_header(file, path)
                elif path.suffix == ".json" and path.name != "config.json":
                    json.loads(path.read_bytes())  # transformers skips some that are damaged
            except SpkitError as error:
                yield str(error)
            except (ValueError, RecursionError) as error:
                yield f"{path} is no JSON: {first_line(error)}; was it cut?"
            except OSError as error:
                yield f"{path} cannot be read: {error.strerror}"


def _refuse_missing_shards(folder: Path) -> None:
    """All of them at once; anything else that is wrong with an index is told by `headers`."""
    try:
        named = set(load_json(read_small(folder / INDEX))["weight_map"].values())
        missing = sorted(str(name) for name in named if not (folder / str(name)).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        what = f"{len(missing)} of {len(named)} files that the index names are not there"
        raise SpkitError(f"{folder}: {what} ({names}): download them.")


def _config(folder: Path) -> dict[str, Any]:
    """config.json; SpkitError also where the folder is an adapter, or no language model's."""
    path = folder / "config.json"
    if (folder / ADAPTER).is_file() and not (path.is_file() and _has_weights(folder)):
        try:
            base = load_json(read_small(folder / ADAPTER)).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        raise SpkitError(
            f"{folder} is a PEFT adapter and no whole model: backbone.source needs the base"
            f"{f' ({base})' if base else ''}, or base and adapter in one: PeftModel.from_pretrained"
            "(base, adapter).merge_and_unload().save_pretrained(FOLDER)."
        )
    if (folder / ADAPTER).is_file():
        raise SpkitError(
            f"{folder} has a PEFT adapter beside the model's weights, and transformers adds it to "
            "them unasked, whereas a patch is added to the weights alone: move "
            f"{ADAPTER} and adapter_model.safetensors to a folder of their own."
        )
    config = _json_config(folder)
    names = config.get("architectures") or []
    if names and not any(str(name).endswith(MAKERS) for name in names):
        raise SpkitError(f"{path} is of {names[0]}{NO_TEXT}.")
    return config


def _json_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SpkitError(f"The folder {str(folder)!r} has no config.json; it is no checkpoint.")
    try:
        config = load_json(read_small(path))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise SpkitError(f"{path} cannot be read: {first_line(error)}") from None
    return config


def _has_weights(folder: Path) -> bool:
    files = (path.name for path in folder.glob("*.safetensors"))
    return any(not name.startswith("adapter_") for name in files)


def _stored_otherwise(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence where the weights are stored quantised."""
    how = config.get("quantization_config") or _text(config).get("quantization_config")
    if not isinstance(how, dict) or not how:
        return
    method = str(how.get("quant_method") or "bitsandbytes")
    if method == "bitsandbytes":
        bits = "8-bit" if how.get("load_in_8bit") else "4-bit"
        source = DEQUANTISE.format(source=str(folder))
        advice, method = f", or write one: {source}", f"bitsandbytes {bits}"
    else:
        advice = ""
    named = config.get("_name_or_path")
    known = isinstance(named, str) and is_hub_id(named) and "/" in named
    original = "the original in full precision" + (f" (perhaps {named})" if known else "")
    yield (
        f"{folder / 'config.json'}: the weights are stored quantised ({method}), and a patch is "
        f"added to full-precision ones: take {original}{advice}. derivation.quantization: nf4 "
        "quantises it for the derivation."
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


# ---- the tensors ---------------------------------------------------------------------------------


def _fits(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, tuple[Path, int, About]],
    targets: Sequence[str] | str,
) -> Iterator[str]:
    """Remarks; SpkitError for a missing tensor, or a target that cannot be patched in the files."""
    from spkit.models.weights import left_out, target_weights

    model = _loaded_empty(folder, stored)
    if not config.get("architectures"):
        yield f"{folder / 'config.json'} names no architecture: read as {type(model).__name__}"
    layers = target_weights(model, targets)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    names = checked_names(folder, shapes)
    for there in names.values():
        path, _, about = stored[there]
        if about["dtype"] not in PATCHABLE:
            known = ", ".join(PATCHABLE)
            raise SpkitError(
                f"{path}: {there!r} is {about['dtype']}, and a patch needs {known}: take the "
                "original in full precision."
            )
    name, there = next(iter(names.items()))
    if name != there:
        yield f"The files call {name!r} {there!r}; the patch file will, too"
    yield from left_out(model)
    _check_factors(model, targets)  # last: it changes the model


def _check_factors(model, targets: Sequence[str] | str) -> None:
    """SpkitError where PEFT puts no factors on a target, which training would meet behind notebook
    00. Of models with experts it takes some names for theirs, and of Mamba it refuses some."""
    from peft import LoraConfig, get_peft_model

    from spkit.models.targets import KEY, leaf
    from spkit.models.weights import target_weights

    paths = [name.removesuffix(".weight") for name in target_weights(model, targets)]
    try:
        with _quiet():
            own = LoraConfig(r=1, target_modules=list(paths), task_type="CAUSAL_LM")
            wrapped = get_peft_model(model, own)
    except Exception as error:  # of several kinds, by architecture
        raise SpkitError(f"{KEY} is {targets!r}: PEFT refuses it: {first_line(error)}") from None
    layers = target_weights(wrapped, targets)
    bare = [name for name, layer in layers.items() if not hasattr(layer, "lora_A")]
    if bare:
        lost = {leaf(name.removesuffix(".weight")) for name in bare}
        rest = [name for name in dict.fromkeys(map(leaf, paths)) if name not in lost]
        raise SpkitError(
            f"{KEY} is {targets!r}: PEFT takes {bare[0]!r} for a part of the experts and puts no "
            f"factors on it; set it to [{', '.join(rest)}]."
        )


def check_loads(folder: str | Path, maker: str) -> int:
    """How many tensors a checkpoint has that is only loaded, as a judge is; no weight is read.

    maker: transformers' auto class. SpkitError where its files are not whole or lack a tensor of
    that class, or where what it is stored in needs a package that is not installed.
    """
    folder = Path(folder)
    stored, config = headers(folder), _json_config(folder)
    if not (config.get("quantization_config") or _text(config).get("quantization_config")):
        _loaded_empty(folder, stored, maker)
        return len(stored)
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        how = AutoConfig.from_pretrained(folder).quantization_config
        AutoHfQuantizer.from_config(how).validate_environment()
    except ImportError as error:
        raise SpkitError(f"{folder} cannot be loaded: {first_line(error)}") from None
    except Exception:  # what it says of devices is said where it is loaded onto one
        pass
    return len(stored)


def _loaded_empty(folder: Path, stored: Mapping[str, tuple[Path, int, About]], maker: str = CAUSAL):
    """The model on "meta", loaded from tensors without content; SpkitError for one it misses."""
    import torch

    config, build = _class_of(folder, maker)
    empty = {
        name: torch.empty(about["shape"], dtype=torch.float32, device="meta")
        for name, (_, _, about) in stored.items()
    }
    options = {"state_dict": empty, "device_map": {"": "meta"}, "dtype": torch.float32}
    try:
        with _quiet():
            model, report = build.from_pretrained(
                None,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # a value in config.json that a class does not expect: any kind
        what = f"config.json and the tensors of the files do not make a {build.__name__}"
        raise SpkitError(f"{folder}: {what}; are all there? {_said(error)}") from None
    _refuse_incomplete(folder, report)
    return model


def _class_of(folder: Path, maker: str):
    """(transformers' configuration, the class that `maker` makes of it)."""
    import transformers

    path = folder / "config.json"
    makes = getattr(transformers, maker)._model_mapping
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes for a value it does not expect
        if _json_config(folder).get("auto_map"):
            raise SpkitError(
                f"{path} needs Python code of the checkpoint's own (auto_map), and none is run: "
                "take a model whose class is in transformers."
            ) from None
        raise SpkitError(f"{path} cannot be read: {_said(error)}") from None
    if type(config) not in makes:
        what = f"of the type {config.model_type!r}, of which there is no {KINDS[maker]}"
        raise SpkitError(f"{path} is {what}.")
    if maker == CAUSAL and type(config) in transformers.AutoModelForMaskedLM._model_mapping:
        raise SpkitError(f"{path} is of an encoder ({config.model_type}){NO_TEXT}.")
    return config, makes[type(config)]


def _said(error: Exception) -> str:
    """Its first line; of an error that says a name alone, as KeyError does, also its kind."""
    line = first_line(error)
    named = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and line
    return line if named else f"{type(error).__name__}: {line}"


def _refuse_incomplete(folder: Path, report: Mapping[str, Any]) -> None:
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SpkitError(f"{folder} lacks the tensor {missing[0]!r}{more}; is it complete?")
    if report["mismatched_keys"]:
        name, have, want = sorted(report["mismatched_keys"])[0]
        raise SpkitError(
            f"{folder}: the tensor {name!r} is {list(have)}, and config.json needs {list(want)}: "
            "they are of different models."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar, and a table of what it misses; here it becomes one sentence."""
    from transformers.utils import logging as its

    logger, bars = logging.getLogger("transformers"), its.is_progress_bar_enabled()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    its.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            its.enable_progress_bar()
