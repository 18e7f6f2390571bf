"""Style queries that read three scales of features: a Transformer decoder for W+ codes.

X. Hu et al., "Style Transformer for Image Inversion and Editing", arXiv 2203.07932, after
sapphire497/style-transformer@17ad5f0 (`models/transformer.py`): three decoder layers, each with the
memory of one scale, coarse to fine. `StyleTransformerEncoder` is the whole encoder
(`models/encoders/style_transformer_encoders.py`, `models/style_transformer.py`): learned latents
pass through the generator's mapping network, which is frozen, and become the queries; pSp's trunk
gives the memories. `video.video_encoder:video_style_transformer` reads its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.layers.attention import attend, merge_heads, split_heads
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.video.style_encoders import feature_pyramid
from jaxmodels.video.stylegan2 import normalize_second_moment, num_latents
from jaxmodels.video.stylegan2_layers import leaky_relu
from jaxmodels.vision.ir_se import units

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


class StyleTransformerEncoder(nn.Module):
    """Images [B, S, S, 3] in [-1, 1] and a mapping network [N, D] -> [N, D] -> W+ offsets
    [B, n, D], to which w_avg is added; S is a multiple of 16, D = 512 / `width_divisor`.

    `train` takes the batch's own statistics; dropout acts where a key `dropout` is given, too.
    """

    num_layers: int = 50
    mode: str = "ir_se"
    stylegan_size: int = 1024
    width_divisor: int = 1
    se_reduction: int = 16
    nhead: int = 4
    dropout: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        num_latents(self.stylegan_size)
        units(self.num_layers, self.width_divisor)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, mapping: Callable[[jax.Array], jax.Array], train: bool = False
    ) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        args = (self.num_layers, self.mode, self.width_divisor, self.se_reduction)
        _, maps = feature_pyramid(x, *args, train, types)
        batch, width = len(x), maps[0].shape[-1]
        shape = (1, num_latents(self.stylegan_size), width)
        latents = self.param("z", nn.initializers.normal(1.0), shape, self.param_dtype)
        query = jnp.broadcast_to(mapping(latents[0]), (batch, *shape[1:])).astype(self.dtype)
        dropped = train and self.has_rng("dropout")
        for scale, memory in zip(SCALES, maps):
            layer = DecoderLayer(
                width,
                self.nhead,
                2 * width,
                self.dropout,
                name=f"transformerlayer_{scale}",
                **types,
            )
            query = layer(query, memory.reshape(batch, -1, width), train=dropped)
        return query


class FrozenMapping(nn.Module):
    """A StyleGAN2 mapping network that never trains: its weights are buffers, z [N, D] -> w.

    Names and layouts are rosinality's (`style.1` is the first layer).
    """

    num_layers: int = 8
    lr_multiplier: float = 0.01
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = normalize_second_moment(z)
        for i in range(1, self.num_layers + 1):
            x = _FrozenLinear(self.lr_multiplier, self.param_dtype, name=f"style.{i}")(x)
        return x


class _FrozenLinear(nn.Module):
    lr_multiplier: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def draw():
            # Without a file it is at least a network of the right scale.
            normal = jax.random.normal(self.make_rng("params"), (width, width), self.param_dtype)
            return normal / self.lr_multiplier

        weight = self.variable("buffers", "weight", draw).value
        bias = self.variable("buffers", "bias", jnp.zeros, (width,), self.param_dtype).value
        kernel = weight.T * (self.lr_multiplier / math.sqrt(width))
        return leaky_relu(x @ kernel + bias * self.lr_multiplier)


def frozen_mapping(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`FrozenMapping`'s buffers of a generator's own mapping parameters (`fc0`, `fc1`, ...)."""
    return {
        f"style.{i + 1}": {
            "weight": jnp.asarray(mapping[f"fc{i}"]["kernel"]).T,
            "bias": jnp.copy(mapping[f"fc{i}"]["bias"]),
        }
        for i in range(len([name for name in mapping if name.startswith("fc")]))
    }


MODEL = StyleQueryDecoder
