"""VectorNet: motion forecasting from polylines of directed vectors.

J. Gao, C. Sun, H. Zhao, Y. Shen, D. Anguelov, C. Li, C. Schmid, "VectorNet: Encoding HD Maps and
Agent Dynamics from Vectorized Representation", CVPR 2020, arXiv 2005.04259. There is no official
code: names, epsilons and what the paper leaves open are ours and stand as fields (see
docs/systems/vectornet.md); `vectornet_peers` reads the two published re-implementations.

Shapes: B scenes, P polylines, V vectors, D columns, T future steps, c coordinates (2 or 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop.checkpoint import CheckpointError
from jaxmodels.layers.attention import attention_weights
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.initializers import torch_bias, torch_kernel
from jaxmodels.layers.masked_max import masked_max
from jaxmodels.layers.normalization import LayerNorm

NORM_EPSILON = 1e-12
# Features are metres from the target: a coordinate beyond this was surely never centered.
UNCENTERED = 2000.0


class Forecast(NamedTuple):
    """The target's future in its own frame (origin and heading at the last observed step).

    Attributes:
      offsets: [B, T, c] metres from each step to the next, the first from the origin.
      positions: [B, T, c] their running sum.
      log_scale: [B, T, c] logarithm of each offset's standard deviation, None unless learned.
    """

    offsets: jax.Array
    positions: jax.Array
    log_scale: jax.Array | None


def unit_vectors(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis; zeros stay zeros and have gradient zero."""
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    scale = jnp.where(squares > 0, 1 / jnp.maximum(length, NORM_EPSILON), 0)
    return x * scale.astype(x.dtype)


class ConcatLinear(nn.Module):
    """Affine map of `concat(h, m)` where m is shared by all vectors of a polyline.

    h [..., V, I], m [..., I'] -> [..., V, O]; kernel [I + I', O]. The maximum's half of the product
    is taken once a polyline: the same numbers for half the work.
    """

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array, m: jax.Array) -> jax.Array:
        width = h.shape[-1] + m.shape[-1]
        kernel = self.param("kernel", torch_kernel(), (width, self.features), self.param_dtype)
        bias = self.param("bias", torch_bias(width), (self.features,), self.param_dtype)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        own, shared = kernel[: h.shape[-1]], kernel[h.shape[-1] :]
        return h.astype(self.dtype) @ own + (m.astype(self.dtype) @ shared + bias)[..., None, :]


class SubgraphLayer(nn.Module):
    """One layer of the polyline subgraph: encode every vector, then the maximum of its polyline.

    The layer's output is `concat(h_i, max_i h_i)`; the two halves are returned apart,
    (h [..., V, width], m [..., width]), h being zero at padding slots.
    """

    width: int = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, h: jax.Array, m: jax.Array | None, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if m is None:
            h = Linear(self.width, name="fc", **types)(h)
        else:
            h = ConcatLinear(self.width, name="fc", **types)(h, m)
        h = nn.relu(LayerNorm(name="norm", **types)(h))
        h = jnp.where(mask[..., None], h, 0)
        return h, masked_max(h, mask)


class GlobalAttention(nn.Module):
    """softmax(Q K^T) V over the polylines present: no scale, no heads, no residual.

    x [B, P, W], present [B, P] -> (y [B, Q, width], weights [B, Q, P]); `queries` [B, Q, W] and
    `query_present` [B, Q] default to all polylines. Rows of absent polylines are zero.
    """

    width: int = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        present: jax.Array,
        queries: jax.Array | None = None,
        query_present: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if queries is None:
            queries, query_present = x, present
        query = Linear(self.width, name="q", **types)(queries)
        key = Linear(self.width, name="k", **types)(x)
        value = Linear(self.width, name="v", **types)(x)
        weights = attention_weights(
            query[:, :, None], key[:, :, None], mask=present[:, None, None], scale=1
        )[:, 0]
        weights = jnp.where(query_present[..., None], weights, 0)
        return jnp.einsum("bqp,bph->bqh", weights.astype(value.dtype), value), weights


