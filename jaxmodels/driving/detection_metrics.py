"""How good detections are: average precision, heading, risk-ranked recall, clusters, latency.

On the host in float64. Average precision as the Waymo Open Dataset's metrics and KITTI's; recall by
risk after arXiv 2106.04146 (CPS-IL/risk-ranked-recall@21f8fd48).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.driving import box_overlap, collision_risk
from jaxmodels.driving.camera_projection import flat_boxes
from jaxmodels.driving.cluster_boxes import oriented_corners
from jaxmodels.driving.frame import Frame

LEVEL_1_RETURNS = 5  # more LiDAR returns than this are LEVEL_1, at least one LEVEL_2
RISK_THRESHOLD = 0.8  # intersection over ground truth at which an object counts as found
CONFIDENCES = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
IOU_THRESHOLDS = {"vehicle": 0.7, "pedestrian": 0.5, "cyclist": 0.5, "sign": 0.5}


class Matches(NamedTuple):
    """true_positive: bool [D]. truth: int64 [D], its ground truth, -1. order: descending score."""

    true_positive: np.ndarray
    truth: np.ndarray
    order: np.ndarray


def match_detections(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    frames: np.ndarray,
    truth_boxes: np.ndarray,
    truth_classes: np.ndarray,
    truth_frames: np.ndarray,
    *,
    threshold: float | Sequence[float] = 0.5,
    keep: np.ndarray | None = None,
) -> Matches:
    """Greedy matching class by class and frame by frame, in descending score (stable on ties).

    A detection takes the ground truth it overlaps most; it is a true positive if their IoU is at
    least `threshold` and that one is still free. There is no second choice.

    Args:
      boxes: [D, 4]. scores, classes, frames: [D]. truth_*: [G, 4], [G], [G].
      threshold: one IoU, or one a class.
      keep: bool [D], detections that count (after suppression).
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    truth_boxes = np.asarray(truth_boxes, np.float64).reshape(-1, 4)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    hit, partner = np.zeros(len(boxes), bool), np.full(len(boxes), -1, np.int64)
    used = np.zeros(len(truth_boxes), bool)
    groups: dict[tuple[int, int], list[int]] = {}
    for g, key in enumerate(zip(np.asarray(truth_frames), np.asarray(truth_classes))):
        groups.setdefault((int(key[0]), int(key[1])), []).append(g)
    for d in order:
        if keep is not None and not keep[d]:
            continue
        own = groups.get((int(frames[d]), int(classes[d])))
        if not own:
            continue
        overlap = box_overlap.iou(boxes[d : d + 1], truth_boxes[own])[0]
        best = int(overlap.argmax())
        least = threshold if np.isscalar(threshold) else threshold[int(classes[d])]
        if overlap[best] >= least and not used[own[best]]:
            used[own[best]] = True
            hit[d], partner[d] = True, own[best]
    return Matches(hit, partner, order)


class AveragePrecision(NamedTuple):
    """area: under the max-interpolated curve (Waymo). points_11, points_40: KITTI's."""

    area: float
    points_11: float
    points_40: float


def average_precision(
    true_positive: np.ndarray, scores: np.ndarray, total: int, weights: np.ndarray | None = None
) -> AveragePrecision:
    """Average precision of the detections of one class; all 0 without ground truth.

    Args:
      true_positive, scores: [D]. total: number of ground truths.
      weights: [D] in 0..1, credit of a true positive (heading accuracy for APH); None: 1.
    """
    if not total or not len(scores):
        return AveragePrecision(0.0, 0.0, 0.0)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    hits = np.asarray(true_positive)[order].astype(np.float64)
    credit = hits if weights is None else hits * np.asarray(weights)[order]
    found = np.cumsum(credit)
    recall = found / total
    precision = found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]

    def at(points):
        place = np.searchsorted(recall, points - 1e-12)
        return np.where(place < len(best), best[np.minimum(place, len(best) - 1)], 0)

    area = float((np.diff(recall, prepend=0.0) * best).sum())
    eleven, forty = np.linspace(0, 1, 11), np.arange(1, 41) / 40
    return AveragePrecision(area, float(at(eleven).mean()), float(at(forty).mean()))


