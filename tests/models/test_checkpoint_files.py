"""Layer and module of a tensor's name."""

import pytest

from spkit.models.checkpoint_files import place


@pytest.mark.parametrize(
    "tensor, layer, module",
    [
        ("model.layers.3.mlp.up_proj.weight", 3, "up_proj"),
        ("model.layers.31.self_attn.q_proj.weight", 31, "q_proj"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", 2, "down_proj"),
        ("transformer.h.0.attn.c_attn.weight", 0, "c_attn"),
        ("lm_head.weight", -1, "lm_head"),
        ("proj2.weight", -1, "proj2"),
    ],
)
def test_layer_and_module_of_a_name(tensor, layer, module):
    assert place(tensor) == {"tensor": tensor, "layer": layer, "module": module}
