"""The two published re-implementations of VectorNet, to import their weights: not for training.

Peer A: xk-huang/yet-another-vectornet@a1acbede (`HGNN`). Peer B: Henry1iu/TNT-Trajectory-Prediction
@bcbccdc1, backbone v2 (`ResidualVectorNet`), which publishes trained weights. Both depart from the
paper (docs/systems/vectornet.md); constructor arguments have their names. The target is polyline 0.

Their data has no absent polylines: one without a valid vector counts as one zero vector, which is
how they pad.
"""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.driving.vectornet import check_shapes, unit_vectors
from jaxmodels.layers.attention import attention_weights
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.masked_max import masked_max
from jaxmodels.layers.normalization import LayerNorm


def _padded(vectors: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zeros in padding slots, and one valid zero vector in absent polylines."""
    vectors = jnp.where(mask[..., None], vectors, 0)
    first = jnp.arange(mask.shape[-1]) == 0
    return vectors, mask | (first & ~mask.any(-1, keepdims=True))


def _max_of_others(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maximum over the *other* valid vectors, x [..., V, C] -> [..., V, C]; 0 for a lone one."""
    length = x.shape[-2]
    others = mask[..., None, :] & ~jnp.eye(length, dtype=bool)
    spread = jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], length, *x.shape[-2:]))
    return masked_max(spread, others)


class Block(nn.Module):
    """Peer B's encoder: `relu(N2(L2(relu(N1(L1 x)))) + S)`, S = x or a normalized projection."""

    features: int
    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Linear(self.hidden, name="linear1", **types)(x)
        y = nn.relu(LayerNorm(name="norm1", **types)(y))
        y = Linear(self.features, name="linear2", **types)(y)
        y = LayerNorm(name="norm2", **types)(y)
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="shortcut.0", **types)(x)
            x = LayerNorm(name="shortcut.1", **types)(x)
        return nn.relu(y + x)


class _Projections(nn.Module):
    """`q_lin`, `k_lin`, `v_lin` of both peers."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return tuple(Linear(self.width, name=f"{n}_lin", **types)(x) for n in "qkv")


class ResidualVectorNet(nn.Module):
    """Peer B's VectorNet (backbone v2): vectors [B, P, V, in_channels] -> offsets [B, 2 horizon].

    Columns of its data: xs ys dx dy, step, control, turn (2), intersection, id; starts for tracks,
    *centers* for pieces of lanes.
    """

    in_channels: int = 8
    horizon: int = 30
    num_subgraph_layers: int = 3
    num_global_graph_layer: int = 1
    subgraph_width: int = 64
    global_graph_width: int = 64
    traj_pred_mlp_width: int = 64
    aux_mlp_width: int = 64
    with_aux: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes to initialize with: vectors, vector_mask, valid_len, identifier."""
        return (
            jax.ShapeDtypeStruct((1, 4, 3, self.in_channels), jnp.float32),
            jax.ShapeDtypeStruct((1, 4, 3), jnp.bool_),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((1, 4, 2), jnp.float32),
        )

    def __call__(self, vectors, vector_mask, valid_len, identifier) -> jax.Array:
        """Per-step offsets [B, 2 T] of polyline 0."""
        return self.intermediates(vectors, vector_mask, valid_len, identifier)["pred"]

    @nn.compact
    def intermediates(
        self, vectors, vector_mask, valid_len, identifier, node_index=None
    ) -> dict[str, jax.Array]:
        """`polyline_norm` [B, P, W], `global_out` [B, P, Wg], `pred` [B, 2 T].

        valid_len [B]: polylines from there on are padding. identifier [B, P, 2]. `node_index` [B]
        is the polyline hidden in training; then also `aux_out` and its target `aux_gt` [B, W].
        """
        check_shapes(vectors, vector_mask, valid_len, self.in_channels, "valid_len")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x, mask = _padded(vectors, vector_mask)
        x = jnp.asarray(x, self.dtype)
        width = self.subgraph_width
        for i in range(self.num_subgraph_layers):
            x = Block(width, width, name=f"backbone.subgraph.layer_seq.glp_{i}", **types)(x)
            shared = jnp.broadcast_to(masked_max(x, mask)[..., None, :], x.shape)
            x = jnp.concatenate([x, shared], -1)
        x = Linear(width, name="backbone.subgraph.linear", **types)(x)
        polyline = unit_vectors(masked_max(x, mask))

        hidden = jnp.zeros(polyline.shape[:2], bool)
        if node_index is not None:
            hidden = jnp.arange(polyline.shape[1]) == node_index[:, None]
        x = jnp.where(hidden[..., None], 0, polyline)
        x = jnp.concatenate([x, jnp.asarray(identifier, self.dtype)], -1)
        present = jnp.arange(polyline.shape[1]) < valid_len[:, None]
        for i in range(self.num_global_graph_layer):
            name = f"backbone.global_graph.layers.glp_{i}"
            q, k, v = _Projections(self.global_graph_width, name=name, **types)(x)
            weights = attention_weights(q[:, :, None], k[:, :, None], mask=present[:, None, None])
            weights = jnp.where(present[:, :, None], weights[:, 0], 0)
            x = jnp.einsum("bqp,bph->bqh", weights.astype(v.dtype), v)
        pred_width = self.traj_pred_mlp_width
        y = Block(pred_width, pred_width, name="traj_pred_mlp.0", **types)(x[:, 0])
        pred = Linear(2 * self.horizon, name="traj_pred_mlp.1", **types)(y)
        found = {"polyline_norm": polyline, "global_out": x, "pred": pred}
        if self.with_aux and (node_index is not None or self.is_initializing()):
            chosen = hidden[..., None]
            aux_width = self.aux_mlp_width
            y = jnp.where(chosen, x, 0).sum(1)
            y = Block(aux_width, aux_width, name="backbone.aux_mlp.0", **types)(y)
            found["aux_out"] = Linear(width, name="backbone.aux_mlp.1", **types)(y)
            found["aux_gt"] = jnp.where(chosen, polyline, 0).sum(1)
        return found


