"""Dirichlet prior networks: one forward pass predicts a distribution over class probabilities.

A. Malinin, M. Gales, "Predictive Uncertainty Estimation via Prior Networks", arXiv 1802.10501
(forward KL), and "Reverse KL-Divergence Training of Prior Networks", arXiv 1905.13472.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln

DIRECTIONS = ("forward", "reverse")
TARGET_CONCENTRATION = 100.0
# exp of larger logits says nothing more and overflows on the way to it.
_LARGEST_LOGIT = 15.0


def concentrations(logits: jax.Array) -> jax.Array:
    """alpha = exp(logits), [..., K] in float32 or wider."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.exp(jnp.clip(wide, -_LARGEST_LOGIT, _LARGEST_LOGIT))


def kl_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(Dir(p) || Dir(q)) of concentrations [..., K] -> [...]."""
    p0, q0 = p.sum(-1), q.sum(-1)
    logs = gammaln(p0) - gammaln(p).sum(-1) - gammaln(q0) + gammaln(q).sum(-1)
    return logs + ((p - q) * (digamma(p) - digamma(p0)[..., None])).sum(-1)


def prior_network_loss(
    logits: jax.Array,
    labels: jax.Array,
    noise_logits: jax.Array,
    *,
    direction: str = "reverse",
    target: float = TARGET_CONCENTRATION,
    noise_weight: float = 1.0,
) -> jax.Array:
    """Mean KL of natural rows to 1 + `target` at the true class, plus that of noise rows to Dir(1).

    Args:
      logits: [B, K]. labels: int [B]. noise_logits: [N, K], of data outside the distribution.
      direction: `forward` is KL(target || model), `reverse` KL(model || target).
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r}; known: {', '.join(DIRECTIONS)}")
    alpha, noise = concentrations(logits), concentrations(noise_logits)
    natural = 1.0 + target * jax.nn.one_hot(labels, logits.shape[-1], dtype=alpha.dtype)
    flat = jnp.ones_like(noise)
    if direction == "forward":
        inside, outside = kl_divergence(natural, alpha), kl_divergence(flat, noise)
    else:
        inside, outside = kl_divergence(alpha, natural), kl_divergence(noise, flat)
    return inside.mean() + noise_weight * outside.mean()
