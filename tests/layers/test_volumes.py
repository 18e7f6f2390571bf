"""Volume layers: the CPU's form of a convolution, disjoint transposed windows, pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmodels.layers import volumes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "kernel,strides", [((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 1)), ((3, 1, 3), (1, 1, 2))]
)
def test_convolution_by_slices_equals_xlas_with_its_gradients(kernel, strides):
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 7, 3)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=(*kernel, 3, 4)), jnp.float32)
    padding = tuple((k - 1) // 2 for k in kernel)
    forms = [volumes._convolve_slices, volumes._xla_convolve, volumes.convolve]
    values = [
        jax.jit(
            jax.value_and_grad(
                lambda x, w, f=f: jnp.sin(f(x, w, strides, padding)).sum(), argnums=(0, 1)
            )
        )(x, w)
        for f in forms
    ]
    for one in values[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, values[0])


def test_transposed_windows_equal_the_dilated_convolution():
    layer = volumes.UpConv(3, (2, 1, 2), use_bias=False)
    x = jnp.asarray(RNG.normal(size=(1, 3, 4, 2, 5)), jnp.float32)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    kernel = jnp.flip(variables["params"]["kernel"], (0, 1, 2))
    expected = lax.conv_general_dilated(
        x,
        kernel,
        (1, 1, 1),
        ((1, 1), (0, 0), (1, 1)),
        lhs_dilation=(2, 1, 2),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    assert y.shape == (1, 6, 4, 4, 3)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_norms_own_gradient_equals_differentiation():
    def plain(x, scale, bias):
        mean = x.mean((1, 2), keepdims=True)
        variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
        return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + bias

    x = jnp.asarray(RNG.normal(2, 3, size=(2, 5, 4, 3)), jnp.float32)
    scale, bias, weight = (jnp.asarray(RNG.normal(size=s), "f4") for s in (3, 3, x.shape))
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: (jnp.sin(f(*a)) * weight).sum(), (0, 1, 2)))(
            x, scale, bias
        )
        for f in (lambda *a: volumes.instance_norm(*a, 1e-5), plain)
    )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_norm_and_pooling_are_per_sample_and_per_block():
    x = jnp.asarray(RNG.normal(2, 3, size=(2, 5, 6, 3)), jnp.float32)
    y, _ = volumes.InstanceNorm().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-4)
    pooled = volumes.average_pool(x, (2, 3))  # the fifth row is dropped
    np.testing.assert_allclose(pooled[0, 0, 0], x[0, :2, :3].mean((0, 1)), rtol=1e-5)
    assert pooled.shape == (2, 2, 2, 3)
