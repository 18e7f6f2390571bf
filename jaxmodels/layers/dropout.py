"""Dropout as a function, and stochastic depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def dropout(
    x: jax.Array, rate: float, rng: jax.Array | None, broadcast: tuple[int, ...] = ()
) -> jax.Array:
    """Zero each element with probability `rate` and divide the others by 1 - rate.

    Off when `rng` is None or `rate` is 0. Axes in `broadcast` share one draw: `drop_path` is
    `broadcast=(1, ..., ndim - 1)`.

    Raises ValueError when `rate` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
    if rng is None or rate == 0:
        return x
    shape = tuple(1 if axis in broadcast else size for axis, size in enumerate(x.shape))
    keep = _hashed_bits(rng, shape) >= jnp.uint32(round(rate * 2**32))
    return keep_where(x, keep, rate)


def _hashed_bits(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: the element's number hashed twice with two words of the key between.

    Threefry's bits cost an encoder's CPU train step 30 %; these are a few integer operations that
    fuse with whatever reads them. They are a function of key and place alone, so that sharding
    changes nothing and needs no communication.
    """
    first, second = jax.random.bits(rng, (2,), jnp.uint32)
    numbers = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mixed(_mixed(numbers ^ first) + second)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits whose every output bit depends on every input bit ("lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_masks(
    rng: jax.Array | None, rate: float, shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array | None]:
    """Bool masks of these shapes, true with probability 1 - rate, for `keep_where`.

    One draw serves them all: on a CPU every call of a random function costs about a second of
    compilation, and a layer has six. All None when `rng` is None or `rate` is 0.

    Raises ValueError when `rate` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
    if rng is None or rate == 0:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    kept = _hashed_bits(rng, (sum(sizes),)) >= jnp.uint32(round(rate * 2**32))
    masks, start = [], 0
    for shape, size in zip(shapes, sizes):
        masks.append(kept[start : start + size].reshape(shape))
        start += size
    return masks


def keep_where(x: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `keep`, else 0; x itself without a mask."""
    if keep is None:
        return x
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def drop_path(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Stochastic depth: drop whole rows of x [B, ...], the residual branch of one example."""
    return dropout(x, rate, rng, tuple(range(1, x.ndim)))
