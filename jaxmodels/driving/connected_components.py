"""Connected components as jitted device code: ground fill, depth clusters and DBSCAN share it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def components(neighbor_minimum: Callable[[jax.Array], jax.Array], size: int) -> jax.Array:
    """The least index of each node's component, int32 [size].

    Nodes point to parents of lower index; every round a node's parent and its parent's parent
    take the least grandparent among the neighbors ("FastSV": Zhang, Azad, Hu, SIAM PP 2020), so
    that the number of rounds grows with the logarithm of the size, not with the diameter.

    Args:
      neighbor_minimum: labels [size] -> [size], the least label among a node's neighbors, at least
        `size` where there is none. The relation must be symmetric.
    """

    def unfinished(state):
        return state[1]

    def advance(state):
        parent, _ = state
        grandparent = parent[parent]
        least = jnp.minimum(grandparent, neighbor_minimum(grandparent))
        hooked = jnp.minimum(parent.at[parent].min(least), least)
        return hooked, (hooked != parent).any()

    start = jnp.arange(size, dtype=jnp.int32)
    return jax.lax.while_loop(unfinished, advance, (start, jnp.bool_(size > 0)))[0]


def grid_components(right: jax.Array, down: jax.Array) -> jax.Array:
    """Components of an image whose neighbors are linked or not, int32 [H, W].

    Every pixel gets the least raster index of its component.

    Args:
      right: bool [H, W], link of (r, c) and (r, c + 1); in the last column of that and (r, 0).
      down: bool [H, W], link of (r, c) and (r + 1, c); the last row is False.
    """
    shape = right.shape
    size = right.size

    def neighbor_minimum(labels):
        labels = labels.reshape(shape)

        def among(linked, axis):
            forward = jnp.where(linked, jnp.roll(labels, -1, axis), size)
            behind = jnp.where(jnp.roll(linked, 1, axis), jnp.roll(labels, 1, axis), size)
            return jnp.minimum(forward, behind)

        return jnp.minimum(among(right, 1), among(down, 0)).reshape(-1)

    return components(neighbor_minimum, size).reshape(shape)


def raster_ids(roots: jax.Array, members: jax.Array) -> jax.Array:
    """Ids 1, 2, ... in raster order of the components of `members`, 0 elsewhere, int32.

    Args:
      roots: what `grid_components` or `components` returned.
      members: bool, same shape.
    """
    flat, inside = roots.reshape(-1), members.reshape(-1)
    is_root = inside & (flat == jnp.arange(flat.size, dtype=flat.dtype))
    number = jnp.cumsum(is_root, dtype=jnp.int32)
    return jnp.where(inside, number[flat], 0).reshape(roots.shape)
