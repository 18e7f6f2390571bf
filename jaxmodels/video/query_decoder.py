"""Style queries that read three scales of features: a Transformer decoder for W+ codes.

X. Hu et al., "Style Transformer for Image Inversion and Editing", arXiv 2203.07932, after
sapphire497/style-transformer@17ad5f0 (`models/transformer.py`): three decoder layers, each with the
memory of one scale, coarse to fine.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.attention import attend, merge_heads, split_heads
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.normalization import LayerNorm

SCALES = ("coarse", "medium", "fine")


class MultiheadAttention(nn.Module):
    """PyTorch's `nn.MultiheadAttention`, batch first: query [B, T, D], key and value [B, S, D]."""

    heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        width = query.shape[-1]
        # Checkpoints stack the three projections along the output axis, [3 D, D].
        init = nn.initializers.xavier_uniform(in_axis=1, out_axis=0)
        weight = self.param("in_proj_weight", init, (3 * width, width), self.param_dtype)
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,), self.param_dtype)
        weights, biases = jnp.split(weight, 3), jnp.split(bias, 3)
        heads = [
            split_heads(
                x.astype(self.dtype) @ w.T.astype(self.dtype) + b.astype(self.dtype), self.heads
            )
            for x, w, b in zip((query, key, value), weights, biases)
        ]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return Linear(width, name="out_proj", **types)(merge_heads(attend(*heads)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, MLP; post-norm unless told otherwise.

    query [B, T, D], memory [B, S, D], positions of either (added to queries and keys only) or None
    -> [B, T, D].
    """

    d_model: int
    nhead: int
    dim_feedforward: int = 2048
    dropout: float = 0.0
    activation: str = "relu"
    normalize_before: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        memory: jax.Array,
        query_position: jax.Array | None = None,
        position: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        activation = {"relu": nn.relu, "gelu": lambda y: nn.gelu(y, approximate=False)}
        if self.activation not in activation:
            raise ValueError(f"activation is relu or gelu, got {self.activation!r}")

        def norm(n):
            return LayerNorm(name=f"norm{n}", **types)

        def at(x, place):
            return x if place is None else x + place

        def drop(x):
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        def own(x):
            y = at(x, query_position)
            return MultiheadAttention(self.nhead, name="self_attn", **types)(y, y, x)

        def other(x):
            attention = MultiheadAttention(self.nhead, name="multihead_attn", **types)
            return attention(at(x, query_position), at(memory, position), memory)

        def mlp(x):
            y = Linear(self.dim_feedforward, name="linear1", **types)(x)
            y = drop(activation[self.activation](y))
            return Linear(self.d_model, name="linear2", **types)(y)

        x = query
        for n, part in enumerate((own, other, mlp), 1):
            if self.normalize_before:
                x = x + drop(part(norm(n)(x)))
            else:
                x = norm(n)(x + drop(part(x)))
        return x


class StyleQueryDecoder(nn.Module):
    """Queries [B, T, D] and three memories [B, S_i, D] -> the queries after each layer."""

    d_model: int = 512
    nhead: int = 4
    dim_feedforward: int = 1024
    dropout: float = 0.0
    activation: str = "relu"
    normalize_before: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that generic code initializes with: 18 queries, maps of 16, 32 and 64 pixels."""
        return tuple(
            jax.ShapeDtypeStruct((1, n, self.d_model), jnp.float32) for n in (18, 256, 1024, 4096)
        )

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        coarse: jax.Array,
        medium: jax.Array,
        fine: jax.Array,
        query_position: jax.Array | None = None,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        found = {}
        for name, memory in zip(SCALES, (coarse, medium, fine)):
            query = DecoderLayer(
                self.d_model,
                self.nhead,
                self.dim_feedforward,
                self.dropout,
                self.activation,
                self.normalize_before,
                self.dtype,
                self.param_dtype,
                name=name,
            )(query, memory, query_position, None, train)
            found[name] = query
        return found


MODEL = StyleQueryDecoder
