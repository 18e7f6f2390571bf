"""What motion forecasting minimizes: likelihood of the future, and completion of hidden nodes.

VectorNet (arXiv 2005.04259), section 3.4: `L = L_traj + alpha L_node`, alpha = 1. The paper leaves
the scale of the Gaussian, the space and the Huber threshold open; the defaults are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

SPACES = ("offset", "position")
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Losses(NamedTuple):
    """`total = trajectory + alpha * node`, scalars."""

    total: jax.Array
    trajectory: jax.Array
    node: jax.Array


def gaussian_nll(
    predicted: jax.Array,
    truth: jax.Array,
    valid: jax.Array,
    log_scale: jax.Array | None = None,
) -> jax.Array:
    """mean_b sum_t valid_t sum_c [0.5 ((truth - predicted) / sigma)^2 + log sigma + 0.5 log 2 pi].

    Args:
      predicted, truth: [B, T, c]; truth at steps that are not valid may hold anything.
      valid: [B, T], 0 or 1 (or bool).
      log_scale: [B, T, c], log sigma; None is sigma = 1.
    """
    valid = (valid > 0)[..., None]
    error = jnp.where(valid, truth - predicted, 0)
    if log_scale is None:
        terms = 0.5 * jnp.square(error) + _HALF_LOG_TWO_PI
    else:
        terms = 0.5 * jnp.square(error * jnp.exp(-log_scale)) + log_scale + _HALF_LOG_TWO_PI
    return jnp.where(valid, terms, 0).sum((1, 2)).mean()


def positions_of(offsets: jax.Array) -> jax.Array:
    """Running sum over steps, offsets [B, T, c] -> positions [B, T, c] from the origin."""
    return jnp.cumsum(offsets, axis=-2)


def reachable(valid: jax.Array) -> jax.Array:
    """Steps [B, T] whose position follows from offsets: all up to them are valid."""
    return jnp.cumprod((valid > 0).astype(jnp.int32), axis=-1) > 0


def trajectory_loss(
    offsets: jax.Array,
    future_offsets: jax.Array,
    future_valid: jax.Array,
    log_scale: jax.Array | None = None,
    space: str = "offset",
) -> jax.Array:
    """`gaussian_nll` of offsets, or of their running sums (`space="position"`).

    In position space a step counts while all offsets up to it are known.
    """
    if space not in SPACES:
        raise ValueError(f"space {space!r}; known: {', '.join(SPACES)}")
    if space == "offset":
        return gaussian_nll(offsets, future_offsets, future_valid, log_scale)
    truth = positions_of(jnp.where((future_valid > 0)[..., None], future_offsets, 0))
    return gaussian_nll(positions_of(offsets), truth, reachable(future_valid), log_scale)


def node_loss(
    predicted: jax.Array, target: jax.Array, node_mask: jax.Array, delta: float = 1.0
) -> jax.Array:
    """Huber loss summed over features, averaged over all hidden nodes of the batch, 0 if none.

    predicted, target [B, P, F]; node_mask [B, P]. The target is not detached: normalization alone
    keeps the features from collapsing (section 3.3 of the paper).
    """
    hidden = node_mask > 0
    error = jnp.abs(jnp.where(hidden[..., None], predicted - target, 0))
    terms = jnp.where(error <= delta, 0.5 * jnp.square(error), delta * (error - 0.5 * delta))
    return terms.sum() / jnp.maximum(hidden.sum(), 1)


def objective(
    outputs: Mapping[str, jax.Array],
    future_offsets: jax.Array,
    future_valid: jax.Array,
    node_mask: jax.Array | None = None,
    *,
    alpha: float = 1.0,
    space: str = "offset",
    delta: float = 1.0,
) -> Losses:
    """Both terms from `VectorNet.intermediates`; without `node_mask` the trajectory's alone."""
    trajectory = trajectory_loss(
        outputs["offsets"], future_offsets, future_valid, outputs.get("log_scale"), space
    )
    if node_mask is None:
        return Losses(trajectory, trajectory, jnp.zeros_like(trajectory))
    node = node_loss(outputs["node_pred"], outputs["polyline_norm"], node_mask, delta)
    return Losses(trajectory + alpha * node, trajectory, node)


def sample_node_mask(
    rng: jax.Array,
    present: jax.Array,
    target_index: jax.Array,
    rate: float = 0.15,
    exactly_one: bool = False,
) -> jax.Array:
    """Which polylines to hide, bool [B, P]: each present one with probability `rate`.

    Never the target; at least one a scene where there is a candidate; `exactly_one` hides one at
    random, as TNT-Trajectory-Prediction does. present bool [B, P], target_index [B].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate = {rate} must be in [0, 1]")
    candidates = present & (jnp.arange(present.shape[1]) != target_index[:, None])
    scores = jnp.where(candidates, jax.random.uniform(rng, present.shape), 2.0)
    # The smallest score is hidden whatever it is; the others are where they fall below the rate.
    first = jnp.arange(present.shape[1]) == jnp.argmin(scores, axis=1)[:, None]
    chosen = first if exactly_one else first | (scores < rate)
    return chosen & candidates


def smooth_l1_mean(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Smooth L1 (beta 1) averaged over all entries, as unofficial code trains node completion."""
    error = jnp.abs(predicted - target)
    return jnp.where(error < 1, 0.5 * jnp.square(error), error - 0.5).mean()


def mse_mean(offsets: jax.Array, future_offsets: jax.Array) -> jax.Array:
    """Squared error averaged over all entries, validity ignored, as in unofficial code."""
    return jnp.square(offsets - future_offsets).mean()
