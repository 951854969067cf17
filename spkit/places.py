"""Where in a model a tensor lies, read off its name."""

import re


def place(tensor: str) -> dict[str, str | int]:
    """Layer number (-1 outside of the layers) and module of "model.layers.3.mlp.up_proj.weight"."""
    layer = re.search(r"\.(\d+)\.", tensor)
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    return {"tensor": tensor, "layer": int(layer[1]) if layer else -1, "module": module}
