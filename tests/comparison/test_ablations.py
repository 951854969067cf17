"""Every variant of a patch against a computation in plain loops, and the analysis by hand."""

import itertools
import math
import weakref
from fractions import Fraction

import pytest
import torch

from spkit.comparison import ablations
from spkit.comparison.ablations import (
    ABLATIONS,
    NO_RETENTION,
    NO_RETENTION_SCALED,
    NO_SUBTRACTION,
    RANDOM_SETS,
    SAFEPATCHING,
    VARIANTS,
    Variants,
    kept_norm,
    random_set,
)
from spkit.config import PatchingConfig
from spkit.errors import SpkitError
from spkit.method.overlap import overlap, where
from spkit.method.patch import Patch
from spkit.method.patching import retention_mask

SHAPES = {"model.layers.0.q_proj.weight": (4, 6), "model.layers.1.up_proj.weight": (3, 7)}
SEED = 5


def config(**changes):
    values = dict(retention_rate=0.6, top_rate_se=0.5, top_rate_osm=0.4, alpha=3.0, beta=2.0)
    return PatchingConfig(**{"scale": "plain"} | values | changes)


def factors(seed):
    """Small whole numbers, so that products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-4, 5, shape, generator=generator).float()  # noqa: E731
    return {name: (whole(2, cols), whole(rows, 2)) for name, (rows, cols) in SHAPES.items()}


def scores(seed):
    """Whole numbers again, so that there are ties; larger ones in the second matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(low, low + 9, shape, generator=generator).float()
        for low, (name, shape) in zip((0, 4), SHAPES.items(), strict=True)
    }


def variants(**changes):
    se, osm = Patch("se", factors(1), 0.5), Patch("osm", factors(2), 2.0)
    return Variants(se, osm, scores(3), scores(4), config(**changes), SEED)


# ---- the same in plain loops: a patch is {(tensor, row, column): value}


def flat(matrices):
    return {
        (name, i, j): value
        for name, matrix in matrices.items()
        for i, row in enumerate(matrix.tolist())
        for j, value in enumerate(row)
    }


def loop_delta(patch):
    delta = {}
    for name, (a, b) in patch.factors.items():
        a, b = a.tolist(), b.tolist()
        for i, j in itertools.product(range(len(b)), range(len(a[0]))):
            delta[name, i, j] = patch.scaling * sum(b[i][k] * a[k][j] for k in range(len(a)))
    return delta


def loop_top(score, rate, retained, setting):
    """The best of each matrix, or of all; equal scores in the matrices' order, row by row."""
    groups = [[at for at in score if at[0] == name] for name in SHAPES]
    if setting.scope == "global":
        groups = [sum(groups, [])]
    top = set()
    for group in groups:
        if setting.order == "rank_retained":
            group = [at for at in group if at in retained]
        ranked = sorted(group, key=lambda at: -score[at])  # stable
        top |= set(ranked[: math.floor(Fraction(str(rate)) * len(group))])
    return top


def loop_norm(delta, keep=None):
    return math.sqrt(sum(value**2 for at, value in delta.items() if keep is None or at in keep))


# SafePatching with one parameter changed: what it is to be the same as
CHANGES = {
    "rescaled by 1/p": {"scale": "plain", "rescale": True},
    "global top rate": {"scope": "global"},
    "ranked after retention": {"order": "rank_retained"},
}


def with_config(both, **changes):
    """The same patches, importances and seed under other parameters."""
    values = both.config.model_dump() | changes
    return Variants(
        both.se, both.osm, both.scores_se, both.scores_osm, PatchingConfig(**values), both.seed
    )


