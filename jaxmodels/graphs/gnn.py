"""Stacks of graph layers: GCN, GraphSAGE, GAT, GIN and R-GCN of any depth.

Names and semantics after torch_geometric 2.8.1: `convs.{i}` are the layers; the activation stands
between them (ELU for GAT, ReLU for the others).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.graphs.graph import Graph, graph_of_arrays
from jaxmodels.graphs.layers import GATConv, GCNConv, GINConv, RGCNConv, SAGEConv
from jaxmodels.graphs.message_passing import gcn_normalize, relational_graph
from jaxmodels.layers.dropout import dropout
from jaxmodels.spelling import did_you_mean

KINDS = ("gcn", "sage", "gat", "gin", "rgcn")


class GNN(nn.Module):
    """Node features x [..., N, in_features] and a graph -> outputs [..., N, out].

    `kind` is one of KINDS. For GAT `hidden` is the width of a head and inner layers have
    `heads * hidden` features; the last layer averages `out_heads`. `dropout` acts on the input of
    every layer but the first, `input_dropout` on that of the first. `residual` adds a layer's input
    to its activated output where the widths agree; it is off by default, to show over-smoothing.
    `normalize` is that of GCN's edge weights (on without it) or SAGE's rows (off without it).
    `node_mask` [..., N] marks real nodes for GIN's batch statistics.

    Raises ValueError for an unknown kind or fewer than one layer.
    """

    kind: str = "gcn"
    in_features: int = 16
    hidden: int = 16
    out: int = 7
    num_layers: int = 2
    dropout: float = 0.0
    input_dropout: float = 0.0
    residual: bool = False
    bias: bool = True
    add_self_loops: bool = True
    aggr: str = "mean"
    normalize: bool | None = None
    root_weight: bool = True
    heads: int = 1
    out_heads: int = 1
    negative_slope: float = 0.2
    attention_dropout: float = 0.0
    train_eps: bool = False
    num_relations: int = 0
    num_bases: int | None = None
    num_blocks: int | None = None
    normalization: str = "mean"
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(self.kind, KINDS)
            raise ValueError(f"kind {self.kind!r}{near}; known: {', '.join(KINDS)}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.kind == "rgcn" and self.num_relations < 1:
            raise ValueError("kind 'rgcn' needs num_relations")
        super().__post_init__()

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 edges."""
        ints = jax.ShapeDtypeStruct((16,), jnp.int32)
        types = ints if self.kind == "rgcn" else None
        graph = Graph(ints, ints, edge_type=types, num_nodes=8, num_senders=8)
        return jax.ShapeDtypeStruct((8, self.in_features), jnp.float32), graph

    def _widths(self) -> list[tuple[int, int]]:
        """(input, output) features of every layer; a head's output for GAT."""
        inner = self.hidden * (self.heads if self.kind == "gat" else 1)
        inputs = [self.in_features] + [inner] * (self.num_layers - 1)
        outputs = [self.hidden] * (self.num_layers - 1) + [self.out]
        return list(zip(inputs, outputs))

    def _normalizes_edges(self) -> bool:
        """Whether GCN's edge weights are normalized."""
        return self.normalize is None or self.normalize

    def setup(self) -> None:
        for i, (inputs, outputs) in enumerate(self._widths()):
            setattr(self, f"convs.{i}", self._layer(inputs, outputs, i == self.num_layers - 1))

    def _layer(self, inputs: int, outputs: int, last: bool) -> nn.Module:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.kind == "gcn":
            edges = self._normalizes_edges()
            return GCNConv(inputs, outputs, self.add_self_loops, self.bias, edges, **types)
        if self.kind == "sage":
            rows = bool(self.normalize)
            return SAGEConv(inputs, outputs, self.aggr, rows, self.root_weight, self.bias, **types)
        if self.kind == "gat":
            return GATConv(
                inputs,
                outputs,
                heads=self.out_heads if last else self.heads,
                concat=not last,
                negative_slope=self.negative_slope,
                add_self_loops=self.add_self_loops,
                bias=self.bias,
                dropout=self.attention_dropout,
                **types,
            )
        if self.kind == "gin":
            return GINConv(inputs, outputs, self.train_eps, bn_axis_name=self.bn_axis_name, **types)
        return RGCNConv(
            inputs,
            outputs,
            self.num_relations,
            self.num_bases,
            self.num_blocks,
            self.normalization,
            self.root_weight,
            self.bias,
            **types,
        )

    def prepare(self, graph: Graph) -> Graph:
        """The graph as every layer wants it, computed once: normalized, relations unfolded."""
        if self.kind == "gcn" and self._normalizes_edges():
            return gcn_normalize(graph, self.add_self_loops)
        if self.kind == "rgcn" and not graph.normalized:
            return relational_graph(graph, self.num_relations, self.normalization)
        return graph

    def intermediates(
        self,
        x: jax.Array,
        graph: Graph,
        train: bool = False,
        node_mask: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Every layer's output before its activation: `layer1` .. `layerL` [..., N, features]."""
        graph = self.prepare(graph)
        outputs = {}
        for i in range(self.num_layers):
            rate = self.dropout if i else self.input_dropout
            h = dropout(x, rate, self.make_rng("dropout")) if train and rate else x
            layer = getattr(self, f"convs.{i}")
            if self.kind == "gat":
                y = layer(h, graph, train)
            elif self.kind == "gin":
                y = layer(h, graph, train, node_mask)
            else:
                y = layer(h, graph)
            outputs[f"layer{i + 1}"] = y
            if i < self.num_layers - 1:
                y = nn.elu(y) if self.kind == "gat" else nn.relu(y)
                x = y + x if self.residual and y.shape == x.shape else y
        return outputs

    def __call__(
        self,
        x: jax.Array,
        graph: Graph | None = None,
        train: bool = False,
        node_mask: jax.Array | None = None,
        *,
        edge_index: jax.Array | None = None,
        edge_weight: jax.Array | None = None,
        edge_type: jax.Array | None = None,
    ) -> jax.Array:
        """The last layer's output; `edge_index` [2, E] may stand for a graph, as in recordings."""
        if (graph is None) == (edge_index is None):
            raise ValueError("give either a graph or an edge_index")
        if graph is None:
            graph = graph_of_arrays(edge_index, x.shape[-2], edge_weight, edge_type)
        return self.intermediates(x, graph, train, node_mask)[f"layer{self.num_layers}"]


def check_checkpoint(keys: Iterable[str], module: nn.Module) -> None:
    """Refuse a file of another kind of network with one line that says which it is."""
    if not isinstance(module, GNN):
        return
    parts = [key.split(".", 2) for key in keys if key.startswith("convs.")]
    found = {part[2] for part in parts if len(part) == 3}
    marks = {"gat": "att_src", "sage": "lin_l.weight", "gin": "nn.0.weight", "rgcn": "root"}
    kinds = [kind for kind, mark in marks.items() if mark in found]
    if not kinds and "lin.weight" in found:
        kinds = ["gcn"]
    if kinds and module.kind not in kinds:
        raise ValueError(f"the file holds a {kinds[0]} network, the model is kind={module.kind!r}")


MODEL = GNN
VARIANTS: dict[str, dict[str, Any]] = {
    "gcn": {"kind": "gcn"},
    "graphsage": {"kind": "sage"},
    "gat": {"kind": "gat", "hidden": 8, "heads": 8},
    "gin": {"kind": "gin", "train_eps": True},
    "rgcn": {"kind": "rgcn", "num_relations": 1},
}
