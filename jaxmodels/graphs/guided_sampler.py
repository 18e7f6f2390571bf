"""MeGuide's sampler: grow a subgraph from a seed, preferring nodes with high scores.

RECONSTRUCTED, like `guidance` (which see): the expansion follows Ripple Walk (J. Bai, Y. Ren,
J. Zhang, arXiv 2002.07206), whose uniform choice of neighbors a score replaces here.

`sample_subgraph` runs under `jit` with static shapes, `vmap` over seeds included;
`sample_on_host` is the same procedure for graphs that do not fit a device: it touches only what it
selects. Given the same noise both select the same nodes in the same order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs.graph import Graph
from jaxmodels.graphs.guidance import within_hops
from jaxmodels.graphs.message_passing import aggregate_sum

EPS = 1e-6


class Adjacency(NamedTuple):
    """Neighbors of node v: `indices[indptr[v] : indptr[v + 1]]`, ascending, without v itself."""

    indptr: np.ndarray
    indices: np.ndarray

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1


class Subgraph(NamedTuple):
    """What was selected.

    Attributes:
      nodes: [S] int32 in order of selection, the seed first; N after the last one.
      count: [] number of nodes. steps: [S] int32, nodes added in every step, 0 after the last.
    """

    nodes: jax.Array
    count: jax.Array
    steps: jax.Array


def adjacency(graph: Graph) -> Adjacency:
    """Rows of a graph sorted by receiver as a host adjacency; self loops are left out."""
    s, r = np.asarray(graph.senders), np.asarray(graph.receivers)
    keep = (r < graph.num_nodes) & (s != r)
    s, r = s[keep], r[keep]
    s = s[np.lexsort((s, r))]
    counts = np.bincount(r, minlength=graph.num_nodes)
    return Adjacency(np.concatenate([[0], np.cumsum(counts)]), s.astype(np.int64))


def check_sampling(num_nodes: int, size: int, hops: int, ratio: float) -> None:
    """Raises ValueError for a size outside [1, N], hops below 1, a ratio outside (0, 1]."""
    if not 1 <= size <= num_nodes:
        raise ValueError(f"size must be in [1, {num_nodes}] (the graph's nodes), got {size}")
    if hops < 1:
        raise ValueError(f"hops must be at least 1, got {hops}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")


def sample_subgraph(
    graph: Graph,
    scores: jax.Array,
    seed: jax.Array,
    size: int,
    *,
    hops: int,
    ratio: float = 0.5,
    beta: float = 1.0,
    eps: float = EPS,
    key: jax.Array | None = None,
    gumbel: jax.Array | None = None,
    restart: Any = None,
) -> Subgraph:
    """Select `size` connected nodes around a seed, in JAX with static shapes.

    From the frontier F (neighbors of what is selected, at most `hops` from the seed in the whole
    graph) every step takes min(ceil(ratio |F|), what is missing) nodes without replacement with
    probability weights (score + eps)^beta: the largest of beta log(score + eps) + Gumbel noise,
    ties to the lower index. It stops at `size` or when the frontier is empty.

    Args:
      graph: both directions of every edge. scores: [N] of `guidance.node_scores`.
      seed: [] int32. size, hops, ratio, beta: static or traced but for `size`.
      key: of the noise; or gumbel: [T, N], row t used in step t (the last again when T is short).
      restart: bool [N] or None: with it an empty frontier draws another seed, uniformly from its
        true entries that are not selected, whose ball is added.

    Raises ValueError as `check_sampling`, and without either noise.
    """
    n = graph.num_nodes
    check_sampling(n, size, hops, ratio)
    if (key is None) == (gumbel is None):
        raise ValueError("give either a key or the Gumbel noise")
    # In double precision on the host: ceil of a rounded product may be one too many.
    take = jnp.asarray([math.ceil(ratio * count) for count in range(n + 1)], jnp.int32)
    scores = jnp.asarray(scores)
    preference = beta * jnp.log(scores + eps)

    def noise(step):
        if gumbel is not None:
            return jnp.asarray(gumbel)[jnp.minimum(step, len(gumbel) - 1)]
        return jax.random.gumbel(jax.random.fold_in(key, step), (n,), preference.dtype)

    def near(selected):
        reached = aggregate_sum(graph, selected.astype(jnp.float32)[:, None], weighted=False)
        return reached[:, 0] > 0

    def begin_again(state):
        pool = jnp.asarray(restart, bool) & ~state["selected"]
        draw = jnp.argmax(jnp.where(pool, noise(n + state["step"]), -jnp.inf))
        found = pool.any() & (state["count"] < size)
        index = jnp.where(found, draw, n)
        ball = within_hops(graph, draw[None], hops)[:, 0] & found
        return _select(state, index[None], found.astype(jnp.int32), size) | {
            "ball": state["ball"] | ball,
            "over": ~found,
        }

    def grow(state):
        frontier = near(state["selected"]) & state["ball"] & ~state["selected"]
        count = frontier.sum()
        m = jnp.minimum(take[count], size - state["count"])
        keys = jnp.where(frontier, preference + noise(state["step"]), -jnp.inf)
        _, best = jax.lax.top_k(keys, size)
        state = _select(state, best, m, size)
        state["steps"] = state["steps"].at[state["step"]].set(m, mode="drop")
        state["step"] = state["step"] + (m > 0)
        if restart is None:
            return state | {"over": m == 0}
        return jax.lax.cond(m == 0, begin_again, lambda s: s, state)

    seed = jnp.asarray(seed, jnp.int32)
    state = {
        "selected": jnp.zeros(n, bool),
        "ball": within_hops(graph, seed[None], hops)[:, 0],
        "nodes": jnp.full(size, n, jnp.int32),
        "steps": jnp.zeros(size, jnp.int32),
        "count": jnp.zeros((), jnp.int32),
        "step": jnp.zeros((), jnp.int32),
        "over": jnp.zeros((), bool),
    }
    state = _select(state, seed[None], jnp.ones((), jnp.int32), size)
    state = jax.lax.while_loop(lambda s: (s["count"] < size) & ~s["over"], grow, state)
    return Subgraph(state["nodes"], state["count"], state["steps"])


def _select(state, candidates, m, size):
    """The state with the first m of `candidates` selected."""
    rank = jnp.arange(len(candidates))
    chosen = rank < m
    n = len(state["selected"])
    place = jnp.where(chosen, state["count"] + rank, size)
    return state | {
        "nodes": state["nodes"].at[place].set(candidates.astype(jnp.int32), mode="drop"),
        "selected": state["selected"].at[jnp.where(chosen, candidates, n)].set(True, mode="drop"),
        "count": state["count"] + m,
    }


def induced_subgraph(
    graph: Graph, sample: Subgraph, pad_edges: int
) -> tuple[Graph, jax.Array, jax.Array]:
    """All edges among the selected nodes, in JAX with static shapes.

    Where they do not fit, the nodes selected last are left out until they do: what remains is an
    induced subgraph still.

    Returns: the graph on S places, places in ascending node order; nodes [S], the node of every
    place, N on padding; and the number of edges [] among all nodes selected, which exceeds
    `pad_edges` where nodes were left out.
    """
    n, size = graph.num_nodes, sample.nodes.shape[-1]
    order = jnp.arange(size, dtype=jnp.int32)
    rank = jnp.full(n + 1, size, jnp.int32).at[sample.nodes].set(order).at[n].set(size)
    # The selection that brings an edge in; `size` for edges that leave the subgraph.
    brought = jnp.maximum(rank[graph.senders], rank[jnp.minimum(graph.receivers, n)])
    edges = jnp.zeros(size, jnp.int32).at[brought].add(1, mode="drop")
    fits = jnp.cumsum(edges) <= pad_edges
    nodes = jnp.sort(jnp.where(fits, sample.nodes, n))
    place = jnp.full(n + 1, -1, jnp.int32).at[nodes].set(jnp.arange(size, dtype=jnp.int32))
    place = place.at[n].set(-1)
    senders, receivers = place[graph.senders], place[jnp.minimum(graph.receivers, n)]
    inside = (senders >= 0) & (receivers >= 0)
    # Ascending node order keeps the edges ascending by receiver.
    slot = jnp.where(inside, jnp.cumsum(inside) - 1, pad_edges)

    def kept(values, fill):
        return jnp.full(pad_edges, fill, values.dtype).at[slot].set(values, mode="drop")

    weight = None if graph.weight is None else kept(jnp.asarray(graph.weight), 0)
    induced = Graph(
        kept(senders, 0), kept(receivers, size), weight, num_nodes=size, num_senders=size
    )
    return induced, nodes, edges.sum()


def neighbors_of(graph: Adjacency, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All neighbors of several nodes one after another, and how many each has."""
    counts = graph.indptr[nodes + 1] - graph.indptr[nodes]
    first = np.repeat(graph.indptr[nodes] - (np.cumsum(counts) - counts), counts)
    return graph.indices[first + np.arange(counts.sum())], counts


