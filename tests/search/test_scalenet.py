"""The super-supernet: masked equals sliced, cut out equals sliced, sides, one compilation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.search import scalenet, scalenet_nets, scalenet_sampling, soft_labels
from tests.search.tiny_space import ARGUMENTS, CHEAP, SPACE, drawn_variables

MASKED = scalenet.SuperSupernet(**ARGUMENTS, depthwise="grouped")
SLICED = MASKED.clone(sliced=True)


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(MASKED)


def networks():
    """Two sub-networks with different ops, depths and widths: (ops, width)."""
    rng = np.random.default_rng(3)
    shallow = SPACE.scale_depth(SPACE.random_base(rng), 1.0)
    deep = SPACE.random_base(rng)
    deep[3:7] = (2, 1, 0, 0)
    return [(shallow, 1.0), (SPACE.scale_depth(deep, 1.6), 1.4)]


IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(3, 13, 13, 3)), jnp.float32)
RIGHT = np.arange(len(SPACE.blocks)) % 2 == 1


@chex.assert_max_traces(n=1)
def _masked(variables, images, subnet, right, size):
    return MASKED.apply(
        variables, images, subnet, right, True, (size, size), mutable=["batch_stats"]
    )


masked = jax.jit(_masked, compiler_options=CHEAP)


def test_one_compiled_function_is_every_sub_network_sliced(variables):
    for ops, width in networks():
        subnet = scalenet.make_subnet(SPACE, ops, width)
        for size in (13, 10):
            image = IMAGES[:, :size, :size]
            padded = jnp.pad(image, ((0, 0), (0, 13 - size), (0, 13 - size), (0, 0)))
            apply = functools.partial(SLICED.apply, subnet=subnet, train=True)
            wanted, statistics = jax.jit(
                functools.partial(apply, mutable=["batch_stats"]),
                compiler_options=CHEAP,
            )(variables, image, right=RIGHT)
            found, new = masked(variables, padded, subnet, RIGHT, size)
            chex.assert_trees_all_close(found, wanted, atol=1e-5)
            chex.assert_trees_all_close(new, statistics, atol=1e-5)


def test_a_network_cut_out_of_the_weights_is_the_sub_network(variables):
    ops, width = networks()[1]
    subnet = scalenet.make_subnet(SPACE, ops, width)
    sliced = jax.jit(functools.partial(SLICED.apply, subnet=subnet), compiler_options=CHEAP)
    for right in (False, True):
        wanted = sliced(variables, IMAGES, right=right)
        network, own = scalenet_nets.extract(SLICED, variables, ops, width, right)
        cut = jax.jit(network.apply, compiler_options=CHEAP)(own, IMAGES)
        chex.assert_trees_all_close(cut, wanted, atol=1e-5)


def test_only_used_rows_of_the_chosen_ops_get_gradients(variables):
    ops, width = networks()[0]
    subnet = scalenet.make_subnet(SPACE, ops, width)
    label = jnp.array([0, 1, 2])

    def loss(params):
        y = SLICED.apply({**variables, "params": params}, IMAGES, subnet)
        return soft_labels.classification_loss(y, label)

    gradients = jax.jit(jax.grad(loss), compiler_options=CHEAP)(variables["params"])
    number = int(ops[1])
    chosen = gradients[f"net.backbone_stage1_0.{number}.conv2"]["kernel"]
    other = gradients[f"net.backbone_stage1_0.{3 - number}.conv2"]["kernel"]
    width = int(subnet.outputs[1])
    assert not np.any(other) and np.any(chosen[..., :width]) and not np.any(chosen[..., width:])


def test_counters_drift_apart_where_sub_networks_differ():
    (first, _), (second, _) = networks()
    subnets = [scalenet.make_subnet(SPACE, ops, 1.0) for ops in (first, second, first)]
    counters, sides = MASKED.counters(), []
    for subnet in subnets:
        right, counters = scalenet.advance(counters, subnet, 2)
        sides.append(np.asarray(right))
    assert not sides[0].any() and sides[1][0] and not sides[2][0]
    fresh = subnets[0].ops != subnets[1].ops
    assert (sides[2] == fresh).all()  # an op that the second left out is still at its second call
    right, once = scalenet.advance(MASKED.counters(), subnets[0], 1)
    assert not right.any() and not np.asarray(once).any()  # one-sided: always left


def test_checkpoint_names_travel_both_ways(variables):
    from jaxmodels.interop.catalog import export

    state = export("search.scalenet", MASKED, variables)
    assert "net.backbone_stage2_2.1.conv1_2.weight" in state
    assert "net.backbone_stage1_0.0.conv.weight" in state
    assert "net.backbone_stage1_1.0.conv.weight" not in state
    prefixed = {f"module.{k}": v for k, v in state.items()}
    _, again = jaxmodels.load("search.scalenet", prefixed, **ARGUMENTS)
    chex.assert_trees_all_equal(again["params"], variables["params"])


def test_the_published_network_has_the_published_parameters_and_entries():
    from jaxmodels.interop import catalog

    module = scalenet.SuperSupernet()
    shapes = catalog.shapes(module)
    # One byte a number: 320 million floats are not wanted here.
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.int8(0), s.shape), shapes)
    state = catalog.export("search.scalenet", module, zeros)
    count = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes["params"]))
    assert (count, len(state)) == (320_014_229, 2594)


def test_resizing_to_a_traced_size_is_resizing_to_that_size():
    image = jnp.asarray(np.random.default_rng(0).random((1, 16, 16, 1)), jnp.float32)
    for size in (16, 12):
        found = jax.jit(scalenet_sampling.resized, static_argnums=2)(image, size, 20)
        wanted = jax.image.resize(image, (1, size, size, 1), "linear")
        chex.assert_trees_all_close(found[:, :size, :size], wanted, atol=1e-5)
        assert not np.any(found[:, size:]) and not np.any(found[:, :, size:])


def test_mistakes_of_the_network_are_named(variables):
    with pytest.raises(ValueError, match="only 0, 1 and 2 are defined"):
        scalenet.SuperSupernet(n_laterally_coupling=3)
    with pytest.raises(ValueError, match=r"label 3 is not in 0\.\.2"):
        soft_labels.classification_loss(jnp.zeros((1, 3)), jnp.array([3]))
    with pytest.raises(ValueError, match="at least 2 classes"):
        soft_labels.classification_loss(jnp.zeros((1, 1)), jnp.array([0]))
    with pytest.raises(ValueError, match=r"1\.7 would exceed 1.6"):
        scalenet.make_subnet(SPACE, networks()[0][0], 1.7)