class Decoder(nn.Module):
    """`fc2(relu(LN(fc1 x)))`, x [..., W] -> [..., features]."""

    features: int
    hidden: int = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Linear(self.hidden, name="fc1", **types)(x)
        x = nn.relu(LayerNorm(name="norm", **types)(x))
        return Linear(self.features, name="fc2", **types)(x)


class VectorNet(nn.Module):
    """Vectors [B, P, V, D] of a scene -> the target's future (`Forecast`).

    Attributes:
      in_dim: D columns: starts (c), ends (c), attributes, polyline id (jaxmodels.driving
        .vectorization); the network itself only knows that the first c are starts.
      horizon: T. coord_dim: c.
      sub_width, sub_depth: of the polyline subgraphs; a polyline's feature is 2 sub_width wide.
      global_width, global_depth: of the attention layers. dec_width: hidden width of the decoders.
      learn_scale: also predict the logarithm of each offset's standard deviation.
      id_scale: factor of the identifier (smallest start coordinates, metres) beside the features.
        With raw metres (1.0) the unscaled softmax starts out peaked and training stalls.

    Contents of padding slots, NaN included, influence nothing. An absent target (no valid vector,
    or `target_index` outside the scene) gives zeros under `jit`; with concrete arrays it is a
    ValueError, as are masks and columns that do not fit.
    """

    in_dim: int = 12
    horizon: int = 30
    sub_width: int = 64
    sub_depth: int = 3
    global_width: int = 64
    global_depth: int = 1
    dec_width: int = 64
    coord_dim: int = 2
    learn_scale: bool = False
    id_scale: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.coord_dim not in (2, 3):
            raise ValueError(f"coord_dim = {self.coord_dim}; coordinates are 2 or 3")
        if self.in_dim < 2 * self.coord_dim:
            raise ValueError(
                f"in_dim = {self.in_dim} cannot hold two points of {self.coord_dim} coordinates"
            )
        for name in ("horizon", "sub_width", "sub_depth", "global_width", "global_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: vectors, vector_mask, target_index."""
        return (
            jax.ShapeDtypeStruct((1, 4, 3, self.in_dim), jnp.float32),
            jax.ShapeDtypeStruct((1, 4, 3), jnp.bool_),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )

    def __call__(
        self, vectors: jax.Array, vector_mask: jax.Array, target_index: jax.Array
    ) -> Forecast:
        """The target's `Forecast`; of the last attention layer only the target's row is taken."""
        found = self._run(vectors, vector_mask, target_index, None, True)
        return Forecast(found["offsets"], found["positions"], found.get("log_scale"))

    def intermediates(
        self,
        vectors: jax.Array,
        vector_mask: jax.Array,
        target_index: jax.Array,
        node_mask: jax.Array | None = None,
        target_only: bool = False,
    ) -> dict[str, jax.Array]:
        """Everything by name; `node_mask` [B, P] hides polylines for the completion task.

        `subgraph_layer{l}`, `subgraph_last` [B, P, V, 2 Ws]; `polyline`, `polyline_norm`
        [B, P, 2 Ws] (before and after normalization, nothing hidden); `identifier` [B, P, c];
        `global_in` [B, P, 2 Ws + c]; `attention` [B, L, P, P]; `global_out` [B, P, Wg];
        `node_pred` [B, P, 2 Ws]; `offsets`, `positions` and `log_scale` as in `Forecast`. With
        `target_only` the last layer has the target's row alone and there is no `node_pred`.
        """
        return self._run(vectors, vector_mask, target_index, node_mask, target_only)

    @nn.compact
    def _run(self, vectors, vector_mask, target_index, node_mask, target_only):
        check_shapes(vectors, vector_mask, target_index, self.in_dim)
        if not self.is_initializing():
            check_values(vectors, vector_mask, target_index)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        found: dict[str, jax.Array] = {}
        vectors = jnp.where(vector_mask[..., None], vectors, 0)
        present = vector_mask.any(-1)

        h, m = jnp.asarray(vectors, self.dtype), None
        for layer in range(self.sub_depth):
            name = f"subgraph.layers.{layer}"
            h, m = SubgraphLayer(self.sub_width, name=name, **types)(h, m, vector_mask)
            found[f"subgraph_layer{layer}"] = _joined(h, m, vector_mask)
        found["subgraph_last"] = found[f"subgraph_layer{self.sub_depth - 1}"]

        # The maximum over vectors of concat(h_i, m) is concat(m, m).
        polyline = jnp.concatenate([m, m], -1)
        unit = unit_vectors(polyline)
        starts = vectors[..., : self.coord_dim]
        identifier = -masked_max(-starts, vector_mask)
        seen = unit if node_mask is None else jnp.where(node_mask[..., None], 0, unit)
        x = jnp.concatenate([seen, (self.id_scale * identifier).astype(seen.dtype)], -1)
        found |= dict(polyline=polyline, polyline_norm=unit, identifier=identifier, global_in=x)

        target = _one_hot_rows(target_index, present)
        target_present = target.any(-1)
        attention = []
        for layer in range(self.global_depth):
            attend = GlobalAttention(
                self.global_width, name=f"global_graph.layers.{layer}", **types
            )
            if target_only and layer == self.global_depth - 1:
                x, weights = attend(x, present, _row(x, target)[:, None], target_present[:, None])
            else:
                x, weights = attend(x, present)
            attention.append(weights)
        same = len({w.shape for w in attention}) == 1
        found["attention"] = jnp.stack(attention, 1) if same else attention[-1][:, None]
        found["global_out"] = x

        one_row = target_only and not self.is_initializing()
        node = x[:, 0] if target_only else _row(x, target)
        steps, c = self.horizon, self.coord_dim
        size = steps * c * (2 if self.learn_scale else 1)
        decoder = Decoder(size, self.dec_width, name="traj_decoder", **types)
        decoded = decoder(node).astype(jnp.promote_types(self.dtype, jnp.float32))
        decoded = jnp.where(target_present[:, None], decoded, 0)
        offsets = decoded[:, : steps * c].reshape(-1, steps, c)
        found |= {"offsets": offsets, "positions": jnp.cumsum(offsets, 1)}
        if self.learn_scale:
            found["log_scale"] = decoded[:, steps * c :].reshape(-1, steps, c)
        if not one_row:
            completion = Decoder(2 * self.sub_width, self.dec_width, name="node_decoder", **types)
            found["node_pred"] = completion(x)
        return found


def _joined(h: jax.Array, m: jax.Array, mask: jax.Array) -> jax.Array:
    """concat(h_i, m) [..., V, 2 W], zero at padding slots."""
    shared = jnp.where(mask[..., None], m[..., None, :], 0)
    return jnp.concatenate([h, shared], -1)


def _one_hot_rows(index: jax.Array, present: jax.Array) -> jax.Array:
    """[B, P] true at `index` where that polyline is present; an index outside matches nothing."""
    return (jnp.arange(present.shape[1]) == index[:, None]) & present


def _row(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen row of x [B, P, W] -> [B, W], zeros where none is chosen."""
    return jnp.where(chosen[..., None], x, 0).sum(1)


def check_shapes(vectors, vector_mask, numbers, in_dim: int, name: str = "target_index") -> None:
    """Raises ValueError where shapes or dtypes cannot be meant, naming both sides.

    `numbers` [B] is the argument called `name`.
    """
    if vectors.ndim != 4 or vectors.shape[-1] != in_dim:
        raise ValueError(
            f"vectors must be [B, P, V, D] with D = in_dim = {in_dim}, "
            f"got {tuple(vectors.shape)}: {vectors.shape[-1]} columns for {in_dim}"
        )
    if vector_mask.dtype != np.bool_:
        raise ValueError(f"vector_mask must be bool, got {vector_mask.dtype}")
    if tuple(vector_mask.shape) != tuple(vectors.shape[:3]):
        raise ValueError(
            f"vector_mask must be [B, P, V] = {tuple(vectors.shape[:3])}, "
            f"got {tuple(vector_mask.shape)}"
        )
    whole = jnp.issubdtype(numbers.dtype, jnp.integer)
    if tuple(numbers.shape) != (vectors.shape[0],) or not whole:
        raise ValueError(
            f"{name} must be integers [B] = [{vectors.shape[0]}], "
            f"got {numbers.dtype} {list(numbers.shape)}"
        )


def check_values(vectors, vector_mask, target_index) -> None:
    """Check concrete arrays; does nothing while tracing.

    Raises ValueError for a target that is absent or outside the scene and for the first value of
    a valid vector that is not finite; warns of coordinates that were never centered.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (vectors, vector_mask, target_index)):
        return
    vectors, mask, target = (np.asarray(x) for x in (vectors, vector_mask, target_index))
    polylines = mask.shape[1]
    for b, index in enumerate(target):
        if not 0 <= index < polylines:
            raise ValueError(
                f"target_index[{b}] = {index} is outside the scene's {polylines} polylines"
            )
        if not mask[b, index].any():
            raise ValueError(f"target_index[{b}] = {index} is a polyline with no valid vector")
    bad = mask[..., None] & ~np.isfinite(vectors)
    if bad.any():
        place = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"vectors{place} = {vectors[tuple(place)]} in a valid vector; values must be finite"
        )
    largest = np.abs(np.where(mask[..., None], vectors, 0)[..., :4]).max(initial=0)
    if largest > UNCENTERED:
        warnings.warn(
            f"a coordinate of {largest:.0f} m: vectors look uncentered; they must be in the "
            "target's frame (jaxmodels.driving.vectorization)",
            stacklevel=2,
        )


