"""Graphs as padded edge lists sorted by receiver, and the tables that make full graphs fast.

A directed edge goes from its sender to its receiver, where messages are aggregated: PyTorch
Geometric's `edge_index` rows 0 and 1. Padding edges have receiver `num_nodes`, which every
aggregation drops; padding nodes are rows that no edge touches. So three graphs that fit one
bucket are one compiled program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Row widths of a neighbor table; longer rows are cut into pieces of the last one.
TABLE_WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32)


@struct.dataclass
class NeighborTables:
    """The neighbors of every node as dense rows [n, k], one table a width k.

    A node with more neighbors than the widest row has several rows in the last table. Unused
    slots repeat the row's first neighbor with weight 0.

    Attributes:
      neighbors: a table each, int32 [n, k]: the node at the edge's other end.
      edges: a table each, int32 [n, k]: position in the edge list, its length in unused slots.
      weight: a table each, float [n, k]: weight of the edge, 0 in unused slots.
      nodes: a table each, int32 [n]: the node that owns a row.
      piece_of: int32 [n of the last table] or None: which long node a piece belongs to, ascending.
      row: int32 [N]: where a node stands in the tables' sums, concatenated with a zero row.
    """

    neighbors: tuple[jax.Array, ...]
    edges: tuple[jax.Array, ...]
    weight: tuple[jax.Array, ...]
    nodes: tuple[jax.Array, ...]
    piece_of: jax.Array | None
    row: jax.Array
    num_long: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Graph:
    """Directed edges, ascending by receiver; a leading batch axis on every array is allowed.

    Attributes:
      senders: int32 [E], below `num_senders`.
      receivers: int32 [E], ascending; `num_nodes` on padding edges.
      weight: float [E] or None (all 1).
      edge_type: int32 [E] or None.
      in_degree: float [N] or None: number of incoming edges, where known beforehand.
      loop_weight: float [N] or None: a diagonal added to the weighted adjacency.
      incoming, outgoing: tables of the same edges by receiver and by sender, or None.
      num_nodes: N, receivers. num_senders: rows of what is sent; N but for rectangular operators.
      normalized: whether `weight` and `loop_weight` are those of `gcn_normalize`.
    """

    senders: jax.Array
    receivers: jax.Array
    weight: jax.Array | None = None
    edge_type: jax.Array | None = None
    in_degree: jax.Array | None = None
    loop_weight: jax.Array | None = None
    incoming: NeighborTables | None = None
    outgoing: NeighborTables | None = None
    num_nodes: int = struct.field(pytree_node=False, default=0)
    num_senders: int = struct.field(pytree_node=False, default=0)
    normalized: bool = struct.field(pytree_node=False, default=False)

    @property
    def num_edges(self) -> int:
        """Length of the edge list, padding included."""
        return self.receivers.shape[-1]

    @property
    def edge_mask(self) -> jax.Array:
        """bool [E]: real edges."""
        return self.receivers < self.num_nodes


def bucket_size(count: int, minimum: int = 64) -> int:
    """The next power of two, at least `minimum`: the sizes that are ever compiled."""
    return max(minimum, 1 << max(0, int(count) - 1).bit_length())


def check_edges(edge_index: Any, num_nodes: int, num_senders: int | None = None) -> np.ndarray:
    """`edge_index` as int64 [2, E] once it can be meant.

    Raises ValueError naming the first entry that is not an integer in range.
    """
    edges = np.asarray(edge_index)
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ValueError(f"edge_index must be [2, edges], got shape {edges.shape}")
    if num_nodes < 1:
        raise ValueError(f"a graph needs at least one node, got num_nodes = {num_nodes}")
    if edges.shape[1] == 0:
        return np.zeros((2, 0), np.int64)
    if edges.dtype.kind not in "iu":
        raise ValueError(
            f"edge_index must hold integers, got {edges.dtype} (first entry {edges[0, 0]!r})"
        )
    limits = np.array([[num_nodes if num_senders is None else num_senders], [num_nodes]])
    bad = (edges < 0) | (edges >= limits)
    if bad.any():
        edge = int(np.flatnonzero(bad.any(0))[0])
        row = int(np.flatnonzero(bad[:, edge])[0])
        raise ValueError(
            f"edge {edge} ({edges[0, edge]} -> {edges[1, edge]}): {edges[row, edge]} is outside "
            f"[0, {int(limits[row, 0])})"
        )
    return edges.astype(np.int64)


def make_graph(
    edge_index: Any,
    num_nodes: int,
    *,
    edge_weight: Any = None,
    edge_type: Any = None,
    num_senders: int | None = None,
    pad_edges: int | None = 0,
    tables: bool = False,
) -> Graph:
    """A `Graph` of NumPy arrays from PyTorch Geometric's arrays; duplicates and loops are kept.

    Args:
      edge_index: integers [2, E], senders and receivers, in any order.
      num_nodes: N.
      edge_weight: [E]. edge_type: integers [E].
      num_senders: rows that senders index, if they are not the receivers.
      pad_edges: length to pad to; 0 for none, None for the next power of two.
      tables: also build the neighbor tables, for a graph that is used many times.

    Raises:
      ValueError: an entry out of range or not an integer, a weight that is not finite, arrays of
        another length, more edges than `pad_edges`.
    """
    edges = check_edges(edge_index, num_nodes, num_senders)
    count = edges.shape[1]
    weight = None if edge_weight is None else np.asarray(edge_weight)
    kind = None if edge_type is None else np.asarray(edge_type)
    for name, array in (("edge_weight", weight), ("edge_type", kind)):
        if array is not None and array.shape != (count,):
            raise ValueError(f"{name} has shape {array.shape}; there are {count} edges")
    if weight is not None and not np.isfinite(weight).all():
        edge = int(np.flatnonzero(~np.isfinite(weight))[0])
        raise ValueError(f"edge_weight[{edge}] is {weight[edge]}")
    # Stable: of several self loops the last one given counts, as in PyTorch Geometric.
    order = np.argsort(edges[1], kind="stable")
    padded = count if pad_edges == 0 else bucket_size(count) if pad_edges is None else pad_edges
    if padded < count:
        raise ValueError(f"{count} edges do not fit pad_edges = {padded}")

    def laid(array, fill, dtype):
        out = np.full(padded, fill, dtype)
        out[:count] = array[order]
        return out

    floats = np.float32 if weight is None else np.promote_types(weight.dtype, np.float32)
    graph = Graph(
        senders=laid(edges[0], 0, np.int32),
        receivers=laid(edges[1], num_nodes, np.int32),
        weight=None if weight is None else laid(weight, 0, floats),
        edge_type=None if kind is None else laid(kind, 0, np.int32),
        in_degree=np.bincount(edges[1], minlength=num_nodes).astype(floats),
        num_nodes=num_nodes,
        num_senders=num_nodes if num_senders is None else num_senders,
    )
    return with_tables(graph) if tables else graph


def graph_of_arrays(
    edge_index: jax.Array,
    num_nodes: int,
    edge_weight: jax.Array | None = None,
    edge_type: jax.Array | None = None,
) -> Graph:
    """`make_graph` for arrays under `jit`: sorts there, checks nothing, pads nothing."""
    senders, receivers = jnp.asarray(edge_index).astype(jnp.int32)
    order = jnp.argsort(receivers, stable=True)

    def laid(array):
        return None if array is None else jnp.asarray(array)[order]

    return Graph(
        laid(senders),
        laid(receivers),
        laid(edge_weight),
        laid(edge_type),
        num_nodes=num_nodes,
        num_senders=num_nodes,
    )


def with_tables(graph: Graph) -> Graph:
    """The graph with its neighbor tables, built on the host.

    Aggregation over tables reads each message where it lies and never writes it down; a CPU does
    it several times faster than a segment sum. Table sizes depend on the degrees, so every graph
    compiles anew: it is for graphs that are used many times.
    """
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    if senders.ndim != 1:
        raise ValueError("neighbor tables are for one graph, not for a batch of graphs")
    real = np.flatnonzero(receivers < graph.num_nodes)
    weight = None if graph.weight is None else np.asarray(graph.weight)
    shared = dict(edges=real, weight=weight, length=len(receivers))
    return graph.replace(
        incoming=_tables(receivers[real], senders[real], graph.num_nodes, **shared),
        outgoing=_tables(senders[real], receivers[real], graph.num_senders, **shared),
    )


def _tables(
    owner: np.ndarray,
    other: np.ndarray,
    num_nodes: int,
    edges: np.ndarray,
    weight: np.ndarray | None,
    length: int,
) -> NeighborTables:
    order = np.argsort(owner, kind="stable")
    other, edges = other[order], edges[order]
    degree = np.bincount(owner, minlength=num_nodes)
    start = np.cumsum(degree) - degree
    widest = TABLE_WIDTHS[-1]
    row = np.zeros(num_nodes, np.int32)
    columns: dict[str, list] = {"neighbors": [], "edges": [], "weight": [], "nodes": []}
    floats = np.float32 if weight is None else weight.dtype

    def add(nodes, begin, used, width):
        slot = np.arange(width)
        inside = slot < used[:, None]
        # Unused slots repeat a real neighbor: what is not finite there is not finite anyway.
        at = np.where(inside, begin[:, None] + slot, begin[:, None])
        columns["neighbors"].append(other[at].astype(np.int32))
        columns["edges"].append(np.where(inside, edges[at], length).astype(np.int32))
        values = 1 if weight is None else weight[edges[at]]
        columns["weight"].append(np.where(inside, values, 0).astype(floats))
        columns["nodes"].append(nodes.astype(np.int32))

    below, total = 0, 0
    for width in TABLE_WIDTHS:
        nodes = np.flatnonzero((degree > below) & (degree <= width))
        below = width
        if len(nodes):
            add(nodes, start[nodes], degree[nodes], width)
            row[nodes] = total + np.arange(len(nodes))
            total += len(nodes)
    long = np.flatnonzero(degree > widest)
    piece_of = None
    if len(long):
        pieces = -(-degree[long] // widest)
        piece_of = np.repeat(np.arange(len(long)), pieces)
        within = np.arange(len(piece_of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = start[long][piece_of] + within * widest
        used = np.minimum(degree[long][piece_of] - within * widest, widest)
        add(long[piece_of], begin, used, widest)
        row[long] = total + np.arange(len(long))
        piece_of = piece_of.astype(np.int32)
    row[degree == 0] = total + len(long)
    return NeighborTables(
        **{name: tuple(parts) for name, parts in columns.items()},
        piece_of=piece_of,
        row=row,
        num_long=len(long),
    )


def symmetrize(edge_index: Any, edge_weight: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Every edge in both directions once, self loops once; of two weights the larger.

    Args:
      edge_index: integers [2, E]. edge_weight: [E] or None.

    Returns: edge_index [2, E'] sorted by (receiver, sender), and weights [E'] or None.
    """
    edges = np.asarray(edge_index, np.int64).reshape(2, -1)
    both = np.concatenate([edges, edges[::-1]], axis=1)
    key = both[1] * (int(both.max(initial=0)) + 1) + both[0]
    unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    if edge_weight is None:
        return both[:, first], None
    weight = np.tile(np.asarray(edge_weight), 2)
    largest = np.full(len(unique), -np.inf, weight.dtype)
    np.maximum.at(largest, inverse.reshape(-1), weight)
    return both[:, first], largest


