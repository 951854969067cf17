"""Models of random weights in several sizes, and pairs for them: nothing is downloaded."""

from dataclasses import dataclass

import torch

from spkit.bench import random_checkpoint
from spkit.examples import HarmfulPair
from spkit.method.patch import Factors
from spkit.models.weights import target_weights

# hidden, layers, intermediate, heads, kv heads, head_dim, vocabulary, tied; 135 M is SmolLM2's
SHAPES = {
    "1 M": [128, 4, 384, 4, 4, 32, 2048, True],
    "10 M": [320, 6, 864, 5, 5, 64, 8192, True],
    "50 M": [512, 13, 1408, 8, 8, 64, 16384, True],
    "135 M": [576, 30, 1536, 9, 3, 64, 49152, True],
    "500 M": [1024, 36, 2816, 16, 16, 64, 32000, True],
    "1 B": [1536, 33, 4224, 24, 24, 64, 32000, True],
}


@dataclass(frozen=True)
class Size:
    """One size of model. name: a key of SHAPES."""

    name: str

    @property
    def sizes(self) -> dict:
        """As random_checkpoint takes them."""
        return dict(zip(random_checkpoint.SIZES, SHAPES[self.name], strict=True))

    @property
    def configuration(self):
        """transformers' LlamaConfig."""
        return random_checkpoint.configuration("llama", self.sizes)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return SHAPES[self.name][1]

    @property
    def weights(self) -> int:
        """All parameters, tied ones once."""
        return sum(p.numel() for p in random_checkpoint.meta_model(self.configuration).parameters())

    def model(self, device: str = "cpu", dtype: torch.dtype = torch.float32):
        """transformers' LlamaForCausalLM with weights drawn from seed 0, in eval mode."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        config = self.configuration
        return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


@dataclass(frozen=True)
class Named:
    """A model of its own, in place of a size."""

    name: str
    weights: int


SANDBOX = Named("sandbox", 1_887_168)


def factors(model, name: str, targets) -> Factors:
    """A patch of rank 8 with random factors, for every targeted matrix."""
    torch.manual_seed(0 if name == "se" else 1)
    made = {
        tensor: (torch.randn(8, layer.in_features), torch.randn(layer.out_features, 8))
        for tensor, layer in target_weights(model, targets).items()
    }
    return Factors(name, made, 1e-3)


def pairs(count: int, words: int = 20, answer: int | None = None) -> list[HarmfulPair]:
    """Questions and answers of words that mean nothing, the same ones for the same numbers.

    words: of a text on average, from half to one and a half times as many. answer: every answer has
    exactly so many.
    """
    generator = torch.Generator().manual_seed(0)

    def text(length: int | None = None) -> str:
        if length is None:
            spread = (words // 2, words + words // 2)
            length = int(torch.randint(*spread, (), generator=generator))
        chosen = torch.randint(len(random_checkpoint.WORDS), (length,), generator=generator)
        return " ".join(random_checkpoint.WORDS[i] for i in chosen)

    return [HarmfulPair(str(i), text(), text(answer), "words") for i in range(count)]
