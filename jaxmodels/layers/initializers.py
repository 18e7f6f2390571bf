"""PyTorch's default initializers, and the others that published recipes name."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers

Initializer = Callable[..., jax.Array]


def torch_kernel() -> Initializer:
    """Uniform in +-1/sqrt(fan_in), fan_in = product of all axes but the last.

    PyTorch's default for convolutions and linear layers (Kaiming uniform with a = sqrt 5), for
    kernels `[*spatial, in / groups, out]`.
    """
    return initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), `fan_in` that of the kernel beside the bias."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def kaiming_normal_fan_out() -> Initializer:
    """Normal with variance 2 / fan_out, fan_out = out * spatial size (torch, mode "fan_out").

    PyTorch's fan_out ignores groups: `weight.shape[0] * kh * kw`, which for `[kh, kw, I, O]` is
    `O * kh * kw`.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        fan_out = shape[-1] * math.prod(shape[:-2])
        return jax.random.normal(key, shape, dtype) * math.sqrt(2 / fan_out)

    return init