def missing_reverse_edges(edge_index: Any) -> float:
    """Share of edges whose reverse is absent: 0 for an undirected graph."""
    edges = np.asarray(edge_index, np.int64)
    if edges.shape[1] == 0:
        return 0.0
    size = int(edges.max()) + 1
    return float(np.mean(~np.isin(edges[1] * size + edges[0], edges[0] * size + edges[1])))


def disjoint_union(graphs: Sequence[Graph], pad_edges: int | None = None) -> Graph:
    """Several graphs as one without edges between them; node i of graph g is sum(N below g) + i.

    Raises ValueError when one has weights or types and another has not, or for rectangular graphs.
    """
    if any(g.num_nodes != g.num_senders or g.normalized for g in graphs):
        raise ValueError("only square graphs before normalization can be joined")
    offsets = np.cumsum([0, *(g.num_nodes for g in graphs)])
    real = [np.asarray(g.receivers) < g.num_nodes for g in graphs]

    def joined(name, shift=False):
        arrays = [getattr(g, name) for g in graphs]
        if all(a is None for a in arrays):
            return None
        if any(a is None for a in arrays):
            raise ValueError(f"some of the graphs have {name} and others have not")
        return np.concatenate(
            [np.asarray(a)[m] + (o if shift else 0) for a, m, o in zip(arrays, real, offsets)]
        )

    return make_graph(
        np.stack([joined("senders", True), joined("receivers", True)]),
        int(offsets[-1]),
        edge_weight=joined("weight"),
        edge_type=joined("edge_type"),
        pad_edges=pad_edges,
    )
