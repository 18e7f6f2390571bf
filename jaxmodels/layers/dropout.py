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
    keep = jax.random.bernoulli(rng, 1 - rate, shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def keep_masks(
    rng: jax.Array | None, rate: float, shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array | None]:
    """Bool masks of these shapes, true with probability 1 - rate, for `keep_where`.

    16 bits an element (the rate is rounded to 2 ** -16), hashed from the element's number and two
    words of `rng`: on a CPU Threefry costs 25 ns an element, more than the layers whose outputs
    it drops, and a second of compilation a call.

    Raises ValueError when `rate` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
    if rng is None or rate == 0:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    kept = _hashed_bits(rng, sum(sizes)) >= round(rate * 2**16)
    masks, start = [], 0
    for shape, size in zip(shapes, sizes):
        masks.append(kept[start : start + size].reshape(shape))
        start += size
    return masks


def _hashed_bits(rng: jax.Array, count: int) -> jax.Array:
    """uint16 `[count]`: MurmurHash3's 32-bit finalizer, twice, over a keyed counter."""
    first, second = jax.random.bits(rng, (2,), jnp.uint32)
    words = _mix(_mix(jnp.arange(-(-count // 2), dtype=jnp.uint32) + first) ^ second)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:count]


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def keep_where(x: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `keep`, else 0; x itself without a mask."""
    if keep is None:
        return x
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_path(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Stochastic depth: drop whole rows of x [B, ...], the residual branch of one example."""
    return dropout(x, rate, rng, tuple(range(1, x.ndim)))
