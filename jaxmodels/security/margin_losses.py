"""Angular-margin classification of unit embeddings: ArcFace, CosFace and their combination.

J. Deng et al., arXiv 1801.07698; H. Wang et al., "CosFace", arXiv 1801.09414. Rules after
deepinsight/insightface@7fadd42 (`recognition/arcface_torch/losses.py`), whose margins are applied
without gradient tracking: the gradient with respect to the cosine is that of
`s (softmax - onehot)`, straight through the margin.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

GRADIENTS = ("straight_through", "exact")


def cosine_logits(embeddings: jax.Array, weight: jax.Array) -> jax.Array:
    """Cosines in [-1, 1] of embeddings [B, D] with class centers weight [C, D] -> [B, C]."""
    return jnp.clip(unit(embeddings) @ unit(weight).T, -1.0, 1.0)


def unit(x: jax.Array) -> jax.Array:
    """x [..., D] divided by its length (lengths below 1e-12 count as that)."""
    return x / jnp.maximum(jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24)), 1e-12)


def check_margins(margins: tuple[float, ...]) -> None:
    """Refuse margins that the official code refuses, and what are not three of them."""
    if len(margins) != 3 or not (margins[2] > 0 or (margins[0] == 1 and margins[2] == 0)):
        raise ValueError(f"margins (m1, m2, m3) need m3 > 0, or m1 = 1 with m3 = 0; got {margins}")


def margin_logits(
    cosines: jax.Array,
    labels: jax.Array,
    *,
    scale: float = 64.0,
    margins: tuple[float, float, float] = (1.0, 0.5, 0.0),
    filter_above: float = 0.0,
    gradient: str = "straight_through",
) -> jax.Array:
    """Scaled logits [B, C] with a margin at each row's label; rows labeled -1 have none.

    Args:
      cosines: [B, C], already clipped to [-1, 1]. labels: int [B], -1 for a class not held here.
      margins: (m1, m2, m3). m1 = 1 and m3 = 0: cos(theta + m2), ArcFace. m3 > 0: cos - m3, CosFace,
        m1 and m2 ignored. Anything else is an error, as officially.
      filter_above: where positive, other classes' cosines above it count as 0 (and get no
        gradient).
      gradient: `straight_through`, the official one, or `exact`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient {gradient!r}; known: {', '.join(GRADIENTS)}")
    check_margins(margins)
    _, m2, m3 = margins
    target = labels[:, None] == jnp.arange(cosines.shape[-1])
    if filter_above > 0:
        cosines = jnp.where((cosines > filter_above) & ~target, 0.0, cosines)
    if m3 > 0:
        with_margin = cosines - m3
    else:
        # arccos has no derivative at +-1, and the rows that matter are not there.
        inside = jnp.clip(cosines, -1 + 1e-7, 1 - 1e-7) if gradient == "exact" else cosines
        with_margin = jnp.cos(jnp.arccos(inside) + m2)
    moved = jnp.where(target, with_margin, cosines)
    if gradient == "straight_through":
        moved = cosines + lax.stop_gradient(moved - cosines)
    return scale * moved


def margin_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the rows whose label is not -1; logits [B, C], labels [B] -> []."""
    held = labels >= 0
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return (nll * held).sum() / jnp.maximum(held.sum(), 1)
