"""LAD, the baseline: change points from the spectra of graph Laplacians, on the host.

Huang, Hitti, Rabusseau, Rabbany, "Laplacian Change Point Detection for Dynamic Graphs", KDD 2020;
arithmetic and conventions of the official code, shenyangHuang/LAD@5833023. Snapshots have node sets
of their own, so this is LAPACK in float64, one snapshot at a time. Axis names: t snapshots, n
nodes, r signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Settings of the official code by data set: short and long window, first scored index, size of
# the signature, share of the snapshots reported.
SETTINGS: dict[str, dict[str, float]] = {
    "sbm": dict(short=5, long=10, initial=10, num_eigen=499, share=0.047),
    "us_senate": dict(short=1, long=2, initial=2, num_eigen=6, share=0.20),
    "uci": dict(short=7, long=14, initial=14, num_eigen=6, share=0.05),
    "canadian_votes": dict(short=2, long=4, initial=4, num_eigen=338, share=0.154),
}

PLAIN, LAZY, PAGERANK = "plain", "lazy", "pagerank"
_PAGERANK_ALPHA = 0.95


class LadScores(NamedTuple):
    """`short`, `long` [t]: Z of each window, differenced or not; `scores` [t]: their maximum."""

    short: np.ndarray
    long: np.ndarray
    scores: np.ndarray


def snapshot_adjacency(
    senders, receivers, weights, *, directed: bool, max_nodes: int
) -> tuple[np.ndarray, int]:
    """Adjacency of the nodes that have edges, and how many isolated nodes pad it to `max_nodes`.

    A repeated edge keeps its last weight. Returns (A [m, m] float64, max_nodes - m).

    Raises ValueError: more nodes than `max_nodes`.
    """
    senders, receivers = np.asarray(senders, np.int64), np.asarray(receivers, np.int64)
    nodes, place = np.unique(np.concatenate([senders, receivers]), return_inverse=True)
    if len(nodes) > max_nodes:
        raise ValueError(f"a snapshot has {len(nodes)} nodes, more than max_nodes = {max_nodes}")
    u, v = place[: len(senders)], place[len(senders) :]
    adjacency = np.zeros((len(nodes), len(nodes)))
    if not directed:
        # One assignment per unordered pair, so that a repetition in either direction is the last.
        u, v = np.minimum(u, v), np.maximum(u, v)
    adjacency[u, v] = np.asarray(weights, np.float64)
    if not directed:
        adjacency = np.maximum(adjacency, adjacency.T)
    return adjacency, max_nodes - len(nodes)


def edges_to_adjacency(
    edges: np.ndarray, num_snapshots: int, *, directed: bool, max_nodes: int
) -> list[tuple[np.ndarray, int]]:
    """`snapshot_adjacency` of every snapshot of rows (t, u, v, weight), in the rows' order.

    Raises ValueError: a time outside 0..num_snapshots-1.
    """
    edges = np.asarray(edges)
    times = edges[:, 0].astype(np.int64)
    if len(times) and not 0 <= times.min() <= times.max() < num_snapshots:
        raise ValueError(f"edge times must be in 0..{num_snapshots - 1}")
    return [
        snapshot_adjacency(*edges[times == t, 1:4].T, directed=directed, max_nodes=max_nodes)
        for t in range(num_snapshots)
    ]


def walk_kind(adjacency: np.ndarray) -> str:
    """Which random walk a directed graph gets: plain, lazy (periodic), PageRank (not strong).

    As networkx chooses: strong connectivity first, then the period, which is the greatest common
    divisor of d(u) + 1 - d(v) over the edges, d the distance of a breadth-first search.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, connected_components

    if not adjacency.any():
        return PAGERANK
    links = csr_matrix(adjacency != 0)
    if connected_components(links, directed=True, connection="strong")[0] != 1:
        return PAGERANK
    order, parents = breadth_first_order(links, 0, directed=True)
    depth = np.zeros(len(adjacency), np.int64)
    for node in order[1:]:
        depth[node] = depth[parents[node]] + 1
    senders, receivers = links.nonzero()
    period = np.gcd.reduce(depth[senders] + 1 - depth[receivers])
    return PLAIN if period == 1 else LAZY


