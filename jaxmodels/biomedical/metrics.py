"""Overlap, calibration, classification and detection metrics of challenges.

Definitions and pitfalls after "Metrics Reloaded", L. Maier-Hein et al., arXiv 2206.01653; surface
metrics are in `surface_distance`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

# What to report for what kind of task.
METRIC_GUIDE = {
    "segmentation": ("dice", "surface_dice"),
    "small structures": ("surface_dice", "detection_f1"),
    "imbalanced classification": ("balanced_accuracy", "average_precision"),
    "classification": ("balanced_accuracy", "auroc"),
    "calibration": ("brier", "expected_calibration_error"),
    "instances": ("panoptic_quality", "detection_f1"),
}


def _pair(reference, prediction) -> tuple[np.ndarray, np.ndarray]:
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    if reference.shape != prediction.shape:
        raise ValueError(
            f"masks differ in shape: {reference.shape} (reference) and {prediction.shape}"
        )
    return reference.astype(bool), prediction.astype(bool)


def dice(reference: np.ndarray, prediction: np.ndarray, both_empty: float = np.nan) -> float:
    """2 TP / (2 TP + FP + FN) of two masks; `both_empty` where neither has a voxel, 0 if one has.

    Raises ValueError for masks of different shapes.
    """
    reference, prediction = _pair(reference, prediction)
    total = int(reference.sum()) + int(prediction.sum())
    return 2 * int((reference & prediction).sum()) / total if total else both_empty


def iou(reference: np.ndarray, prediction: np.ndarray, both_empty: float = np.nan) -> float:
    """TP / (TP + FP + FN) of two masks; empty cases and errors as in `dice`."""
    reference, prediction = _pair(reference, prediction)
    union = int((reference | prediction).sum())
    return int((reference & prediction).sum()) / union if union else both_empty


def mean_over_cases(table: np.ndarray, warn: bool = True) -> tuple[np.ndarray, float]:
    """Means per class over cases, NaN left out, [classes], and the mean over classes.

    `table` is [cases, classes]. Warns with the number of cases left out.
    """
    table = np.asarray(table, float)
    missing = int(np.isnan(table).sum())
    if missing and warn:
        warnings.warn(
            f"{missing} of {table.size} values are of classes that neither mask has; left out",
            stacklevel=2,
        )
    counts = (~np.isnan(table)).sum(0)
    means = np.where(counts, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)
    return means, float(np.nanmean(means)) if np.isfinite(means).any() else float("nan")


# -- image level -----------------------------------------------------------------------------------


def _binary(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels).astype(int).reshape(-1), np.asarray(scores, float)
    scores = scores.reshape(-1)
    if labels.shape != scores.shape:
        raise ValueError(f"{labels.size} labels for {scores.size} scores")
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(f"both classes 0 and 1 must occur, the labels are {np.unique(labels)}")
    return labels, scores


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; ties count half. Raises ValueError with one class only."""
    from scipy.stats import rankdata

    labels, scores = _binary(labels, scores)
    positive = int(labels.sum())
    ranks = rankdata(scores)
    u = ranks[labels == 1].sum() - positive * (positive + 1) / 2
    return float(u / (positive * (labels.size - positive)))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Sum over thresholds of (recall step) x precision, ties taken together (no interpolation)."""
    labels, scores = _binary(labels, scores)
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(labels[order])
    last = np.flatnonzero(np.append(np.diff(ordered) != 0, True))
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int [classes (true), classes (predicted)]."""
    labels, predicted = np.asarray(labels).astype(int), np.asarray(predicted).astype(int)
    if labels.shape != predicted.shape:
        raise ValueError(f"{labels.shape} labels for {predicted.shape} predictions")
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels.reshape(-1), predicted.reshape(-1)), 1)
    return matrix


