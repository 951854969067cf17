"""A LoRA adapter that PEFT's save_pretrained wrote, read as plain factors of weight matrices.

    folder/adapter_config.json          rank, scale, targets
    folder/adapter_model.safetensors    ...q_proj.lora_A.weight [r, in], ...q_proj.lora_B.weight

The change that the adapter makes to a weight is scale * B @ A, with the scale lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora (PEFT 0.21, tuners/lora). Whatever makes it another change is
refused. No pickle is read and no code is run.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from spkit.errors import SpkitError
from spkit.models.checkpoint_files import is_hub_id, load_json, read_header, read_small
from spkit.models.weights import target_weights

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Shapes = Mapping[str, tuple[int, int]]  # {checkpoint tensor name: (out, in)}
Pairs = dict[str, tuple[Tensor, Tensor]]  # {checkpoint tensor name: (A [r, in], B [out, r])}

FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight")
DTYPES = ("F64", "F32", "F16", "BF16")
# keys of LoraConfig that change nothing in scale * B @ A, or that are read below
HARMLESS = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision bias "
    "inference_mode r lora_alpha lora_dropout target_modules exclude_modules use_rslora "
    "rank_pattern alpha_pattern layers_to_transform layers_pattern init_lora_weights eva_config "
    "megatron_core megatron_config qalora_group_size runtime_config loftq_config corda_config "
    "lora_ga_config".split()
)
# of init_lora_weights, those that leave the backbone's weights as they are: the factors are all of
# the change. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the weights first
OWN_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """What the headers of one adapter say, checked against the backbone.

    keys: {checkpoint tensor name: (key of A, key of B)}, in the backbone's order. scales: by tensor
    name, of B @ A. about: for the record; without a path of this machine.
    """

    file: Path
    keys: dict[str, tuple[str, str]]
    scales: dict[str, float]
    about: dict[str, Any]


def check_adapter(folder: str | Path, shapes: Shapes) -> Adapter:
    """An adapter whose factors are all finite, fit the backbone, and change something.

    shapes: of all the backbone's linear layers; none of its weights is needed. SpkitError, in one
    sentence, for a folder that is no such adapter, and for one whose change is not scale * B @ A.
    """
    folder = Path(folder)
    config, tensors = _config(folder), _header(folder)
    keys = _paired(folder, tensors, shapes)
    scales = {}
    for name, (a, b) in keys.items():
        module = FACTOR.fullmatch(a)[1]
        rank = _number(folder, config, "r", "rank_pattern", module)
        alpha = _number(folder, config, "lora_alpha", "alpha_pattern", module)
        _check_shapes(folder, name, [tensors[key]["shape"] for key in (a, b)], rank, shapes[name])
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    _check_values(folder, keys)
    return Adapter(folder / WEIGHTS, keys, scales, _about(folder, config, keys))


def read_adapter(folder: str | Path, shapes: Shapes) -> tuple[Pairs, dict[str, Any]]:
    """({tensor name: (A [r, in], B [out, r])}, manifest) with B @ A the whole change, fp32.

    The scale is multiplied into B. Smaller ranks are filled up with zeros, so that all matrices
    have one r: the product is the same. The manifest tells the adapter and, as of a derived patch,
    the LoRA that carries these factors. SpkitError as in `check_adapter`.
    """
    found = check_adapter(folder, shapes)
    factors = {}
    with safe_open(found.file, framework="pt") as file:
        for name, (key_a, key_b) in found.keys.items():
            a, b = file.get_tensor(key_a).float(), file.get_tensor(key_b).float()
            factors[name] = a, b * found.scales[name]
    r = max(a.shape[0] for a, _ in factors.values())
    lora = {"r": r, "alpha": float(r), "dropout": 0.0, "targets": found.about["targets"]}
    manifest = {"adapter": found.about, "steps": 0, "stop": "given", "lora": lora}
    return {name: _filled(*pair, r) for name, pair in factors.items()}, manifest


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{checkpoint tensor name: (out, in)} of every linear layer of a bare model, also on "meta"."""
    return {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def covered(model: nn.Module, folders: Iterable[str | None], targets) -> Shapes:
    """The shapes of the matrices of both patches; {} where neither is an adapter.

    The difference sets compare the two, matrix by matrix. So both have the layers that either
    changes, by their last names, in all of the decoder: where a patch does not change one, its
    delta is 0, and its importance there is measured as anywhere else. folders: of the adapters;
    None: the patch is derived, on `targets`. SpkitError as in `check_adapter`, for either.
    """
    folders = list(folders)
    if not any(folders):
        return {}
    shapes, names = linear_shapes(model), []
    for folder in folders:
        if folder is None:
            names += target_weights(model, targets)
        else:
            names += check_adapter(folder, shapes).keys
    return {name: shapes[name] for name in target_weights(model, last_names(names))}


def completed(factors: Pairs, manifest: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """{"factors", "manifest"} of a patch on all of `shapes`: where it had none, A and B are 0."""
    r = max(a.shape[0] for a, _ in factors.values())
    whole = {
        name: factors.get(name) or (torch.zeros(r, columns), torch.zeros(rows, r))
        for name, (rows, columns) in shapes.items()
    }
    lora = {**manifest["lora"], "targets": last_names(shapes)}
    return {"factors": whole, "manifest": {**manifest, "lora": lora}}


def described(key: str, about: Mapping[str, Any], source: str) -> str:
    """One line on an adapter, and a remark where it names another base model than `source`.

    A remark only: the same weights may lie under another name.
    """
    line = (
        f"{key}: the adapter {about['name']} (r {about['r']}, alpha {about['lora_alpha']}, "
        f"{', '.join(about['targets'])}) is taken as it is, nothing is trained"
    )
    base = about["base_model"]
    if (
        base is None
        or base.rpartition("/")[2].lower() == _public(source).rpartition("/")[2].lower()
    ):
        return line
    return (
        f"{line}\n{key}: it was trained on {base}, and the backbone is {_public(source)}; "
        "its change is meant for the weights that it was trained on"
    )


# ---- the configuration ---------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once nothing in it makes another change than scale * B @ A."""
    if not folder.is_dir():
        hub = ", and one of the hub is downloaded first" if is_hub_id(str(folder)) else ""
        raise SpkitError(f"There is no folder {str(folder)!r}; an adapter has {CONFIG} in it{hub}.")
    if not (folder / CONFIG).is_file():
        whole = (folder / "config.json").is_file()
        what = "it is a whole checkpoint, not an adapter" if whole else "it is no PEFT adapter"
        raise SpkitError(f"The folder {str(folder)!r} has no {CONFIG}: {what}.")
    try:
        config = load_json(read_small(folder / CONFIG))
    except ValueError as error:
        raise SpkitError(f"{folder / CONFIG} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise SpkitError(f"{folder / CONFIG} is no JSON object, as PEFT writes it.")
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise SpkitError(f"{folder / CONFIG} is of type {kind!r}; only LORA can be a patch.")
    if config.get("bias", "none") != "none":
        _refuse(folder, "bias", config["bias"])
    if isinstance(start, str) and start not in OWN_STARTS:
        raise SpkitError(
            f"{folder / CONFIG} has init_lora_weights {start!r}, which changes the backbone's "
            "own weights first; convert the adapter to an ordinary LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key, value in config.items():
        if key not in HARMLESS and value not in (None, False, [], {}, ""):
            _refuse(folder, key, value)
    return config


def _refuse(folder: Path, key: str, value: Any) -> None:
    name = " (DoRA)" if key == "use_dora" else ""
    raise SpkitError(
        f"{folder / CONFIG} has {key} {value!r}{name}: only a plain LoRA, whose change of a weight "
        "is scale * B @ A, can be a patch."
    )


def _number(folder: Path, config: Mapping, key: str, pattern: str, module: str) -> float:
    """r or lora_alpha of one layer, as PEFT takes it: a matching pattern before the one number."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise SpkitError(f"{folder / CONFIG} has {pattern} {patterns!r}, must be a JSON object.")
    try:
        value = patterns.get(get_pattern_key(list(patterns), module), config.get(key))
    except re.error as error:
        raise SpkitError(f"{folder / CONFIG} has a {pattern} that is no regex: {error}") from None
    if key == "r" and not (type(value) is int and value > 0):
        raise SpkitError(f"{folder / CONFIG} has r {value!r}, must be a whole number above 0.")
    if type(value) not in (int, float) or not math.isfinite(value) or value == 0:
        raise SpkitError(f"{folder / CONFIG} has {key} {value!r}, must be a number other than 0.")
    return value


# ---- the tensors ---------------------------------------------------------------------------------


def _header(folder: Path) -> dict[str, Mapping[str, Any]]:
    """{key: {dtype, shape, ...}} of adapter_model.safetensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise SpkitError(
                f"{folder / PICKLE} is a pickle, which can run code and is not read: where you "
                f"trust it, load the adapter with PEFT and save_pretrained it as {WEIGHTS}."
            )
        raise SpkitError(f"The folder {str(folder)!r} has no {WEIGHTS}.")
    try:
        with path.open("rb") as file:
            return dict(read_header(file, path)[0])
    except OSError as error:
        raise SpkitError(f"{path} cannot be read: {error.strerror}") from None


def _paired(folder: Path, tensors: Mapping, shapes: Shapes) -> dict[str, tuple[str, str]]:
    """{checkpoint tensor name: (key of A, key of B)} in the backbone's order."""
    path, found = folder / WEIGHTS, {}
    for key, about in tensors.items():
        match = FACTOR.fullmatch(key)
        if key.endswith(".base_layer.weight"):
            raise SpkitError(
                f"{path} has a whole matrix beside the factors, {key!r}, as PEFT saves embeddings "
                "and a head that are targets: where they were not trained, save it again by "
                "save_pretrained(..., save_embedding_layers=False)."
            )
        if match is None:
            raise SpkitError(f"{path} has the tensor {key!r}, which is no factor of a plain LoRA.")
        if about["dtype"] not in DTYPES:
            raise SpkitError(
                f"{path} has {key!r} in {about['dtype']}; read are {', '.join(DTYPES)}."
            )
        name = _in_backbone(match[1], shapes)
        if name is None:
            raise SpkitError(
                f"{path} changes {match[1]!r}, and the backbone has no such linear layer: "
                "the adapter belongs to another model."
            )
        if match[2] in found.setdefault(name, {}):
            raise SpkitError(f"{path} has two factors {match[2]} of {name!r}; one adapter is read.")
        found[name][match[2]] = key
    for name, pair in found.items():
        for factor in {"A", "B"} - set(pair):
            raise SpkitError(f"{path} lacks the factor {factor} of {name!r}.")
    if not found:
        raise SpkitError(f"{path} holds no tensor: the adapter changes nothing.")
    return {name: (found[name]["A"], found[name]["B"]) for name in shapes if name in found}


def _in_backbone(module: str, shapes: Shapes) -> str | None:
    """The tensor's name in the backbone; a multimodal package has one more part in its names."""
    plain = re.sub(r"(^|\.)language_model\.", r"\1", module)
    for name in (module, plain, f"model.{plain}", plain.removeprefix("model.model.")):
        for full in (f"{name}.weight", f"model.{name}.weight"):
            if full in shapes:
                return full
    return None


def _check_shapes(folder: Path, name: str, found: list, rank: float, shape: tuple) -> None:
    rows, columns = shape
    expected = [[rank, columns], [rows, rank]]
    if [list(one) for one in found] != expected:
        raise SpkitError(
            f"{folder / WEIGHTS} has factors {found[0]} and {found[1]} of {name!r}, and the "
            f"backbone and {CONFIG} want {expected[0]} and {expected[1]}."
        )


def _check_values(folder: Path, keys: Mapping[str, tuple[str, str]]) -> None:
    """All finite, and at least one matrix with both factors not zero."""
    changes = False
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for pair in keys.values():
            values = [file.get_tensor(key) for key in pair]
            for key, value in zip(pair, values, strict=True):
                if not bool(torch.isfinite(value).all()):
                    raise SpkitError(
                        f"{folder / WEIGHTS} has values in {key!r} that are not finite."
                    )
            changes = changes or all(bool(value.any()) for value in values)
    if not changes:
        raise SpkitError(f"{folder / WEIGHTS} changes nothing: every B @ A is zero, as untrained.")


def _filled(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with rows and columns of zeros behind their own."""
    more = r - a.shape[0]
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))


# ---- the record ----------------------------------------------------------------------------------


def _about(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    base, kept = config.get("base_model_name_or_path"), ("r", "lora_alpha", "use_rslora")
    patterns = {key: config[key] for key in ("rank_pattern", "alpha_pattern") if config.get(key)}
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": folder.resolve().name,
        "sha256": digest,
        "base_model": _public(str(base)) if base else None,
        **{key: config.get(key, False) for key in kept},
        **patterns,
        "targets": last_names(names),
    }


def last_names(tensors: Iterable[str]) -> list[str]:
    """["q_proj", ...] of tensor names, each once, in their order."""
    return list(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in tensors))


def _public(source: str) -> str:
    """A hub id as it is; of a path the last part alone."""
    if is_hub_id(source) and not Path(source).exists():
        return source
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1]  # written on Windows, too
