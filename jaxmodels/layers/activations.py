"""Activation functions that need a gradient of their own."""

from __future__ import annotations

import math

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
