import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmodels.layers.convolution import Conv


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "pad"),
    [((9, 12), 3, 3, 2, 1), ((8, 8), 3, 7, 2, 3), ((11, 10), 1, 4, 4, 0), ((7, 9), 4, 3, 3, 2)],
)
def test_a_stem_equals_xlas_convolution_with_both_gradients(size, channels, kernel, stride, pad):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, channels)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, channels, 5)), jnp.float32)
    conv = Conv(5, kernel, strides=stride, padding=pad)

    def ours(x, weights):
        return conv.apply({"params": {"kernel": weights}}, x)

    def theirs(x, weights):
        return lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    y, pull = jax.vjp(ours, x, weights)
    wanted, pull_wanted = jax.vjp(theirs, x, weights)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    for a, b in zip(pull(jnp.cos(wanted)), pull_wanted(jnp.cos(wanted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("features", [3, 40])
def test_a_narrow_1x1_and_a_wide_stem_equal_the_matrix_product_twice_differentiated(features):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 4, 5, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(1, 1, 4, features)), jnp.float32)

    def ours(x, weights):
        return Conv(features).apply({"params": {"kernel": weights}}, x)

    def curvature(function):
        def slope(x):
            return jax.grad(lambda w: jnp.sin(function(x, w)).sum())(weights)

        return jax.value_and_grad(lambda x: jnp.square(slope(x)).sum())(x)

    for a, b in zip(curvature(ours), curvature(lambda x, w: x @ w[0, 0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    stem = jnp.asarray(rng.normal(size=(3, 3, 4, features)), jnp.float32)
    y = Conv(features, 3, strides=2).apply({"params": {"kernel": stem}}, x)
    wanted = lax.conv_general_dilated(
        x, stem, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize("case", ["stem", "pointwise"])
def test_forward_mode_agrees_with_reverse_mode(case):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 9, 3)), jnp.float32)
    conv = Conv(5, 3, strides=2) if case == "stem" else Conv(5)
    params = conv.init(jax.random.key(0), x)

    def f(params, x):
        return jnp.sum(jnp.sin(conv.apply(params, x)))

    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), (params, x))

    @jax.jit
    def both(params, x):
        grads = jax.grad(f, (0, 1))(params, x)
        products = jax.tree.map(jnp.vdot, grads, direction)
        hvp = jax.jvp(jax.grad(f, 1), (params, x), direction)[1]
        twice = jax.grad(lambda p, x: jax.jvp(f, (p, x), direction)[1], 1)(params, x)
        return jax.jvp(f, (params, x), direction)[1], sum(jax.tree.leaves(products)), hvp, twice

    forward, reverse, over_reverse, over_forward = both(params, x)
    assert float(forward) == pytest.approx(float(reverse), rel=1e-5)
    np.testing.assert_allclose(over_reverse, over_forward, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((2, 2), 3, 1), ((1, 4), 3, 1), ((4, 3), 3, 2), ((4, 4), 7, 1)]
)
def test_maps_smaller_than_the_kernel_equal_xlas_convolution(size, kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 6)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, 6, 5)), jnp.float32)
    pad = (kernel // 2, kernel // 2)

    def ours(x, weights):
        return Conv(5, kernel, strides=stride).apply({"params": {"kernel": weights}}, x)

    def theirs(x, weights):
        return lax.conv_general_dilated(
            x, weights, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert "stablehlo.convolution" not in jax.jit(ours).lower(x, weights).as_text()
    y, pull = jax.vjp(jax.jit(ours), x, weights)
    wanted, pull_wanted = jax.vjp(jax.jit(theirs), x, weights)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    for a, b in zip(pull(jnp.cos(wanted)), pull_wanted(jnp.cos(wanted)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
