"""Layers of a superformer whose widths and head counts are arrays: the rest is masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.layers.attention import attend, merge_heads, split_heads


def masked_norm(x: jax.Array, layer: Any, mask: jax.Array, count: Any, epsilon: float) -> jax.Array:
    """LayerNorm over the `count` masked channels only, x [..., D] zero at the others."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = (wide - wide.sum(-1, keepdims=True) / count) * mask
    var = jnp.square(centered).sum(-1, keepdims=True) / count
    y = centered * lax.rsqrt(var + epsilon) * layer["scale"] + layer["bias"] * mask
    return y.astype(x.dtype)


def affine(x: jax.Array, layer: Any) -> jax.Array:
    """x [..., I] @ kernel [I, O] + bias."""
    return x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)


def active_rows(size: int, count: Any, right: Any) -> jax.Array:
    """Which of `size` hidden rows are used: the first `count`, or the last; bool [size]."""
    places = jnp.arange(size)
    start = jnp.where(right, size - count, 0)
    return (places >= start) & (places < start + count)


class HeadLayout(NamedTuple):
    """Attention channels laid out as [heads, widest head] for whichever head count is chosen.

    Attributes:
      counts: the head counts to choose from. most: largest attention width. op: the choice, [].
      heads: chosen count, []. source: number of the channel at each place, [P]. valid: whether a
        place has one, bool [P].
    """

    counts: tuple[int, ...]
    most: int
    op: Any
    heads: Any
    source: Any
    valid: Any

    def pick(self, layer: Any, first: Any, x: jax.Array) -> jax.Array:
        """x times the columns from `first` on, in this layout: [..., I] -> [..., P]."""
        index = jnp.clip(first + self.source, 0, layer["kernel"].shape[-1] - 1)
        y = x @ jnp.take(layer["kernel"], index, axis=-1).astype(x.dtype)
        y = y + jnp.take(layer["bias"], index).astype(x.dtype)
        return y * self.valid.astype(x.dtype)

    def back(self, layer: Any, first: Any, x: jax.Array) -> jax.Array:
        """The layout times the rows from `first` on: [..., P] -> [..., O]."""
        index = jnp.clip(first + self.source, 0, layer["kernel"].shape[-2] - 1)
        kernel = jnp.take(layer["kernel"], index, axis=-2) * self.valid[:, None]
        return x @ kernel.astype(x.dtype) + layer["bias"].astype(x.dtype)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention of queries that are scaled already, [B, T, P]; one branch a head count."""
        widest = _widest(self.counts, self.most)
        length = self.source.shape[0]

        def of(number):
            heads = self.counts[number]
            size = heads * int(widest[number])

            def run(q, k, v):
                parts = (split_heads(a[..., :size], heads) for a in (q, k, v))
                out = merge_heads(attend(*parts, scale=1.0))
                return jnp.pad(out, ((0, 0), (0, 0), (0, length - size)))

            return run

        return lax.switch(self.op, [of(i) for i in range(len(self.counts))], q, k, v)


def _widest(counts: Sequence[int], most: int) -> np.ndarray:
    return -(-most // np.array(counts))


def head_layout(counts: Sequence[int], most: int, op: Any, width: Any) -> HeadLayout:
    """The layout of `width` channels in `counts[op]` heads, none wider than `most` channels."""
    widest = _widest(counts, most)
    op = jnp.clip(op, 0, len(counts) - 1)
    heads, room = jnp.asarray(np.array(counts))[op], jnp.asarray(widest)[op]
    each = width // heads
    place = jnp.arange(int((np.array(counts) * widest).max()))
    head, inside = place // room, place % room
    valid = (inside < each) & (head < heads)
    source = jnp.minimum(head * each + inside, most - 1)
    return HeadLayout(tuple(counts), most, op, heads, source, valid)
