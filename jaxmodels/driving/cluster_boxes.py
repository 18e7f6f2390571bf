"""Boxes and scores of clusters: axis-aligned, convex footprint, closeness-fitted yaw.

Cube and polygon after cpsintegrationlab/depth_clustering@3f30c545; the yaw by the closeness
criterion of X. Zhang et al., "Efficient L-Shape Fitting for Vehicle Detection Using Laser
Scanners", IV 2017.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_YAW_STEPS = 90  # degrees 0..89
_STRAIGHT = 1e-12  # sine of the least turn at a vertex
_CLOSEST = 0.01  # meters; nearer points count as this near an edge


class Cubes(NamedTuple):
    """Axis-aligned boxes: center [N, 3], extent [N, 3] in meters; 0 for empty clusters."""

    center: jax.Array
    extent: jax.Array


def cubes(points: jax.Array, mask: jax.Array) -> Cubes:
    """Boxes around points [N, M, 3] where bool mask [N, M]."""
    xp = points.__array_namespace__()
    low = xp.where(mask[..., None], points, xp.inf).min(1)
    high = xp.where(mask[..., None], points, -xp.inf).max(1)
    some = mask.any(1)[:, None]
    return Cubes(xp.where(some, (low + high) / 2, 0), xp.where(some, high - low, 0))


def cube_corners(center: jax.Array, extent: jax.Array) -> jax.Array:
    """Corners [N, 8, 3] of axis-aligned boxes."""
    xp = center.__array_namespace__()
    signs = xp.asarray(
        [[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)],
        dtype=center.dtype,
    )
    return center[:, None] + extent[:, None] * signs


def oriented_corners(boxes: jax.Array) -> jax.Array:
    """Corners [N, 8, 3] of boxes [N, 7] (x y z l w h yaw)."""
    xp = boxes.__array_namespace__()
    local = cube_corners(0 * boxes[:, :3], boxes[:, 3:6])
    cos, sin = xp.cos(boxes[:, 6])[:, None], xp.sin(boxes[:, 6])[:, None]
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return xp.stack([x, y, local[..., 2]], axis=-1) + boxes[:, None, :3]


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Indices of the hull's vertices of [M, 2], counterclockwise; collinear points are dropped.

    On the host (Andrew's monotone chain). One or two different points are their own hull.
    """
    points = np.asarray(points, np.float64)
    order = np.lexsort((points[:, 1], points[:, 0]))
    order = [i for k, i in enumerate(order) if k == 0 or (points[i] != points[order[k - 1]]).any()]
    if len(order) < 3:
        return np.asarray(order, np.int64)

    def chain(indices):
        kept: list[int] = []
        for i in indices:
            while len(kept) > 1:
                edge, way = points[kept[-1]] - points[kept[-2]], points[i] - points[kept[-2]]
                turn = edge[0] * way[1] - edge[1] * way[0]
                # Rounding must not make corners of a straight line.
                if turn > _STRAIGHT * np.sqrt((edge @ edge) * (way @ way)):
                    break
                kept.pop()
            kept.append(i)
        return kept[:-1]

    return np.asarray(chain(order) + chain(order[::-1]), np.int64)


class Polygons(NamedTuple):
    """Extruded hulls of N clusters.

    Attributes:
      corners: [N, 2 M, 3], hull vertices at the lowest and the highest z of their cluster.
      mask: bool [N, 2 M]. size: int64 [N], vertices of the hull.
    """

    corners: np.ndarray
    mask: np.ndarray
    size: np.ndarray


def polygons(points: np.ndarray, mask: np.ndarray) -> Polygons:
    """Convex footprints of points [N, M, 3] where bool mask [N, M], on the host."""
    count, width = mask.shape
    corners = np.zeros((count, 2, width, 3))
    used = np.zeros((count, 2, width), bool)
    size = np.zeros(count, np.int64)
    for i in range(count):
        own = np.asarray(points[i], np.float64)[mask[i]]
        if not len(own):
            continue
        hull = convex_hull(own[:, :2])
        size[i] = len(hull)
        corners[i, :, : len(hull), :2] = own[hull, :2]
        corners[i, 0, : len(hull), 2] = own[:, 2].min()
        corners[i, 1, : len(hull), 2] = own[:, 2].max()
        used[i, :, : len(hull)] = True
    return Polygons(corners.reshape(count, -1, 3), used.reshape(count, -1), size)