MODEL = VectorNet

VARIANTS: dict[str, dict[str, Any]] = {
    "vectornet_base": {},
    # The paper's 72K parameters and 0.041 GFLOPs a target; unused columns are zero.
    "vectornet_72k": {"in_dim": 74, "global_width": 128},
    # The published ablation, subgraph depth x width and global depth x width.
    "vectornet_1x64_1x64": {"sub_depth": 1},
    "vectornet_3x128_1x64": {"sub_width": 128},
    "vectornet_3x64_2x64": {"global_depth": 2},
    "vectornet_3x64_2x256": {"global_depth": 2, "global_width": 256},
}


def count_encoder_parameters(module: VectorNet) -> int:
    """Parameters without the decoders, as the paper counts them."""
    width, wide = module.sub_width, 2 * module.sub_width
    inputs = [module.in_dim] + [wide] * (module.sub_depth - 1)
    total = sum(d * width + 3 * width for d in inputs)
    inputs = [wide + module.coord_dim] + [module.global_width] * (module.global_depth - 1)
    return total + sum(3 * (d + 1) * module.global_width for d in inputs)


def count_flops(
    n_polylines: int,
    n_vectors: int,
    in_dim: int = 12,
    *,
    sub_width: int = 64,
    sub_depth: int = 3,
    global_width: int = 64,
    global_depth: int = 1,
    coord_dim: int = 2,
) -> int:
    """FLOPs of one target: 2 x multiply-accumulates of the dense maps, decoders excluded.

    Counted as the paper counts (the maximum's half of a layer's input once a vector), for
    `n_vectors` vectors in all, on `n_polylines` polylines.
    """
    wide = 2 * sub_width
    vector = (in_dim + (sub_depth - 1) * wide) * sub_width
    polyline = 3 * (wide + coord_dim + (global_depth - 1) * global_width) * global_width
    return 2 * (n_vectors * vector + n_polylines * polyline)


def check_checkpoint(keys: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse weights of the two peer re-implementations, naming the layout and who reads it."""
    if not isinstance(module, VectorNet):
        return
    layouts = {
        "glp_0.mlp.": ("Peer A (yet-another-vectornet)", "driving.vectornet_peers:HGNN"),
        "glp_0.linear1.": (
            "Peer B (TNT-Trajectory-Prediction, backbone v2)",
            "driving.vectornet_peers:ResidualVectorNet",
        ),
    }
    for part, (layout, name) in layouts.items():
        key = next((k for k in keys if f"subgraph.layer_seq.{part}" in k), None)
        if key is not None:
            raise CheckpointError(
                f"checkpoint is in the layout of {layout} ({key}), the model in the reference "
                f"layout (subgraph.layers.0.fc.weight); load it as {name}"
            )
