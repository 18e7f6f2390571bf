"""Activation functions by name, and those that need a gradient of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with the exact normal distribution function, PyTorch's default GELU.

    Its derivative Phi(x) + x phi(x) is computed from the forward pass's Phi, so that backward
    passes evaluate no error function a second time.
    """
    return jax.lax.platform_dependent(x, cpu=_gelu_in_a_loop, default=_gelu)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    cdf = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, (cdf + x * density).astype(x.dtype) * dx


def _gelu(x: jax.Array) -> jax.Array:
    return x * _normal_cdf(x)


def _gelu_in_a_loop(x: jax.Array) -> jax.Array:
    """The same. XLA's CPU backend fuses it into the matrix products around it, where the error
    function is slower than in a loop of its own; clamps are what it does not fuse."""
    return _unfused(_gelu(_unfused(x)))


def _unfused(x: jax.Array) -> jax.Array:
    infinity = jnp.asarray(jnp.inf, x.dtype)
    return jax.lax.clamp(-infinity, x, infinity)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return (0.5 * (1 + jax.lax.erf(x * (1 / math.sqrt(2))))).astype(x.dtype)


# By the names of transformers, which has several for one function and agrees with fairseq's.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_python_tanh": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_accurate": nn.gelu,
    "gelu_python": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "silu": nn.silu,
    "swish": nn.silu,
    "hardswish": nn.hard_swish,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}