def transition_matrix(adjacency: np.ndarray) -> np.ndarray:
    """P [n, n], rows summing to 1, of the walk that `walk_kind` names."""
    size = len(adjacency)
    kind = walk_kind(adjacency)
    degrees = adjacency.sum(1, keepdims=True)
    if kind == PAGERANK:
        rows = np.where(degrees > 0, adjacency / np.where(degrees > 0, degrees, 1.0), 1.0 / size)
        return _PAGERANK_ALPHA * rows + (1.0 - _PAGERANK_ALPHA) / size
    walk = adjacency / np.where(degrees > 0, degrees, 1.0)
    return 0.5 * (np.eye(size) + walk) if kind == LAZY else walk


def stationary_distribution(walk: np.ndarray) -> np.ndarray:
    """phi [n] with phi P = phi and sum 1 of an irreducible P."""
    size = len(walk)
    system = walk.T - np.eye(size)
    system[-1] = 1.0
    right = np.zeros(size)
    right[-1] = 1.0
    return np.abs(np.linalg.solve(system, right))


def directed_laplacian(adjacency: np.ndarray) -> np.ndarray:
    """Chung's `I - (Phi^1/2 P Phi^-1/2 + its transpose) / 2` [n, n]; row u: edges leaving u."""
    walk = transition_matrix(adjacency)
    root = np.sqrt(stationary_distribution(walk))
    scaled = root[:, None] * walk / root[None, :]
    return np.eye(len(walk)) - 0.5 * (scaled + scaled.T)


def _undirected_values(adjacency: np.ndarray) -> np.ndarray:
    laplacian = np.diag(adjacency.sum(1)) - adjacency
    return np.abs(np.linalg.eigvalsh(laplacian)) if len(adjacency) else np.zeros(0)


def _directed_values(adjacency: np.ndarray, isolated: int) -> np.ndarray:
    """Singular values of the directed Laplacian of `adjacency` with isolated nodes beside it.

    With isolated nodes the walk is PageRank's, in which they are all alike: vectors on them that
    sum to zero are eigenvectors of L with value 1, and what is left is a walk in which they are
    one state. So a day with 40 active people costs 41 rows, not 1,901.
    """
    active = len(adjacency)
    if isolated == 0:
        return np.abs(np.linalg.eigvalsh(directed_laplacian(adjacency)))
    size = active + isolated
    degrees = adjacency.sum(1, keepdims=True)
    rows = np.where(degrees > 0, adjacency / np.where(degrees > 0, degrees, 1.0), 1.0 / size)
    walk = np.zeros((active + 1, active + 1))
    walk[:active, :active] = _PAGERANK_ALPHA * rows + (1.0 - _PAGERANK_ALPHA) / size
    # A dangling row is uniform over all nodes, isolated ones among them.
    dangling = (degrees[:, 0] == 0).astype(float)
    walk[:active, active] = isolated * (_PAGERANK_ALPHA * dangling + 1.0 - _PAGERANK_ALPHA) / size
    walk[active, :active] = 1.0 / size
    walk[active, active] = isolated / size
    root = np.sqrt(stationary_distribution(walk))
    scaled = root[:, None] * walk / root[None, :]
    small = np.eye(active + 1) - 0.5 * (scaled + scaled.T)
    return np.concatenate([np.abs(np.linalg.eigvalsh(small)), np.ones(isolated - 1)])


def singular_values(
    snapshots: Sequence[tuple[np.ndarray, int]], num_eigen: int, *, directed: bool = False
) -> np.ndarray:
    """The largest `num_eigen` singular values [t, num_eigen] of each Laplacian, ascending.

    Args:
      snapshots: (adjacency [m, m], isolated nodes beside it) each, as from `edges_to_adjacency`.

    Raises ValueError: fewer nodes than `num_eigen`, or an asymmetric matrix with directed=False.
    """
    rows = []
    for t, (adjacency, isolated) in enumerate(snapshots):
        adjacency = np.asarray(adjacency, np.float64)
        size = len(adjacency) + isolated
        if not 1 <= num_eigen <= size:
            raise ValueError(f"num_eigen = {num_eigen} of {size} nodes: it must be in 1..{size}")
        if directed:
            values = _directed_values(adjacency, isolated)
        else:
            if not np.array_equal(adjacency, adjacency.T):
                raise ValueError(
                    f"snapshot {t} is not symmetric but directed=False; pass directed=True for the "
                    "directed Laplacian"
                )
            values = np.concatenate([_undirected_values(adjacency), np.zeros(isolated)])
        rows.append(np.sort(values)[-num_eigen:])
    return np.stack(rows)


