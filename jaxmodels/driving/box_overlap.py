"""Overlaps of boxes in images, seen from above and in space; greedy non-maximum suppression.

Functions of arrays follow their argument: NumPy in its own precision for evaluation on the host,
JAX (also under `jit` and `vmap`) on the device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


def area(boxes: Array) -> Array:
    """Areas [...] of boxes [..., 4] as x1 y1 x2 y2 (pixel edges); never negative."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return width.clip(0) * height.clip(0)


def intersection(a: Array, b: Array) -> Array:
    """Areas [N, M] common to boxes a [N, 4] and b [M, 4]."""
    xp = a.__array_namespace__()
    low = xp.maximum(a[:, None, :2], b[None, :, :2])
    high = xp.minimum(a[:, None, 2:], b[None, :, 2:])
    side = (high - low).clip(0)
    return side[..., 0] * side[..., 1]


def iou(a: Array, b: Array) -> Array:
    """Intersection over union [N, M] of boxes a [N, 4] and b [M, 4]; 0 between empty boxes."""
    common = intersection(a, b)
    return _share(common, area(a)[:, None] + area(b)[None] - common)


def over_second(a: Array, b: Array) -> Array:
    """Intersection over the area of the second box [N, M] ("IoG" when b is ground truth).

    Bansal et al., arXiv 2106.04146: a detection that covers more than the object is safe.
    """
    common = intersection(a, b)
    return _share(common, area(b)[None] + 0 * common)


def over_smaller(a: Array, b: Array) -> Array:
    """Intersection over the smaller of both areas [N, M]."""
    xp = a.__array_namespace__()
    return _share(intersection(a, b), xp.minimum(area(a)[:, None], area(b)[None]))


def _share(part: Array, whole: Array) -> Array:
    xp = part.__array_namespace__()
    positive = whole > 0
    return xp.where(positive, part / xp.where(positive, whole, 1), 0)


# Rotated boxes [x y z length width height yaw], yaw counterclockwise from x


def footprints(boxes: Array) -> Array:
    """Corners [N, 4, 2] seen from above, counterclockwise, of boxes [N, 7]."""
    xp = boxes.__array_namespace__()
    half_l, half_w = boxes[:, 3] / 2, boxes[:, 4] / 2
    along = xp.stack([half_l, -half_l, -half_l, half_l], axis=-1)
    across = xp.stack([half_w, half_w, -half_w, -half_w], axis=-1)
    cos, sin = xp.cos(boxes[:, 6])[:, None], xp.sin(boxes[:, 6])[:, None]
    x = boxes[:, 0, None] + along * cos - across * sin
    y = boxes[:, 1, None] + along * sin + across * cos
    return xp.stack([x, y], axis=-1)


def _clip(polygon: Array, start: Array, end: Array) -> Array:
    """Polygons [..., K, 2] clipped to the left of the lines start -> end, as [..., 2 K, 2].

    Vertices outside move onto the line and every crossing is added, so that the number of vertices
    is fixed: what runs along the line encloses no area.
    """
    xp = polygon.__array_namespace__()
    edge = end - start
    length = xp.maximum(xp.sqrt((edge * edge).sum(-1, keepdims=True)), 1e-12)
    normal = xp.stack([-edge[..., 1], edge[..., 0]], axis=-1) / length
    height = ((polygon - start[..., None, :]) * normal[..., None, :]).sum(-1)
    kept = polygon - xp.minimum(height, 0)[..., None] * normal[..., None, :]
    following = xp.roll(polygon, -1, axis=-2)
    after = xp.roll(height, -1, axis=-1)
    crosses = (height > 0) != (after > 0)
    share = height / xp.where(crosses, height - after, 1)
    crossing = polygon + share[..., None] * (following - polygon)
    points = xp.stack([kept, xp.where(crosses[..., None], crossing, kept)], axis=-2)
    return points.reshape(*polygon.shape[:-2], 2 * polygon.shape[-2], 2)


def footprint_intersection(a: Array, b: Array) -> Array:
    """Areas [N, M] common to rotated boxes a [N, 7] and b [M, 7] seen from above."""
    xp = a.__array_namespace__()
    first, second = footprints(a)[:, None], footprints(b)[None]
    shape = (len(a), len(b), 4, 2)
    # About the second box's center: far from the origin the shoelace formula cancels.
    center = xp.broadcast_to(b[None, :, None, :2], shape)
    polygon = xp.broadcast_to(first, shape) - center
    corners = xp.broadcast_to(second, shape) - center
    for i in range(4):
        polygon = _clip(polygon, corners[..., i, :], corners[..., (i + 1) % 4, :])
    following = xp.roll(polygon, -1, axis=-2)
    cross = polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]
    # A box without a length or a width has no lines to clip to.
    solid = (b[:, 3:5] > 0).all(-1)[None]
    return xp.where(solid, (cross.sum(-1) / 2).clip(0), 0)