def loop_kept(variant, both):
    """({positions}, {positions}) of SE and OSM."""
    if variant in CHANGES:
        return loop_kept(SAFEPATCHING, with_config(both, **CHANGES[variant]))
    setting, score = both.config, (flat(both.scores_se), flat(both.scores_osm))
    everything = set(score[0])
    whole = {"SE only": "s", "OSM only": "o", "plain sum": "so"}
    if variant in whole:
        return tuple(everything if letter in whole[variant] else set() for letter in "so")
    retained = [
        {
            at
            for name, shape in SHAPES.items()
            for at, kept in flat(
                {name: retention_mask(shape, 0.6, seed=5, patch=patch, tensor=name)}
            ).items()
            if kept
        }
        for patch in ("se", "osm")
    ]
    if "without retention" in variant:
        retained = [everything, everything]
    top_se = loop_top(score[0], setting.top_rate_se, retained[0], setting)
    top_osm = loop_top(score[1], setting.top_rate_osm, retained[1], setting)
    if variant == "intersection":
        return retained[0] & top_se & top_osm, retained[1] & top_se & top_osm
    if variant == NO_SUBTRACTION:
        return retained[0] & top_se, retained[1] & top_osm
    return retained[0] & (top_se - top_osm), retained[1] & (top_osm - top_se)


def loop_strengths(variant, both):
    if variant in CHANGES:
        return loop_strengths(SAFEPATCHING, with_config(both, **CHANGES[variant]))
    if variant in ("SE only", "OSM only", "plain sum"):
        return float(variant != "OSM only"), float(variant != "SE only")
    share = {NO_RETENTION_SCALED: 0.6}.get(variant, 1.0)
    values = [3.0 * share, 2.0 * share]
    if both.config.scale == "norm_matched":
        kept = loop_kept(SAFEPATCHING if "without" in variant else variant, both)
        deltas = [loop_delta(both.se), loop_delta(both.osm)]
        for i in range(2):
            values[i] *= loop_norm(deltas[i]) / loop_norm(deltas[i], kept[i])
    elif both.config.rescale:
        values = [value / 0.6 for value in values]
    return tuple(values)


SETTINGS = [
    dict(scope=scope, order=order, **strength)
    for scope in ("matrix", "global")
    for order in ("rank_all", "rank_retained")
    for strength in ({}, {"rescale": True}, {"scale": "norm_matched"})
]


IN_LOOPS = (*VARIANTS, NO_SUBTRACTION, *CHANGES)


