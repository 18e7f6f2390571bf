"""Metrics of a detector: area under the ROC curve, average precision, FPR at 95 % TPR.

Ties count as in scikit-learn: average ranks for the area, whole groups of equal scores as one step
of precision and of the ROC curve.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Detection(NamedTuple):
    """`auroc`, `aupr` (average precision) and `fpr95`, the FPR where TPR first reaches 0.95."""

    auroc: float
    aupr: float
    fpr95: float


def detection_metrics(scores: Any, labels: Any) -> Detection:
    """Metrics of scores [N] (larger = more suspicious) for labels [N], 1 = adversarial.

    Raises ValueError for NaN scores, other shapes or labels, and when one class is absent.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be [N], got {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores hold {int(np.isnan(scores).sum())} NaN of {len(scores)}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (natural) or 1 (adversarial)")
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError(
            f"detection needs both classes, got {positives} adversarial and {negatives} natural"
        )
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], labels[order].astype(np.float64)
    # The last place of each group of equal scores: thresholds fall between groups only.
    # (Compared, not subtracted: infinite scores tie as well.)
    ends = np.r_[np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1]
    true = np.cumsum(hits)[ends]
    false = ends + 1 - true
    tpr, fpr = np.r_[0, true / positives], np.r_[0, false / negatives]
    auroc = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    aupr = float(np.sum(np.diff(tpr) * (true / (true + false))))
    return Detection(auroc, aupr, float(fpr[np.argmax(tpr >= 0.95)]))


PROTOCOLS = ("all", "successful")


def detect_adversarial(
    clean_scores: dict[str, Any],
    adversarial_scores: dict[str, Any],
    *,
    correct: Any,
    fooled: Any,
    protocol: str = "all",
) -> dict[str, Detection]:
    """Metrics of each score for telling attacked images from their clean counterparts.

    Args:
      clean_scores, adversarial_scores: name -> [N], image by image.
      correct: bool [N], the clean image was classified correctly. fooled: bool [N], the attacked
        one was not.
      protocol: `all` attacked images, or only the `successful` ones of correctly classified images.

    Raises ValueError when the protocol leaves no image.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    correct, fooled = np.asarray(correct, bool), np.asarray(fooled, bool)
    rows = np.ones(len(correct), bool) if protocol == "all" else correct & fooled
    labels = np.repeat([0, 1], rows.sum())
    return {
        name: detection_metrics(
            np.r_[np.asarray(clean_scores[name])[rows], np.asarray(adversarial_scores[name])[rows]],
            labels,
        )
        for name in clean_scores
    }
