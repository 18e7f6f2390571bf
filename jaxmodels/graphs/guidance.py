"""MeGuide's metrics: where a graph's useful information is, and how large a subgraph should be.

J. Bai, Y. Ren, J. Zhang, "Measuring and Sampling: A Metric-guided Subgraph Learning Framework for
Graph Neural Network", arXiv 2112.15015.

RECONSTRUCTED. The body of that paper could not be obtained. Feature and label smoothness are those
of CS-GNN (Hou et al., ICLR 2020; yifan-h/CS-GNN@8dd5a30fe308), which its abstract builds on. The
node score, the connection failure distance and the size derived from it are ours, made so that they
do what the abstract says. They stand in this one module, and the sampler (`guided_sampler`) takes
only a score per node, a hop cap and a size: who has the paper replaces this file.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs.graph import Graph, check_edges, make_graph, symmetrize
from jaxmodels.graphs.message_passing import aggregate_sum, in_degree

SMALLEST_ESTIMATED = 5_000
_BLOCK = 128
SIZE_LIMITS = (64, 4_096)


class UndirectedGraph(NamedTuple):
    """What the metrics are measured on.

    Attributes:
      graph: both directions of every edge between two nodes, once, without weights.
      num_edges: |E|: undirected edges, each once, self loops included.
    """

    graph: Graph
    num_edges: int


def undirected(edge_index: Any, num_nodes: int, *, tables: bool = False) -> UndirectedGraph:
    """Directed or undirected `edge_index` [2, E] as the metrics see it; duplicates count once."""
    edges = check_edges(edge_index, num_nodes)
    both, _ = symmetrize(edges)
    loops = both[0] == both[1]
    graph = make_graph(both[:, ~loops], num_nodes, tables=tables)
    return UndirectedGraph(graph, int((~loops).sum()) // 2 + int(loops.sum()))


def check_features(x: Any, num_nodes: int) -> np.ndarray:
    """x as floats [N, d]; raises ValueError naming the first node and column that is not finite."""
    x = np.asarray(x)
    if x.ndim != 2 or len(x) != num_nodes:
        raise ValueError(f"features must be [{num_nodes}, d], got shape {x.shape}")
    if x.dtype.kind != "f":
        x = x.astype(np.float32)
    bad = ~np.isfinite(x)
    if bad.any():
        node, column = np.argwhere(bad)[0]
        raise ValueError(f"feature of node {node}, column {column} is {x[node, column]}")
    return x


def min_max_scale(x: jax.Array) -> jax.Array:
    """Every column of x [N, d] to [0, 1]; a constant column becomes 0."""
    low, span = x.min(0), jnp.ptp(x, axis=0)
    return jnp.where(span > 0, (x - low) / jnp.where(span > 0, span, 1), 0)


def _squared_differences(graph: Graph, x: jax.Array) -> jax.Array:
    """sum_{u in N(v)} ||x_v - x_u||^2 per node [N], without an array [E, d]."""
    x = x - x.mean(0)  # The differences do not change, the cancellation below does.
    square = jnp.square(x).sum(-1)
    around = aggregate_sum(graph, jnp.concatenate([x, square[:, None]], 1))
    total = in_degree(graph) * square - 2 * (x * around[:, :-1]).sum(-1) + around[:, -1]
    return jnp.maximum(total, 0)


def feature_smoothness(
    graph: UndirectedGraph, x: Any, *, variant: str = "edge", scale: bool = True
) -> jax.Array:
    """How much neighbors' features differ, []; larger means neighbors bring more new information.

    "edge": 2 sum_{(u, v) in E} ||x_u - x_v||^2 / (|E| d), as CS-GNN's code has it. "formula":
    || sum_v (sum_{u in N(v)} (x_v - x_u))^2 ||_1 / (|E| d), as its text has it (summed before the
    square). `scale`: min-max scaling of every column first.

    Args:
      graph: of `undirected`. x: features [N, d].

    Raises ValueError for features that are not finite, an unknown variant, no edges.
    """
    x = check_features(x, graph.graph.num_nodes)
    if graph.num_edges == 0:
        raise ValueError("feature smoothness needs at least one edge")
    if variant not in ("edge", "formula"):
        raise ValueError(f"variant {variant!r}; known: edge, formula")
    return _total_difference(graph.graph, x, variant, scale) / (graph.num_edges * x.shape[1])


@functools.partial(jax.jit, static_argnames=("variant", "scale"))
def _total_difference(graph: Graph, x: jax.Array, variant: str, scale: bool) -> jax.Array:
    x = min_max_scale(x) if scale else x
    if variant == "edge":
        return _squared_differences(graph, x).sum()
    x = x - x.mean(0)
    return jnp.square(in_degree(graph)[:, None] * x - aggregate_sum(graph, x)).sum()


def label_smoothness(graph: UndirectedGraph, labels: Any) -> float:
    """2 |{(u, v) in E: y_u != y_v}| / |E|: from 0 to 2 (CS-GNN). labels: integers [N].

    Raises ValueError for a graph without edges.
    """
    labels = np.asarray(labels)
    if graph.num_edges == 0:
        raise ValueError("label smoothness needs at least one edge")
    s, r = np.asarray(graph.graph.senders), np.asarray(graph.graph.receivers)
    return float((labels[s] != labels[r]).sum() / graph.num_edges)


def node_scores(graph: UndirectedGraph, x: Any) -> jax.Array:
    """s(v) = sum_{u in N(v)} ||x_v - x_u||^2 / (deg(v) d), [N], of scaled features; isolated: 0.

    sum_v deg(v) s(v) / |E| is the feature smoothness.
    """
    return _scores(graph.graph, check_features(x, graph.graph.num_nodes))


@jax.jit
def _scores(graph: Graph, x: jax.Array) -> jax.Array:
    degree = jnp.maximum(in_degree(graph), 1)
    return _squared_differences(graph, min_max_scale(x)) / (degree * x.shape[1])


class ConnectionFailure(NamedTuple):
    """How similarity falls with distance.

    Attributes:
      distance: the first hop at which being connected says no more than chance; k_max + 1 if none.
      curve: [k_max], mean similarity of ordered pairs at distance k = 1, 2, ...; NaN without pairs.
      standard_error: [k_max], of the curve over the drawn sources; 0 when every source was used.
      base: mean similarity of all ordered pairs of distinct nodes.
      pairs: [k_max], number of pairs seen. num_sources: breadth-first searches made.
    """

    distance: int
    curve: np.ndarray
    standard_error: np.ndarray
    base: float
    pairs: np.ndarray
    num_sources: int


def connection_failure_distance(
    graph: UndirectedGraph,
    *,
    labels: Any = None,
    features: Any = None,
    mask: Any = None,
    k_max: int = 10,
    tau: float = 0.0,
    num_sources: int | None = None,
    seed: int = 0,
) -> ConnectionFailure:
    """min { k >= 1 : c_k <= base + tau (1 - base), or no pair at distance k }, else k_max + 1.

    c_k is the mean similarity of ordered node pairs at shortest-path distance k (in the whole
    graph). Similarity is equality of `labels` [N], the Jaccard index of label sets for `labels`
    [N, C] (0 for two empty sets), else the cosine of `features` [N, d].

    Args:
      mask: bool [N], nodes whose pairs count: the *training* nodes, wherever labels are used.
      num_sources: breadth-first searches; default all up to 5,000 nodes, 512 above. Sources are
        drawn from the masked nodes without replacement, by `seed`.

    Raises:
      ValueError: neither labels nor features, fewer than two masked nodes, labels below 0 on the
        mask, features that are not finite.
    """
    n = graph.graph.num_nodes
    if (labels is None) == (features is None):
        raise ValueError("give either labels or features")
    chosen = np.ones(n, bool) if mask is None else np.asarray(mask, bool)
    members = np.flatnonzero(chosen)
    if len(members) < 2:
        raise ValueError(f"similarity needs at least two nodes, the mask has {len(members)}")
    kind, rows = _similarity_rows(labels, features, chosen, n)
    wanted = num_sources or (n if n <= SMALLEST_ESTIMATED else 512)
    sources = members
    if wanted < len(members):
        sources = np.sort(np.random.default_rng(seed).choice(members, wanted, replace=False))
    sums, counts, everywhere = [], [], []
    block = min(_BLOCK, len(sources))
    for start in range(0, len(sources), block):
        part = sources[start : start + block]
        padded = np.concatenate([part, np.repeat(part[:1], block - len(part))])
        found = _similarity_by_distance(graph.graph, rows, chosen, padded, kind, k_max)
        for store, values in zip((sums, counts, everywhere), found):
            store.append(np.asarray(values, np.float64)[: len(part)])
    sums, counts = np.concatenate(sums), np.concatenate(counts)
    base = _base(kind, rows, chosen, np.concatenate(everywhere))
    pairs = counts.sum(0)
    seen = pairs > 0
    curve = np.where(seen, sums.sum(0) / np.where(seen, pairs, 1), np.nan)
    error = _standard_error(sums, counts, curve, len(members))
    fails = ~seen | (np.where(seen, curve, 0) <= base + tau * (1 - base))
    distance = int(np.argmax(fails)) + 1 if fails.any() else k_max + 1
    return ConnectionFailure(distance, curve, error, float(base), pairs, len(sources))


def _similarity_rows(labels, features, mask, n) -> tuple[str, np.ndarray]:
    if features is not None:
        x = check_features(features, n)
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        return "cosine", x / np.where(norm > 0, norm, 1)
    labels = np.asarray(labels)
    if labels.shape[0] != n or labels.ndim not in (1, 2):
        raise ValueError(f"labels must be [{n}] or [{n}, classes], got shape {labels.shape}")
    # Labels off the mask are erased, so that nothing can read them.
    if labels.ndim == 2:
        return "jaccard", np.where(mask[:, None], labels != 0, False).astype(np.float32)
    bad = np.flatnonzero(mask & (labels < 0))
    if len(bad):
        raise ValueError(f"node {bad[0]} is in the mask and has label {labels[bad[0]]}")
    return "label", np.where(mask, labels, -1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("kind", "k_max"))
def _similarity_by_distance(graph, rows, mask, sources, kind, k_max):
    """Per source: sums of similarity and pair counts by distance [B, k_max], and over all [B]."""
    at = rows[sources]
    if kind == "label":
        similarity = (rows[:, None] == at[None]).astype(jnp.float32)
    else:
        similarity = jnp.matmul(rows, at.T, precision="highest")
        if kind == "jaccard":
            size = rows.sum(1)
            union = size[:, None] + size[sources][None] - similarity
            similarity = similarity / jnp.maximum(union, 1)
    others = mask[:, None] & (jnp.arange(len(rows))[:, None] != sources[None])

    def of(pairs):
        return jnp.where(pairs, similarity, 0).sum(0), pairs.sum(0)

    start = jnp.arange(len(rows))[:, None] == sources[None]

    def hop(carry, _):
        reached, frontier = carry
        near = aggregate_sum(graph, frontier.astype(jnp.float32), weighted=False) > 0
        frontier = near & ~reached
        return (reached | frontier, frontier), of(frontier & others)

    _, (sums, counts) = jax.lax.scan(hop, (start, start), None, length=k_max)
    return sums.T, counts.T, of(others)[0]


def _base(kind, rows, mask, everywhere) -> float:
    n = int(mask.sum())
    if kind == "label":
        counts = np.bincount(rows[mask])
        return float((counts * (counts - 1.0)).sum() / (n * (n - 1.0)))
    if kind == "cosine":
        x = rows[mask].astype(np.float64)
        return float((np.square(x.sum(0)).sum() - np.square(x).sum()) / (n * (n - 1.0)))
    return float(everywhere.sum() / (len(everywhere) * (n - 1.0)))


def _standard_error(sums, counts, curve, population) -> np.ndarray:
    """Of the ratio of two totals over sources drawn without replacement, by linearization."""
    drawn, pairs = len(sums), counts.sum(0)
    if drawn >= population or drawn < 2:
        return np.zeros_like(curve)
    residual = np.square(sums - np.nan_to_num(curve) * counts).sum(0)
    scale = drawn / (drawn - 1) * (1 - drawn / population)
    return np.where(pairs > 0, np.sqrt(residual * scale) / np.maximum(pairs, 1), np.nan)


class SubgraphSize(NamedTuple):
    """hop_cap: H = max(1, CFD - 1). size: rounded mean of ball_sizes [sources]."""

    hop_cap: int
    size: int
    ball_sizes: np.ndarray


def subgraph_size(
    graph: UndirectedGraph,
    distance: int,
    *,
    mask: Any = None,
    limits: tuple[int, int] | None = SIZE_LIMITS,
    num_sources: int | None = None,
    seed: int = 0,
) -> SubgraphSize:
    """Hop cap and target size from the connection failure distance.

    The size is the mean number of nodes within the hop cap of a node, itself included, over all
    nodes or, above 5,000 of them, `num_sources` (512) drawn by `seed`; clipped to `limits`, which
    are in turn clipped to the graph. `mask` [N]: only these nodes count, as in an inductive set,
    where the others have no edges yet.
    """
    n = graph.graph.num_nodes
    hops = max(1, int(distance) - 1)
    wanted = num_sources or (n if n <= SMALLEST_ESTIMATED else 512)
    sources = np.arange(n) if mask is None else np.flatnonzero(mask)
    if wanted < len(sources):
        sources = np.sort(np.random.default_rng(seed).choice(sources, wanted, replace=False))
    balls, block = [], min(_BLOCK, len(sources))
    for start in range(0, len(sources), block):
        part = sources[start : start + block]
        padded = np.concatenate([part, np.repeat(part[:1], block - len(part))])
        reached = within_hops(graph.graph, jnp.asarray(padded), hops)
        balls.append(np.asarray(reached.sum(0))[: len(part)])
    balls = np.concatenate(balls)
    size = int(np.round(balls.mean()))
    if limits is not None:
        size = min(max(size, limits[0]), limits[1])
    return SubgraphSize(hops, min(size, n), balls)


@jax.jit
def within_hops(graph: Graph, sources: jax.Array, hops: int) -> jax.Array:
    """bool [N, B]: nodes at distance at most `hops` of each source [B], the source included."""
    start = jnp.arange(graph.num_nodes)[:, None] == sources[None]

    def more(carry):
        step, _, frontier = carry
        return (step < hops) & frontier.any()

    def hop(carry):
        step, reached, frontier = carry
        near = aggregate_sum(graph, frontier.astype(jnp.float32), weighted=False) > 0
        return step + 1, reached | near, near & ~reached

    return jax.lax.while_loop(more, hop, (0, start, start))[1]