def class_average_precisions(
    matches: Matches,
    scores: np.ndarray,
    classes: np.ndarray,
    truth_classes: np.ndarray,
    num_classes: int,
    keep: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """[num_classes, 3]: area, 11-point and 40-point average precision of every class."""
    keep = np.ones(len(scores), bool) if keep is None else np.asarray(keep)
    rows = []
    for c in range(num_classes):
        own = keep & (np.asarray(classes) == c)
        total = int((np.asarray(truth_classes) == c).sum())
        mine = None if weights is None else np.asarray(weights)[own]
        rows.append(
            average_precision(matches.true_positive[own], np.asarray(scores)[own], total, mine)
        )
    return np.asarray(rows)


def heading_accuracy(yaw: np.ndarray, truth_yaw: np.ndarray) -> np.ndarray:
    """`1 - |wrapped difference| / pi`, the weight of a true positive in APH."""
    apart = np.abs((np.asarray(yaw) - np.asarray(truth_yaw) + np.pi) % (2 * np.pi) - np.pi)
    return 1 - apart / np.pi


def difficulty(returns: np.ndarray) -> np.ndarray:
    """1 (more than five LiDAR returns), 2 (one to five) or 0 (none: not counted); [N]."""
    returns = np.asarray(returns)
    return np.where(returns > LEVEL_1_RETURNS, 1, np.where(returns > 0, 2, 0))


def recall_by_rank(
    boxes: np.ndarray,
    scores: np.ndarray,
    frames: np.ndarray,
    truth_boxes: np.ndarray,
    truth_ranks: np.ndarray,
    truth_frames: np.ndarray,
    *,
    confidences: Sequence[float] = CONFIDENCES,
    threshold: float = RISK_THRESHOLD,
) -> np.ndarray:
    """Share of objects found, [confidences, 3] for ranks 0, 1, 2; NaN where there are none.

    Class-agnostic: an object is found when the largest intersection over its own area among the
    frame's detections of at least that confidence reaches `threshold`. `truth_ranks` are those of
    `label_ranks`; objects of rank -1 count nowhere.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    truth_boxes = np.asarray(truth_boxes, np.float64).reshape(-1, 4)
    scores, frames = np.asarray(scores), np.asarray(frames)
    ranks, truth_frames = np.asarray(truth_ranks), np.asarray(truth_frames)
    if len(boxes):
        cover = box_overlap.over_second(boxes, truth_boxes)
        cover = np.where(frames[:, None] == truth_frames[None], cover, 0)
    table = np.full((len(confidences), 3), np.nan)
    for i, least in enumerate(confidences):
        found = np.zeros(len(truth_boxes), bool)
        sure = scores >= least
        if len(boxes) and sure.any() and len(truth_boxes):
            found = cover[sure].max(0) >= threshold
        for rank in range(3):
            if (ranks == rank).any():
                table[i, rank] = found[ranks == rank].mean()
    return table


def label_ranks(frame: Frame, *, official: bool = False, least_iou: float = 0.5) -> np.ndarray:
    """Rank of each of a frame's 2-D labels, int64 [M], -1 for those without a 3-D label.

    A 2-D label is that of the 3-D one with its id; cameras that are labeled on their own (Waymo's)
    have none: there it is the 3-D label whose projected box overlaps it most, by an IoU of at
    least `least_iou` (`rrr.py`, which leaves the others out).

    Args:
      official: see `collision_risk.collision_ranks`.
    """
    three, two = frame.labels3d, frame.labels2d
    ranks = np.full(len(two.boxes), -1, np.int64)
    if not len(two.boxes) or not len(three.boxes):
        return ranks
    boxes, velocity, ego = (
        np.asarray(x, np.float64) for x in (three.boxes, three.velocity, frame.ego_velocity)
    )
    own = collision_risk.collision_ranks(
        boxes[:, :2], velocity, boxes[:, 3:5], boxes[:, 6], ego, official=official
    )
    corners = oriented_corners(boxes)
    mask = np.ones(corners.shape[:2], bool)
    flat = flat_boxes(corners, mask, frame.camera, max_truncation=1.0, partial=True)
    overlap = box_overlap.iou(np.asarray(two.boxes, np.float64), np.asarray(flat.boxes, np.float64))
    row_of = {int(i): row for row, i in enumerate(three.ids)}
    for m, label in enumerate(two.ids):
        row = row_of.get(int(label))
        if row is None and overlap[m].max() >= least_iou:
            row = int(overlap[m].argmax())
        if row is not None:
            ranks[m] = own[row]
    return ranks


# Clusters against the simulator's object ids


class ClusterQuality(NamedTuple):
    """Clusters of a frame against objects.

    Attributes:
      panoptic: panoptic quality at IoU 0.5. over: objects spread over more than one cluster.
      under: clusters that cover more than one object. whole: objects of which at least 80 % of the
        returns lie in one cluster. objects: how many there are.
    """

    panoptic: float
    over: int
    under: int
    whole: int
    objects: int


def cluster_quality(
    labels: np.ndarray,
    truth: np.ndarray,
    *,
    min_returns: int = 1,
    share: float = 0.1,
    whole: float = 0.8,
) -> ClusterQuality:
    """Compare label images of returns; 0 is no object in both.

    Args:
      labels, truth: integers of one shape, over pixels with a return.
      min_returns: objects with fewer are left out.
      share: part of an object (or cluster) from which it counts as covered by the other.
    """
    labels, truth = np.asarray(labels).reshape(-1), np.asarray(truth).reshape(-1)
    ids_l, at_l = np.unique(labels, return_inverse=True)
    ids_t, at_t = np.unique(truth, return_inverse=True)
    table = np.zeros((len(ids_l), len(ids_t)), np.int64)
    np.add.at(table, (at_l, at_t), 1)
    size_l, size_t = table.sum(1), table.sum(0)
    rows = ids_l > 0
    columns = (ids_t > 0) & (size_t >= min_returns)
    inner = table[np.ix_(rows, columns)]
    size_l, size_t = size_l[rows], size_t[columns]
    if not columns.any():
        return ClusterQuality(float(not rows.any()), 0, 0, 0, 0)
    if not rows.any():
        return ClusterQuality(0.0, 0, 0, 0, int(columns.sum()))
    union = size_l[:, None] + size_t[None] - inner
    overlap = inner / union
    matched = overlap > 0.5
    hits = int(matched.sum())
    misses = len(size_l) + len(size_t) - 2 * hits
    panoptic = float(overlap[matched].sum() / (hits + misses / 2)) if hits + misses else 0.0
    over = int(((inner > share * size_t[None]).sum(0) > 1).sum())
    under = int(((inner > share * size_l[:, None]).sum(1) > 1).sum())
    complete = int((inner.max(0) >= whole * size_t).sum())
    return ClusterQuality(panoptic, over, under, complete, len(size_t))


def mask_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean images; 1 when both are empty."""
    found, truth = np.asarray(found, bool), np.asarray(truth, bool)
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


# Latency


class Latency(NamedTuple):
    """Milliseconds: mean, median and 99th percentile."""

    mean: float
    p50: float
    p99: float


def latency(milliseconds: Sequence[float]) -> Latency:
    """Summary of latencies; NaN for none."""
    values = np.asarray(milliseconds, np.float64)
    if not len(values):
        return Latency(np.nan, np.nan, np.nan)
    return Latency(float(values.mean()), *map(float, np.percentile(values, (50, 99))))


def time_to_riskiest(finish_ms: Any, risk_order: Sequence[int]) -> float:
    """When the most dangerous object of a frame was known, milliseconds; inf if never."""
    finish = np.asarray(finish_ms, np.float64)
    if not len(risk_order):
        return 0.0
    first = finish[int(risk_order[0])]
    return float(first) if first >= 0 else float("inf")