def bev_iou(a: Array, b: Array) -> Array:
    """Intersection over union [N, M] of rotated boxes [N, 7] and [M, 7] seen from above."""
    common = footprint_intersection(a, b)
    first, second = a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]
    return _share(common, first[:, None] + second[None] - common)


def iou_3d(a: Array, b: Array) -> Array:
    """Intersection over union of volumes [N, M] of boxes [N, 7] and [M, 7] turned about z."""
    xp = a.__array_namespace__()
    top = xp.minimum((a[:, 2] + a[:, 5] / 2)[:, None], (b[:, 2] + b[:, 5] / 2)[None])
    bottom = xp.maximum((a[:, 2] - a[:, 5] / 2)[:, None], (b[:, 2] - b[:, 5] / 2)[None])
    common = footprint_intersection(a, b) * (top - bottom).clip(0)
    first, second = a[:, 3:6].prod(-1), b[:, 3:6].prod(-1)
    return _share(common, first[:, None] + second[None] - common)


def points_inside(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How many of points [P, 3] lie in each of boxes [N, 7], int32 [N], on the host."""
    boxes, points = np.asarray(boxes, np.float64), np.asarray(points, np.float64)
    counts = np.zeros(len(boxes), np.int32)
    for i, box in enumerate(boxes):
        moved = points - box[:3]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        along, across = moved[:, 0] * cos + moved[:, 1] * sin, moved[:, 1] * cos - moved[:, 0] * sin
        local = np.stack([along, across, moved[:, 2]], axis=-1)
        counts[i] = (np.abs(local) <= box[3:6] / 2).all(-1).sum()
    return counts


# Suppression


def suppress(
    boxes: jax.Array,
    scores: jax.Array,
    threshold: float = 0.5,
    classes: jax.Array | None = None,
    valid: jax.Array | None = None,
    frames: jax.Array | None = None,
) -> jax.Array:
    """Which boxes greedy non-maximum suppression keeps, bool [N].

    A box goes when its IoU with a kept box of higher score exceeds `threshold`; of equal scores the
    lower index comes first.

    Args:
      boxes: [N, 4]. scores: [N].
      classes: [N]; only boxes of one class suppress each other. None: all do.
      valid: bool [N]; padding rows are never kept and suppress nothing.
      frames: [N]; only boxes of one frame suppress each other. None: one frame.
    """
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    n = len(scores)
    if not n:
        return jnp.zeros(0, bool)
    valid = jnp.ones(n, bool) if valid is None else jnp.asarray(valid)
    order = jnp.argsort(-jnp.where(valid, scores, -jnp.inf), stable=True)
    ranked = boxes[order]
    rivals = iou(ranked, ranked) > threshold
    for groups in (classes, frames):
        if groups is not None:
            group = jnp.asarray(groups)[order]
            rivals &= group[:, None] == group[None]
    later = jnp.arange(n)[:, None] < jnp.arange(n)[None]

    def visit(i, kept):
        return kept & ~(kept[i] & rivals[i] & later[i])

    kept = jax.lax.fori_loop(0, n, visit, valid[order])
    return jnp.zeros(n, bool).at[order].set(kept)


def check_boxes(boxes: Any, scores: Any = None, classes: Any = None, num_classes: int = 0) -> None:
    """Refuse malformed detections on the host, naming the first bad row.

    Raises ValueError: shape, x2 < x1 or y2 < y1, scores outside 0..1, class ids out of range.
    """
    boxes = np.asarray(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4] (x1 y1 x2 y2), got shape {boxes.shape}")
    wrong = ~((boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1]))
    _name_row(wrong, boxes, "boxes", "has x2 < x1, y2 < y1 or NaN")
    if scores is not None:
        scores = np.asarray(scores)
        _name_row(~((scores >= 0) & (scores <= 1)), scores, "scores", "is outside 0..1")
    if classes is not None:
        classes = np.asarray(classes)
        wrong = (classes < 0) | (classes >= num_classes)
        _name_row(wrong, classes, "classes", f"is not a class id below {num_classes}")


def check_boxes_3d(boxes: Any) -> None:
    """Refuse boxes that are not [N, 7], have a negative size or a value that is not finite.

    Raises ValueError naming the first bad row.
    """
    boxes = np.asarray(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 7:
        raise ValueError(f"boxes must be [N, 7] (x y z l w h yaw), got shape {boxes.shape}")
    _name_row(~np.isfinite(boxes[:, 6]), boxes, "boxes", "has a yaw that is not finite")
    wrong = ~np.isfinite(boxes).all(-1) | (boxes[:, 3:6] < 0).any(-1)
    _name_row(wrong, boxes, "boxes", "has a negative size or a value that is not finite")


def _name_row(wrong: np.ndarray, values: np.ndarray, what: str, problem: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{what}: row {row} {problem} ({values[row].tolist()})")
