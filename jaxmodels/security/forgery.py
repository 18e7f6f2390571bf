"""Real or fake: metrics of detectors, video aggregation, and fixed frequency filters.

Metrics as in SCLBD/DeepfakeBench@8a4a7bf (`training/metrics`); the filters are the residual kernels
of the spatial rich model, J. Fridrich, J. Kodovsky, IEEE TIFS 2012.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.layers.conv2d import conv2d
from jaxmodels.security.detection import detection_metrics

PROBABILITY_FLOOR = 1e-7


def forgery_metrics(probabilities: Any, labels: Any) -> dict[str, float]:
    """`auc`, `eer`, `ap`, `accuracy` (at 0.5) and `log_loss` of fake probabilities [N], labels [N].

    The log-loss clips probabilities to [1e-7, 1 - 1e-7]; the equal error rate is read off the ROC
    curve by linear interpolation.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    found = detection_metrics(p, y)
    clipped = np.clip(p, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return {
        "auc": found.auroc,
        "eer": equal_error_rate(p, y),
        "ap": found.aupr,
        "accuracy": float(((p > 0.5) == y).mean()),
        "log_loss": float(-np.mean(y * np.log(clipped) + (1 - y) * np.log(1 - clipped))),
    }


def equal_error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """Where the false positive rate meets the false negative rate."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.asarray(labels)[order]
    ends = np.r_[np.flatnonzero(np.diff(ranked)), len(ranked) - 1]
    true = np.r_[0, np.cumsum(hits)[ends]]
    false = np.r_[0, ends + 1] - true
    fnr, fpr = 1 - true / true[-1], false / false[-1]
    after = int(np.argmax(fpr >= fnr))
    if after == 0:
        return float(fpr[0])
    gap0, gap1 = fnr[after - 1] - fpr[after - 1], fpr[after] - fnr[after]
    share = gap0 / (gap0 + gap1) if gap0 + gap1 else 0.0
    return float(fpr[after - 1] + share * (fpr[after] - fpr[after - 1]))


def video_scores(probabilities: Any, videos: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean fake probability of every video's frames and its label, in the order of video ids."""
    p, videos, labels = map(np.asarray, (probabilities, videos, labels))
    ids, inverse = np.unique(videos, return_inverse=True)
    counts = np.bincount(inverse)
    means = np.bincount(inverse, weights=p.astype(np.float64)) / counts
    share = np.bincount(inverse, weights=labels) / counts
    if not np.isin(share, (0, 1)).all():
        raise ValueError(
            f"frames of one video have both labels: {ids[~np.isin(share, (0, 1))][:5]}"
        )
    return means, share.astype(int)


_SRM = (
    (np.array([[0, 0, 0, 0, 0], [0, -1, 2, -1, 0], [0, 2, -4, 2, 0], [0, -1, 2, -1, 0],
               [0, 0, 0, 0, 0]]), 4.0),
    (np.array([[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2],
               [-1, 2, -2, 2, -1]]), 12.0),
    (np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, -2, 1, 0], [0, 0, 0, 0, 0],
               [0, 0, 0, 0, 0]]), 2.0),
)  # fmt: skip


def with_frequency_residuals(x: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] -> [B, H, W, 6]: three SRM residuals of the mean channel appended."""
    gray = x.mean(-1, keepdims=True)
    kernel = jnp.asarray(np.stack([k / q for k, q in _SRM], -1)[:, :, None], x.dtype)
    residuals = conv2d(gray, kernel, (1, 1), ((2, 2), (2, 2)))
    # Truncated as the rich model does, at some levels of a byte image.
    return jnp.concatenate([x, jnp.clip(8 * residuals, -1, 1)], -1)
