"""ScaleNet's space: reference points, even channel use, sampling's law, bad input, strategy."""

import math
import time

import jax
import numpy as np
import pytest

from jaxmodels.search import scalenet, scalenet_nets, scalenet_sampling, scalenet_space
from tests.search.tiny_space import ARGUMENTS, CHEAP, SPACE
from train.search import scaling_strategy

PUBLISHED = scalenet_space.make_space()


def test_reference_points_of_the_published_space():
    small, large = PUBLISHED.smallest_and_largest()
    ops, width, resolution = PUBLISHED.scaled(large, 3, (6, 6, 2))
    # The specification's smallest network keeps an op in the first and last stage.
    small[[1, 38]] = np.maximum(small[[1, 38]], 1)
    assert PUBLISHED.genes == 43
    assert PUBLISHED.flops(small) == 176_513_152
    assert PUBLISHED.flops(large) == 713_511_936
    assert PUBLISHED.flops(ops, width, resolution) == 7_538_810_451
    assert [len(PUBLISHED.scalings(s)) for s in (1, 2, 3)] == [48, 75, 147]


def test_a_hundred_thousand_networks_are_counted_at_once():
    rng = np.random.default_rng(0)
    ops = np.array([PUBLISHED.random_base(rng) for _ in range(200)])
    one = [PUBLISHED.flops(o, 1.2, 272) for o in ops]
    begin = time.process_time()
    many = PUBLISHED.flops(np.tile(ops, (500, 1)), 1.2, 272)
    assert many[:200].tolist() == one and many[-200:].tolist() == one
    assert time.process_time() - begin < 30  # a loop over networks takes minutes


@pytest.mark.parametrize("width", (32, 16, 40, 80, 96, 192, 320))
def test_every_channel_serves_equally_many_widths_from_the_two_sides(width):
    most = math.ceil(1.64 * width)
    full = most + width
    usage = np.zeros(full, int)
    for active in range(width, most + 1):
        usage[:active] += 1
        usage[full - active :] += 1
    assert (usage == most - width + 1).all()
    block = next(b for b in PUBLISHED.blocks if b.base_out == width)
    assert block.full_out == full


def test_hierarchical_draws_are_legal_and_follow_the_stages_law():
    count = 200_000
    draw = jax.jit(
        jax.vmap(lambda key: scalenet_sampling.sample(PUBLISHED, key)), compiler_options=CHEAP
    )
    found = jax.device_get(draw(jax.random.split(jax.random.key(0), count)))
    law = np.array([1, 4, 5, 7]) / 17
    share = np.bincount(found.stage, minlength=4) / count
    assert (np.abs(share - law) < 3 * np.sqrt(law * (1 - law) / count)).all()
    t = scalenet_sampling.tables(PUBLISHED)
    numbers = np.stack([found.width, found.depth, found.resolution], 1)
    first, counts = (a[found.stage][:, [0, 0, 1]] for a in (t.first, t.counts))
    assert ((numbers >= first) & (numbers < first + counts)).all()
    ops = np.pad(found.ops, ((0, 0), (0, 2)))
    PUBLISHED.check_ops(ops)
    for start, base, full in PUBLISHED.stage_slices():
        if base == full:
            continue
        part, total = ops[:, start : start + full], (ops[:, start : start + full] > 0).sum(1)
        # Of some base depth n: as deep as n scales to, and the op of block n - 1 from there on.
        fits = [
            (t.reach[found.depth, n] == total)
            & ((part == part[:, [n - 1]]) | (np.arange(full) < n) | (part == 0)).all(1)
            for n in range(1, base + 1)
        ]
        assert np.any(fits, 0).all()
    for i in range(20):  # the same by the rule that official draws are made again with
        stage = PUBLISHED.scaling_stage_of(t.widths[found.width[i]], t.sizes[found.resolution[i]])
        assert stage == found.stage[i] and (PUBLISHED.resample(ops[i], stage) == ops[i]).all()


def test_uniform_draws_mix_stages():
    draw = jax.jit(jax.vmap(lambda key: scalenet_sampling.sample(SPACE, key, "uniform")))
    found = jax.device_get(draw(jax.random.split(jax.random.key(0), 4000)))
    widths = np.bincount(found.width, minlength=5) / 4000
    assert np.allclose(widths, 0.2, atol=0.03)
    assert len({(w, d) for w, d in zip(found.width.tolist(), found.depth.tolist())}) == 25


def test_repair_keeps_the_official_hole_and_the_stable_mode_closes_it():
    genes = np.zeros(43, int)
    genes[3:7] = (3, 0, 2, 1)
    assert PUBLISHED.repair(genes)[3:7].tolist() == [3, 2, 0, 1]
    assert PUBLISHED.repair(genes, "stable")[3:7].tolist() == [3, 2, 1, 0]
    scaled = PUBLISHED.scale_depth(PUBLISHED.repair(genes), 1.4)
    assert scaled[3:7].tolist() == [3, 2, 2, 1]


