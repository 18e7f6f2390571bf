"""CORAL: link prediction by a relational graph convolution on the socio-technical graph.

J. Zhang et al., "Using Large-scale Heterogeneous Graph Representation Learning for Code Review
Recommendations at Microsoft", arXiv 2202.02385, section IV. There is no official code; names are
those of the reference composition of torch_geometric's GCNConv, one a relation.

    h_u(k) = act( sum_r sum_{v in N_r(u)} W_r(k-1) h_v(k-1) a_uv / sqrt(d_r(u) d_r(v))
                  + W_0(k-1) h_u(k-1) ),   k = 1, 2;    P(link u-v) = sigmoid(z_u . z_v)

A change that the graph has not seen gets its embedding from its known neighbors alone: the second
layer's relational part is applied to their trained first-layer states (equation 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs.graph import Graph, check_edges, make_graph
from jaxmodels.graphs.layers import RGCNConv
from jaxmodels.graphs.message_passing import aggregate_sum, relational_graph
from jaxmodels.graphs.review_graph import DEFAULT_RELATIONS, check_relations
from jaxmodels.layers.partitioning import everywhere, over_rows
from jaxmodels.spelling import did_you_mean

ACTIVATIONS = {"identity": lambda x: x, "relu": nn.relu, "tanh": jnp.tanh}
AGGREGATIONS = ("sym", "mean")
INPUTS = ("onehot", "embedding")
# Relations through which a new change is reached; others are not known when it is opened.
QUERY_RELATIONS = ("pr_user", "pr_file", "pr_word")


def relations_graph(
    edges: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    relations: Sequence[str],
    num_nodes: int,
    pad_edges: int | None = 0,
) -> Graph:
    """The typed graph of undirected relations: every stored edge in both directions.

    Args:
      edges: relation -> integers [2, E], each edge once. weights: relation -> [E], or None for 1.
      relations: which, and in which order; the position is the edge's type.
      pad_edges: as in `make_graph`.

    Raises:
      ValueError: a relation's name, the first edge out of range or weight that is negative or NaN.
    """
    relations = check_relations(relations)
    both, types, values = [], [], []
    for r, name in enumerate(relations):
        try:
            pairs = check_edges(edges[name], num_nodes)
        except ValueError as error:
            raise ValueError(f"relation {name}: {error}") from None
        given = np.ones(pairs.shape[1]) if weights is None else np.asarray(weights[name])
        if given.shape != (pairs.shape[1],):
            raise ValueError(f"relation {name}: weights {given.shape} for {pairs.shape[1]} edges")
        bad = ~(given >= 0) | ~np.isfinite(given)
        if bad.any():
            e = int(np.flatnonzero(bad)[0])
            hint = " (was pmi_min lowered below 0?)" if given[e] < 0 else ""
            raise ValueError(
                f"relation {name}: edge {e} ({pairs[0, e]} - {pairs[1, e]}) has weight "
                f"{given[e]}{hint}"
            )
        # A self edge has one direction.
        turned = pairs[0] != pairs[1]
        both += [pairs, pairs[::-1, turned]]
        values += [given, given[turned]]
        types.append(np.full(pairs.shape[1] + int(turned.sum()), r))
    return make_graph(
        np.concatenate(both, axis=1),
        num_nodes,
        edge_weight=np.concatenate(values).astype(np.float32),
        edge_type=np.concatenate(types),
        pad_edges=pad_edges,
    )


def relation_degrees(
    edges: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    relations: Sequence[str],
    num_nodes: int,
) -> np.ndarray:
    """d_r(v): [R, N] float32, the sum of the weights of v's edges of relation r."""
    degrees = np.zeros((len(relations), num_nodes), np.float64)
    for r, name in enumerate(relations):
        pairs = np.asarray(edges[name])
        given = np.ones(pairs.shape[1]) if weights is None else np.asarray(weights[name])
        np.add.at(degrees[r], pairs[0], given)
        turned = pairs[0] != pairs[1]
        np.add.at(degrees[r], pairs[1, turned], given[turned])
    return degrees.astype(np.float32)