def classification_report(labels, predicted, classes: int) -> dict[str, float]:
    """`accuracy`, `balanced_accuracy`, macro `f1` and multiclass `mcc` (as scikit-learn).

    Balanced accuracy is over classes that occur in the labels; F1 of a class that occurs in
    neither is left out. Raises ValueError with one class only.
    """
    matrix = confusion_matrix(labels, predicted, classes)
    true, guessed, right = matrix.sum(1), matrix.sum(0), np.diag(matrix)
    if (true > 0).sum() < 2:
        raise ValueError(f"the labels are of one class only: {np.unique(labels)}")
    total = matrix.sum()
    seen = (true + guessed) > 0
    covariance = right.sum() * total - (true * guessed).sum()
    spread = np.sqrt(
        float(total**2 - (guessed.astype(float) ** 2).sum())
        * float(total**2 - (true.astype(float) ** 2).sum())
    )
    return {
        "accuracy": float(right.sum() / total),
        "balanced_accuracy": float((right[true > 0] / true[true > 0]).mean()),
        "f1": float((2 * right[seen] / (true + guessed)[seen]).mean()),
        "mcc": float(covariance / spread) if spread else 0.0,
    }


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared distance of probabilities [N, classes] to one-hot labels, summed over classes.

    Probabilities [N] are of class 1: then the mean of (p - y)^2.
    """
    labels, p = np.asarray(labels).astype(int), np.asarray(probabilities, float)
    if p.ndim == 1:
        return float(((p - labels) ** 2).mean())
    return float(((p - np.eye(p.shape[-1])[labels]) ** 2).sum(-1).mean())


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 15
) -> float:
    """Mean over equal-width bins of |accuracy - confidence|, weighted by their share.

    labels [...], probabilities [..., classes]; confidence is the largest probability.
    """
    p = np.asarray(probabilities, float).reshape(-1, np.shape(probabilities)[-1])
    labels = np.asarray(labels).reshape(-1)
    confidence, right = p.max(-1), p.argmax(-1) == labels
    # Bins are open below and closed above, as Guo et al. (arXiv 1706.04599) have them.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    gaps = np.bincount(index, right.astype(float) - confidence, bins)
    return float(np.abs(gaps).sum() / max(int(count.sum()), 1))


# -- instances -------------------------------------------------------------------------------------


def match_instances(
    reference: np.ndarray, prediction: np.ndarray, threshold: float = 0.5, greedy: bool = False
) -> tuple[list[tuple[int, int, float]], int, int]:
    """Pairs (reference id, predicted id, IoU) above the threshold, and the numbers of instances.

    Instance maps int [*S], 0 is background. By assignment of the largest total IoU, or `greedy`
    from the best pair down; above IoU 0.5 both are the same. Raises ValueError for other shapes.
    """
    from scipy.optimize import linear_sum_assignment

    reference, prediction = np.asarray(reference), np.asarray(prediction)
    if reference.shape != prediction.shape:
        raise ValueError(
            f"maps differ in shape: {reference.shape} (reference) and {prediction.shape}"
        )
    ids_r, r = np.unique(reference, return_inverse=True)
    ids_p, p = np.unique(prediction, return_inverse=True)
    overlap = np.zeros((ids_r.size, ids_p.size), np.int64)
    np.add.at(overlap, (r.reshape(-1), p.reshape(-1)), 1)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    rows, columns = np.flatnonzero(ids_r != 0), np.flatnonzero(ids_p != 0)
    scores = (overlap / np.maximum(union, 1))[np.ix_(rows, columns)]
    scores = np.where(scores > threshold, scores, 0)
    pairs = []
    if greedy:
        left = scores.copy()
        while left.size and left.max() > 0:
            i, j = np.unravel_index(int(left.argmax()), left.shape)
            pairs.append((i, j))
            left[i], left[:, j] = 0, 0
    else:
        pairs = list(zip(*linear_sum_assignment(scores, maximize=True)))
    found = [
        (int(ids_r[rows[i]]), int(ids_p[columns[j]]), float(scores[i, j]))
        for i, j in pairs
        if scores[i, j] > 0
    ]
    return found, rows.size, columns.size


def detection_scores(
    reference: np.ndarray, prediction: np.ndarray, threshold: float = 0.5, greedy: bool = False
) -> dict[str, float]:
    """`detection_f1`, `segmentation_quality` (mean IoU of matches) and `panoptic_quality`.

    NaN where neither map has an instance.
    """
    pairs, in_reference, in_prediction = match_instances(reference, prediction, threshold, greedy)
    total = in_reference + in_prediction
    if not total:
        return dict.fromkeys(
            ("detection_f1", "segmentation_quality", "panoptic_quality"), float("nan")
        )
    f1 = 2 * len(pairs) / total
    quality = float(np.mean([score for *_, score in pairs])) if pairs else 0.0
    return {
        "detection_f1": f1,
        "segmentation_quality": quality,
        "panoptic_quality": f1 * quality,
    }


# -- intervals -------------------------------------------------------------------------------------


def bootstrap_interval(
    values: np.ndarray,
    *,
    groups: Sequence | None = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high): percentile interval of a mean over cases; NaN values are left out.

    With `groups` (one a case) whole patients are drawn (cluster bootstrap).
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not np.isfinite(values).any():
        raise ValueError(f"an interval needs a vector with a finite value, got {values.shape}")
    kept = np.isfinite(values)
    values = values[kept]
    names = np.arange(len(values)) if groups is None else np.asarray(groups)[kept]
    _, cluster = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(cluster, values), np.bincount(cluster)
    draws = np.random.default_rng(seed).integers(0, len(sums), (samples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(values.mean()), float(low), float(high)


def paired_interval(
    before: Mapping[str, float], after: Mapping[str, float], **arguments
) -> tuple[float, float, float]:
    """Interval of the mean gain over the cases that both have. Raises ValueError without any."""
    cases = sorted(set(before) & set(after))
    if not cases:
        raise ValueError("the two results have no case in common")
    return bootstrap_interval(np.asarray([after[c] - before[c] for c in cases], float), **arguments)
