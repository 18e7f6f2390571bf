"""Superformer: sharing, shifting, masked equals cut out, quirks, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmodels
from jaxmodels.search import vitas, vitas_extract, vitas_nets, vitas_space
from jaxmodels.search.twins_space import Space as TwinsSpace
from jaxmodels.search.vitas_space import Space
from tests.search.tiny_space import CHEAP, drawn_variables

ARGUMENTS = dict(
    patches=(4, 8), heads=(1, 2, 3), dim=20, attention=90, mlp=24, depth=3, classes=4,
    image_size=16, percent=(0.2, 0.4, 0.6, 0.8, 1.0),
)  # fmt: skip
SPACE = Space(**ARGUMENTS)
CORRECTED = vitas.Superformer(**ARGUMENTS, compat="corrected")
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 16, 3)), jnp.float32)
# patch 1; heads 2, identity, 3; dim 3rd of 5; widths of each position.
GENOME = np.array([1, 1, 3, 2, 0, 0, 2, 1, 2, 4, 4, 3, 0])


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(CORRECTED)


@functools.cache
def _compiled(module, patch):
    return jax.jit(
        lambda v, x, c: module.apply(v, x, c._replace(patch=patch)), compiler_options=CHEAP
    )


def apply(module, variables, choice):
    """Logits of a choice whose patch index is a number: one program a module and patch size."""
    return _compiled(module, choice.patch)(variables, IMAGES, choice._replace(patch=None))


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)))))
@settings(max_examples=60, deadline=None)
def test_cyclic_sharing_is_even_for_any_ascending_widths(case):
    channels, widths = case
    widths = sorted(widths) or [channels]
    usage = vitas_space.channel_usage(widths, channels)
    assert usage.max() - usage.min() <= 1 and usage.sum() == sum(widths)
    masks = vitas_space.cyclic_masks(widths, channels)
    assert masks.sum(1).tolist() == widths
    if widths[-1] == channels:
        assert masks[-1].all()


@pytest.mark.parametrize("side", ("cyclic", "left", "right"))
def test_a_genome_cut_out_of_the_weights_computes_the_same(variables, side):
    genome = SPACE.shift(GENOME)
    choice = vitas.make_choice(SPACE, genome, side, "corrected")
    wanted = apply(CORRECTED, variables, choice)
    network, own = vitas_extract.extract(CORRECTED, variables, genome, side)
    cut = jax.jit(network.apply, compiler_options=CHEAP)(own, IMAGES)
    chex.assert_trees_all_close(cut, wanted, atol=1e-5)


def test_one_compiled_function_serves_every_genome(variables):
    @functools.partial(jax.jit, compiler_options=CHEAP)
    @chex.assert_max_traces(n=1)
    def masked(genome, side):
        return CORRECTED.apply(variables, IMAGES, vitas.choices(SPACE, genome, side, "corrected"))

    for genome in SPACE.shift(SPACE.sample_many(np.random.default_rng(0), 4, 0.4)):
        if (genome[1:4] == SPACE.identity_index).all():
            continue
        choice = vitas.make_choice(SPACE, genome, "cyclic", "corrected")
        wanted = apply(CORRECTED, variables, choice)  # no padding tokens, one patch size
        chex.assert_trees_all_close(masked(genome, 2), wanted, atol=1e-5)


def test_channels_outside_a_cyclic_set_get_no_gradient(variables):
    choice = vitas.make_choice(SPACE, SPACE.shift(GENOME), "cyclic", "corrected")

    @functools.partial(jax.jit, compiler_options=CHEAP)
    def gradient(params):
        return jax.grad(lambda p: jnp.square(CORRECTED.apply({"params": p}, IMAGES, choice)).sum())(
            params
        )

    found = gradient(variables["params"])
    used = np.zeros(20, bool)
    used[vitas.token_indices(choice, 20)] = True
    stem, block = "net.backbone_init_stem_Patch_init_0.1", "net.backbone_Block_id.*.0"
    tensors = {
        "class token": found[stem]["cls_token"][0, 0],
        "positions": found[stem]["pos_embed"][0].sum(0),
        "embedding": found[f"{stem}.patch_embed.proj"]["kernel"].sum((0, 1, 2)),
        "norm": found[f"{block}.norm1"]["scale"][0],
        "v columns": found[f"{block}.attn.v"]["kernel"][0].sum(1),
        "fc2 rows": found[f"{block}.mlp.fc2"]["kernel"][0].sum(0),
        "head": found["net.backbone_FC_FC_0.0.module.0"]["kernel"].sum(1),
    }
    for name, tensor in tensors.items():
        assert not np.any(tensor[~used]), name
        assert np.any(tensor[used]), name


def test_shifting_is_idempotent_keeps_the_network_and_merges_equal_ones():
    drawn = SPACE.sample_many(np.random.default_rng(0), 3000, 0.5)
    shifted = SPACE.shift(drawn)
    assert (SPACE.shift(shifted) == shifted).all()
    assert (SPACE.flops(drawn) == SPACE.flops(shifted)).all()

    def network(genome):
        patch, dim, blocks = SPACE.decode(genome)
        return patch, dim, tuple(b for b in blocks if b is not None)

    assert all(network(a) == network(b) for a, b in zip(drawn, shifted))
    unique = np.unique(shifted, axis=0)
    assert len({network(g) for g in unique}) == len(unique)
    # 4^3 patterns of ops fall to 1 + 3 + 9 + 27.
    assert len(np.unique(drawn[:, 1:4], axis=0)) == 64
    assert len(np.unique(shifted[:, 1:4], axis=0)) == 40


def test_draws_inside_jit_follow_the_law():
    space = Space()
    draw = jax.jit(jax.vmap(lambda key: space.sample(key, 0.3, shift=True)))
    genomes = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    assert (space.shift(genomes) == genomes).all()
    away = (genomes[:, 1:17] == 4).mean()
    assert abs(away - 0.3) < 0.01
    assert np.allclose(np.bincount(genomes[:, 19]) / 3000, 0.1, atol=0.03)


def test_the_official_quirks_make_a_difference(variables):
    official = CORRECTED.clone(compat="official")
    outputs = {}
    for name, module, genome in (
        ("all of them", official, GENOME),
        ("none", CORRECTED, GENOME),
        ("scale and positions", official, SPACE.shift(GENOME)),
    ):
        choice = vitas.make_choice(SPACE, genome, "left", module.compat)
        outputs[name] = np.asarray(apply(module, variables, choice))
        if name == "all of them":
            table = choice._replace(last_position=False)
            outputs["table"] = np.asarray(apply(module, variables, table))
    assert not np.allclose(outputs["all of them"], outputs["none"], atol=1e-3)
    assert not np.allclose(outputs["all of them"], outputs["table"], atol=1e-3)
    # After shifting, consuming width genes in order and by position is the same (Q2).
    assert not np.allclose(outputs["all of them"], outputs["scale and positions"], atol=1e-4)


def test_the_softmax_scale_and_the_fused_slices_differ_where_they_should(variables):
    official = CORRECTED.clone(compat="official")

    def both(op, attention):
        """Logits of either mode for one genome, positions and width genes out of play."""
        genome = np.array([1, op, op, op, 0, 0, 4, *[attention, 4] * 3])
        choice = vitas.make_choice(SPACE, genome, "left", "corrected")
        return (np.asarray(apply(m, variables, choice)) for m in (official, CORRECTED))

    # Three heads of the whole dim have the superformer's scale, and whole rows are the same rows.
    np.testing.assert_allclose(*both(op=2, attention=4), atol=1e-6)
    ours, theirs = both(op=0, attention=4)  # Q3: one head of the whole dim
    assert not np.allclose(ours, theirs, atol=1e-3)
    ours, theirs = both(op=2, attention=1)  # Q4: k rows of a narrow net are q rows of the wide one
    assert not np.allclose(ours, theirs, atol=1e-3)


def test_the_identity_probability_is_found_or_the_band_refused():
    space = Space()
    probability, mean = space.identity_probability(900e6, 1000e6, draws=400)
    assert 0.4 < probability < 0.65 and 900e6 <= mean <= 1000e6
    low, high = space.cheapest_and_dearest()
    with pytest.raises(ValueError, match=f"they have {low:,} to {high:,}"):
        space.identity_probability(1.0, 2.0)
    with pytest.raises(ValueError, match="no network has between"):
        space.identity_probability(2e9, 1e9)
    with pytest.raises(ValueError, match=f"above the largest network; networks have {low:,} to"):
        space.check_budget(1e9, 1e13)
    twins = TwinsSpace((24, 48), (2, 2), (2, 6), (4, 2), (4, 2), image_size=32)
    least, most = (twins.flops(twins.sample_many(np.random.default_rng(0), 999, p)).mean()
                   for p in (0.9, 0.8))  # fmt: skip
    probability, mean = twins.identity_probability(least, most, draws=400)
    assert 0.75 < probability < 0.95 and least <= mean <= most
    with pytest.raises(ValueError, match=r"stage 0: a 8x8 map does not divide by .* ratio 3"):
        TwinsSpace((24, 48), (2, 2), (2, 6), (4, 2), (3, 2), image_size=32)


def test_positions_for_another_image_size_are_resized_bicubically():
    table = np.random.default_rng(0).normal(size=(1, 17, 6)).astype(np.float32)
    assert vitas_nets.resize_positions(table, 4) is table
    larger = vitas_nets.resize_positions(table, 6)
    assert larger.shape == (1, 37, 6) and (larger[:, 0] == table[:, 0]).all()
    # PyTorch 2.13's interpolate(mode="bicubic", align_corners=False): first and last rows.
    grid = np.arange(16, dtype=np.float32) ** 1.5
    rows = {
        6: ([-0.76482, -0.44675, 0.38913, 1.3763, 3.07654, 4.23411],
            [42.74615, 45.38144, 49.76609, 52.97458, 57.60194, 60.473]),
        3: ([1.04404, 3.09345, 6.46496], [39.75576, 46.95706, 54.59396]),
    }  # fmt: skip
    for side, (first, last) in rows.items():
        table = np.concatenate([[7.0], grid]).astype(np.float32)[None, :, None]
        found = vitas_nets.resize_positions(table, side)[0, 1:, 0].reshape(side, side)
        np.testing.assert_allclose(found[[0, -1]], [first, last], rtol=1e-5, atol=2e-5)
    flat = np.ones((1, 17, 1), np.float32)
    assert np.allclose(vitas_nets.resize_positions(flat, 7), 1)
    with pytest.raises(ValueError, match="no square grid"):
        vitas_nets.resize_positions(table[:, :16], 4)


def test_a_file_is_loaded_at_another_image_size_where_that_is_asked_for(variables):
    from jaxmodels.interop.catalog import export

    state = export("search.vitas", CORRECTED, variables)
    larger = {**ARGUMENTS, "compat": "corrected", "image_size": 24}
    with pytest.raises(ValueError, match=r"0.pos_embed has 17 positions, .* wants 37; resize_che"):
        jaxmodels.load("search.vitas", state, **larger)
    _, found = jaxmodels.load("search.vitas", state, **larger, resize_checkpoint=True)
    for i, side in enumerate((6, 3)):
        stem = f"net.backbone_init_stem_Patch_init_0.{i}"
        wanted = vitas_nets.resize_positions(variables["params"][stem]["pos_embed"], side)
        np.testing.assert_array_equal(found["params"][stem]["pos_embed"], wanted)
    network, own = vitas_extract.extract(CORRECTED, variables, SPACE.shift(GENOME), "cyclic")
    state = export("search.vitas:ViTAS", network, own)
    arguments = {**vitas_nets.standalone_arguments(SPACE, SPACE.shift(GENOME)), "image_size": 24}
    _, found = jaxmodels.load("search.vitas:ViTAS", state, **arguments, resize_checkpoint=True)
    stem = "net.backbone_init_stem_Patch_init_0.0"
    assert found["params"][stem]["pos_embed"].shape[1] == 10


def _genome(**changes):
    genome = GENOME.copy()
    for place, value in changes.items():
        genome[int(place[1:])] = value
    return genome


BAD = {
    "length": (lambda: SPACE.check(GENOME[:-1]), r"6 \+ 7 genes, not 12"),
    "op": (lambda: SPACE.check(_genome(g1=4)), r"gene 1 \(op index\): 4 is not in 0..3"),
    "width": (lambda: SPACE.check(_genome(g7=5)), r"gene 7 \(width index\): 5 is not in 0..4"),
    "heads": (
        lambda: vitas.ViTAS(dim=20, blocks=((4, 90, 24),), classes=4),
        "attention width 90 is not divisible by 3 x 4 heads",
    ),
    "identity": (lambda: SPACE.check(_genome(g1=3, g3=3)), "all blocks are the identity"),
    "patch": (lambda: Space(image_size=30), "image size 30 is not divisible by patch 14"),
    "image": (
        lambda: CORRECTED.init(jax.random.key(0), jnp.zeros((1, 12, 12, 3))),
        "images are 12x12, the position tables are of 16x16",
    ),
    "side": (lambda: vitas.make_choice(SPACE, GENOME, None), "needs a side"),
    "descending": (lambda: vitas_space.cyclic_offsets([3, 2], 5), "must ascend"),
    "repeated": (lambda: vitas_space.cyclic_offsets([2, 2], 5), "without repetition: 2 follows 2"),
    "wide": (lambda: vitas_space.cyclic_offsets([2, 6], 5), r"2..6 must lie in 1..5"),
    "none": (lambda: vitas_space.cyclic_offsets([], 5), "at least one width"),
    "qkv": (lambda: vitas.Superformer(qkv=3), "qkv mode 3; known: 0, 1, 2"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_named(mistake):
    make, message = BAD[mistake]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_superformers_file_is_no_stand_alone_network(variables):
    from jaxmodels.interop.catalog import export

    shared = export("search.vitas", CORRECTED, variables)
    assert "net.backbone_Block_id_2.0.attn.qk1.weight" in shared
    with pytest.raises(ValueError, match=r"attn\.qk0.*attn\.qkv"):
        jaxmodels.load("search.vitas:digits_net", shared)
    from jaxmodels.interop import catalog

    module = catalog.find("search.vitas:digits_net").build()
    own = drawn_variables(module)
    single = export("search.vitas:digits_net", module, own)
    with pytest.raises(ValueError, match=r"attn\.qkv.*attn\.qk0"):
        jaxmodels.load("search.vitas", single, **ARGUMENTS)


def test_width_genes_are_checked_where_they_are_used():
    # Attention rows 12, 24, 36, 48 and 60; only 36 divides by 3 x 3 heads.
    space = Space(**{**ARGUMENTS, "attention": 60})
    genome = np.array([1, 3, 2, 3, 0, 0, 2, 2, 2, 0, 0, 0, 0])
    choice = vitas.make_choice(space, genome, "left")  # gene 2 serves the only block
    assert (int(choice.qk[1]), int(choice.v[1])) == (24, 12)
    with pytest.raises(ValueError, match="block 1: attention width 12 is not divisible by 3 x 3"):
        vitas.make_choice(space, genome, "left", "corrected")
    with pytest.raises(ValueError, match="block 1: attention width 12 is not divisible by 3 x 3"):
        space.check(genome)


def test_recorded_draws_may_have_widths_that_heads_do_not_divide():
    space = Space(**{**ARGUMENTS, "attention": 60})
    ops, shares = np.array([[1, 2, 3, 3, 0, 0]]), np.array([[0.2, 0.2, 1, 1, 1, 1, 1]])
    found = space.recover(ops, shares)
    assert found.tolist() == [[1, 2, 3, 3, 0, 0, 0, 0, 4, 4, 4, 4, 4]]
    assert not space.legal(found)[0]


def test_only_cyclic_sharing_needs_widths_that_differ():
    space = Space(**{**ARGUMENTS, "percent": (0.78, 0.8, 1.0)})  # 15.6 and 16 of 20 tokens
    genome = np.array([1, 0, 3, 3, 0, 0, 0, 2, 2, 2, 2, 2, 2])
    assert int(vitas.make_choice(space, genome, "right").offset) == 4
    with pytest.raises(ValueError, match="without repetition"):
        vitas.make_choice(space, genome, "cyclic")


def test_official_configurations_may_name_fewer_heads_than_ops():
    config = {
        "backbone": {
            "init_stem": [1, 3, [4, 8], [], 20, [], [], True, ["Patch_init"]],
            "Block": [2, 20, [1, 2], 90, 20, 24, 20, True, ["Block", "id"]],
            "FC": [1, 20, [], [], 4, [], [], False, ["FC"]],
        },
        "image_size": 16,
        "heads_share": True,
        "net_id": "1 9 3 0 0 0 0 0 0 0",
    }
    assert vitas_space.from_official(config).heads == (1, 2, 2, 2)
    config["backbone"]["Block"][2] = [1, 2, 3, 5, 6]  # a fifth would be the identity's number
    assert vitas_space.from_official(config).heads == (1, 2, 3, 5)
    config["backbone"]["Block"][2] = [1, 2]
    assert vitas_space.official_genome(config)[:3].tolist() == [1, 4, 3]


def test_a_cut_box_is_that_of_double_precision():
    from train.data.image_mixing import cut_box

    box, share = cut_box((20, 20), 0.91, 10, 10)  # 20 sqrt(0.09), just below 6
    assert [int(n) for n in box] == [8, 12, 8, 12] and float(share) == pytest.approx(0.96)


@pytest.mark.parametrize(
    ("size", "count"), (("small", 24_060_776), ("base", 56_070_952), ("large", 99_271_400))
)
def test_twins_has_the_published_number_of_parameters(size, count):
    from jaxmodels.interop import catalog

    module = catalog.find(f"search.twins:twins_svt_{size}").build()
    shapes = jax.tree.leaves(catalog.shapes(module)["params"])
    assert sum(int(np.prod(s.shape)) for s in shapes) == count


def test_windows_that_do_not_tile_a_map_are_named():
    from jaxmodels.search.twins import TwinsSVT

    with pytest.raises(ValueError, match="a 16x16 map does not divide into windows of 7"):
        jax.eval_shape(
            functools.partial(TwinsSVT().init, jax.random.key(0)), jnp.zeros((1, 64, 64, 3))
        )


def test_windows_of_single_tokens_become_global_attention():
    from jaxmodels.search.twins import TwinsSVT

    module = TwinsSVT(
        dims=(8,), heads=(2,), mlp_ratios=(2,), depths=(1,), windows=(1,), sr_ratios=(2,),
        classes=3, image_size=(16, 24),
    )  # fmt: skip
    names = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    assert {"blocks.0.0.attn.q", "blocks.0.0.attn.kv", "blocks.0.0.attn.sr"} <= set(names)


TWINS = dict(
    dims=(24, 48), heads=(2, 4), depths=(3, 2), windows=(4, 2), sr_ratios=(4, 1), classes=4,
    image_size=32,
)  # fmt: skip


def test_a_twins_genome_cut_out_of_its_superformer_computes_the_same():
    from jaxmodels.search import twins_superformer

    module = twins_superformer.TwinsSuperformer(**TWINS)
    variables, rng = drawn_variables(module), np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 32, 32, 3)), jnp.float32)
    space = module.space
    genomes = space.sample_many(rng, 2, 0.5, shift=True)

    @functools.partial(jax.jit, compiler_options=CHEAP)
    @chex.assert_max_traces(n=1)
    def masked(genome, side):
        return module.apply(variables, images, twins_superformer.choices(space, genome, side))

    for genome, side in zip(genomes, ("cyclic", "right")):
        network, own = twins_superformer.extract(module, variables, genome, side)
        found = masked(genome, twins_superformer.SIDES.index(side))
        cut = jax.jit(network.apply, compiler_options=CHEAP)(own, images)
        chex.assert_trees_all_close(cut, found, atol=1e-4)


def test_shifting_twins_blocks_keeps_windows_and_global_attention_apart():
    from jaxmodels.search.twins_space import Space as TwinsSpace

    space = TwinsSpace(
        **{**TWINS, "depths": (6, 6)},
    )
    drawn = space.sample_many(np.random.default_rng(0), 400, 0.5)
    shifted = space.shift(drawn)

    def network(genome):
        return tuple(
            (dim, tuple((i % 2, b) for i, b in enumerate(blocks) if b is not None))
            for dim, blocks in space.decode(genome)
        )

    assert all(network(a) == network(b) for a, b in zip(drawn, shifted))
    assert (space.shift(shifted) == shifted).all()
    assert (space.flops(drawn) == space.flops(shifted)).all()
    patterns = {network(g): g.tobytes() for g in shifted}
    assert len(set(patterns.values())) == len(patterns) == len(np.unique(shifted, axis=0))
    with pytest.raises(ValueError, match=r"gene 1: 4 is not in 0\.\.3"):
        space.check(np.where(np.arange(space.genes) == 1, 4, shifted[0]))