@pytest.mark.parametrize("variant", IN_LOOPS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_variant_is_what_the_loops_make_of_it(setting, variant):
    both = variants(**setting)
    kept = loop_kept(variant, both)
    for found, expected in zip(both.kept(variant), kept, strict=True):
        assert {at for at, value in flat(found).items() if value} == expected
    strengths = loop_strengths(variant, both)
    assert both.strengths(variant) == pytest.approx(strengths, rel=1e-9)
    merged = dict.fromkeys(flat(both.scores_se), 0.0)
    parts = zip((both.se, both.osm), kept, strengths, strict=True)
    for delta, keep, strength in [(loop_delta(patch), k, s) for patch, k, s in parts]:
        for at in keep:
            merged[at] += strength * delta[at]
    deltas = both.deltas(variant)
    assert list(deltas) == list(SHAPES)
    assert all(delta.dtype == torch.float32 for delta in deltas.values())
    assert flat(deltas) == pytest.approx(merged, rel=1e-6, abs=1e-5)


def test_the_settings_above_are_not_the_same_in_disguise():
    """Each parameter changes a kept set or a strength, or the loops would prove nothing."""
    for changes in SETTINGS:
        both = variants(**changes)
        for variant in ("intersection", NO_RETENTION, SAFEPATCHING):
            assert all(loop_kept(variant, both)), (changes, variant)
    kept = {
        (scope, order): loop_kept(SAFEPATCHING, variants(scope=scope, order=order))
        for scope in ("matrix", "global")
        for order in ("rank_all", "rank_retained")
    }
    assert all(a != b for a, b in itertools.combinations(kept.values(), 2))
    both = variants()
    made = {variant: str(loop_kept(variant, both)) for variant in VARIANTS}
    made[NO_RETENTION_SCALED] += "at another strength"
    assert len(set(made.values())) == len(VARIANTS)
    for variant in (NO_SUBTRACTION, "global top rate", "ranked after retention"):
        assert str(loop_kept(variant, both)) not in made.values()
    assert {*IN_LOOPS, RANDOM_SETS} == set(ABLATIONS)


def test_all_variants_by_hand():
    """One row of four weights, everything retained: S_SE = {0, 1}, S_OSM = {1, 2}."""
    row = lambda *values: torch.tensor([[float(value) for value in values]])  # noqa: E731
    one = torch.ones(1, 1)
    both = Variants(
        Patch("se", {"w": (row(1, 2, 3, 4), one)}, 1.0),
        Patch("osm", {"w": (row(10, 20, 30, 40), one)}, 1.0),
        {"w": row(4, 3, 2, 1)},
        {"w": row(1, 4, 3, 2)},
        config(retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, alpha=2.0, beta=3.0),
        seed=0,
    )
    patched = [2, 0, 90, 0]
    assert {name: deltas["w"].tolist()[0] for name, deltas in both} == {
        "SE only": [1, 2, 3, 4],
        "OSM only": [10, 20, 30, 40],
        "plain sum": [11, 22, 33, 44],
        "intersection": [0, 2 * 2 + 3 * 20, 0, 0],
        NO_RETENTION: patched,
        NO_RETENTION_SCALED: patched,  # p is 1
        SAFEPATCHING: patched,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("setting", SETTINGS[::3], ids=lambda s: "-".join(s.values()))
def test_the_kept_sets_are_disjoint_retained_and_important(setting, seed):
    both = variants(**setting)
    both = Variants(both.se, both.osm, scores(10 + seed), scores(20 + seed), both.config, seed)
    for variant in (SAFEPATCHING, NO_RETENTION, NO_RETENTION_SCALED):
        keep_se, keep_osm = both.kept(variant)
        assert not any((keep_se[name] & keep_osm[name]).any() for name in SHAPES)
    kept, masks, tops = both.kept(SAFEPATCHING), both.retained, both.important()
    for keep, retained, top in zip(kept, masks, tops, strict=True):
        assert any(keep[name].any() for name in SHAPES)
        assert not any((keep[name] & ~(retained[name] & top[name])).any() for name in SHAPES)


def test_each_patch_has_a_draw_of_its_own_from_the_seed():
    both = variants()
    for masks, patch in zip(both.retained, ("se", "osm"), strict=True):
        assert list(masks) == list(SHAPES)
        for name, mask in masks.items():
            drawn = retention_mask(SHAPES[name], 0.6, seed=SEED, patch=patch, tensor=name)
            assert torch.equal(mask, drawn)
    assert both.retained is both.retained  # drawn once
    one, other = both.retained
    assert not all(torch.equal(one[name], other[name]) for name in SHAPES)


# ---- what the comparison asks for beyond the seven


def same(one, other):
    assert list(one) == list(other) == list(SHAPES)
    return all(torch.equal(one[name], other[name]) for name in SHAPES)


def counts(sets):
    return {name: int(mask.sum()) for name, mask in sets.items()}


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=lambda s: "-".join(map(str, s.values())))
def test_random_sets_hold_as_many_weights_of_each_matrix(setting):
    both = variants(**setting)
    kept, drawn = both.kept(SAFEPATCHING), both.kept(RANDOM_SETS)
    for own, other in zip(kept, drawn, strict=True):
        assert counts(own) == counts(other) and any(counts(own).values())
        assert not same(own, other)
    expected = [
        {name: random_set(mask, seed=SEED, patch=patch, tensor=name) for name, mask in own.items()}
        for patch, own in zip(("se", "osm"), kept, strict=True)
    ]
    assert all(map(same, drawn, expected))


def test_random_sets_depend_on_the_seed_the_patch_and_the_tensor_alone():
    like = torch.zeros(30, 20, dtype=torch.bool)
    like[:4] = True
    drawn = random_set(like, seed=0, patch="se", tensor="w")
    assert drawn.dtype == torch.bool and drawn.shape == like.shape and drawn.sum() == 80
    torch.manual_seed(
        1
    )  # no framework's random state, and not which weights are kept, but how many
    assert torch.equal(random_set(like.flip(0), seed=0, patch="se", tensor="w"), drawn)
    for other in ({"seed": 1}, {"patch": "osm"}, {"tensor": "v"}):
        key = {"seed": 0, "patch": "se", "tensor": "w"} | other
        assert not torch.equal(random_set(like, **key), drawn)
    assert abs(drawn[:4].float().mean() - 80 / 600) < 0.15  # they do not follow `like`
    assert random_set(torch.ones(3, 2), seed=0, patch="se", tensor="w").all()
    assert not random_set(torch.zeros(3, 2), seed=0, patch="se", tensor="w").any()
    one, two = (variants().kept(RANDOM_SETS) for _ in range(2))
    assert all(map(same, one, two))
    both = variants()
    moved = Variants(both.se, both.osm, both.scores_se, both.scores_osm, both.config, SEED + 1)
    assert not any(map(same, one, moved.kept(RANDOM_SETS)))


def test_random_sets_move_the_weights_as_far():
    """At matched norms; else at SafePatching's own strengths."""
    both = variants(scale="norm_matched", beta=0.0)
    delta = both.deltas(RANDOM_SETS)
    norm = math.sqrt(sum(part.square().sum().item() for part in delta.values()))
    assert norm == pytest.approx(3.0 * both.se.norm(), rel=1e-5)
    assert variants().strengths(RANDOM_SETS) == (3.0, 2.0)


def test_no_subtraction_keeps_what_matters_to_both():
    both = variants()
    for own, kept, masks, top in zip(
        both.kept(NO_SUBTRACTION),
        both.kept(SAFEPATCHING),
        both.retained,
        both.important(),
        strict=True,
    ):
        assert same(own, {name: masks[name] & top[name] for name in SHAPES})
        assert sum(counts(own).values()) > sum(counts(kept).values())
        assert all((own[name] | ~kept[name]).all() for name in SHAPES)


@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_rescaled_is_alpha_by_p_on_safepatchings_sets(scale):
    both = variants(scale=scale)
    assert both.strengths("rescaled by 1/p") == pytest.approx((3.0 / 0.6, 2.0 / 0.6), rel=1e-12)
    keep_se, keep_osm = kept = both.kept("rescaled by 1/p")
    assert all(map(same, kept, both.kept(SAFEPATCHING)))
    expected = {
        name: 3.0 / 0.6 * both.se.delta(name) * keep_se[name]
        + 2.0 / 0.6 * both.osm.delta(name) * keep_osm[name]
        for name in SHAPES
    }
    found = both.deltas("rescaled by 1/p")
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6) for name in SHAPES)


