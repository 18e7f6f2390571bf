"""The samplers MeGuide is compared with: GraphSAINT's three, neighbors, clusters, uniform nodes.

Host functions on an `Adjacency` and a NumPy generator. All return node numbers without repetition;
the subgraph is the induced one, except for `sample_neighbors`, which keeps only the edges it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxmodels.graphs.guided_sampler import Adjacency, neighbors_of


def _distinct(nodes: np.ndarray, size: int | None = None) -> np.ndarray:
    """The first `size` different entries, in order of first appearance."""
    _, first = np.unique(nodes, return_index=True)
    return nodes[np.sort(first)][:size]


def sample_nodes(
    graph: Adjacency, size: int, rng: np.random.Generator, pool: np.ndarray | None = None
) -> np.ndarray:
    """`size` nodes of `pool` (all) uniformly without replacement: sampling without any guidance."""
    pool = np.arange(graph.num_nodes) if pool is None else pool
    return rng.choice(pool, min(size, len(pool)), replace=False)


def saint_nodes(graph: Adjacency, size: int, rng: np.random.Generator) -> np.ndarray:
    """GraphSAINT-Node: `size` draws with replacement, probability proportional to the degree.

    Zeng et al., arXiv 1907.04931; GraphSAINT/GraphSAINT@c9b1e340d7b9.
    """
    if not len(graph.indices):
        return sample_nodes(graph, size, rng)
    # The end of a uniformly drawn edge is a node drawn by degree.
    return _distinct(graph.indices[rng.integers(len(graph.indices), size=size)])


def edge_probabilities(graph: Adjacency) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """GraphSAINT-Edge's law: ends u < v of every edge and p ~ 1 / deg(u) + 1 / deg(v)."""
    degree = np.diff(graph.indptr)
    receivers = np.repeat(np.arange(graph.num_nodes), degree)
    once = graph.indices < receivers
    u, v = graph.indices[once], receivers[once]
    weight = 1 / np.maximum(degree[u], 1) + 1 / np.maximum(degree[v], 1)
    return u, v, weight / max(weight.sum(), 1e-300)


