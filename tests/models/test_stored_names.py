"""One prefix brings the model's names and the files' together, and never a vision tower's."""

import pytest

from spkit.errors import SpkitError
from spkit.models.stored_names import stored_names

Q, UP = "layers.{}.self_attn.q_proj.weight", "layers.{}.mlp.up_proj.weight"
WANTED = {f"model.{name.format(i)}": [4, 4] for i in (0, 1) for name in (Q, UP)}


def files(*prefixes, shape=(4, 4), **more):
    """As checkpoint_files.headers gives them."""
    names = [prefix + name.format(i) for prefix in prefixes for i in (0, 1) for name in (Q, UP)]
    return {name: ("file", 8, {"shape": list(shape)}) for name in names} | more


@pytest.mark.parametrize(
    "prefix",
    ["model.", "", "language_model.model.", "model.language_model.", "transformer."],
)
def test_one_prefix_for_all(prefix):
    tower = {f"vision_tower.encoder.{Q.format(i)}": ("file", 8, {"shape": [4, 4]}) for i in (0, 1)}
    other = files("vision_tower.encoder.", "model.visual.", "mtp.")  # every name and shape fits
    found = stored_names(WANTED, {**tower, **other, **files(prefix)}, "here")
    assert found == {name: prefix + name.removeprefix("model.") for name in WANTED}
    assert list(found) == list(WANTED)


def test_shapes_decide_where_two_prefixes_have_the_names():
    both = {**files("a.", shape=(2, 4)), **files("b.")}
    assert set(stored_names(WANTED, both, "here").values()) == set(files("b."))
    with pytest.raises(SpkitError, match="in more than one place: 'a.layers.0.*', 'b.layers.0"):
        stored_names(dict.fromkeys(WANTED), both, "here")


def test_a_head_has_its_own_prefix():
    stored = files("language_model.model.") | {"language_model.lm_head.weight": ("file", 8, {})}
    found = stored_names({**dict.fromkeys(WANTED), "lm_head.weight": None}, stored, "here")
    assert found["lm_head.weight"] == "language_model.lm_head.weight"


def test_the_first_tensor_without_a_place_is_named():
    stored = files("")
    del stored[UP.format(1)]
    missing = f"model.{UP.format(1)}"
    with pytest.raises(SpkitError, match=f"^The checkpoint here has no tensor '{missing}'; the ne"):
        stored_names(WANTED, stored, "here")
    with pytest.raises(SpkitError, match=r"has no tensor 'model\.layers\.0\.self_attn.*'\.$"):
        stored_names(WANTED, files("vision_tower."), "here")


def test_nothing_wanted_nothing_found():
    assert stored_names({}, {}, "here") == {}