@pytest.mark.parametrize("variant", CHANGES)
@pytest.mark.parametrize("scale", ["plain", "norm_matched"])
def test_a_changed_parameter_is_a_run_with_that_parameter(variant, scale):
    both = variants(scale=scale)
    other = with_config(both, **CHANGES[variant])
    assert same(both.deltas(variant), other.deltas(SAFEPATCHING))
    assert both.strengths(variant) == other.strengths(SAFEPATCHING)
    assert not same(both.deltas(variant), both.deltas(SAFEPATCHING))


def test_which_variants_depend_on_the_mask():
    """What ABLATIONS says is what another seed does; matched strengths follow the masks, too."""
    both = variants(scale="norm_matched")
    moved = Variants(both.se, both.osm, both.scores_se, both.scores_osm, both.config, SEED + 1)
    for name, masks in ABLATIONS.items():
        assert same(both.deltas(name), moved.deltas(name)) is not masks, name


# ---- strengths


def test_the_two_rows_without_retention():
    """At SafePatching's strength, and at p times that, whatever SafePatching's strength is."""
    plain = variants(retention_rate=0.25)
    assert plain.strengths(SAFEPATCHING) == (3.0, 2.0)
    assert plain.strengths(NO_RETENTION) == (3.0, 2.0)
    assert plain.strengths(NO_RETENTION_SCALED) == (0.75, 0.5)
    longer = variants(retention_rate=0.25, rescale=True)
    assert longer.strengths(SAFEPATCHING) == (12.0, 8.0)
    assert longer.strengths("intersection") == (12.0, 8.0)
    assert longer.strengths(NO_RETENTION) == (12.0, 8.0)
    assert longer.strengths(NO_RETENTION_SCALED) == (3.0, 2.0)
    assert [longer.strengths(name) for name in VARIANTS[:3]] == [(1, 0), (0, 1), (1, 1)]


