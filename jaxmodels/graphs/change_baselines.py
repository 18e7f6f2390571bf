"""Other detectors of the literature that latent evolution and LAD are compared with.

Each takes aligned snapshots [T, n, n] and returns scores [T], larger meaning more of a change; what
cannot be scored yet is 0. They follow the published descriptions in their simplest form and are
there to compare with, not to reproduce anybody's tables:

- activity vector: T. Ide, H. Kashima, KDD 2004; L. Akoglu, C. Faloutsos, 2010.
- DeltaCon: D. Koutra, J. Vogelstein, C. Faloutsos, SDM 2013.
- SPOTLIGHT: D. Eswaran et al., KDD 2018.
- EdgeMonitoring: Y. Wang et al., IJCAI 2017, arXiv 1705.07325.
- TensorSplat: D. Koutra, E. Papalexakis, C. Faloutsos, PCI 2012.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs import laplacian_change
from jaxmodels.graphs.change_scores import unit

_HIGHEST = jax.lax.Precision.HIGHEST
_POWER_STEPS = 200


@jax.jit
def _principal_eigenvectors(snapshots):
    """Perron vectors [T, n] of the symmetrized snapshots, by power iteration."""
    graphs = 0.5 * (snapshots + jnp.swapaxes(snapshots, -1, -2))
    # Shifted, so that a bipartite graph's two extreme eigenvalues do not alternate.
    shift = 0.5 * graphs.sum(-1).max(-1)[:, None]

    def step(_, x):
        return unit(jnp.einsum("tij,tj->ti", graphs, x, precision=_HIGHEST) + shift * x)

    start = unit(jnp.ones(snapshots.shape[:2], graphs.dtype))
    vectors = jax.lax.fori_loop(0, _POWER_STEPS, step, start)
    return jnp.where(graphs.any((-1, -2))[:, None], vectors, 0.0)


def activity_vector(snapshots, *, window: int = 5, difference: bool = True) -> np.ndarray:
    """Principal eigenvectors against the principal direction of the window before: LAD's Z on them.

    Scores are the first differences of Z unless `difference` is False.
    """
    vectors = np.asarray(_principal_eigenvectors(jnp.asarray(snapshots, jnp.float32)))
    z = laplacian_change.context_distances(vectors.astype(np.float64), window, window)
    return laplacian_change.differences(z) if difference else z


@jax.jit
def _deltacon(snapshots):
    def affinity(graph):
        graph = 0.5 * (graph + graph.T)
        degrees = graph.sum(-1)
        strength = 1.0 / (1.0 + degrees.max())
        eye = jnp.eye(len(graph), dtype=graph.dtype)
        system = eye * (1.0 + strength**2 * degrees) - strength * graph
        return jnp.sqrt(jnp.maximum(jnp.linalg.inv(system), 0.0))

    def step(previous, graph):
        now = affinity(graph)
        return now, jnp.sqrt(((now - previous) ** 2).sum())

    _, distances = jax.lax.scan(step, affinity(snapshots[0]), snapshots)
    return distances


def deltacon(snapshots) -> np.ndarray:
    """Root Euclidean distance of the belief-propagation affinities of neighboring snapshots.

    S = (I + e^2 D - e A)^-1 with e = 1 / (1 + largest degree), in full (no node groups).
    """
    return np.asarray(_deltacon(jnp.asarray(snapshots, jnp.float32)))


def spotlight(
    snapshots, *, seed: int = 0, sketches: int = 50, p: float = 0.2, q: float = 0.2, window: int = 5
) -> np.ndarray:
    """Edge weight between random node sets, K of them; distance to the mean of the window before.

    Args:
      p, q: chance of a node to be a source or a destination of a sketch.
    """
    rng = np.random.default_rng(seed)
    graphs = jnp.asarray(snapshots, jnp.float32)
    n = graphs.shape[-1]
    sources = jnp.asarray(rng.random((sketches, n)) < p, jnp.float32)
    targets = jnp.asarray(rng.random((sketches, n)) < q, jnp.float32)
    product = jnp.einsum("ki,tij,kj->tk", sources, graphs, targets, precision=_HIGHEST)
    points = np.asarray(product)
    scores = np.zeros(len(points))
    for t in range(window, len(points)):
        scores[t] = np.linalg.norm(points[t] - points[t - window : t].mean(0))
    return scores


def edge_monitoring(snapshots, *, seed: int = 0, pairs: int = 1000, window: int = 5) -> np.ndarray:
    """Edge frequencies of sampled node pairs in the window before and in the window from t on.

    It looks ahead by `window` - 1 snapshots, so it is not causal.
    """
    graphs = np.asarray(snapshots) > 0
    rng = np.random.default_rng(seed)
    n = graphs.shape[-1]
    u, v = rng.integers(0, n, (2, pairs))
    seen = graphs[:, u, v].astype(np.float64)
    scores = np.zeros(len(graphs))
    for t in range(window, len(graphs) - window + 1):
        before, after = seen[t - window : t].mean(0), seen[t : t + window].mean(0)
        scores[t] = np.linalg.norm(after - before)
    return scores


@functools.partial(jax.jit, static_argnames=("rank", "sweeps"))
def _cp_time_factors(tensor, rng, *, rank: int, sweeps: int):
    """Time factors [T, rank] of a CP decomposition by alternating least squares."""
    n = tensor.shape[-1]
    rngs = jax.random.split(rng, 2)
    rows = jax.random.uniform(rngs[0], (n, rank))
    columns = jax.random.uniform(rngs[1], (n, rank))
    einsum = functools.partial(jnp.einsum, precision=_HIGHEST)

    def solve(right, x, y):
        gram = einsum("ir,is->rs", x, x) * einsum("ir,is->rs", y, y)
        ridge = 1e-6 * jnp.trace(gram) / rank * jnp.eye(rank)
        return jnp.linalg.solve(gram + ridge, right.T).T

    def times(rows, columns):
        return solve(einsum("tij,ir,jr->tr", tensor, rows, columns), rows, columns)

    def step(_, factors):
        rows, columns = factors
        time = times(rows, columns)
        rows = solve(einsum("tij,tr,jr->ir", tensor, time, columns), time, columns)
        # Norms live in the time factors.
        rows = rows / jnp.linalg.norm(rows, axis=0)
        columns = solve(einsum("tij,tr,ir->jr", tensor, time, rows), time, rows)
        return rows, columns / jnp.linalg.norm(columns, axis=0)

    rows, columns = jax.lax.fori_loop(0, sweeps, step, (rows, columns))
    return times(rows, columns)


def tensor_splat(
    snapshots, *, seed: int = 0, rank: int = 10, neighbors: int = 20, sweeps: int = 50
) -> np.ndarray:
    """Local outlier factors of the time factors of a CP decomposition of the whole sequence.

    It sees all snapshots at once, so it is not causal.
    """
    from sklearn.neighbors import LocalOutlierFactor

    tensor = jnp.asarray(snapshots, jnp.float32)
    factors = np.asarray(_cp_time_factors(tensor, jax.random.key(seed), rank=rank, sweeps=sweeps))
    model = LocalOutlierFactor(n_neighbors=min(neighbors, len(factors) - 1))
    model.fit(factors)
    return -model.negative_outlier_factor_


def lad(snapshots, *, directed: bool = False, **settings) -> np.ndarray:
    """LAD's two-window scores (`laplacian_change.lad`)."""
    return laplacian_change.lad(snapshots, directed=directed, **settings).scores


BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "lad": lad,
    "activity_vector": activity_vector,
    "deltacon": deltacon,
    "spotlight": spotlight,
    "edge_monitoring": edge_monitoring,
    "tensor_splat": tensor_splat,
}