class Queries(NamedTuple):
    """Changes to rank reviewers for, as known neighbors in the graph, padded to K.

    Attributes:
      neighbors: int32 [Q, K] node indices. relation: int32 [Q, K], positions in the model's list.
      mask: float32 [Q, K], 0 on padding.
    """

    neighbors: np.ndarray
    relation: np.ndarray
    mask: np.ndarray


def make_queries(
    known: Sequence[Mapping[str, Sequence[int]]],
    relations: Sequence[str],
    width: int | None = None,
) -> Queries:
    """Queries from {relation: node indices} of each change; relations the model lacks are skipped.

    Args:
      known: for every change its known neighbors: the author under `pr_user`, files, words.
      width: K; the longest by default. Longer lists are cut at the end.

    Raises:
      ValueError: a relation by which a new change cannot be reached.
    """
    position = {name: r for r, name in enumerate(relations)}
    rows = []
    for neighbors in known:
        for name in neighbors:
            if name not in QUERY_RELATIONS:
                raise ValueError(f"a new change has no relation {name!r}; it has {QUERY_RELATIONS}")
        rows.append(
            [
                (v, position[name])
                for name in QUERY_RELATIONS
                if name in position
                for v in dict.fromkeys(neighbors.get(name, ()))
            ]
        )
    width = width or max([1, *map(len, rows)])
    arrays = Queries(
        np.zeros((len(rows), width), np.int32),
        np.zeros((len(rows), width), np.int32),
        np.zeros((len(rows), width), np.float32),
    )
    for q, row in enumerate(rows):
        for k, (v, r) in enumerate(row[:width]):
            arrays.neighbors[q, k], arrays.relation[q, k], arrays.mask[q, k] = v, r, 1
    return arrays


class _Parameter(nn.Module):
    """One array under the name that a checkpoint has for it."""

    leaf: str
    shape: tuple[int, ...]
    initializer: Any
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.leaf, self.initializer, self.shape, self.param_dtype)


