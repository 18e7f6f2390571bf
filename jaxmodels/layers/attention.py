"""Attention and its key-value cache: the arithmetic, without projections.

Checkpoints name their projections in many ways (`q_proj`, `self.query`, `SelfAttention.q`, one
fused `qkv`), so every architecture declares its own and calls these functions in between.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.layers.dropout import dropout, keep_where


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[..., T, N * H]` -> `[..., T, N, H]`, heads outermost as in PyTorch's views.

    Raises ValueError when `heads` does not divide the width.
    """
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(f"width {x.shape[-1]} is not divisible by {heads} heads")
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """`[..., T, N, H]` -> `[..., T, N * H]`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def padding_mask(keep: jax.Array) -> jax.Array:
    """Keys that may be attended, `[B, S]` -> mask `[B, 1, 1, S]` for `attend`."""
    return keep.astype(bool)[:, None, None, :]


def causal_mask(queries: int, keys: int | None = None, offset: int | jax.Array = 0) -> jax.Array:
    """Lower-triangular mask `[1, 1, T, S]`; the first query stands at position `offset`."""
    keys = queries if keys is None else keys
    rows = jnp.arange(queries)[:, None] + offset
    return (jnp.arange(keys)[None, :] <= rows)[None, None]


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) over the allowed keys, `[B, N, T, S]`; arguments of `attend`."""
    return _weights("btnh,bsnh->bnts", query, key, bias, mask, scale)


def _weights(products, query, key, bias, mask, scale) -> jax.Array:
    """`attention_weights` of keys laid out as the einsum `products` says."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The queries are scaled, not the scores: S / H times fewer products.
    scores = jnp.einsum(products, query * scale if scale != 1 else query, key)
    scores = scores.astype(wide)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    return jax.nn.softmax(scores, axis=-1)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
    keep: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias, over allowed keys) v, the softmax in float32 or wider.

    Args:
      query: `[B, T, N, H]`.
      key, value: `[B, S, N, H]`.
      bias: added to the scores, broadcastable to `[B, N, T, S]`.
      mask: bool, true where a query may look, broadcastable to `[B, N, T, S]`. A query that may
        look nowhere gets the mean of all values (as with the dtype's minimum in PyTorch code),
        never NaN.
      scale: factor of the scores; None is H ** -0.5, T5 wants 1.
      dropout_rate, rng: dropout of the weights, off when `rng` is None.
      keep: bool `[B, N, T, S]`, which weights dropout keeps, instead of `rng` (`keep_masks`).
      implementation: None is this function's own einsum; "xla" or "cudnn" go through
        `jax.nn.dot_product_attention` (no dropout there).

    Returns: `[B, T, N, H]` in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    drops = (rng is not None or keep is not None) and dropout_rate > 0
    if implementation is not None:
        if drops:
            raise ValueError(f"attention {implementation!r} has no dropout of the weights")
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=scale, implementation=implementation
        )
    weights = attention_weights(query, key, bias=bias, mask=mask, scale=scale)
    if drops and keep is not None:
        weights = keep_where(weights, keep, dropout_rate)
    elif drops:
        weights = dropout(weights, dropout_rate, rng)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value)


def update_cache(
    module: nn.Module,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array | int,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    """Write new keys and values at `position` of the module's `cache`, and return all of it.

    Args:
      module: the attention module that calls; its collection `cache` gets the arrays `key` and
        `value`, `[B, length, N, H]` (zeros at first). Nothing else is kept there: the position is
        the caller's, so that rows can be reordered along axis -4 of every leaf, scanned layers
        included.
      key, value: `[B, T, N, H]`, for positions `position` to `position + T - 1`.

    Returns: keys and values `[B, length, N, H]`; positions not yet written are zeros, which
    `causal_mask(T, length, position)` hides.
    """
    shape = (key.shape[0], length, *key.shape[2:])
    keys = module.variable("cache", "key", jnp.zeros, shape, key.dtype)
    values = module.variable("cache", "value", jnp.zeros, shape, value.dtype)
    start = (0, position, 0, 0)
    keys.value = lax.dynamic_update_slice(keys.value, key, start)
    values.value = lax.dynamic_update_slice(values.value, value, start)
    return keys.value, values.value


def attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`attend` over keys `[B, N, H, S]` and values `[B, N, S, H]`, as `write_cache` keeps them.

    For one or a few queries a token these are plain matrix products; with `[B, S, N, H]` all of the
    cache is transposed for every token (on a CPU four times slower).

    Args and returns as in `attend`, without dropout.
    """
    weights = _weights("btnh,bnhs->bnts", query, key, bias, mask, scale)
    return jnp.einsum("bnts,bnsh->btnh", weights.astype(value.dtype), value)


def head_major(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[B, S, N, H]` -> `[B, N, H, S]`, `[B, N, S, H]`, for `attend_cached`."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def write_cache(
    module: nn.Module,
    key: jax.Array,
    value: jax.Array,
    position: jax.Array | int,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    """`update_cache` in the layout of `attend_cached`; rows are axis -4 of its leaves as well."""
    batch, _, heads, width = key.shape
    keys = module.variable("cache", "key", jnp.zeros, (batch, heads, width, length), key.dtype)
    values = module.variable(
        "cache", "value", jnp.zeros, (batch, heads, length, width), value.dtype
    )
    key, value = head_major(key, value)
    keys.value = lax.dynamic_update_slice(keys.value, key, (0, 0, 0, position))
    values.value = lax.dynamic_update_slice(values.value, value, (0, 0, position, 0))
    return keys.value, values.value


def reorder_cache(cache, rows: jax.Array):
    """Every leaf `[..., B, S, N, H]` of a cache with its rows (axis -4) taken by `rows` [B']."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=-4), cache)
