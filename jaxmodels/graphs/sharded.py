"""Graphs spread over devices: nodes in blocks, features passed around a ring.

Device p owns a block of nodes and every edge that ends there. An aggregation takes as many rounds
as there are devices; in each one a device holds one other block of features, adds what its edges
from that block bring, and passes the block on. No device ever holds the whole graph's features or
messages: what counts per device is two blocks and the messages of one pair of blocks.

The layers of `jaxmodels.graphs.layers` run on a `ShardedGraph` unchanged, inside `shard_map`:
`apply_sharded` does it for a whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from jaxmodels.graphs.graph import Graph, bucket_size


@struct.dataclass
class ShardedGraph:
    """Edges by (receiver's device, sender's device), padded to one length.

    Attributes:
      senders, receivers: int32 [P, P, E']: places within the blocks of the second and the first
        axis's device; receivers are ascending, `num_nodes` on padding.
      weight: float [P, P, E'] or None.
      in_degree, loop_weight: float [P, block], or None.
      place: int32 [N]: row of every node in the blocks laid end to end.
      num_nodes: rows of a block. axis_name: the mesh axis. normalized: as in `Graph`.
    """

    senders: jax.Array
    receivers: jax.Array
    weight: jax.Array | None
    in_degree: jax.Array | None
    loop_weight: jax.Array | None
    place: Any
    num_nodes: int = struct.field(pytree_node=False)
    axis_name: str = struct.field(pytree_node=False)
    normalized: bool = struct.field(pytree_node=False)

    @property
    def num_senders(self) -> int:
        """Rows that senders index: those of a block."""
        return self.num_nodes


def shard_graph(
    graph: Graph, parts: int, axis_name: str = "data", order: np.ndarray | None = None
) -> ShardedGraph:
    """Deal a graph's nodes to `parts` devices, on the host.

    Args:
      graph: one square graph; normalize it first for a GCN.
      parts: number of devices P along `axis_name`.
      order: permutation of the nodes to cut into blocks; default a fixed shuffle, which evens out
        the number of edges between any two blocks whatever the numbering means.

    Raises ValueError for batched, rectangular or typed graphs, and an order that is none.
    """
    receivers = np.asarray(graph.receivers)
    if receivers.ndim != 1 or graph.num_nodes != graph.num_senders or graph.edge_type is not None:
        raise ValueError("only one square graph without edge types can be sharded")
    n, block = graph.num_nodes, -(-graph.num_nodes // parts)
    order = np.random.default_rng(0).permutation(n) if order is None else np.asarray(order)
    if not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"order must be a permutation of the {n} nodes")
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    real = np.flatnonzero(receivers < n)
    source, target = place[np.asarray(graph.senders)[real]], place[receivers[real]]
    pair = target // block * parts + source // block
    by_pair = np.lexsort((target, pair))
    counts = np.bincount(pair, minlength=parts * parts)
    length = bucket_size(counts.max(initial=1), 8)
    slot = np.arange(len(real)) - np.repeat(np.cumsum(counts) - counts, counts)

    def laid(values, fill, dtype):
        out = np.full((parts * parts, length), fill, dtype)
        out[pair[by_pair], slot] = values[by_pair]
        return out.reshape(parts, parts, length)

    def blocks(values):
        if values is None:
            return None
        values = np.asarray(values)
        out = np.zeros(parts * block, values.dtype)
        out[place] = values
        return out.reshape(parts, block)

    weight = None
    if graph.weight is not None:
        weight = np.asarray(graph.weight)[real]
        weight = laid(weight, 0, weight.dtype)
    in_degree = np.bincount(receivers[real], minlength=n).astype(np.float32)
    return ShardedGraph(
        senders=laid(source % block, 0, np.int32),
        receivers=laid(target % block, block, np.int32),
        weight=weight,
        in_degree=blocks(in_degree),
        loop_weight=blocks(graph.loop_weight),
        place=place.astype(np.int32),
        num_nodes=block,
        axis_name=axis_name,
        normalized=graph.normalized,
    )


def shard_rows(graph: ShardedGraph, x: Any) -> np.ndarray:
    """Node rows [N, ...] in the blocks' order, zeros after the last: [P * block, ...]."""
    x = np.asarray(x)
    out = np.zeros((graph.senders.shape[0] * graph.num_nodes, *x.shape[1:]), x.dtype)
    out[np.asarray(graph.place)] = x
    return out


def unshard_rows(graph: ShardedGraph, x: Any) -> Any:
    """The inverse of `shard_rows`: rows of the blocks back in node order [N, ...]."""
    return x[graph.place]


def apply_sharded(module: Any, mesh: Mesh, graph: ShardedGraph, **arguments: Any) -> Callable:
    """`(variables, x [P * block, F], graph, rngs=None) -> [P * block, out]`, differentiable.

    Variables are the same on every device; x and the result are spread over the graph's axis.
    `rngs` is a dict of keys, from which every device draws its own. `arguments` go to the module.

    Raises ValueError when the mesh axis has another size than the graph has parts.
    """
    axis = graph.axis_name
    if mesh.shape[axis] != graph.senders.shape[0]:
        raise ValueError(
            f"the graph is in {graph.senders.shape[0]} parts, mesh axis {axis!r} has "
            f"{mesh.shape[axis]} devices"
        )
    over, whole = PartitionSpec(axis), PartitionSpec()
    specs = jax.tree.map(lambda _: over, graph).replace(place=whole)

    def local(variables, x, graph, rngs):
        mine = jax.tree.map(lambda a: a[0], graph.replace(place=None))
        own = {k: jax.random.fold_in(r, jax.lax.axis_index(axis)) for k, r in rngs.items()}
        return module.apply(variables, x, mine, rngs=own, **arguments)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, over, specs, whole), out_specs=over)
    return lambda variables, x, graph, rngs=None: mapped(variables, x, graph, rngs or {})


def ring(graph: ShardedGraph, visitor: Any, start: Any, visit: Callable) -> Any:
    """Carry every block past every device: `total = visit(total, block, edges, step)`.

    `visitor` is this device's block (a pytree of rows), `start` constants to begin with, `edges` a
    `Graph` from the visiting block to ours.
    """
    size = jax.lax.axis_size(graph.axis_name)
    me = jax.lax.axis_index(graph.axis_name)
    backward = [(i, (i - 1) % size) for i in range(size)]

    def body(carry, step):
        total, block = carry
        owner = (me + step) % size

        def of(array):
            return None if array is None else jnp.take(array, owner, axis=0)

        edges = Graph(
            of(graph.senders),
            of(graph.receivers),
            of(graph.weight),
            num_nodes=graph.num_nodes,
            num_senders=graph.num_nodes,
        )
        total = visit(total, block, edges, step)
        block = jax.tree.map(lambda b: jax.lax.ppermute(b, graph.axis_name, backward), block)
        return (total, block), None

    # Constants are the same everywhere; what is carried is not.
    start = jax.tree.map(lambda s: jax.lax.pcast(s, graph.axis_name, to="varying"), start)
    (total, _), _ = jax.lax.scan(body, (start, visitor), jnp.arange(size))
    return total
