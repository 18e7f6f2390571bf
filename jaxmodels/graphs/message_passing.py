"""Aggregation of messages at the receivers of a padded edge list, with exact gradients.

Every function takes a graph and node arrays [N, ...]; a leading batch axis on both is mapped over.
A `ShardedGraph` is taken too, inside `shard_map`, with this device's block of the node arrays.
Sums run in float32 or wider, whatever the features' dtype. Nodes without incoming edges get 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmodels.graphs.graph import Graph, NeighborTables
from jaxmodels.graphs.sharded import ShardedGraph, ring


def over_batch(function: Callable, graph: Graph, *arrays: jax.Array):
    """`function(graph, *arrays)`, mapped over the leading axes that the graph's arrays have."""
    if graph.receivers.ndim == 1:
        return function(graph, *arrays)
    return jax.vmap(lambda g, *a: over_batch(function, g, *a))(graph, *arrays)


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] for indices known to be in range (the receiver of padding is brought into it)."""
    return jnp.take(x, index, axis=0, mode="clip")


def segment_sum(messages: jax.Array, graph: Graph) -> jax.Array:
    """Sum per receiver, [E, ...] -> [N, ...]."""
    return jax.ops.segment_sum(messages, graph.receivers, graph.num_nodes, indices_are_sorted=True)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def in_degree(graph: Graph) -> jax.Array:
    """Number of incoming edges [N], duplicates and self loops counted as given."""
    if graph.in_degree is not None:
        return jnp.asarray(graph.in_degree)
    return over_batch(lambda g: segment_sum(g.edge_mask.astype(jnp.float32), g), graph)


def aggregate_sum(graph: Graph, x: jax.Array, *, weighted: bool = True) -> jax.Array:
    """sum_e w_e x[sender(e)] (+ loop_weight * x) per receiver, [N', F] -> [N, F].

    `weighted=False` ignores the graph's weights and its diagonal. With neighbor tables no message
    is ever stored, forward or backward.
    """

    def listed(graph: Graph, x: jax.Array) -> jax.Array:
        messages = _wide(rows(x, graph.senders))
        if weighted and graph.weight is not None:
            messages = messages * graph.weight[:, None].astype(messages.dtype)
        return segment_sum(messages, graph)

    def one(graph: Graph, x: jax.Array) -> jax.Array:
        if graph.incoming is None:
            return listed(graph, x)
        incoming, outgoing = graph.incoming, graph.outgoing
        if not weighted:
            incoming, outgoing = (_unweighted(t, graph) for t in (incoming, outgoing))
        return _table_sum(x, incoming.weight, incoming, outgoing).astype(_wide(x).dtype)

    if isinstance(graph, ShardedGraph):
        start = jnp.zeros(x.shape, _wide(x).dtype)
        y = ring(graph, x, start, lambda total, block, edges, _: total + listed(edges, block))
    else:
        y = over_batch(one, graph, x)
    if weighted and graph.loop_weight is not None:
        y = y + graph.loop_weight[..., None].astype(y.dtype) * _wide(x)
    return y


def _unweighted(tables: NeighborTables, graph: Graph) -> NeighborTables:
    if graph.weight is None:
        return tables
    used = tuple((e < graph.num_edges).astype(w.dtype) for e, w in zip(tables.edges, tables.weight))
    return tables.replace(weight=used)


def _gather_sum(x: jax.Array, tables: NeighborTables) -> jax.Array:
    """sum_k weight[n, k] x[neighbors[n, k]] for every row, brought into node order."""
    kind = jnp.promote_types(x.dtype, jnp.float32)
    parts = []
    for neighbors, weight in zip(tables.neighbors, tables.weight):
        # Unrolled, XLA fuses all the reads of a row into one loop that writes only the sum.
        total = rows(x, neighbors[:, 0]).astype(kind) * weight[:, :1].astype(kind)
        for k in range(1, neighbors.shape[1]):
            total = total + rows(x, neighbors[:, k]).astype(kind) * weight[:, k : k + 1].astype(
                kind
            )
        parts.append(total)
    if tables.piece_of is not None:
        parts[-1] = jax.ops.segment_sum(
            parts[-1], tables.piece_of, tables.num_long, indices_are_sorted=True
        )
    parts.append(jnp.zeros((1, x.shape[1]), kind))
    return rows(jnp.concatenate(parts), tables.row)


@jax.custom_vjp
def _table_sum(x, weight, incoming, outgoing):
    del weight, outgoing
    return _gather_sum(x, incoming)


def _table_sum_forward(x, weight, incoming, outgoing):
    return _gather_sum(x, incoming), (x, weight, incoming, outgoing)


def _table_sum_backward(saved, g):
    x, weight, incoming, outgoing = saved
    # The transposed operator is the same sum over the edges that leave a node.
    dx = _gather_sum(g, outgoing).astype(x.dtype)
    dw = []
    for neighbors, nodes, w in zip(incoming.neighbors, incoming.nodes, weight):
        at = rows(g, nodes)
        columns = [
            (at * rows(x, neighbors[:, k])).sum(-1, keepdims=True)
            for k in range(neighbors.shape[1])
        ]
        dw.append(jnp.concatenate(columns, 1).astype(w.dtype))
    return dx, tuple(dw), None, None


_table_sum.defvjp(_table_sum_forward, _table_sum_backward)


def aggregate_mean(graph: Graph, x: jax.Array) -> jax.Array:
    """Unweighted mean over incoming edges, duplicates counted, [N', F] -> [N, F]."""
    count = jnp.maximum(in_degree(graph), 1).astype(jnp.promote_types(x.dtype, jnp.float32))
    return aggregate_sum(graph, x, weighted=False) / count[..., None]


def aggregate_max(graph: Graph, x: jax.Array) -> jax.Array:
    """Feature-wise maximum over incoming edges, [N', F] -> [N, F].

    The gradient goes to the maximum, in equal parts where several edges reach it (as
    torch.scatter_reduce's). Which edges do is decided once, in the forward pass: a backward pass
    that compares against a recomputed, differently rounded maximum finds none.
    """
    if isinstance(graph, ShardedGraph):
        return _ring_max(graph, x)
    return over_batch(lambda g, x: _segment_max(x, g.senders, g.receivers, in_degree(g)), graph, x)


def _ring_max(graph: ShardedGraph, x: jax.Array) -> jax.Array:
    x = jax.lax.optimization_barrier(x)

    def best(top, block, edges, _):
        return jnp.maximum(top, _top(rows(block, edges.senders), edges))

    lowest = jnp.full(x.shape, -jnp.inf, x.dtype)
    top = ring(graph, jax.lax.stop_gradient(x), lowest, best)
    top = jax.lax.optimization_barrier(top)

    def winners(total, block, edges, _):
        messages = rows(block, edges.senders)
        won = (messages == rows(top, edges.receivers)) & edges.edge_mask[:, None]
        value, ties = total
        value = value + segment_sum(jnp.where(won, messages, 0), edges)
        return value, ties + segment_sum(won.astype(x.dtype), edges)

    value, ties = ring(graph, x, (jnp.zeros(x.shape, x.dtype),) * 2, winners)
    return value / jnp.maximum(ties, 1)


def _top(messages: jax.Array, graph: Graph) -> jax.Array:
    return jax.ops.segment_max(messages, graph.receivers, graph.num_nodes, indices_are_sorted=True)


def _max_and_winners(x, senders, receivers, degree):
    x = jax.lax.optimization_barrier(x)
    messages = rows(x, senders)
    top = jax.ops.segment_max(messages, receivers, len(degree), indices_are_sorted=True)
    top = jax.lax.optimization_barrier(top)
    real = (receivers < len(degree))[:, None]
    won = (messages == rows(top, receivers)) & real
    return jnp.where(degree[:, None] > 0, top, 0), won


@jax.custom_vjp
def _segment_max(x, senders, receivers, degree):
    return _max_and_winners(x, senders, receivers, degree)[0]


def _segment_max_forward(x, senders, receivers, degree):
    y, won = _max_and_winners(x, senders, receivers, degree)
    return y, (x, won, senders, receivers, degree)


def _segment_max_backward(saved, g):
    x, won, senders, receivers, degree = saved
    ties = jax.ops.segment_sum(won.astype(g.dtype), receivers, len(degree), indices_are_sorted=True)
    share = rows(g / jnp.maximum(ties, 1), receivers)
    dx = jax.ops.segment_sum(jnp.where(won, share, 0), senders, x.shape[0])
    return dx.astype(x.dtype), None, None, jnp.zeros_like(degree)


_segment_max.defvjp(_segment_max_forward, _segment_max_backward)


def edge_softmax(graph: Graph, logits: jax.Array) -> jax.Array:
    """Softmax over the incoming edges of every node, [E, H] -> [E, H]; 0 on padding."""

    def one(graph: Graph, logits: jax.Array) -> jax.Array:
        mask = graph.edge_mask[:, None]
        top = jax.lax.stop_gradient(_top(jnp.where(mask, logits, -jnp.inf), graph))
        e = _shifted_exp(logits, top, mask, graph)
        total = segment_sum(e, graph)
        return e / rows(jnp.where(total > 0, total, 1), graph.receivers)

    return over_batch(one, graph, logits)


def _shifted_exp(logits, top, mask, graph):
    # The inner `where` keeps exp finite off the mask, and so its gradient zero and not NaN.
    top = rows(jnp.where(jnp.isfinite(top), top, 0), graph.receivers)
    return jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0)), 0)