def fit_yaw(points: jax.Array, slots: jax.Array, rows: int) -> jax.Array:
    """Boxes [N, 7] around clusters, turned to where points lie closest to the edges.

    Yaws 0..89 degrees in steps of one; every point counts by 1 / max(distance to the nearer edge,
    1 cm). Length is the longer side, so that the yaw returned is in 0..180 degrees.

    Args:
      points: [P, 3]. slots: int32 [P], row of each point, `rows` for none.
    """
    dtype = points.dtype
    infinite = jnp.asarray(jnp.inf, dtype)

    def extremes(values):
        low = jnp.full(rows + 1, infinite).at[slots].min(values)
        return low, jnp.full(rows + 1, -infinite).at[slots].max(values)

    def sides(yaw):
        along = points[:, 0] * jnp.cos(yaw) + points[:, 1] * jnp.sin(yaw)
        across = points[:, 1] * jnp.cos(yaw) - points[:, 0] * jnp.sin(yaw)
        return along, across, *extremes(along), *extremes(across)

    def closeness(yaw):
        along, across, a_low, a_high, c_low, c_high = sides(yaw)
        a = jnp.minimum(along - a_low[slots], a_high[slots] - along)
        c = jnp.minimum(across - c_low[slots], c_high[slots] - across)
        near = 1 / jnp.maximum(jnp.minimum(a, c), _CLOSEST)
        return jnp.zeros(rows + 1, dtype).at[slots].add(near)[:rows]

    yaws = jnp.arange(_YAW_STEPS, dtype=dtype) * (math.pi / 2 / _YAW_STEPS)
    best = yaws[jnp.argmax(jax.lax.map(closeness, yaws), axis=0)]

    turned = jnp.append(best, 0)[slots]
    _, _, a_low, a_high, c_low, c_high = (
        x[:rows] if x.shape[0] == rows + 1 else x for x in sides(turned)
    )
    z_low, z_high = (x[:rows] for x in extremes(points[:, 2]))
    middle_a, middle_c = (a_low + a_high) / 2, (c_low + c_high) / 2
    x = middle_a * jnp.cos(best) - middle_c * jnp.sin(best)
    y = middle_a * jnp.sin(best) + middle_c * jnp.cos(best)
    length, width = a_high - a_low, c_high - c_low
    swap = width > length
    boxes = jnp.stack(
        [
            x,
            y,
            (z_low + z_high) / 2,
            jnp.where(swap, width, length),
            jnp.where(swap, length, width),
            z_high - z_low,
            jnp.where(swap, best + math.pi / 2, best),
        ],
        axis=-1,
    )
    return jnp.where(jnp.isfinite(boxes).all(-1, keepdims=True), boxes, 0)


def cluster_scores(
    elongation: jax.Array, ranges: jax.Array, slots: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Scores of clusters [N] and of the frame, after the elongation of their returns.

    A point scores 1 - elongation (in 0..1); a cluster's score is the average with weights
    `1 - (r - rmin) / (rmax - rmin)` over its points, a plain average where all ranges are equal
    (the published code divides by zero); the frame's is the mean over clusters, 0 without any.

    Args:
      elongation, ranges: [P]. slots: int32 [P], row of each point, `rows` for none.
    """
    low = jnp.full(rows + 1, jnp.inf, ranges.dtype).at[slots].min(ranges)
    high = jnp.full(rows + 1, -jnp.inf, ranges.dtype).at[slots].max(ranges)
    spread = (high - low)[slots]
    flat = ~(spread > 0)
    weight = jnp.where(flat, 1, 1 - (ranges - low[slots]) / jnp.where(flat, 1, spread))
    score = 1 - jnp.clip(elongation, 0, 1)
    zeros = jnp.zeros(rows + 1, ranges.dtype)
    total = zeros.at[slots].add(weight)[:rows]
    weighted = zeros.at[slots].add(weight * score)[:rows]
    scores = jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), 0)
    present = zeros.at[slots].add(1)[:rows] > 0
    return scores, scores.sum() / jnp.maximum(present.sum(), 1)
