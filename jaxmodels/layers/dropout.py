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

    One draw of 16 bits an element serves them all (the rate is rounded to 2 ** -16): on a CPU every
    call of a random function costs about a second of compilation, a layer has six. All None
    when `rng` is None or `rate` is 0.

    Raises ValueError when `rate` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be in [0, 1), not {rate}")
    if rng is None or rate == 0:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    kept = jax.random.bits(rng, (sum(sizes),), jnp.uint16) >= round(rate * 2**16)
    masks, start = [], 0
    for shape, size in zip(shapes, sizes):
        masks.append(kept[start : start + size].reshape(shape))
        start += size
    return masks


def keep_where(x: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `keep`, else 0; x itself without a mask."""
    if keep is None:
        return x
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_path(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Stochastic depth: drop whole rows of x [B, ...], the residual branch of one example."""
    return dropout(x, rate, rng, tuple(range(1, x.ndim)))
