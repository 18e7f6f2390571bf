"""Maximum over the valid entries of one axis, with a gradient that is right under `jit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def masked_max(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maximum over the valid entries of the second-last axis; 0 where there is none.

    The gradient goes to the first of the largest entries, whose index is kept from the forward
    pass. (`jnp.max` compares the operand with the maximum again, and XLA may recompute the operand
    with other rounding, so that whole gradient rows come out wrong.)

    Args:
      x: `[..., V, C]`; entries that are not valid may hold anything.
      mask: bool `[..., V]`.

    Returns: `[..., C]`.
    """
    return _max_and_index(x, mask)[0]


def _max_and_index(x, mask):
    valid = mask[..., None]
    index = jnp.argmax(jnp.where(valid, x, -jnp.inf), axis=-2).astype(jnp.int32)
    top = jnp.take_along_axis(x, index[..., None, :], axis=-2)[..., 0, :]
    found = mask.any(-1)[..., None]
    return jnp.where(found, top, 0), jnp.where(found, index, -1)


def _forward(x, mask):
    top, index = _max_and_index(x, mask)
    return top, (index, x.shape[-2])


def _backward(saved, g):
    index, length = saved
    places = jnp.arange(length, dtype=jnp.int32)[:, None]
    return jnp.where(index[..., None, :] == places, g[..., None, :], 0), None


masked_max.defvjp(_forward, _backward)