def normalized(values: np.ndarray) -> np.ndarray:
    """Rows [t, r] over their 2-norms; a zero row stays zero."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms > 0, norms, 1.0)


def context_distances(
    signatures: np.ndarray, length: int, initial: int, *, typical: str = "principal"
) -> np.ndarray:
    """Z [t] = 1 - |cos(signature, typical vector of the `length` before it)|, 0 before `initial`.

    `typical` is "principal" (first left singular vector) or "mean".
    """
    if typical not in ("principal", "mean"):
        raise ValueError(f"typical {typical!r}; known: principal, mean")
    if not 1 <= length <= initial:
        raise ValueError(f"a window of {length} must be at least 1 and at most initial = {initial}")
    z = np.zeros(len(signatures))
    for t in range(initial, len(signatures)):
        context = signatures[t - length : t]
        if typical == "mean":
            vector = context.mean(0)
        else:
            vector = np.linalg.svd(context.T, full_matrices=False)[0][:, 0]
        a, b = np.linalg.norm(signatures[t]), np.linalg.norm(vector)
        empty = not signatures[t].any(), not context.any()
        # As in the detector: nothing after nothing is no change, nothing after something is.
        z[t] = float(not all(empty)) if any(empty) else 1 - abs(signatures[t] @ vector / a / b)
    return z


def differences(z: np.ndarray) -> np.ndarray:
    """First differences [t], the first of which is the value itself."""
    return np.diff(z, prepend=0.0)


def lad_scores(
    signatures: np.ndarray,
    *,
    short: int,
    long: int,
    initial: int,
    difference: bool = True,
    typical: str = "principal",
) -> LadScores:
    """Two-window scores of signatures [t, r]; signed where differenced (clip only to draw)."""
    values = [
        context_distances(signatures, length, initial, typical=typical) for length in (short, long)
    ]
    if difference:
        values = [differences(z) for z in values]
    return LadScores(values[0], values[1], np.maximum(*values))


def ranked_points(scores: np.ndarray, share: float) -> np.ndarray:
    """Indices of the round(share T) largest scores, in order of time; ties: the lower index."""
    count = round(share * len(scores))
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[:count])


def compact(adjacency) -> tuple[np.ndarray, int]:
    """A snapshot [n, n], dense or sparse, as (adjacency of nodes with edges, isolated nodes)."""
    import scipy.sparse

    matrix = scipy.sparse.csr_matrix(adjacency)
    u, v = matrix.nonzero()
    nodes = np.unique(np.concatenate([u, v]))
    return matrix[nodes][:, nodes].toarray().astype(np.float64), matrix.shape[0] - len(nodes)


def lad(
    snapshots,
    *,
    directed: bool = False,
    num_eigen: int | None = None,
    short: int = 5,
    long: int = 10,
    initial: int | None = None,
    difference: bool = True,
    typical: str = "principal",
) -> LadScores:
    """LAD of aligned snapshots, [t, n, n] or a sequence of sparse matrices.

    `num_eigen` defaults to n - 1, as the synthetic settings have it; `initial` to `long`.
    """
    size = snapshots[0].shape[-1]
    kept = max(1, size - 1) if num_eigen is None else min(num_eigen, size)
    parts = [compact(graph) for graph in snapshots]
    signatures = normalized(singular_values(parts, kept, directed=directed))
    return lad_scores(
        signatures,
        short=short,
        long=long,
        initial=long if initial is None else initial,
        difference=difference,
        typical=typical,
    )
