"""Change scores of a snapshot against a mix of its prediction and its window's normal pattern.

The trade-off between the two is the abstract's of arXiv 2212.08818; its form here is our
reconstruction (see `latent_evolution`). Axis names: t snapshots, w window, n nodes, r signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_HIGHEST = jax.lax.Precision.HIGHEST


class Distances(NamedTuple):
    """Cosine distances [...] of a snapshot to its prediction, the normal pattern, and their mix."""

    prediction: jax.Array
    normal: jax.Array
    mixed: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """x [..., d] over its 2-norm; zero stays zero."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """`1 - |a.b| / (|a| |b|)` [...] over the last axis; 1 if one of them is zero, 0 if both are."""
    cosine = jnp.abs(jnp.einsum("...d,...d->...", unit(a), unit(b), precision=_HIGHEST))
    both = ~(a.any(-1) | b.any(-1))
    # Rounding may carry the cosine past 1.
    return jnp.where(both, 0.0, jnp.maximum(1.0 - cosine, 0.0))


def mixed_distances(snapshot, prediction, normal, alpha) -> Distances:
    """Distances of vectors [..., d]; the mix is `alpha unit(prediction) + (1-alpha) unit(normal)`.

    alpha 1 asks the prediction only, 0 the normal pattern only.
    """
    mix = alpha * unit(prediction) + (1.0 - alpha) * unit(normal)
    return Distances(
        cosine_distance(snapshot, prediction),
        cosine_distance(snapshot, normal),
        cosine_distance(snapshot, mix),
    )


def frobenius_distances(normal, snapshot, prediction, alpha) -> Distances:
    """Distances [] on adjacency; all [n, n], `normal` being the mean of the window."""
    return mixed_distances(snapshot.reshape(-1), prediction.reshape(-1), normal.reshape(-1), alpha)


def laplacian(adjacency):
    """`L = D - S` [..., n, n] of `S = (A + A^T) / 2`, D its degrees; self loops cancel."""
    symmetric = 0.5 * (adjacency + jnp.swapaxes(adjacency, -1, -2))
    eye = jnp.eye(symmetric.shape[-1], dtype=symmetric.dtype)
    return symmetric.sum(-1)[..., None] * eye - symmetric


def signature(adjacency, size: int | None = None) -> jax.Array:
    """The largest `size` (None: all) Laplacian singular values [..., r], descending, unit norm."""
    values = jnp.abs(jnp.linalg.eigvalsh(laplacian(adjacency)))
    values = -jnp.sort(-values, axis=-1)
    return unit(values if size is None else values[..., :size])


def principal_direction(context: jax.Array) -> jax.Array:
    """First left singular vector [..., r] of the columns `context` [..., w, r], of positive sum."""
    gram = jnp.einsum("...wr,...vr->...wv", context, context, precision=_HIGHEST)
    _, vectors = jnp.linalg.eigh(gram)
    first = unit(jnp.einsum("...w,...wr->...r", vectors[..., -1], context, precision=_HIGHEST))
    return first * jnp.where(first.sum(-1, keepdims=True) < 0, -1.0, 1.0).astype(first.dtype)


def spectral_distances(context, snapshot, prediction, alpha) -> Distances:
    """Distances [...] on signatures; the normal pattern is `principal_direction` of the context.

    Args: context [..., w, r], snapshot [..., r] and prediction [..., r], all of unit norm.
    """
    return mixed_distances(snapshot, prediction, principal_direction(context), alpha)


def rises(distances, window: int) -> np.ndarray:
    """Z* [t]: the positive part of the first difference, zero up to and including index window."""
    z = np.asarray(distances)
    rise = np.zeros_like(z)
    rise[1:] = np.maximum(z[1:] - z[:-1], 0.0)
    rise[: window + 1] = 0.0
    return rise


def top_points(scores, count: int) -> np.ndarray:
    """Indices [count] of the largest scores, largest first; ties: the lower index first."""
    scores = np.asarray(scores)
    if not 1 <= count <= len(scores):
        raise ValueError(
            f"n = {count} points of {len(scores)} scores: n must be in 1..{len(scores)}"
        )
    return np.argsort(-scores, kind="stable")[:count]


def causal_threshold(scores, window: int, *, deviations: float = 3.0, least: int = 5) -> np.ndarray:
    """Thresholds [t]: mean + 3 standard deviations of the scores before t, infinite at first.

    Args:
      scores: Z* [t]. window: scores up to and including this index do not count.
      least: past scores that must be there before a point can be flagged.
    """
    scores = np.asarray(scores, np.float64)
    thresholds = np.full(scores.shape, np.inf)
    for t in range(window + 1 + max(least, 1), len(scores)):
        past = scores[window + 1 : t]
        thresholds[t] = past.mean() + deviations * past.std()
    return thresholds


def alarms(scores, thresholds) -> np.ndarray:
    """Indices of the scores above their thresholds, ascending."""
    return np.flatnonzero(np.asarray(scores) > np.asarray(thresholds))


class Hits(NamedTuple):
    """How a ranking meets the true events.

    Attributes:
      hits: share of the events among the top n (LAD's `compute_accuracy`).
      precision: share of the top n that are events.
      ranks: event -> its place in the ranking, 1 the highest.
      top: [n] the top n, largest first.
    """

    hits: float
    precision: float
    ranks: dict[int, int]
    top: np.ndarray


def hits_at(scores, events: Sequence[int], count: int | None = None) -> Hits:
    """Hits@n of scores [t] against event indices; n is the number of events unless given.

    Raises ValueError: no events, or an event outside 0..t-1.
    """
    scores, chosen = np.asarray(scores), sorted({int(e) for e in events})
    if not chosen:
        raise ValueError("Hits@n needs at least one event")
    outside = [e for e in chosen if not 0 <= e < len(scores)]
    if outside:
        raise ValueError(f"event index {outside[0]} is outside the {len(scores)} snapshots")
    top = top_points(scores, len(chosen) if count is None else count)
    found = len(set(top.tolist()) & set(chosen))
    order = np.argsort(-scores, kind="stable")
    place = np.empty(len(order), int)
    place[order] = np.arange(1, len(order) + 1)
    ranks = {e: int(place[e]) for e in chosen}
    return Hits(found / len(chosen), found / len(top), ranks, top)
