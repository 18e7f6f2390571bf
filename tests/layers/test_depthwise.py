"""Depthwise convolution equals XLA's grouped convolution, in values and in every gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels.layers import depthwise
from jaxmodels.layers.depthwise import depthwise_conv, depthwise_conv_grouped

CASES = {
    "3x3": ((2, 6, 5, 3), 3, (1, 1), ((1, 1), (1, 1))),
    "5x5": ((2, 7, 6, 2), 5, (1, 1), ((2, 2), (2, 2))),
    "3x3 stride 2, odd size": ((2, 7, 5, 3), 3, (2, 2), ((1, 1), (1, 1))),
    "3x3 stride 2, even size": ((2, 6, 8, 3), 3, (2, 2), ((1, 1), (1, 1))),
    "5x5 stride 2, odd size": ((2, 9, 7, 2), 5, (2, 2), ((2, 2), (2, 2))),
    "5x5 stride 2, even size": ((2, 8, 6, 2), 5, (2, 2), ((2, 2), (2, 2))),
    "3x3 on 1x1": ((3, 1, 1, 4), 3, (1, 1), ((1, 1), (1, 1))),
    "5x5 on 1x1, stride 2": ((3, 1, 1, 4), 5, (2, 2), ((2, 2), (2, 2))),
    "5x5 on 2x1": ((2, 2, 1, 3), 5, (1, 1), ((2, 2), (2, 2))),
    "no padding, strides differ": ((2, 8, 9, 3), 3, (2, 3), ((0, 0), (0, 0))),
    "padding on one side": ((2, 6, 6, 3), 3, (2, 2), ((0, 1), (2, 0))),
    "padding beyond the kernel": ((2, 4, 4, 3), 3, (1, 1), ((3, 3), (4, 2))),
    "1x1 kernel": ((2, 5, 4, 3), 1, (2, 2), ((0, 0), (0, 0))),
    "rows in blocks": ((2, 15, 14, 40), 3, (1, 1), ((1, 1), (1, 1))),
    "rows in blocks, stride 2": ((2, 31, 28, 48), 5, (2, 2), ((2, 2), (2, 2))),
    "prime number of rows": ((1, 17, 13, 40), 3, (1, 1), ((1, 1), (1, 1))),
}


def draw(shape, kernel_size, strides, padding, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    kernel = jnp.asarray(rng.normal(size=(kernel_size, kernel_size, 1, shape[3])), dtype)
    out = jax.eval_shape(lambda: depthwise_conv_grouped(x, kernel, strides, padding))
    return x, kernel, jnp.asarray(rng.normal(size=out.shape), dtype)


def value_and_gradients(function, x, kernel, dy):
    y, pull = jax.vjp(function, x, kernel)
    return (y, *pull(dy))


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "no jit"])
@pytest.mark.parametrize("case", CASES)
def test_equals_grouped_convolution_in_value_and_gradients(case, jitted):
    _, _, strides, padding = CASES[case]
    with jax.enable_x64(True):
        arrays = draw(*CASES[case], jnp.float64)
        wrap = jax.jit if jitted else (lambda f: f)
        got = wrap(
            lambda *a: value_and_gradients(lambda x, k: depthwise_conv(x, k, strides, padding), *a)
        )(*arrays)
        wanted = jax.jit(
            lambda *a: value_and_gradients(
                lambda x, k: depthwise_conv_grouped(x, k, strides, padding), *a
            )
        )(*arrays)
        for name, a, b in zip(("y", "dx", "dkernel"), got, wanted, strict=True):
            assert a.dtype == jnp.float64
            scale = max(1.0, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale, err_msg=name)


def test_large_maps_take_the_loop_and_small_maps_the_reduction(monkeypatch):
    taken = []
    for name in ("_products_by_loop", "_products_by_reduction"):
        form = getattr(depthwise, name)
        monkeypatch.setattr(
            depthwise, name, lambda *a, form=form, name=name: taken.append(name) or form(*a)
        )
    for shape in ((2, 15, 14, 40), (2, 6, 5, 3)):
        x, kernel, dy = draw(shape, 3, (1, 1), ((1, 1), (1, 1)), jnp.float32)
        jax.eval_shape(lambda x, k, dy: jax.vjp(depthwise_conv, x, k)[1](dy), x, kernel, dy)
    assert taken == ["_products_by_loop", "_products_by_reduction"]


def test_float32_agrees_to_rounding():
    x, kernel, dy = draw((2, 8, 8, 6), 3, (1, 1), ((1, 1), (1, 1)), jnp.float32)
    same = ((1, 1), ((1, 1), (1, 1)))
    got = value_and_gradients(depthwise_conv, x, kernel, dy)
    wanted = value_and_gradients(lambda x, k: depthwise_conv_grouped(x, k, *same), x, kernel, dy)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_bfloat16_accumulates_in_float32_and_keeps_its_dtype():
    x, kernel, dy = draw((2, 8, 8, 6), 3, (2, 2), ((1, 1), (1, 1)), jnp.bfloat16)
    got = value_and_gradients(lambda x, k: depthwise_conv(x, k, (2, 2)), x, kernel, dy)
    wide = value_and_gradients(
        lambda x, k: depthwise_conv(x, k, (2, 2)),
        *(a.astype(jnp.float32) for a in (x, kernel, dy)),
    )
    for a, b in zip(got, wide, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_kernel_is_cast_to_the_dtype_of_x_and_its_gradient_keeps_the_kernels_own():
    x, kernel, _ = draw((1, 4, 4, 2), 3, (1, 1), ((1, 1), (1, 1)), jnp.float32)
    x = x.astype(jnp.bfloat16)
    assert depthwise_conv(x, kernel).dtype == jnp.bfloat16
    grad = jax.grad(lambda k: depthwise_conv(x, k).astype(jnp.float32).sum())(kernel)
    assert grad.dtype == jnp.float32


def test_vmap_equals_a_loop_with_gradients():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 2, 5, 6, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 1, 4)), jnp.float32)

    def both(x, kernel):
        loss = lambda x, k: jnp.sum(depthwise_conv(x, k, (2, 2)) ** 2)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    got = jax.jit(jax.vmap(both))(x, kernel)
    one = jax.jit(both)
    wanted = jax.tree.map(lambda *a: jnp.stack(a), *(one(x[n], kernel[n]) for n in range(3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)


def test_second_derivatives_in_reverse_mode_equal_those_of_the_grouped_form():
    strides, padding = (2, 2), ((1, 1), (1, 1))
    with jax.enable_x64(True):
        x, kernel, dy = draw((1, 4, 5, 2), 3, strides, padding, jnp.float64)

        def curvature(function):
            def norm(x, k):
                gx, gk = jax.grad(lambda x, k: jnp.sum(dy * jnp.tanh(function(x, k))), (0, 1))(x, k)
                return jnp.sum(gx**3) + jnp.sum(gk**3)

            return jax.jit(jax.grad(norm, (0, 1)))(x, kernel)

        got = curvature(lambda x, k: depthwise_conv(x, k, strides, padding))
        wanted = curvature(lambda x, k: depthwise_conv_grouped(x, k, strides, padding))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 6, 6, 3), (8, 16, 16, 40)], ids=["small", "large"])
def test_batch_sharded_over_eight_devices_equals_one_device(shape):
    x, kernel, dy = draw(shape, 3, (1, 1), ((1, 1), (1, 1)), jnp.float32)
    step = jax.jit(lambda *a: value_and_gradients(depthwise_conv, *a))
    wanted = step(x, kernel, dy)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    got = step(jax.device_put(x, rows), jax.device_put(kernel, whole), jax.device_put(dy, rows))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_forward_is_one_named_call_without_concatenation():
    x, kernel, _ = draw((2, 6, 6, 3), 3, (2, 2), ((1, 1), (1, 1)), jnp.float32)
    text = str(jax.make_jaxpr(lambda x, k: depthwise_conv(x, k, (2, 2)))(x, kernel))
    assert text.count("custom_vjp_call[") == 1 and "name=_depthwise_conv" in text
    assert text.count("conv_general_dilated[") == 1
    assert "concatenate" not in text


def test_compiled_for_a_cpu_no_convolution_is_left():
    x, kernel, dy = draw((2, 6, 6, 3), 3, (2, 2), ((1, 1), (1, 1)), jnp.float32)
    step = jax.jit(lambda *a: value_and_gradients(lambda x, k: depthwise_conv(x, k, (2, 2)), *a))
    assert "convolution" not in step.lower(x, kernel, dy).as_text()


def test_shapes_that_do_not_fit_are_named():
    x = jnp.zeros((1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"wanted \[kh,kw,1,3\]"):
        depthwise_conv(x, jnp.zeros((3, 3, 1, 4)))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        depthwise_conv(x, jnp.zeros((5, 5, 1, 3)), padding=((0, 0), (0, 0)))
    with pytest.raises(ValueError, match=r"x \[B,H,W,C\]"):
        depthwise_conv(x[0], jnp.zeros((3, 3, 1, 3)))


def test_compiled_apart_from_what_reads_the_result():
    """Fused into its readers the convolution would be computed once for each of them."""
    x, kernel, _ = draw((2, 6, 6, 3), 3, (1, 1), ((1, 1), (1, 1)), jnp.float32)

    @jax.jit
    def normalized(x, kernel):
        y = depthwise_conv(jax.nn.relu(x), kernel)
        return (y - y.mean()) / y.std()

    program = normalized.lower(x, kernel).compile().as_text()
    assert len(re.findall(r" call\(.*to_apply=%?_multiply_add", program)) == 1
    body = program[program.index("ENTRY") :]
    assert " call(" in body
