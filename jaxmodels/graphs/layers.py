"""Graph layers with PyTorch Geometric's semantics and state-dict names.

After torch_geometric 2.8.1 (pyg-team/pytorch_geometric, `torch_geometric.nn.conv`). All take node
features x [..., N, in] and a `Graph`, and give [..., N, out]; matrix products run in `dtype`, sums
over edges in float32 or wider.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.graphs.graph import Graph
from jaxmodels.graphs.message_passing import (
    aggregate_attention,
    aggregate_max,
    aggregate_mean,
    aggregate_sum,
    gcn_normalize,
    relational_graph,
)
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import dropout
from jaxmodels.layers.initializers import Initializer, torch_bias, torch_kernel
from jaxmodels.layers.normalization import BatchNorm

glorot: Initializer = nn.initializers.glorot_uniform()


def _example(x_features: int, typed: bool = False) -> tuple[Any, ...]:
    def ints(size: int):
        return jax.ShapeDtypeStruct((size,), jnp.int32)

    graph = Graph(
        ints(16), ints(16), edge_type=ints(16) if typed else None, num_nodes=8, num_senders=8
    )
    return jax.ShapeDtypeStruct((8, x_features), jnp.float32), graph


class GCNConv(nn.Module):
    """D^-1/2 (A + I) D^-1/2 x W + b (Kipf and Welling, arXiv 1609.02907).

    `add_self_loops=False` takes the edges as given, and `normalize=False` their weights too: no
    loops then. A graph that went through `gcn_normalize` is used as it is. The smaller of input and
    output is what travels along the edges.
    """

    in_features: int
    features: int
    add_self_loops: bool = True
    bias: bool = True
    normalize: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 edges."""
        return _example(self.in_features)

    @nn.compact
    def __call__(self, x: jax.Array, graph: Graph) -> jax.Array:
        if self.normalize:
            graph = gcn_normalize(graph, self.add_self_loops)
        linear = Linear(
            self.features, False, glorot, dtype=self.dtype, param_dtype=self.param_dtype, name="lin"
        )
        if self.features <= self.in_features:
            y = aggregate_sum(graph, linear(x)).astype(self.dtype)
        else:
            y = linear(aggregate_sum(graph, x))
        if self.bias:
            zeros = nn.initializers.zeros
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class _Affine(nn.Module):
    """The parameters of a linear layer, for those who put its bias elsewhere: (kernel, bias)."""

    in_features: int
    features: int
    use_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        shape = (self.in_features, self.features)
        kernel = self.param("kernel", torch_kernel(), shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        init = torch_bias(self.in_features)
        return kernel, self.param("bias", init, (self.features,), self.param_dtype)


class SAGEConv(nn.Module):
    """W_l aggregate_{u -> v} x_u + b + W_r x_v (Hamilton et al., arXiv 1706.02216).

    `aggr` is "mean", "max" or "sum"; edge weights are ignored; `normalize` divides every row by
    max(2-norm, 1e-12). `root_weight=False` drops W_r.
    """

    in_features: int
    features: int
    aggr: str = "mean"
    normalize: bool = False
    root_weight: bool = True
    bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.aggr not in ("mean", "max", "sum"):
            raise ValueError(f"aggr {self.aggr!r}; known: mean, max, sum")
        super().__post_init__()

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 edges."""
        return _example(self.in_features)

    @nn.compact
    def __call__(self, x: jax.Array, graph: Graph) -> jax.Array:
        left = _Affine(self.in_features, self.features, self.bias, self.param_dtype, name="lin_l")
        kernel, bias = left()
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        # Sums commute with W, so the narrower of the two travels; a maximum does not.
        aggregate = functools.partial(aggregate_sum, weighted=False)
        if self.aggr == "mean":
            aggregate = aggregate_mean
        if self.aggr == "max":
            y = aggregate_max(graph, x) @ kernel
        elif self.features < self.in_features:
            y = aggregate(graph, x @ kernel).astype(self.dtype)
        else:
            y = aggregate(graph, x).astype(self.dtype) @ kernel
        if bias is not None:
            y = y + bias.astype(self.dtype)
        if self.root_weight:
            types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
            y = y + Linear(self.features, False, name="lin_r", **types)(x)
        if self.normalize:
            squares = jnp.square(y).sum(-1, keepdims=True)
            # sqrt has no gradient at 0, where the rows of padding nodes may lie.
            norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
            y = y / jnp.where(squares > 0, jnp.maximum(norm, 1e-12), 1)
        return y


class GATConv(nn.Module):
    """sum_u alpha_vu W x_u + b, alpha = softmax_u leaky_relu(a_src . W x_u + a_dst . W x_v).

    Velickovic et al., arXiv 1710.10903. Existing self loops are removed and one a node added
    (`add_self_loops`); duplicates count twice. `concat` puts heads side by side, head-major, and
    otherwise averages them. `dropout` is that of the coefficients. Edge weights are ignored.
    """

    in_features: int
    features: int
    heads: int = 1
    concat: bool = True
    negative_slope: float = 0.2
    add_self_loops: bool = True
    bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 edges."""
        return _example(self.in_features)

    @nn.compact
    def __call__(self, x: jax.Array, graph: Graph, train: bool = False) -> jax.Array:
        heads, width = self.heads, self.features
        linear = Linear(
            heads * width,
            False,
            glorot,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="lin",
        )
        h = linear(x).reshape(*x.shape[:-1], heads, width)

        def score(name):
            a = self.param(name, glorot, (1, heads, width), self.param_dtype)
            return (h * a.astype(self.dtype)).sum(-1).astype(self._wide)

        rate = self.dropout if train else 0.0
        key = self.make_rng("dropout") if rate else None

        def drop(coefficients, number):
            own = None if key is None else jax.random.fold_in(key, number + 1)
            return dropout(coefficients, rate, own)

        y = aggregate_attention(
            graph,
            h,
            score("att_src"),
            score("att_dst"),
            negative_slope=self.negative_slope,
            add_self_loops=self.add_self_loops,
            drop=drop,
        )
        y = y.reshape(*x.shape[:-1], heads * width) if self.concat else y.mean(-2)
        y = y.astype(self.dtype)
        if self.bias:
            zeros = nn.initializers.zeros
            y = y + self.param("bias", zeros, (y.shape[-1],), self.param_dtype).astype(self.dtype)
        return y

    @property
    def _wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)