def aggregate_attention(
    graph: Graph,
    x: jax.Array,
    source: jax.Array,
    target: jax.Array,
    *,
    negative_slope: float = 0.2,
    add_self_loops: bool = True,
    drop: Callable[[jax.Array, jax.Array | int], jax.Array] = lambda e, number: e,
) -> jax.Array:
    """sum_u alpha_vu x_u, alpha = softmax_u leaky_relu(source_u + target_v), [N, H, C] -> same.

    Args:
      x: [N, H, C]. source, target: [N, H], scores of a node as sender and as receiver.
      add_self_loops: remove the loops that are there and add one a node.
      drop: dropout of coefficients, called with an array and a number that tells calls apart.
    """

    def score(graph, source, target, step):
        # A block's own edges come in step 0; only there can equal places mean a self loop.
        mask = graph.edge_mask
        if add_self_loops:
            mask = mask & ((graph.senders != graph.receivers) | (step != 0))
        logits = rows(source, graph.senders) + rows(target, graph.receivers)
        return jax.nn.leaky_relu(logits, negative_slope), mask[:, None]

    def highest(graph, source, target, step=0):
        logits, mask = score(graph, source, target, step)
        return _top(jnp.where(mask, logits, -jnp.inf), graph)

    def sums(graph, x, source, target, top, step=0):
        logits, mask = score(graph, source, target, step)
        e = _shifted_exp(logits, top, mask, graph)
        values = drop(e, step)[..., None] * _wide(rows(x, graph.senders))
        return segment_sum(values, graph), segment_sum(e, graph)

    own = jax.nn.leaky_relu(source + target, negative_slope)
    lowest = own if add_self_loops else jnp.full(own.shape, -jnp.inf, own.dtype)
    if isinstance(graph, ShardedGraph):
        constant = jax.lax.stop_gradient((source, target, lowest))

        def raise_top(top, source, edges, step):
            return jnp.maximum(top, highest(edges, source, constant[1], step))

        def add(total, block, edges, step):
            return jax.tree.map(jnp.add, total, sums(edges, *block, target, top, step))

        bottom = jnp.full(own.shape, -jnp.inf, own.dtype)
        top = jnp.maximum(ring(graph, constant[0], bottom, raise_top), constant[2])
        start = (jnp.zeros(x.shape, own.dtype), jnp.zeros(own.shape, own.dtype))
        y, total = ring(graph, (x, source), start, add)
    else:
        top = jnp.maximum(over_batch(highest, graph, source, target), lowest)
        top = jax.lax.stop_gradient(top)
        y, total = over_batch(sums, graph, x, source, target, top)
    if add_self_loops:
        loop = jnp.exp(own - top)
        y, total = y + drop(loop, -1)[..., None] * _wide(x), total + loop
    return y / jnp.where(total > 0, total, 1)[..., None]


