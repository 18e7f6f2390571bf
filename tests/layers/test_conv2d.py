"""The plain convolution against XLA's own derivatives, and what XLA makes of it inside a loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmodels.layers.conv2d import conv2d

FORMS = [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((1, 1), (1, 1))), ((2, 1), ((0, 2), (1, 0)))]
SMALL, LARGE = (2, 7, 9, 3), (2, 41, 33, 32)  # the second goes by blocks, the last of them short


def _arrays(shape=SMALL, features=4):
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x = rng.normal(size=shape)
    kernel = rng.normal(size=(3, 3, channels, features))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def _xla(x, kernel, strides, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize(("strides", "padding"), FORMS)
def test_derivatives_of_both_modes_and_orders_are_xlas(strides, padding, shape):
    arrays = _arrays(shape)
    if shape == LARGE:
        arrays = jax.tree.map(lambda a: a / 8, arrays)

    def measured(function):
        def loss(x, kernel):
            return jnp.sin(function(x, kernel, strides, padding)).sum()

        def penalty(x, kernel):  # gradients of gradients, as R1's
            return sum(jnp.square(g).sum() for g in jax.grad(loss, (0, 1))(x, kernel))

        forward = jax.jvp(loss, arrays, jax.tree.map(jnp.cos, arrays))
        batched = jax.vmap(jax.grad(lambda x, k: loss(x[None], k)), (0, None))(*arrays)
        return jax.grad(loss, (0, 1))(*arrays), jax.grad(penalty, (0, 1))(*arrays), forward, batched

    ours, theirs = (
        jax.jit(measured, static_argnums=0)(conv2d),
        jax.jit(measured, static_argnums=0)(_xla),
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * max(1, np.abs(b).max()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA's CPU backend lays out a loop")
def test_gradients_in_a_loop_have_the_layout_of_the_fast_path():
    def layouts(function):
        def loop(x, kernel):
            def body(carry, _):
                grads = jax.grad(lambda x, k: jnp.sin(function(x, k, *FORMS[0])).sum(), (0, 1))(
                    *carry
                )
                return jax.tree.map(lambda c, g: c - 0.1 * g, carry, grads), None

            return lax.scan(body, (x, kernel), length=3)[0]

        text = jax.jit(loop).lower(*_arrays((2, 7, 9, 8), 8)).compile().as_text()
        assert " while(" in text
        return set(re.findall(r"convolution\(.*dim_labels=(\S+?)[,\s]", text))

    assert layouts(conv2d) == {"b01f_01io->b01f"}
    assert len(layouts(_xla)) > 1  # when this fails, XLA does it itself and `conv2d` may go