def saint_edges(
    law: tuple[np.ndarray, np.ndarray, np.ndarray], size: int, rng: np.random.Generator
) -> np.ndarray:
    """GraphSAINT-Edge: both ends of size / 2 edges drawn by `edge_probabilities`."""
    u, v, p = law
    chosen = rng.choice(len(p), max(1, size // 2), p=p)
    return _distinct(np.stack([u[chosen], v[chosen]], 1).ravel())


def saint_walks(
    graph: Adjacency,
    size: int,
    length: int,
    rng: np.random.Generator,
    roots: np.ndarray | None = None,
) -> np.ndarray:
    """GraphSAINT-RW: the nodes of size / (length + 1) walks of `length` steps.

    Roots are uniform with replacement from `roots` (all nodes). A walk ends at an isolated node.
    """
    pool = np.arange(graph.num_nodes) if roots is None else roots
    at = pool[rng.integers(len(pool), size=max(1, size // (length + 1)))]
    visited = [at]
    for _ in range(length):
        degree = graph.indptr[at + 1] - graph.indptr[at]
        step = (rng.random(len(at)) * degree).astype(np.int64)
        place = np.minimum(graph.indptr[at] + step, max(len(graph.indices) - 1, 0))
        at = np.where(degree > 0, graph.indices[place] if len(graph.indices) else at, at)
        visited.append(at)
    return _distinct(np.concatenate(visited))


def sample_neighbors(
    graph: Adjacency, targets: np.ndarray, fanouts: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """GraphSAGE's neighbor sampling: at most fanouts[l] neighbors of every node of layer l.

    Hamilton et al., arXiv 1706.02216. Neighbors are drawn without replacement; a node is expanded
    once, with the fan-out of the layer in which it first appears.

    Args:
      targets: nodes whose outputs are wanted. fanouts: from the targets outwards; -1 takes all.

    Returns: nodes, the targets first, and drawn edges [2, E] (sender, receiver) by node number.
    """
    known = np.zeros(graph.num_nodes, bool)
    known[targets] = True
    nodes, edges, frontier = [targets], [np.zeros((2, 0), np.int64)], targets
    for fanout in fanouts:
        senders, counts = neighbors_of(graph, frontier)
        receivers = np.repeat(frontier, counts)
        if fanout >= 0 and len(senders):
            # Random order within every row, then the first `fanout` of each.
            row = np.repeat(np.arange(len(counts)), counts)
            order = np.lexsort((rng.random(len(senders)), row))
            rank = np.arange(len(senders)) - np.repeat(np.cumsum(counts) - counts, counts)
            senders, receivers = senders[order][rank < fanout], receivers[rank < fanout]
        edges.append(np.stack([senders, receivers]))
        frontier = _distinct(senders[~known[senders]])
        known[frontier] = True
        nodes.append(frontier)
    return np.concatenate(nodes), np.concatenate(edges, axis=1)


def partition(
    graph: Adjacency, parts: int, rng: np.random.Generator, *, slack: float = 0.1, rounds: int = 20
) -> np.ndarray:
    """Clusters of nearly equal size by label propagation with capacities, part numbers [N].

    Regions grow from random nodes; then every node moves to the part most of its neighbors are in
    while that has room, at most (1 + slack) N / parts. It stands in for METIS, which Cluster-GCN
    (Chiang et al., arXiv 1905.07953) takes, and cuts more edges than METIS would.

    Raises ValueError for fewer than one part or more parts than nodes.
    """
    n = graph.num_nodes
    if not 1 <= parts <= n:
        raise ValueError(f"parts must be in [1, {n}], got {parts}")
    from scipy.sparse import csr_matrix

    room = int(np.ceil((1 + slack) * n / parts))
    ones = np.ones(len(graph.indices), np.float32)
    matrix = csr_matrix((ones, graph.indices, graph.indptr), shape=(n, n))
    part = np.full(n, -1)
    part[rng.permutation(n)[:parts]] = np.arange(parts)
    for _ in range(rounds):
        known = np.flatnonzero(part >= 0)
        hot = csr_matrix((np.ones(len(known), np.float32), (known, part[known])), (n, parts))
        votes = np.asarray((matrix @ hot).todense())
        votes += 0.01 * rng.random(votes.shape, np.float32)  # Ties fall differently each round.
        own = np.where(part >= 0, votes[np.arange(n), np.maximum(part, 0)], 0)
        best = votes.argmax(1)
        gain = votes[np.arange(n), best] - own
        wish = np.flatnonzero((gain >= (0.5 if (part >= 0).all() else 1.0)) & (best != part))
        if not len(wish):
            break
        size = np.bincount(part[part >= 0], minlength=parts)
        moved = 0
        for node in wish[np.argsort(-gain[wish], kind="stable")]:
            if size[best[node]] < room:
                if part[node] >= 0:
                    size[part[node]] -= 1
                size[best[node]] += 1
                part[node] = best[node]
                moved += 1
        if not moved:
            break
    # What no region reached fills the emptiest parts.
    size = np.bincount(part[part >= 0], minlength=parts)
    for node in np.flatnonzero(part < 0):
        part[node] = size.argmin()
        size[part[node]] += 1
    return part


def inclusion_frequencies(
    draw: Callable[[np.random.Generator], np.ndarray],
    num_nodes: int,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Share of `draws` subgraphs that hold each node [N]; 1 / draws where none did.

    GraphSAINT divides a node's loss by it: 1 / (N p_v) makes the loss of a subgraph an unbiased
    estimate of the mean loss of all nodes.
    """
    counts = np.zeros(num_nodes)
    for _ in range(draws):
        counts[draw(rng)] += 1
    return np.maximum(counts, 1) / draws