class Coral(nn.Module):
    """Typed graph of N nodes -> embeddings z [N, dims[1]] whose dot products are link logits.

    Args:
      num_nodes: N; parameters belong to these very nodes, so that their keys travel with them.
      relations: names of the edge types, in the order of the graph's and checkpoint's indices.
      dims: widths of the two layers.
      input: "onehot" (a table [N, dims[0]] for every relation and for the self path, read row by
        row) or "embedding" (one table [N, embed], then W_r).
      final_activation: "identity", "relu" (no dot product is then negative, so that a pair without
        a link cannot fall below a loss of log 2) or "tanh".
      aggregation: "sym" as in the paper, or "mean": torch_geometric's RGCNConv, by its names.
      num_bases: "mean" only, shares W_r = sum_b comp[r, b] weight[b].

    Raises ValueError for an unknown option or relation.
    """

    num_nodes: int = 8
    relations: Sequence[str] = DEFAULT_RELATIONS
    dims: Sequence[int] = (128, 128)
    input: str = "onehot"
    embed: int | None = 128
    final_activation: str = "identity"
    aggregation: str = "sym"
    num_bases: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, known in (
            ("input", INPUTS),
            ("final_activation", tuple(ACTIVATIONS)),
            ("aggregation", AGGREGATIONS),
        ):
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(str(value), known)
                raise ValueError(f"{name} {value!r}{near}; known: {', '.join(known)}")
        object.__setattr__(self, "relations", check_relations(self.relations))
        object.__setattr__(self, "dims", tuple(self.dims))
        if len(self.dims) != 2:
            raise ValueError(f"dims {self.dims}: the model has two layers")
        if self.num_bases is not None and self.aggregation != "mean":
            raise ValueError("num_bases is for aggregation 'mean'")
        super().__post_init__()

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: 16 typed edges."""
        ints = jax.ShapeDtypeStruct((16,), jnp.int32)
        n = self.num_nodes
        return (Graph(ints, ints, edge_type=ints, num_nodes=n, num_senders=n),)

    def setup(self) -> None:
        # Every relation's kernel by its own two sides: not by the number of relations.
        each, rows = nn.initializers.glorot_uniform(batch_axis=0), nn.initializers.normal(0.1)
        one = nn.initializers.glorot_uniform()
        onehot = self.input == "onehot"
        d0 = self.num_nodes if onehot else int(self.embed or self.dims[0])
        if not onehot:
            self.table = _Parameter(
                "embedding", (self.num_nodes, d0), rows, self.param_dtype, name="embed"
            )
        count = len(self.relations)
        # A Glorot scale would be that of [N, out], and each row of a table is read alone.
        inits = ((rows, rows) if onehot else (each, one), (each, one))
        for k, (inputs, outputs) in enumerate([(d0, self.dims[0]), tuple(self.dims)]):
            if self.aggregation == "mean":
                conv = RGCNConv(
                    inputs,
                    outputs,
                    count,
                    self.num_bases,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                )
                setattr(self, f"convs.{k}", conv)
                continue
            for name, shape, init in (
                (f"layers.{k}.rel.*.lin", (count, inputs, outputs), inits[k][0]),
                (f"layers.{k}.self", (inputs, outputs), inits[k][1]),
            ):
                setattr(self, name, _Parameter("kernel", shape, init, self.param_dtype))

    @property
    def node_axes(self) -> dict[tuple[str, str], int]:
        """Path of every parameter that has a row a node -> the axis of the rows."""
        if self.input == "embedding":
            return {("embed", "embedding"): 0}
        if self.aggregation == "sym":
            return {("layers.0.rel.*.lin", "kernel"): 1, ("layers.0.self", "kernel"): 0}
        return {("convs.0", "weight"): 1, ("convs.0", "root"): 0}

    def prepare(self, graph: Graph) -> Graph:
        """The graph as one operator from rows [R * N] to nodes, computed once for both layers."""
        count = len(self.relations)
        if graph.normalized and graph.num_senders == count * graph.num_nodes:
            return graph
        return relational_graph(graph, count, self.aggregation)

    def _layer(self, k: int, x: jax.Array | None, operator: Graph) -> jax.Array:
        """Layer k before its activation; x None is the one-hot input."""
        if self.aggregation == "mean":
            return getattr(self, f"convs.{k}")(x, operator)
        table = getattr(self, f"layers.{k}.rel.*.lin")().astype(self.dtype)
        own = getattr(self, f"layers.{k}.self")().astype(self.dtype)
        if x is not None:
            x = over_rows(x)
            table, own = jnp.einsum("ni,rio->rno", x, table), x @ own
        rows = table.reshape(-1, table.shape[-1])
        # Reads out of order: of the rows here, of their gradients on the way back.
        total = everywhere(aggregate_sum(operator, everywhere(rows)))
        return over_rows(total.astype(self.dtype)) + own

    def intermediates(self, graph: Graph) -> dict[str, jax.Array]:
        """`h1` [N, dims[0]] after its ReLU and `z` [N, dims[1]]."""
        operator = spread(self.prepare(graph))
        x = None if self.input == "onehot" else self.table().astype(self.dtype)
        h1 = nn.relu(self._layer(0, x, operator))
        z = ACTIVATIONS[self.final_activation](self._layer(1, h1, operator))
        return {"h1": h1, "z": z}

    def __call__(self, graph: Graph) -> jax.Array:
        return self.intermediates(graph)["z"]

    def _scaled(self, h1: jax.Array, degrees: jax.Array, queries: Queries):
        """Neighbors' states [Q, K, d1] over the square root of degrees, relations [Q, K, R]."""
        relation, mask = jnp.asarray(queries.relation), jnp.asarray(queries.mask)
        same = jax.nn.one_hot(relation, len(self.relations)) * mask[..., None]
        count = jnp.einsum("qkr,qr->qk", same, same.sum(1))
        if self.aggregation == "mean":
            scale = mask / jnp.maximum(count, 1)
        else:
            degree = jnp.asarray(degrees)[relation, queries.neighbors]
            known = (degree > 0) & (mask > 0)
            scale = jnp.where(known, jax.lax.rsqrt(jnp.where(known, count * degree, 1)), 0)
        h = jnp.take(h1, jnp.asarray(queries.neighbors), axis=0).astype(jnp.float32)
        return h * scale[..., None], same

    def reached(self, degrees: jax.Array, queries: Queries) -> jax.Array:
        """bool [Q]: changes with a neighbor that adds to `embed_new`, which is 0 for the others.

        A word that occurs in file names alone has no neighbors under `pr_word` and adds nothing.
        """
        mask = jnp.asarray(queries.mask) > 0
        if self.aggregation == "mean":
            return mask.any(1)
        return (mask & (jnp.asarray(degrees)[queries.relation, queries.neighbors] > 0)).any(1)

    def _last_kernel(self) -> tuple[jax.Array, jax.Array]:
        """W_r of the last layer [R, d1, d2] and its bias."""
        if self.aggregation == "mean":
            conv = self.variables["params"]["convs.1"]
            weight = conv["weight"]
            if self.num_bases is not None:
                weight = jnp.einsum("rb,bio->rio", conv["comp"], weight)
            return weight, conv["bias"]
        return getattr(self, "layers.1.rel.*.lin")(), jnp.zeros((), self.param_dtype)

    def embed_new(self, h1: jax.Array, degrees: jax.Array, queries: Queries) -> jax.Array:
        """Embeddings [Q, dims[1]] of changes that the graph does not have (equation 6).

        Args:
          h1: [N, dims[0]] from `intermediates`.
          degrees: [R, N] of the training graph, see `relation_degrees`.
        """
        h, same = self._scaled(h1, degrees, queries)
        kernel, bias = self._last_kernel()
        # Summed before the product: [Q, R, d1] is small, [Q, K, d2] need not be.
        z = jnp.einsum("qrd,rde->qe", jnp.einsum("qkd,qkr->qrd", h, same), kernel) + bias
        return ACTIVATIONS[self.final_activation](z)

    def contributions(self, h1: jax.Array, degrees: jax.Array, queries: Queries) -> jax.Array:
        """What each known neighbor adds to `embed_new` before its activation, [Q, K, dims[1]]."""
        h, same = self._scaled(h1, degrees, queries)
        kernel, _ = self._last_kernel()
        return jnp.einsum("qkd,qkr,rde->qke", h, same, kernel)


