"""The baselines have the published sizes, and the shared layers PyTorch's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

import jaxmodels
from jaxmodels.cost import count_cost
from jaxmodels.interop.conversion import to_torch
from jaxmodels.layers.convolution import Conv
from jaxmodels.layers.normalization import BatchNorm
from jaxmodels.layers.rounding import make_divisible
from jaxmodels.vision.ghostnet import GhostBottleneck, GhostModule, GhostNet
from jaxmodels.vision.mobilenetv3 import InvertedResidual, MobileNetV3
from jaxmodels.vision.repghost import RepGhostNet


def shapes_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())


@pytest.mark.parametrize(
    ("width", "macs", "parameters"),
    [
        (0.5, 42_327_816, 2_588_232),
        (1.0, 141_149_744, 5_183_016),
        (1.3, 226_995_784, 7_352_622),
    ],
)
def test_ghostnet_has_the_official_costs(width, macs, parameters):
    assert count_cost(GhostNet(width=width))[:2] == (macs, parameters)


def test_a_ghost_modules_first_convolution_may_be_wide_and_strided():
    module = GhostModule(inp=6, oup=9, kernel_size=3, stride=2)
    x = jnp.ones((1, 7, 8, 6))
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x).shape == (1, 4, 4, 9)
    assert to_torch(variables)["primary_conv.0.weight"].shape == (5, 6, 3, 3)


@pytest.mark.parametrize(
    ("variant", "published_macs", "parameters"),
    [("mobilenet_v3_large", 219e6, 5_483_032), ("mobilenet_v3_small", 56e6, 2_542_856)],
)
def test_mobilenetv3_has_the_published_costs(variant, published_macs, parameters):
    module = MobileNetV3(small=variant.endswith("small"))
    cost = count_cost(module)
    assert cost.parameters == parameters
    assert abs(cost.macs / published_macs - 1) < 0.012


def test_mobilenetv3_has_torchvisions_names():
    state = to_torch(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes_of(MobileNetV3())))
    # Stem, last, and three convolutions a block (the first has no expansion) with six keys each;
    # eight gates and two linear layers.
    assert len(state) == 6 * (2 + 15 * 3 - 1) + 8 * 4 + 4
    for key, shape in {
        "features.0.0.weight": (16, 3, 3, 3),
        "features.1.block.0.0.weight": (16, 1, 3, 3),
        "features.4.block.1.1.running_var": (72,),
        "features.4.block.2.fc1.weight": (24, 72, 1, 1),
        "features.4.block.2.fc2.bias": (72,),
        "features.4.block.3.1.num_batches_tracked": (),
        "features.16.0.weight": (960, 160, 1, 1),
        "classifier.0.weight": (1280, 960),
        "classifier.3.bias": (1000,),
    }.items():
        assert state[key].shape == shape, key


@pytest.mark.parametrize("cls", [GhostNet, MobileNetV3])
def test_peers_offer_the_same_pyramid_and_load_full_checkpoints_into_it(cls):
    home = cls.__module__.removeprefix("jaxmodels.")
    state = to_torch(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes_of(cls(width=0.1))))
    module, variables = jaxmodels.load(home, state, width=0.1, features_only=True)
    maps = jax.eval_shape(module.apply, variables, jnp.zeros((1, 65, 40, 3)))
    assert [m.shape[1:3] for m in maps] == [(17, 10), (9, 5), (5, 3), (3, 2)]


@pytest.mark.parametrize("cls", [GhostNet, MobileNetV3])
def test_peers_refuse_bad_arguments_and_images(cls):
    with pytest.raises(ValueError, match="width must be positive"):
        cls(width=0)
    with pytest.raises(ValueError, match="NCHW"):
        jax.eval_shape(cls(width=0.1).init, jax.random.key(0), jnp.zeros((2, 3, 32, 32)))


def test_rounding_is_never_more_than_ten_percent_below():
    values = (0.5, 5.9, 6, 100 * 0.58, 9.6, 14)
    assert [make_divisible(v) for v in values] == [4, 8, 8, 56, 12, 16]
    assert make_divisible(18, 8) == 24 and make_divisible(1, 8) == 8
    assert all(make_divisible(v, d) >= 0.9 * v for v in range(1, 300) for d in (4, 8))


def test_strided_convolution_pads_as_pytorch():
    # XLA's SAME would pad an even image by (0, 1); PyTorch's padding=1 keeps the first pixel's
    # left neighbor a zero.
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1)
    y = Conv(1, 3, 2).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 0], [0, 5]])


def test_batch_norm_moves_running_statistics_as_pytorch():
    x = jnp.asarray([[1.0, 2.0], [3.0, 2.0], [8.0, 5.0]])
    layer = BatchNorm()
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, True, mutable=["batch_stats"])
    biased, unbiased = x.var(0), x.var(0, ddof=1)
    np.testing.assert_allclose(y, (x - x.mean(0)) / jnp.sqrt(biased + 1e-5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-6)
    # Evaluation of the initial statistics leaves the input nearly as it was.
    np.testing.assert_allclose(layer.apply(variables, x), x, rtol=1e-5)


def test_batch_norm_refuses_one_value_per_channel_in_training():
    layer = BatchNorm()
    x = jnp.ones((1, 1, 1, 4))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer.apply(variables, x, True, mutable=["batch_stats"])


def test_batch_norm_over_a_mapped_axis_equals_the_global_batch():
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 5)) + jnp.arange(4.0)[:, None, None, None]
    layer, synchronized = BatchNorm(), BatchNorm(axis_name="devices")
    variables = layer.init(jax.random.key(0), x)

    def train(layer, x):
        return layer.apply(variables, x, True, mutable=["batch_stats"])

    want, want_stats = train(layer, x.reshape(1, 8, 3, 5))
    got, got_stats = jax.vmap(lambda x: train(synchronized, x), axis_name="devices")(x)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got_stats), jax.tree.leaves(want_stats)):
        np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), rtol=1e-5, atol=1e-6)
    # Unsynchronized, every device has its own statistics.
    own, _ = jax.vmap(lambda x: train(layer, x))(x)
    assert jnp.abs(own.reshape(want.shape) - want).max() > 0.1


@pytest.mark.parametrize(
    "module",
    [
        RepGhostNet(width=0.05, num_classes=3),
        GhostBottleneck(4, 8, 6, stride=2, se=True),
        InvertedResidual(4, 8, 4, 5, se=True, hard=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_nnx_bridge_gives_the_same_outputs(module):
    shape = (1, 8, 8, 3) if isinstance(module, RepGhostNet) else (1, 8, 8, 4)
    x = jax.random.normal(jax.random.key(1), shape)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.2, 1, s.shape), s.dtype),
        jax.eval_shape(module.init, jax.random.key(0), x),
    )
    bridged = nnx.bridge.ToNNX(module)
    for name, tree in linen_vars_to_nnx_attrs(variables).items():
        setattr(bridged, name, nnx.data(tree))
    leaves = len(jax.tree.leaves(variables["params"]))
    assert len(nnx.state(bridged, nnx.Param).flat_state()) == leaves
    got = nnx.jit(lambda model, x: model(x))(bridged, x)
    np.testing.assert_allclose(got, jax.jit(module.apply)(variables, x), rtol=1e-6)
