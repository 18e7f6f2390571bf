"""Rules of the face-recognition track: masks, verification thresholds, success, score.

Y. Dong et al., "Artificial Intelligence Security Competition (AISC)", arXiv 2212.03412; minimal
perturbations by binary search as in X. Yang et al., arXiv 2007.04118. The report's own budgets and
score were not available: those here are this project's resolution, kept in `configs/rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GOALS = ("dodging", "impersonation")
MASKS = ("glasses", "forehead", "respirator")


def face_mask(kind: str, size: tuple[int, int] = (112, 112)) -> np.ndarray:
    """Float32 mask [H, W, 1] of 0 and 1 on an aligned face, at most 10 % of it.

    `glasses` (a frame around the eyes), `forehead` (a sticker), `respirator` (over mouth and chin).
    """
    height, width = size
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width)[None] + 0.5) / width
    if kind == "glasses":
        # Aligned eyes lie at 34 % and 66 % of the width, 46 % of the height.
        lens = lambda cx: (np.abs(x - cx) < 0.145) & (np.abs(y - 0.46) < 0.09)  # noqa: E731
        hole = lambda cx: (np.abs(x - cx) < 0.095) & (np.abs(y - 0.46) < 0.042)  # noqa: E731
        bridge = (np.abs(x - 0.5) < 0.03) & (np.abs(y - 0.44) < 0.02)
        mask = (lens(0.34) & ~hole(0.34)) | (lens(0.66) & ~hole(0.66)) | bridge
    elif kind == "forehead":
        mask = (np.abs(x - 0.5) < 0.25) & (np.abs(y - 0.17) < 0.095)
    elif kind == "respirator":
        mask = (np.abs(x - 0.5) < 0.25) & (y > 0.74) & (y < 0.935)
    else:
        raise ValueError(f"mask {kind!r}; known: {', '.join(MASKS)}")
    return mask.astype(np.float32)[..., None]


class Verification(NamedTuple):
    """`accuracy` by k-fold cross-validated thresholds; `threshold`, the best one over all pairs."""

    accuracy: float
    threshold: float


def verification(cosines: Any, same: Any, folds: int = 10) -> Verification:
    """LFW's protocol: each fold is judged with the threshold that is best on the others.

    Args:
      cosines: [N] of pairs of embeddings. same: bool [N], one person. folds: k.
    """
    cosines, same = np.asarray(cosines, np.float64), np.asarray(same, bool)
    if cosines.shape != same.shape or len(cosines) < 2 * folds:
        raise ValueError(f"verification needs at least {2 * folds} pairs, got {cosines.shape}")
    rows = np.arange(len(cosines)) % folds
    hits = []
    for fold in range(folds):
        threshold = best_threshold(cosines[rows != fold], same[rows != fold])
        hits.append(((cosines[rows == fold] > threshold) == same[rows == fold]).mean())
    return Verification(float(np.mean(hits)), best_threshold(cosines, same))


def best_threshold(cosines: np.ndarray, same: np.ndarray) -> float:
    """The threshold of the highest accuracy of `cosine > threshold`."""
    order = np.argsort(cosines)
    ranked, truth = cosines[order], same[order]
    # Below the threshold are the first i pairs: right where these are different persons.
    right = np.r_[0, np.cumsum(~truth)] + (truth.sum() - np.r_[0, np.cumsum(truth)])
    best = int(right.argmax())
    edges = np.r_[ranked[0] - 1e-6, (ranked[1:] + ranked[:-1]) / 2, ranked[-1] + 1e-6]
    return float(edges[best])


def successes(cosines: Any, thresholds: Any, goal: str) -> np.ndarray:
    """Bool [victims, pairs]: cosines, alike, on the wanted side of thresholds [victims]."""
    if goal not in GOALS:
        raise ValueError(f"goal {goal!r}; known: {', '.join(GOALS)}")
    cosines, thresholds = np.asarray(cosines), np.asarray(thresholds)[:, None]
    return cosines > thresholds if goal == "impersonation" else cosines < thresholds


def face_score(success: Any, distances: Any, budget: float, distance_weight: float = 0.5) -> float:
    """100 * mean over victims and pairs of success * (1 - weight * distance / budget).

    Args:
      success: bool [victims, pairs]. distances: [pairs], in the unit of `budget`.
    """
    share = np.clip(np.asarray(distances, np.float64) / budget, 0, 1)
    return float(100 * (np.asarray(success) * (1 - distance_weight * share)).mean())


def minimal_perturbation(
    attack: Callable[[jax.Array], jax.Array],
    succeeded: Callable[[jax.Array], jax.Array],
    count: int,
    largest: float,
    rounds: int = 8,
) -> jax.Array:
    """Smallest eps [count] with which `attack(eps [count]) -> images` succeeds, by bisection.

    Infinity where even `largest` fails. Both functions may be jitted: eps is an argument.
    """
    low, high = jnp.zeros(count), jnp.full(count, largest)
    found = succeeded(attack(high))
    for _ in range(rounds):
        middle = (low + high) / 2
        hit = succeeded(attack(middle))
        low, high = jnp.where(hit, low, middle), jnp.where(hit, middle, high)
    return jnp.where(found, high, jnp.inf)
