"""GanLM's parts: the stack that encoder and decoders are, and the two heads of its discriminator.

Sources as in `jaxmodels.language.ganlm`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxmodels.language.post_norm import PostNormLayer
from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import dropout
from jaxmodels.layers.normalization import LayerNorm
from jaxmodels.layers.relative_position import relative_buckets

# The launch log asks for 1e8; the official code never passes that on.
MAX_RELATIVE_DISTANCE = 128


def position_indices(tokens: jax.Array, pad_id: int) -> jax.Array:
    """Rows of the position table, int32 of the shape of `tokens` [B, T].

    `pad_id + k` for the k-th token that is not padding and `pad_id` for padding, so that left and
    right padding give a token the same position.
    """
    kept = (tokens != pad_id).astype(jnp.int32)
    return jnp.cumsum(kept, axis=-1) * kept + pad_id


class DetectionHead(nn.Module):
    """Is this the gold token? x [B, T, D] -> logits [B, T, 2]; class 1 is "yes"."""

    activation: str
    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        features = x.shape[-1]
        x = ACTIVATIONS[self.activation](Linear(features, name="dense", **types)(x))
        x = LayerNorm(self.epsilon, name="layer_norm", **types)(x)
        kernel = self.param("kernel", Linear.kernel_init, (features, 2), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (2,), self.param_dtype)
        return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class ClassificationHead(nn.Module):
    """Dropout, Linear, activation, dropout, Linear: x [B, D] -> logits [B, classes]."""

    classes: int
    activation: str
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        rngs = (None, None) if rng is None else jax.random.split(rng)
        x = dropout(x, self.dropout, rngs[0])
        x = ACTIVATIONS[self.activation](Linear(x.shape[-1], name="dense", **types)(x))
        return Linear(self.classes, name="out_proj", **types)(dropout(x, self.dropout, rngs[1]))


class Stack(nn.Module):
    """Embedding, positions, and layers under one `nn.scan`: the encoder and both decoders.

    The encoder alone owns the token table and the relative position bias; the discriminator of a
    pre-training model owns the detection head. Layers are stacked on axis 0 of `layers.*`.
    """

    layers: int
    layer: dict[str, Any]
    max_positions: int
    pad_id: int
    embed_scale: float
    layernorm_embedding: bool
    vocab_size: int = 0
    relative_buckets: int = 0
    detection_head: bool = False
    remat: bool = False
    scan_unroll: int = 1

    def setup(self) -> None:
        layer = self.layer
        types = dict(dtype=layer["dtype"], param_dtype=layer["param_dtype"])
        features, encoder = layer["features"], self.vocab_size > 0
        if encoder:
            self.embed_tokens = nn.Embed(
                self.vocab_size,
                features,
                embedding_init=_zero_row(initializers.normal(0.02), self.pad_id),
                **types,
            )
        positions = initializers.normal(0.02 if encoder else features**-0.5)
        self.embed_positions = nn.Embed(
            self.max_positions + self.pad_id + 1,
            features,
            embedding_init=_zero_row(positions, self.pad_id),
            **types,
        )
        if self.layernorm_embedding:
            self.embedding_norm = LayerNorm(layer["epsilon"], name="layernorm_embedding", **types)
        if self.relative_buckets:
            self.relative_bias = nn.Embed(
                self.relative_buckets,
                layer["heads"],
                embedding_init=initializers.normal(0.02),
                name="relative_position.relative_attention_bias",
                **types,
            )
        self.stacked = PostNormLayer(name="layers.*", **layer)
        if self.detection_head:
            self.head = DetectionHead(
                layer["activation"], layer["epsilon"], name="output_projection", **types
            )

    def embed(self, tokens, table, positions=None, rng=None) -> jax.Array:
        """LayerNorm(scale E[tokens] + P[positions]), [B, T] -> [B, T, D].

        Padding's rows get no gradient here, as in the original: the discriminator and the third
        pass read padding among real tokens where the generator's draw was that.
        """
        if positions is None:
            positions = position_indices(tokens, self.pad_id)
        x = jnp.take(table, tokens, axis=0).astype(self.layer["dtype"])
        x = x * self.embed_scale + self.embed_positions(positions)
        x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        if self.layernorm_embedding:
            x = self.embedding_norm(x)
        return dropout(x, self.layer["dropout"], rng)

    def position_bias(self, length: int) -> jax.Array | None:
        """The relative position bias of every layer, [1, N, T, T]."""
        if not self.relative_buckets:
            return None
        place = jnp.arange(length)
        buckets = relative_buckets(
            place[None, :] - place[:, None],
            bidirectional=True,
            buckets=self.relative_buckets,
            max_distance=MAX_RELATIVE_DISTANCE,
        )
        return jnp.transpose(self.relative_bias(buckets), (2, 0, 1))[None]

    def run(self, x, memory=None, *, layers=None, rng=None, states=False, **arguments):
        """The first `layers` layers over x [B, T, D] -> (x, each layer's output [n, B, T, D])."""
        layers = self.layers if layers is None else layers
        keys = None if rng is None else jax.random.split(rng, layers)

        def one(layer, x, inputs):
            index, key = inputs
            x = layer(x, memory, index=index, rng=key, **arguments)
            return x, x if states else None

        return self._scan(one, x, (jnp.arange(layers), keys), layers)

    def memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer's cross-attention, [n, B, S, N, H]."""

        def one(layer, carry, index):
            return carry, layer(memory, memory, index=index, only_memory=True)

        return self._scan(one, (), jnp.arange(self.layers), self.layers)[1]

    def step(self, x, cache, memory, position, memory_mask):
        """x [R, T, D] with the cache [n, R, L, N, H] of the tokens before -> (x, new cache)."""

        def one(layer, x, inputs):
            index, cache, memory = inputs
            return layer(
                x, memory, index=index, cache=cache, position=position, memory_mask=memory_mask
            )

        return self._scan(one, x, (jnp.arange(self.layers), cache, memory), self.layers)

    @nn.nowrap
    def _scan(self, body, carry, inputs, layers):
        def scanned(layer, carry, inputs):
            step = nn.remat(body, prevent_cse=False) if self.remat else body
            return nn.scan(
                step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=layers,
                unroll=min(self.scan_unroll, layers),
            )(layer, carry, inputs)

        if layers == self.layers:
            return scanned(self.stacked, carry, inputs)
        part = nn.map_variables(
            scanned, "params", trans_in_fn=lambda p: jax.tree.map(lambda x: x[:layers], p)
        )
        return part(self.stacked, carry, inputs)


def all_states(embedded, layers) -> jax.Array:
    """Embedding and layer outputs as one array [n + 1, B, T, D]."""
    return jnp.concatenate([embedded[None], layers])


def _zero_row(init, row):
    def zeroed(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype).at[row].set(0)

    return zeroed
