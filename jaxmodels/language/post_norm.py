"""Post-norm Transformer layers with fairseq's names: attention and feed-forward, each followed by
residual addition and LayerNorm.

`self_attn.{q,k,v,out}_proj`, `encoder_attn`, `fc1`, `fc2` and their norms as in fairseq 0.12
(`fairseq/modules/transformer_layer.py`), which GanLM, BART and XLM share. Randomness is an explicit
key for each layer, so that two passes over shared layers never share a dropout mask.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from jaxmodels.layers.activations import ACTIVATIONS
from jaxmodels.layers.attention import attend, causal_mask, merge_heads, split_heads
from jaxmodels.layers.convolution import Linear
from jaxmodels.layers.dropout import keep_masks, keep_where
from jaxmodels.layers.initializers import Initializer
from jaxmodels.layers.normalization import LayerNorm


def scaled_xavier_uniform(scale: Any = 1.0) -> Initializer:
    """Uniform in +-scale * sqrt(6 / (fan_in + fan_out)); the scale may be traced."""
    xavier = initializers.variance_scaling(1.0, "fan_avg", "uniform")

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return (xavier(key, shape, dtype) * scale).astype(dtype)

    return init


def scaled(init: Initializer, scale: Any) -> Initializer:
    """`init` times a scale, which may be traced."""
    return lambda key, shape, dtype=jnp.float32: (init(key, shape, dtype) * scale).astype(dtype)


class MultiHeadAttention(nn.Module):
    """Attention with separate projections `q_proj`, `k_proj`, `v_proj`, `out_proj`, all with bias.

    `kernel_init` draws the three input projections, `out_init` the output's; `bias_init` None is
    PyTorch's default for the inputs (the output's bias starts at zero).
    """

    features: int
    heads: int
    dropout: float
    kernel_init: Initializer
    out_init: Initializer
    bias_init: Initializer | None
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        if self.features % self.heads:
            raise ValueError(f"width {self.features} is not divisible by {self.heads} heads")
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        inputs = dict(kernel_init=self.kernel_init, bias_init=self.bias_init, **types)
        self.q_proj = Linear(self.features, **inputs)
        self.k_proj = Linear(self.features, **inputs)
        self.v_proj = Linear(self.features, **inputs)
        self.out_proj = Linear(
            self.features, kernel_init=self.out_init, bias_init=initializers.zeros, **types
        )

    def keys_and_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Memory [B, S, D] -> keys and values [B, S, N, H]."""
        return (
            split_heads(self.k_proj(memory), self.heads),
            split_heads(self.v_proj(memory), self.heads),
        )

    def read(
        self,
        x: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> jax.Array:
        """Queries from x [B, T, D] over keys and values [B, S, N, H] -> [B, T, D].

        `keep` [B, N, T, S]: the weights that dropout leaves, None for all.
        """
        query = split_heads(self.q_proj(x), self.heads)
        y = attend(query, key, value, bias=bias, mask=mask, dropout_rate=self.dropout, keep=keep)
        return self.out_proj(merge_heads(y))

    def __call__(self, x, memory=None, bias=None, mask=None, keep=None) -> jax.Array:
        """x [B, T, D] over memory [B, S, D], itself when there is none."""
        key, value = self.keys_and_values(x if memory is None else memory)
        return self.read(x, key, value, bias, mask, keep)


class PostNormLayer(nn.Module):
    """Self-attention, with `cross` attention to an encoder's output, feed-forward; norms after.

    x [B, T, D] -> [B, T, D]. `index` (0-based, may be traced) matters only to initialization:
    with `rescale` the output projections and `fc2` are divided by sqrt(2 (index + 1)).
    `bert_init` draws every kernel from N(0, 0.02) with zero biases, otherwise the attention is
    Xavier-uniform with gain 1/sqrt(2) and the feed-forward PyTorch's default.
    """

    features: int
    hidden: int
    heads: int
    cross: bool = False
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    bert_init: bool = False
    rescale: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def _masks(self, rng, x, memory) -> dict[str, jax.Array | None]:
        """What dropout keeps at each of the layer's sites, all rates' masks from one draw each."""
        shape, keys = x.shape, x.shape[1]
        weights, rest = self.attention_dropout, self.dropout
        sites = {"self_weights": (weights, (shape[0], self.heads, keys, keys))}
        sites["self"] = sites["output"] = (rest, shape)
        if self.cross:
            sites["cross_weights"] = (weights, (shape[0], self.heads, keys, memory.shape[1]))
            sites["cross"] = (rest, shape)
        sites["hidden"] = (self.activation_dropout, (*shape[:-1], self.hidden))
        masks = {}
        for i, rate in enumerate(sorted({rate for rate, _ in sites.values()})):
            names = [name for name, (own, _) in sites.items() if own == rate]
            drawn = jax.random.fold_in(rng, i)
            masks |= zip(names, keep_masks(drawn, rate, [sites[name][1] for name in names]))
        return masks

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        index: Any = 0,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        position: Any = None,
        only_memory: bool = False,
    ) -> Any:
        """One layer.

        Args:
          x: `[B, T, D]`. memory: `[B, S, D]`, or its keys and values `[M, S, N, H]` of one row for
            every B / M rows of x (the beams of a sentence).
          bias: added to the self-attention's scores, `[1, N, T, T]`.
          mask, memory_mask: true where a query may look, `[B, 1, T or 1, T]`, `[B or M, 1, 1, S]`.
          rng: key of the dropout masks, None in evaluation.
          cache, position: earlier keys and values `[B, L, N, H]`, and the place of x's first token.
          only_memory: return the keys and values of `memory` alone.

        Returns: `[B, T, D]`; with a cache, (that, the updated cache).
        """
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        out_scale = 1 / jnp.sqrt(2.0 * (index + 1)) if self.rescale else 1.0
        if self.bert_init:
            normal = initializers.normal(0.02)
            attention_inits = (normal, scaled(normal, out_scale), initializers.zeros)
            up = dict(kernel_init=normal, bias_init=initializers.zeros)
            down = dict(kernel_init=scaled(normal, out_scale), bias_init=initializers.zeros)
        else:
            xavier = scaled_xavier_uniform(1 / math.sqrt(2))
            attention_inits = (xavier, scaled_xavier_uniform(out_scale), None)
            up = {}
            down = dict(kernel_init=scaled(Linear.kernel_init, out_scale))

        def attention(name):
            return MultiHeadAttention(
                self.features, self.heads, self.attention_dropout, *attention_inits,
                name=name, **types,
            )  # fmt: skip

        def norm(name):
            return LayerNorm(self.epsilon, name=name, **types)

        if self.cross:
            encoder_attn = attention("encoder_attn")
            if only_memory:
                return encoder_attn.keys_and_values(memory)

        masks = {} if rng is None else self._masks(rng, x, memory)

        def drop(y, site, rate=self.dropout):
            return keep_where(y, masks.get(site), rate)

        self_attn = attention("self_attn")
        if cache is None:
            y = self_attn(x, None, bias, mask, masks.get("self_weights"))
        else:
            new = self_attn.keys_and_values(x)
            cache = tuple(
                lax.dynamic_update_slice(old, part.astype(old.dtype), (0, position, 0, 0))
                for old, part in zip(cache, new)
            )
            mask = causal_mask(x.shape[1], cache[0].shape[1], position)
            y = self_attn.read(x, *cache, bias, mask)
        x = norm("self_attn_layer_norm")(x + drop(y, "self"))

        if self.cross:
            if isinstance(memory, tuple):
                # Rows of one sentence are further queries into its one memory.
                rows = memory[0].shape[0]
                grouped = x.reshape(rows, -1, self.features)
                y = encoder_attn.read(grouped, *memory, None, memory_mask)
                y = y.reshape(x.shape)
            else:
                y = encoder_attn(x, memory, None, memory_mask, masks.get("cross_weights"))
            x = norm("encoder_attn_layer_norm")(x + drop(y, "cross"))

        y = Linear(self.hidden, name="fc1", **up, **types)(x)
        y = drop(ACTIVATIONS[self.activation](y), "hidden", self.activation_dropout)
        y = Linear(self.features, name="fc2", **down, **types)(y)
        x = norm("final_layer_norm")(x + drop(y, "output"))
        return x if cache is None else (x, cache)