def ball(graph: Adjacency, seed: int, hops: int) -> np.ndarray:
    """bool [N]: nodes at distance at most `hops` of the seed."""
    inside = np.zeros(graph.num_nodes, bool)
    inside[seed] = True
    frontier = np.array([seed])
    for _ in range(hops):
        near, _ = neighbors_of(graph, frontier)
        frontier = np.unique(near[~inside[near]])
        if not len(frontier):
            break
        inside[frontier] = True
    return inside


def sample_on_host(
    graph: Adjacency,
    scores: np.ndarray,
    seed: int,
    size: int,
    *,
    hops: int,
    ratio: float = 0.5,
    beta: float = 1.0,
    eps: float = EPS,
    rng: np.random.Generator | None = None,
    gumbel: np.ndarray | None = None,
    restart: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`sample_subgraph` in NumPy: (nodes in order of selection, nodes added in every step).

    Arguments as there; `rng` stands for the key. An isolated seed gives the seed alone.
    """
    check_sampling(graph.num_nodes, size, hops, ratio)
    selected, inside = np.zeros(graph.num_nodes, bool), ball(graph, seed, hops)
    frontier = np.zeros(0, np.int64)
    fresh, order, steps = np.array([seed]), [np.array([seed])], []
    count = 1
    while True:
        selected[fresh] = True
        near, _ = neighbors_of(graph, fresh)
        frontier = np.union1d(frontier, near)
        frontier = frontier[inside[frontier] & ~selected[frontier]]
        if count >= size:
            break
        if not len(frontier):
            pool = np.zeros(0, int) if restart is None else np.flatnonzero(restart & ~selected)
            if not len(pool):
                break
            fresh = pool[rng.integers(len(pool), size=1)]
            inside |= ball(graph, int(fresh[0]), hops)
        else:
            m = min(math.ceil(ratio * len(frontier)), size - count)
            if gumbel is None:
                noise = rng.gumbel(size=len(frontier))
            else:
                noise = gumbel[min(len(steps), len(gumbel) - 1)][frontier]
            keys = beta * np.log(scores[frontier] + eps) + noise
            fresh = frontier[np.argsort(-keys, kind="stable")[:m]]
            steps.append(m)
        order.append(fresh)
        count += len(fresh)
    return np.concatenate(order), np.asarray(steps, np.int64)


def induced_edges(edge_index: Any, nodes: np.ndarray, num_nodes: int) -> np.ndarray:
    """bool [E]: edges of `edge_index` [2, E] with both ends among `nodes`."""
    inside = np.zeros(num_nodes, bool)
    inside[nodes] = True
    edges = np.asarray(edge_index)
    return inside[edges[0]] & inside[edges[1]]