def five_long(**changes):
    """|P_SE| = 5, of which SE keeps the 4 (norm 4); |P_OSM| = 13, of which OSM keeps nothing."""
    row = lambda *values: torch.tensor([[float(value) for value in values]])  # noqa: E731
    one = torch.ones(1, 1)
    return Variants(
        Patch("se", {"a": (row(3, 0), one), "b": (row(4, 0), one)}, 1.0),
        Patch("osm", {"a": (row(5, 12), one), "b": (row(0, 0), one)}, 1.0),
        {"a": row(1, 2), "b": row(2, 1)},  # S_SE: 1 of a, 0 of b
        {"a": row(1, 2), "b": row(1, 2)},  # S_OSM: 1 of a, 1 of b
        config(retention_rate=1.0, top_rate_se=0.5, top_rate_osm=0.5, **changes),
        seed=0,
    )


def test_norm_matched_strengths_by_hand():
    both = five_long(scale="norm_matched")
    assert both.strengths(SAFEPATCHING) == (3.0 * 5 / 4, 0.0)  # P_OSM is 0 where it is kept
    # both keep 1 of a, where P_SE is 0 and P_OSM is 12
    assert both.strengths("intersection") == (0.0, 2.0 * 13 / 12)
    assert both.strengths(NO_RETENTION) == (3.75, 0.0)
    # of the sets that are handed in, and not of the variant's own
    kept = ({n: torch.ones(1, 2, dtype=torch.bool) for n in "ab"},) * 2
    assert both.strengths(SAFEPATCHING, kept) == (3.0, 2.0)
    assert five_long(scale="norm_matched", rescale=True).strengths(SAFEPATCHING) == (3.75, 0.0)
    assert both.deltas(SAFEPATCHING)["b"].tolist() == [[15.0, 0.0]]  # as long as alpha |P|


def test_kept_norm_by_hand():
    patch = five_long().se
    keep = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, True]])}
    assert kept_norm(patch, keep) == 3.0
    assert kept_norm(patch, {name: ~mask for name, mask in keep.items()}) == 4.0
    assert kept_norm(patch, {name: mask | True for name, mask in keep.items()}) == 5.0


# ---- iteration


def test_variants_come_in_order_and_one_at_a_time(monkeypatch):
    both, made, alive, own = variants(), [], [], Variants.deltas

    def spy(self, variant):
        assert not [matrix for matrix in alive if matrix() is not None]  # the last one's are gone
        made.append(variant)
        return own(self, variant)

    monkeypatch.setattr(Variants, "deltas", spy)
    for name, deltas in both:
        assert made[-1] == name and len(made) == len(set(made))
        expected = own(both, name)
        assert all(torch.equal(deltas[n], expected[n]) for n in expected)
        alive = [weakref.ref(matrix) for matrix in deltas.values()]
        del deltas
    assert tuple(made) == VARIANTS