class _Mlp(nn.Module):
    """Peer A's `mlp.{0,1,3}`: Linear, LayerNorm, ReLU, Linear."""

    hidden: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Linear(self.hidden, name="mlp.0", **types)(x)
        x = nn.relu(LayerNorm(name="mlp.1", **types)(x))
        return Linear(self.features, name="mlp.3", **types)(x)


class HGNN(nn.Module):
    """Peer A's network: vectors [B, P, V, in_channels] -> offsets [B, out_channels].

    Trained weights depend on a bug that is kept: the polylines' features are divided by their norm
    along the batch-and-polyline axis, so that the output depends on the rest of the batch (a
    warning says so). `num_global_graph_layer` is an argument of the original that it never reads.
    """

    in_channels: int = 8
    out_channels: int = 60
    num_subgraph_layers: int = 3
    num_global_graph_layer: int = 1
    subgraph_width: int = 64
    global_graph_width: int = 64
    traj_pred_mlp_width: int = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: vectors, vector_mask, valid_len."""
        return (
            jax.ShapeDtypeStruct((1, 4, 3, self.in_channels), jnp.float32),
            jax.ShapeDtypeStruct((1, 4, 3), jnp.bool_),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )

    def __call__(self, vectors, vector_mask, valid_len) -> jax.Array:
        """Per-step offsets [B, out_channels] of polyline 0."""
        return self.intermediates(vectors, vector_mask, valid_len)["pred"]

    @nn.compact
    def intermediates(self, vectors, vector_mask, valid_len) -> dict[str, jax.Array]:
        """`polyline_norm` [B, P, 2^depth D], `global_out` [B, P, Wg], `pred` [B, out_channels].

        valid_len [B]: keys from there on are masked (their own rows are not).
        """
        check_shapes(vectors, vector_mask, valid_len, self.in_channels, "valid_len")
        if not self.is_initializing():
            warnings.warn(
                "HGNN normalizes polylines over the whole batch, as the published weights need: "
                "its output depends on the other scenes of the batch",
                stacklevel=2,
            )
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x, mask = _padded(vectors, vector_mask)
        x = jnp.asarray(x, self.dtype)
        for i in range(self.num_subgraph_layers):
            name = f"subgraph.layer_seq.glp_{i}"
            x = _Mlp(self.subgraph_width, x.shape[-1], name=name, **types)(x)
            x = jnp.concatenate([x, _max_of_others(x, mask)], -1)
        polyline = masked_max(x, mask)
        squares = jnp.square(polyline).sum((0, 1))
        # A column of zeros is NaN in the original; here it stays zero.
        scale = jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))
        polyline = polyline * jnp.where(squares > 0, scale, 0)

        q, k, v = _Projections(self.global_graph_width, name="self_atten_layer", **types)(polyline)
        present = jnp.arange(polyline.shape[1]) < valid_len[:, None]
        weights = attention_weights(
            q[:, :, None], k[:, :, None], mask=present[:, None, None], scale=1
        )[:, 0]
        x = jnp.einsum("bqp,bph->bqh", weights.astype(v.dtype), v)
        mlp = _Mlp(self.traj_pred_mlp_width, self.out_channels, name="traj_pred_mlp", **types)
        return {"polyline_norm": polyline, "global_out": x, "pred": mlp(x[:, 0])}


VARIANTS: dict[str, dict[str, Any]] = {
    "yet_another_vectornet": {"cls": HGNN},
    "tnt_vectornet": {"cls": ResidualVectorNet, "in_channels": 10, "with_aux": True},
}