def test_the_official_counter_lets_an_identity_pass_its_map_on_unstrided():
    space = scalenet_space.make_space(
        **{**ARGUMENTS, "backbone": scalenet_space.backbone((6, 4, 6, 8), (1, 1, 1), (1, 2, 2))}
    )
    ops = np.array([0, 1, 0, 0, 0, 2, 0, 0, 0, 0])  # stage 2, of base depth 1, left out
    flops = space.flops(ops, 1.0, 13, holes=True)
    table = space.cost_table(1.0, 13)
    conv_out = table[7, 0]
    # Stage 3 works on 6 and 3 pixels a side instead of 3 and 1, the last layer on 3.
    stage3 = 6 * 36 * 36 + 36 * 9 * 25 + 2 * 36 * 9 + 36 * 8 * 9
    assert flops == table[[0, 1, 9], ops[[0, 1, 9]]].sum() + stage3 + 9 * conv_out
    assert space.flops(np.array([ops, ops]), 1.0, 13, holes=True).tolist() == [flops, flops]


def test_a_base_resolution_may_be_another_than_the_first_of_the_list():
    space = scalenet_space.make_space(**ARGUMENTS, base_resolution=16)
    assert (SPACE.base_resolution, space.base_resolution) == (12, 16)
    assert space.scaled(LEGAL, 0, (0, 0, 0))[2] == 16
    assert space.flops(LEGAL) == SPACE.flops(LEGAL, 1.0, 16)


def test_stages_that_share_values_are_told_apart_by_the_one_expected():
    shared = ((1.0,), (1.0, 1.2), (1.4, 1.6))
    space = scalenet_space.make_space(
        **{**ARGUMENTS, "channel_multiplier": shared, "resolution_multiplier": ((12,),) * 3}
    )
    assert [space.scaling_stage_of(1.0, 12, s) for s in (0, 1, 2)] == [0, 1, 0]


def test_width_arithmetic_of_the_official_training_is_a_switch():
    ops = PUBLISHED.random_base(np.random.default_rng(0))
    exact = scalenet.make_subnet(PUBLISHED, ops, 1.2).outputs[10]
    single = scalenet.make_subnet(PUBLISHED, ops, 1.2, "float32").outputs[10]
    assert (exact, single) == (48, 49)


def _with(**changes):
    return lambda: scalenet_space.make_space(**{**ARGUMENTS, **changes})


LEGAL = SPACE.scale_depth(SPACE.random_base(np.random.default_rng(0)), 1.0)


def _changed(index, value):
    ops = LEGAL.copy()
    ops[index] = value
    return ops