class GINConv(nn.Module):
    """MLP((1 + eps) x_v + sum_{u -> v} x_u) (Xu et al., arXiv 1810.00826).

    The MLP is Linear, BatchNorm, ReLU, Linear (`nn.0`, `nn.1`, `nn.3`) of width `features`; `eps`
    [1] is a parameter with `train_eps`, else a buffer. `node_mask` [..., N] keeps padding nodes
    out of the batch statistics.
    """

    in_features: int
    features: int
    train_eps: bool = True
    eps: float = 0.0
    bn_axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 edges."""
        return _example(self.in_features)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        graph: Graph,
        train: bool = False,
        node_mask: jax.Array | None = None,
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        start = nn.initializers.constant(self.eps)
        if self.train_eps:
            eps = self.param("eps", start, (1,), self.param_dtype)
        else:
            key = jax.random.key(0)
            eps = self.variable("buffers", "eps", start, key, (1,), self.param_dtype).value
        h = aggregate_sum(graph, x, weighted=False) + (1 + eps) * x
        h = Linear(self.features, name="nn.0", **types)(h)
        norm = BatchNorm(axis_name=self.bn_axis_name, name="nn.1", **types)
        h = nn.relu(norm(h, train, node_mask))
        return Linear(self.features, name="nn.3", **types)(h)


class RGCNConv(nn.Module):
    """root^T x_v + sum_r sum_{u in N_r(v)} c_vu W_r^T x_u + b (Schlichtkrull, arXiv 1703.06103).

    `normalization` "mean" is PyTorch Geometric's (c = 1 / |N_r(v)|), "sym" and "sum" as in
    `relational_graph`. `num_bases` shares W_r = sum_b comp[r, b] weight[b]; `num_blocks` makes W_r
    block-diagonal, weight [R, blocks, in / blocks, out / blocks]. `weight` is [R or bases, in, out]
    and `root` [in, out], as PyTorch Geometric stores them. x = None stands for one-hot rows
    [N, in = N]: the rows of `weight` and `root` are then read as tables, never multiplied.
    """

    in_features: int
    features: int
    num_relations: int
    num_bases: int | None = None
    num_blocks: int | None = None
    normalization: str = "mean"
    root_weight: bool = True
    bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        blocks = self.num_blocks
        if blocks is not None and self.num_bases is not None:
            raise ValueError("num_bases and num_blocks exclude each other")
        if blocks is not None and (self.in_features % blocks or self.features % blocks):
            raise ValueError(
                f"num_blocks = {blocks} must divide {self.in_features} and {self.features} features"
            )
        super().__post_init__()

    def example_inputs(self) -> tuple[Any, ...]:
        """Shapes that generic code initializes with: x [8, in], 16 typed edges."""
        return _example(self.in_features, typed=True)

    @nn.compact
    def __call__(self, x: jax.Array | None, graph: Graph) -> jax.Array:
        relations, bases, blocks = self.num_relations, self.num_bases, self.num_blocks
        shape = (bases or relations, self.in_features, self.features)
        if blocks:
            shape = (relations, blocks, shape[1] // blocks, shape[2] // blocks)
        # Of each matrix by its own two sides, as PyTorch Geometric's.
        each = nn.initializers.glorot_uniform(batch_axis=tuple(range(len(shape) - 2)))
        weight = self.param("weight", each, shape, self.param_dtype).astype(self.dtype)
        if x is not None:
            x = x.astype(self.dtype)
        elif blocks:
            raise ValueError("one-hot input (x = None) has no blocks")
        if blocks:
            parts = x.reshape(*x.shape[:-1], blocks, shape[2])
            table = jnp.einsum("...nbi,rbio->...rnbo", parts, weight)
            table = table.reshape(*table.shape[:-2], self.features)
        elif bases:
            comp = self.param("comp", glorot, (relations, bases), self.param_dtype)
            # N x bases products instead of N x relations, then the cheap combination.
            table = weight if x is None else jnp.einsum("...ni,bio->...bno", x, weight)
            table = jnp.einsum("rb,...bno->...rno", comp.astype(self.dtype), table)
        else:
            table = weight if x is None else jnp.einsum("...ni,rio->...rno", x, weight)
        table = table.reshape(*table.shape[:-3], -1, self.features)
        if graph.num_senders != relations * graph.num_nodes or not graph.normalized:
            graph = relational_graph(graph, relations, self.normalization)
        y = aggregate_sum(graph, table).astype(self.dtype)
        if self.root_weight:
            root = self.param("root", glorot, (self.in_features, self.features), self.param_dtype)
            root = root.astype(self.dtype)
            y = y + (root if x is None else x @ root)
        if self.bias:
            zeros = nn.initializers.zeros
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y
