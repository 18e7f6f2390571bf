"""Dirichlet distributions fitted to several predictions by moments, and their uncertainty.

For Dir(alpha) with alpha_0 = sum alpha: E p_k = alpha_k / alpha_0 = mu_k and
Var p_k = mu_k (1 - mu_k) / (alpha_0 + 1). Estimators of alpha_0 as in T. Minka, "Estimating a
Dirichlet distribution" (2000), and by the covariance's trace; measures as in A. Malinin, M. Gales,
"Predictive Uncertainty Estimation via Prior Networks", arXiv 1802.10501.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln

ESTIMATORS = ("trace", "minka", "geo", "first")
MEASURES = ("max_p", "ent", "expected_ent", "mi", "epkl", "d_ent")
# Measures as scores (larger = more suspicious) where the sign of the measure is another.
SCORES = ("max_p", "ent", "mi", "epkl", "d_ent")
EPSILON = 1e-8
ALPHA0_RANGE = (1e-6, 1e8)
# From here on the asymptotic series below are exact to double precision's 1e-12.
_LARGE = 16.0
_SMALLEST = 1e-30


class Moments(NamedTuple):
    """Mean and population variance over the heads, each [..., K]."""

    mean: jax.Array
    variance: jax.Array


class Dirichlet(NamedTuple):
    """Concentration alpha [..., K] with its total alpha0 [...]."""

    alpha: jax.Array
    alpha0: jax.Array


def moments(probs: jax.Array, *, from_logits: bool = False) -> Moments:
    """Moments over the heads of probs [..., M, K] (or logits, with `from_logits`).

    The variance is the mean squared deviation: E[p^2] - mu^2 cancels when heads agree.

    Raises ValueError, outside `jit`, for rows that do not sum to 1 within 1e-3; and for one head.
    """
    probs = jnp.asarray(probs)
    probs = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
    if probs.ndim < 2 or probs.shape[-2] < 2:
        heads = probs.shape[-2] if probs.ndim > 1 else 1
        raise ValueError(f"moment matching needs at least 2 heads, got {heads}")
    if from_logits:
        probs = jax.nn.softmax(probs)
    elif not isinstance(probs, jax.core.Tracer):
        worst = np.abs(np.asarray(probs.sum(-1)) - 1).max(initial=0)
        if not worst <= 1e-3:
            raise ValueError(
                f"probabilities must sum to 1, got a sum off by {worst:.3g}; pass logits with "
                "from_logits=True"
            )
    mean = probs.mean(-2)
    return Moments(mean, jnp.square(probs - mean[..., None, :]).mean(-2))


def moment_match(
    probs: jax.Array,
    estimator: str = "trace",
    *,
    from_logits: bool = False,
    eps: float = EPSILON,
    alpha0_range: tuple[float, float] = ALPHA0_RANGE,
) -> Dirichlet:
    """The Dirichlet distribution that probs [..., M, K] are samples of, alpha = mu alpha0.

    - `trace`: alpha0 = (1 - sum mu^2) / max(sum v, eps) - 1;
    - `minka`: log alpha0 = mean over the first K - 1 classes of
      log max(mu (1 - mu) / max(v, eps) - 1, eps);
    - `geo`: the same over all K classes;
    - `first`: from the most probable class alone.

    `alpha0` is clipped to `alpha0_range`; identical heads give a large finite value.
    """
    return match_moments(moments(probs, from_logits=from_logits), estimator, eps, alpha0_range)


def match_moments(
    found: Moments,
    estimator: str = "trace",
    eps: float = EPSILON,
    alpha0_range: tuple[float, float] = ALPHA0_RANGE,
) -> Dirichlet:
    """`moment_match` from moments."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    mu, v = found
    if estimator == "trace":
        alpha0 = (1 - jnp.square(mu).sum(-1)) / jnp.maximum(v.sum(-1), eps) - 1
    else:
        ratio = mu * (1 - mu) / jnp.maximum(v, eps) - 1
        if estimator == "first":
            top = mu.argmax(-1)[..., None]
            alpha0 = jnp.take_along_axis(ratio, top, axis=-1)[..., 0]
        else:
            logs = jnp.log(jnp.maximum(ratio, eps))
            alpha0 = jnp.exp((logs if estimator == "geo" else logs[..., :-1]).mean(-1))
    alpha0 = jnp.clip(alpha0, *alpha0_range)
    return Dirichlet(mu * alpha0[..., None], alpha0)


def measures(alpha: jax.Array) -> dict[str, jax.Array]:
    """All six measures of Dir(alpha), alpha [..., K] -> each [...].

    `max_p` = max pbar; `ent` = H(pbar); `expected_ent` = E H(p); `mi` = ent - expected_ent;
    `epkl` = (K - 1) / alpha0; `d_ent`, the differential entropy. Large concentrations are computed
    from asymptotic series, in which the leading terms have been cancelled by hand, so that `mi`
    tends to (K - 1) / (2 alpha0) in float32 as well.
    """
    alpha = jnp.asarray(alpha)
    alpha = alpha.astype(jnp.promote_types(alpha.dtype, jnp.float32))
    classes = alpha.shape[-1]
    alpha = jnp.maximum(alpha, _SMALLEST)
    alpha0 = alpha.sum(-1)
    pbar = alpha / alpha0[..., None]
    ent = -(pbar * jnp.log(pbar)).sum(-1)
    mi = (pbar * _digamma_gap(alpha)).sum(-1) - _digamma_gap(alpha0)
    d_ent = _entropy_part(alpha).sum(-1) - _entropy_part(alpha0)
    return {
        "max_p": pbar.max(-1),
        "ent": ent,
        "expected_ent": -(pbar * (digamma(alpha + 1) - digamma(alpha0 + 1)[..., None])).sum(-1),
        "mi": mi,
        "epkl": (classes - 1) / alpha0,
        "d_ent": d_ent - (classes - 1) * digamma(alpha0),
    }


def scores(measured: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Measures as detection scores, larger = more suspicious: `max_p` becomes 1 - max_p."""
    chosen = {name: measured[name] for name in SCORES}
    return {**chosen, "max_p": 1 - measured["max_p"]}


def _digamma_gap(z: jax.Array) -> jax.Array:
    """psi(z + 1) - ln z, about 1 / (2 z) for large z."""
    large = jnp.maximum(z, _LARGE)
    w = 1 / (large * large)
    series = 0.5 / large - w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w / 132))))
    small = jnp.minimum(z, _LARGE)
    return jnp.where(z > _LARGE, series, digamma(small + 1) - jnp.log(small))


def _entropy_part(z: jax.Array) -> jax.Array:
    """ln Gamma(z) - (z - 1) psi(z) + z, about ln(z) / 2 for large z."""
    large = jnp.maximum(z, _LARGE)
    w = 1 / (large * large)
    stirling = (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w / 1188)))) / large
    digamma_rest = w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w / 132))))
    # ln Gamma = (z - 1/2) ln z - z + ln(2 pi)/2 + stirling; psi = ln z - 1/(2z) - digamma_rest.
    half_log = 0.5 * (jnp.log(large) + np.log(2 * np.pi) + 1)
    series = half_log - 0.5 / large + stirling + (large - 1) * digamma_rest
    small = jnp.minimum(z, _LARGE)
    exact = gammaln(small) - (small - 1) * digamma(small) + small
    return jnp.where(z > _LARGE, series, exact)