def test_a_variant_made_twice_has_the_same_bits():
    one, two = variants().deltas(SAFEPATCHING), variants().deltas(SAFEPATCHING)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- what does not fit


@pytest.mark.parametrize(
    "field, where",
    [
        ("osm", "the OSM patch"),
        ("scores_se", "the SE importance"),
        ("scores_osm", "the OSM importance"),
    ],
)
def test_parts_that_do_not_fit_are_named(field, where):
    both = variants()
    parts = {name: getattr(both, name) for name in both.__dataclass_fields__}
    first, second = SHAPES

    def put(matrices):
        changed = Patch("osm", matrices, 1.0) if field == "osm" else matrices
        return Variants(**parts | {field: changed})

    whole = dict(both.osm.factors if field == "osm" else parts[field])
    with pytest.raises(SpkitError) as caught:
        put({first: whole[first]})
    assert str(caught.value) == f"{where} lacks the tensor {second!r}, which the SE patch has"
    with pytest.raises(SpkitError) as caught:
        put(whole | {"more": whole[first]})
    assert str(caught.value) == f"the SE patch lacks the tensor 'more', which {where} has"
    with pytest.raises(SpkitError) as caught:
        put({first: whole[first], second: whole[first]})
    assert str(caught.value) == f"{second!r} is [3, 7] in the SE patch, but [4, 6] in {where}"
    assert put(whole).kept(SAFEPATCHING)


def test_an_unknown_variant():
    both = variants()
    for ask in (both.kept, both.strengths, both.deltas):
        with pytest.raises(SpkitError, match=r"^unknown variant 'SE', allowed: SE only, OSM only"):
            ask("SE")


# ---- analysis


def mask(text):
    return torch.tensor([[letter == "1" for letter in row] for row in text.split()])


def rows(frame):
    return [tuple(row) for row in frame.itertuples(index=False)]


def test_where_by_hand():
    up, head = "model.layers.12.mlp.up_proj.weight", "lm_head.weight"
    se, osm = {up: mask("110 100"), head: mask("0000")}, {up: mask("000 000"), head: mask("1111")}
    frame = where({"SE": se, "OSM": osm})
    assert list(frame) == ["set", "tensor", "layer", "module", "n", "k", "share"]
    assert rows(frame) == [
        ("SE", up, 12, "up_proj", 6, 3, 0.5),
        ("SE", head, -1, "lm_head", 4, 0, 0.0),
        ("OSM", up, 12, "up_proj", 6, 0, 0.0),
        ("OSM", head, -1, "lm_head", 4, 4, 1.0),
    ]


def test_overlap_by_hand():
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"
    own, other = {q: mask("1111 0000"), up: mask("100")}, {q: mask("1000 1100"), up: mask("000")}
    frame = overlap(own, other)
    named = ["tensor", "layer", "module", "own", "other", "both", "share", "jaccard"]
    assert list(frame) == named
    assert rows(frame) == [
        (q, 0, "q_proj", 4, 3, 1, 1 / 4, 1 / 6),
        (up, 3, "up_proj", 1, 0, 0, 0.0, 0.0),
        ("all", -1, "all", 5, 3, 1, 1 / 5, 1 / 7),  # of the sums, no mean of the shares
    ]
    swapped = overlap(other, own)
    assert swapped["share"].tolist() == [1 / 3, 0.0, 1 / 3]
    assert swapped["jaccard"].tolist() == frame["jaccard"].tolist()


def test_overlap_of_empty_sets():
    nothing = {"a": mask("000"), "b": mask("00")}
    frame = overlap(nothing, nothing)
    assert frame["tensor"].tolist() == ["a", "b", "all"]
    assert frame[["own", "other", "both", "share", "jaccard"]].to_numpy().tolist() == [[0] * 5] * 3


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
    assert ablations.place(tensor) == {"tensor": tensor, "layer": layer, "module": module}
