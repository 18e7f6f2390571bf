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