def spread(operator: Graph) -> Graph:
    """The same graph, every device adding up the messages of its share of the nodes."""
    if operator.incoming is None:
        names = ("senders", "receivers", "weight")
        return operator.replace(**{n: over_rows(getattr(operator, n)) for n in names})

    def of(tables):
        names = ("neighbors", "weight", "edges", "nodes")
        return tables.replace(**{n: over_rows(getattr(tables, n)) for n in names})

    return operator.replace(incoming=of(operator.incoming), outgoing=of(operator.outgoing))


def pair_logits(z: jax.Array, pairs: jax.Array) -> jax.Array:
    """z_u . z_v for pairs [2, P] of node indices -> [P]."""
    return (z[pairs[0]] * z[pairs[1]]).sum(-1)


def link_loss(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean binary cross-entropy of link logits [P] against labels 0 or 1 [P], from logits.

    `mask` [P] leaves pairs out of the mean.
    """
    losses = jax.nn.softplus(logits) - labels * logits
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / jnp.maximum(mask.sum(), 1)


def ranking(scores: Any, users: Any, without: int | None = None) -> np.ndarray:
    """Users by descending score, ties to the lower node index, `without` (the author) left out.

    Args:
      scores: [U]. users: [U] node indices.
    """
    scores, users = np.asarray(scores), np.asarray(users)
    order = np.lexsort((users, -scores))
    ranked = users[order]
    return ranked if without is None else ranked[ranked != without]


def check_checkpoint(shapes: Mapping[str, tuple[int, ...]], module: nn.Module) -> None:
    """Refuse tables that were trained on a graph of another number of nodes.

    Args:
      shapes: PyTorch name -> shape of every entry of the file.
    """
    if not isinstance(module, Coral):
        return
    # The axis of the rows in PyTorch's layout of the tables that may be in a file.
    tables = {"embed.weight": 0, "layers.0.self.weight": 1, "convs.0.root": 0}
    if module.input == "embedding":
        tables = {"embed.weight": 0}
    for key, axis in tables.items():
        if len(shapes.get(key, ())) == 2 and shapes[key][axis] != module.num_nodes:
            raise ValueError(
                f"graph and checkpoint differ: the graph has {module.num_nodes} nodes, "
                f"{key} of the checkpoint {shapes[key][axis]} rows"
            )


MODEL = Coral
VARIANTS: dict[str, dict[str, Any]] = {}