def gcn_normalize(graph: Graph, add_self_loops: bool = True) -> Graph:
    """The graph with weights D^-1/2[sender] w D^-1/2[receiver], once for all layers.

    Degrees are sums of incoming weights, self loops included. `add_self_loops` gives weight 1 to
    every node that lacks a loop; loops that are there keep their weight (the last of several).
    Degree 0 gives factor 0. Source: torch_geometric 2.8.1, `gcn_norm`.

    Raises ValueError for rectangular graphs.
    """
    if graph.normalized:
        return graph
    if isinstance(graph, ShardedGraph):
        raise ValueError("normalize a graph before it is sharded: shard_graph(gcn_normalize(g), p)")
    if graph.num_senders != graph.num_nodes:
        raise ValueError("only a square graph can be normalized symmetrically")

    def one(graph: Graph) -> Graph:
        kind = jnp.float32 if graph.weight is None else _wide(jnp.asarray(graph.weight)).dtype
        weight = jnp.ones((), kind) if graph.weight is None else jnp.asarray(graph.weight, kind)
        weight = jnp.where(graph.edge_mask, weight, 0)
        loops = None
        if add_self_loops:
            is_loop = graph.senders == graph.receivers
            last = jax.ops.segment_max(
                jnp.where(is_loop, jnp.arange(graph.num_edges), -1),
                graph.receivers,
                graph.num_nodes,
                indices_are_sorted=True,
            )
            given = rows(weight, jnp.maximum(last, 0)) if graph.num_edges else jnp.ones((), kind)
            loops = jnp.where(last >= 0, given, 1)
            weight = jnp.where(is_loop, 0, weight)
        degree = segment_sum(weight, graph)
        degree = degree if loops is None else degree + loops
        factor = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1)), 0)
        weight = rows(factor, graph.senders) * weight * rows(factor, graph.receivers)
        return graph.replace(
            weight=weight,
            loop_weight=None if loops is None else loops * factor * factor,
            incoming=_reweighted(graph.incoming, weight),
            outgoing=_reweighted(graph.outgoing, weight),
            normalized=True,
        )

    return over_batch(one, graph)


