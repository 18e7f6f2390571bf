"""Clustering of points without a range image: DBSCAN with scikit-learn's meaning, and Euclidean.

M. Ester, H.-P. Kriegel, J. Sander, X. Xu, KDD 1996. Distances are taken from differences in
blocks of rows: the expansion |a|^2 + |b|^2 - 2 a.b loses 1e-4 m^2 at 40 m in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.driving.connected_components import components, raster_ids


class PointClusters(NamedTuple):
    """labels: int32 [N], 0, 1, ... by the first core point, -1 for noise. core: bool [N]."""

    labels: jax.Array
    core: jax.Array


@functools.partial(jax.jit, static_argnames=("block",))
def dbscan(
    points: jax.Array,
    eps: float = 0.7,
    min_samples: int = 6,
    valid: jax.Array | None = None,
    *,
    block: int = 256,
) -> PointClusters:
    """DBSCAN of points [N, 2] or [N, 3] as `sklearn.cluster.DBSCAN`.

    Points within `eps` (<=) are neighbors; one is a core point when it has `min_samples` of them,
    itself among them. A border point goes to the cluster of lowest id among its core neighbors.

    Args:
      valid: bool [N]; padding rows are noise and nobody's neighbors.
      block: rows whose distances are held at once.
    """
    count = len(points)
    valid = jnp.ones(count, bool) if valid is None else valid
    block = min(block, max(count, 1))
    blocks = -(-count // block)
    rows = jnp.pad(points, ((0, blocks * block - count), (0, 0))).reshape(blocks, block, -1)

    def near(some):
        square = 0.0
        for axis in range(points.shape[1]):
            square += jnp.square(some[:, None, axis] - points[None, :, axis])
        return square <= jnp.square(jnp.asarray(eps, points.dtype))

    def over_neighbors(function):
        """`function(near [block, N])` of every row, [N]."""
        found = jax.lax.map(lambda some: function(near(some)), rows)
        return found.reshape(-1)[:count]

    core = valid & (over_neighbors(lambda close: (close & valid).sum(-1)) >= min_samples)

    def least_core(labels):
        return over_neighbors(lambda close: jnp.where(close & core, labels, count).min(-1))

    roots = components(lambda labels: jnp.where(core, least_core(labels), count), count)
    ids = raster_ids(roots, core)
    border = least_core(jnp.where(core, ids, count))
    labels = jnp.where(core, ids, jnp.where(valid & (border < count), border, 0))
    return PointClusters(labels - 1, core)


def euclidean_clusters(
    points: jax.Array, eps: float = 0.7, valid: jax.Array | None = None
) -> jax.Array:
    """Chains of points within `eps` of each other, int32 [N]: DBSCAN with one sample."""
    return dbscan(points, eps, 1, valid).labels