NET = {"backbone": ARGUMENTS["backbone"], "head": ARGUMENTS["head"]}
BAD = {
    "length": (lambda: SPACE.check_subnet([0] * 5), r"10 \+ 2 entries .* not 5"),
    "op": (lambda: SPACE.check_ops(_changed(1, 7)), r"stage1\[0\]: op index 7 is not in 0..2"),
    "first": (lambda: SPACE.check_ops(_changed(3, 0)), r"stage2\[0\]: the first block"),
    "hole": (
        lambda: SPACE.check_ops(np.where(np.arange(SPACE.genes) == 4, 0, _changed(5, 1))),
        r"stage2\[1\]: an identity stands before",
    ),
    "width": (lambda: SPACE.check_width(1.7), "1.7 would exceed 1.6"),
    "unsorted": (_with(channel_multiplier=((1.0,), (1.2, 1.1), (1.4,))), "must ascend"),
    "empty": (_with(depth_multiplier=((1.0,), (), (1.4,))), r"depth_multiplier\[1\] is empty"),
    "stage": (_with(max_scaling_stage=3), "max_scaling_stage 3 is beyond the 3 lists"),
    "resolution": (
        lambda: scalenet_sampling.encode(scalenet_sampling.tables(SPACE), LEGAL, 1.0, 99),
        r"no images at resolution 99; there are \[12, 13, 14, 16\]",
    ),
    "flops length": (lambda: SPACE.flops([0] * 5), "has 10 op indices .* not 5"),
    "flops op": (lambda: SPACE.flops([LEGAL, _changed(1, 9)]), r"stage1\[0\]: op index 9"),
    "flops first": (lambda: SPACE.flops(_changed(3, 0)), r"stage2\[0\]: the first block"),
    "subnet first": (
        lambda: scalenet.make_subnet(SPACE, _changed(3, 0), 1.0),
        r"stage2\[0\]: the first block",
    ),
    "subnet length": (lambda: scalenet.make_subnet(SPACE, [0] * 5, 1.0), "10 op indices"),
    "scaled stage": (lambda: SPACE.scaled(LEGAL, 4, (0, 0, 0)), r"stage 4 is not in 0..2"),
    "scaled index": (
        lambda: SPACE.scaled(LEGAL, 1, (0, 2, 0)),
        r"width index 2 of stage 1 .* 0..1",
    ),
    "scaled number": (lambda: SPACE.scaled(LEGAL, 1, (0, 0)), "3 indices .* not 2"),
    "scalings": (lambda: SPACE.admissible([LEGAL], 3, 1e9), r"scaling stage 3 is not in 0..2"),
    "negative": (_with(max_scaling_stage=-1), "max_scaling_stage -1 must be at least 0"),
    "zero": (
        _with(depth_multiplier=((0.0,), (1.1, 1.2), (1.4,))),
        r"depth_multiplier\[0\] .* posit",
    ),
    "net op": (
        lambda: scalenet_nets.ScaleNet(**NET, stages=[[0], [9], [1], [0]]),
        r"stage1\[0\]: op index 9 is not in 0..2",
    ),
    "net stages": (
        lambda: scalenet_nets.ScaleNet(**NET, stages=[[0], [1]]),
        "stages has 2 entries; this backbone has 4 stages",
    ),
    "law": (lambda: scalenet_sampling.sample(SPACE, jax.random.key(0), "even"), "sampling law"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_named(mistake):
    make, message = BAD[mistake]
    with pytest.raises((ValueError, KeyError), match=message):
        make()


def test_a_band_that_nothing_lies_in_ends_with_the_range_seen():
    with pytest.raises(RuntimeError, match=r"none of 50 random base models .* they have"):
        SPACE.random_base_within(np.random.default_rng(0), 1.0, 0.1, tries=50)


def test_the_strategy_returns_the_slopes_of_log_linear_data():
    slopes = np.array([0.11, 0.07, 0.05])
    searched = {s: np.exp(slopes * s) for s in (1, 2, 3)}
    fit = scaling_strategy.fit(searched)
    assert np.allclose(fit.coefficients[:, 0], slopes, atol=1e-6)
    curved = scaling_strategy.fit(searched, "quadratic")
    assert np.allclose(curved.multipliers(2), searched[2])
    with pytest.raises(ValueError, match="quadratic fit needs 2"):
        scaling_strategy.fit({1: (1.1, 1.1, 1.1)}, "quadratic")


@pytest.mark.parametrize("stage", (4, 5))
def test_generalized_networks_meet_their_budget(stage):
    rng = np.random.default_rng(1)
    base = PUBLISHED.random_base_within(rng, 306e6, 25e6)
    fit = scaling_strategy.fit({1: (1.12, 1.08, 1.07), 2: (1.28, 1.2, 1.2), 3: (1.5, 1.4, 1.4)})
    scaled = scaling_strategy.generalize(PUBLISHED, base, fit, stage)
    target = 2**stage * PUBLISHED.flops(base)
    assert abs(scaled.flops - target) <= 0.02 * target and scaled.resolution % 16 == 0


def test_searched_values_rebuild_the_searched_networks():
    base = PUBLISHED.random_base(np.random.default_rng(2))
    for stage in (1, 2, 3):
        triple = PUBLISHED.scalings(stage)[7]
        ops, width, resolution = PUBLISHED.scaled(base, stage, triple)
        depth = PUBLISHED.multipliers(stage, triple)[0]
        stages = scaling_strategy.deepened(PUBLISHED, base, depth)
        again = scaling_strategy.flops(PUBLISHED, stages, width, resolution)
        assert again == PUBLISHED.flops(ops, width, resolution)


def test_the_six_public_networks_are_scalings_of_their_base_model():
    space = scalenet_space.make_space()
    nets = [scalenet_nets.VARIANTS[f"scalenet_24_03_s{s}"] for s in range(6)]
    ops = np.zeros(space.genes, int)
    for (first, _, _), stage in zip(space.stage_slices(), nets[0]["stages"]):
        ops[first : first + len(stage)] = stage
    assert space.flops(ops) == 354_933_888
    for stage, indices in ((1, (0, 0, 2)), (2, (4, 0, 2)), (3, (0, 0, 2))):
        scaled, width, resolution = space.scaled(ops, stage, indices)
        named = scalenet_nets.by_stage(space, scaled)[: len(nets[stage]["stages"])]
        assert tuple(tuple(v for v in part if v) or (0,) for part in named) == nets[stage]["stages"]
        assert (width, resolution) == (nets[stage]["width"], nets[stage]["resolution"])
    for net, depth in zip(nets[4:], (1.653, 1.848)):
        assert net["stages"] == scaling_strategy.deepened(space, ops, depth)[:9]