def _reweighted(tables: NeighborTables | None, weight: jax.Array) -> NeighborTables | None:
    if tables is None:
        return None
    # Unused slots point past the list, at this zero.
    padded = jnp.concatenate([weight, jnp.zeros(1, weight.dtype)])
    return tables.replace(weight=tuple(rows(padded, e) for e in tables.edges))


def relational_graph(graph: Graph, num_relations: int, normalization: str = "mean") -> Graph:
    """Typed edges as one operator from relation-and-sender rows [R * N, F] to nodes [N, F].

    Sender r * N + s stands for node s under relation r, so one aggregation serves all relations:
    `aggregate_sum(operator, table.reshape(R * N, F))` with table[r] = x @ W_r.

    Args:
      graph: with `edge_type`, every one below `num_relations`.
      normalization: weight of an edge u -> v of relation r: "mean" is w / |N_r(v)| (edges counted,
        duplicates too), "sym" is w / sqrt(d_r(u) d_r(v)) with d_r the sum of incoming weights
        (0 where that is 0), "sum" is w. No self loops are added.
    """
    if graph.edge_type is None:
        raise ValueError("a relational layer needs edge types")
    if normalization not in ("mean", "sym", "sum"):
        raise ValueError(f"normalization {normalization!r}; known: mean, sym, sum")

    def one(graph: Graph) -> Graph:
        n, mask = graph.num_nodes, graph.edge_mask
        weight = jnp.ones((), jnp.float32) if graph.weight is None else _wide(graph.weight)
        weight = jnp.where(mask, weight, 0)
        receiver = jnp.where(mask, graph.edge_type * n + graph.receivers, num_relations * n)
        sender = graph.edge_type * n + graph.senders
        if normalization == "mean":
            count = jax.ops.segment_sum(mask.astype(weight.dtype), receiver, num_relations * n)
            weight = weight / jnp.maximum(rows(count, receiver), 1)
        elif normalization == "sym":
            degree = jax.ops.segment_sum(weight, receiver, num_relations * n)
            factor = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1)), 0)
            weight = rows(factor, sender) * weight * rows(factor, receiver)
        return Graph(
            senders=sender,
            receivers=graph.receivers,
            weight=weight,
            num_nodes=n,
            num_senders=num_relations * n,
            normalized=True,
        )

    return over_batch(one, graph)
