"""Ground in a range image: repair, angle image, smoothing, fill from below, dilation.

I. Bogoslavskyi, C. Stachniss, "Fast Range Image-Based Segmentation of Sparse 3D Laser Scans for
Online Operation", IROS 2016, as cpsintegrationlab/depth_clustering@3f30c545 has it. Its dilation
kernel is written with the wrong type, which leaves the effect undefined: here it is uniform.
`max_ground_angle` is ours: near walls a noisy angle image lets the fill run up into vehicles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving.connected_components import grid_components

HAS_DEPTH = 1e-3  # meters; less is no return
SMOOTHING_WINDOWS = (0, 5, 7, 9, 11)
# Savitzky-Golay, quadratic; window -> (weights, divisor).
_SAVITZKY_GOLAY = {
    5: ((-3, 12, 17, 12, -3), 35),
    7: ((-2, 3, 6, 7, 6, 3, -2), 21),
    9: ((-21, 14, 39, 54, 59, 54, 39, 14, -21), 231),
    11: ((-36, 9, 44, 69, 84, 89, 84, 69, 44, 9, -36), 429),
}


class Ground(NamedTuple):
    """Every stage of ground removal, images [H, W].

    Attributes:
      repaired: meters, short gaps filled. angle: radians. smoothed: radians.
      seeded: bool, what the fill reached. ground: bool, dilated.
      remaining: `repaired` where there is no ground, else 0.
    """

    repaired: jax.Array
    angle: jax.Array
    smoothed: jax.Array
    seeded: jax.Array
    ground: jax.Array
    remaining: jax.Array


def repair_gaps(depth: jax.Array, window: int = 5, max_step: float = 1.0) -> jax.Array:
    """Fill missing pixels of [H, W] from pairs above and below that nearly agree.

    A missing pixel becomes the mean of all pairs (i above, j below; i, j < `window`) with depth
    that differ by less than `max_step` meters. Rows go from top to bottom and see the repairs
    above them, as the published code, which works in place.
    """
    reach = window - 1
    height, width = depth.shape
    padded = jnp.concatenate([depth, jnp.zeros((reach, width), depth.dtype)])
    below = jnp.stack([padded[j : j + height] for j in range(1, reach + 1)], axis=1)

    def visit(above, row):
        current, under = row
        a, b = above[:, None], under[None]
        fits = (a > HAS_DEPTH) & (b > HAS_DEPTH) & (jnp.abs(a - b) < max_step)
        pairs = fits.sum((0, 1))
        total = jnp.where(fits, a + b, 0).sum((0, 1))
        fill = total / jnp.maximum(2 * pairs, 1)
        repaired = jnp.where((current < HAS_DEPTH) & (pairs > 0), fill, current)
        return jnp.concatenate([repaired[None], above[:-1]]), repaired

    return jax.lax.scan(visit, jnp.zeros((reach, width), depth.dtype), (depth, below))[1]


def angle_image(depth: jax.Array, inclinations: jax.Array) -> jax.Array:
    """Slope between each pixel and the one above it, radians [H, W] in 0..pi/2; row 0 is 0."""
    up = jnp.asarray(inclinations, depth.dtype)[:, None]
    # Differences of depth cos and depth sin without the cancellation: beams lie close together.
    middle, half = (up[1:] + up[:-1]) / 2, jnp.sin((up[1:] - up[:-1]) / 2)
    step, above = jnp.diff(depth, axis=0), depth[:-1]
    x = step * jnp.cos(up[1:]) - 2 * above * jnp.sin(middle) * half
    y = step * jnp.sin(up[1:]) + 2 * above * jnp.cos(middle) * half
    slope = jnp.arctan2(jnp.abs(y), jnp.abs(x))
    return jnp.concatenate([jnp.zeros_like(depth[:1]), slope])


def smooth_columns(image: jax.Array, window: int) -> jax.Array:
    """Savitzky-Golay filter down the columns of [H, W], mirrored at the border; 0: unchanged.

    Raises ValueError for a window that has no published weights.
    """
    if window not in SMOOTHING_WINDOWS:
        raise ValueError(f"smoothing window {window} must be one of {SMOOTHING_WINDOWS}")
    if window == 0:
        return image
    weights, divisor = _SAVITZKY_GOLAY[window]
    half, height = window // 2, len(image)
    rows = np.pad(np.arange(height), half, mode="reflect" if height > 1 else "edge")
    padded = image[rows]
    return sum(padded[i : i + height] * (w / divisor) for i, w in enumerate(weights))


def fill_ground(
    smoothed: jax.Array,
    depth: jax.Array,
    threshold: float,
    *,
    wraps: bool,
    start_angle: float | None = None,
    max_ground_angle: float | None = None,
) -> jax.Array:
    """Pixels reached from the lowest return of each column, bool [H, W].

    Neighbors join where their angles differ by less than `threshold` (radians). A pixel without
    depth may be reached and leads no further.

    Args:
      wraps: whether the last column is the first one's neighbor.
      start_angle: a column whose lowest return is steeper starts nothing (the code of 2016).
      max_ground_angle: steeper pixels neither start nor are reached.
    """
    height, width = depth.shape
    present = depth >= HAS_DEPTH
    allowed = jnp.ones_like(present)
    if max_ground_angle is not None:
        allowed = smoothed <= max_ground_angle
    # The lowest row with depth; row 0 where there is none.
    rows = jnp.arange(height)[:, None]
    lowest = jnp.where(present, rows, 0).max(0)
    start = (rows == lowest) & allowed
    if start_angle is not None:
        start &= smoothed <= start_angle

    def linked(axis):
        near = jnp.abs(jnp.roll(smoothed, -1, axis) - smoothed) < threshold
        return near & allowed & jnp.roll(allowed, -1, axis)

    right, down = linked(1), linked(0).at[-1].set(False)
    if not wraps:
        right = right.at[:, -1].set(False)
    if width == 1:
        right = jnp.zeros_like(right)

    def between(link, axis):
        return link & present & jnp.roll(present, -1, axis)

    parts = grid_components(between(right, 1), between(down, 0)).reshape(-1)
    seeds = (start & present).reshape(-1)
    lit = jnp.zeros(parts.shape, bool).at[parts].max(seeds)
    inside = lit[parts].reshape(depth.shape) & present
    around = (
        (right & jnp.roll(inside, -1, 1))
        | jnp.roll(right & inside, 1, 1)
        | (down & jnp.roll(inside, -1, 0))
        | jnp.roll(down & inside, 1, 0)
    )
    return inside | start | (around & ~present)


def dilate_rows(mask: jax.Array, window: int) -> jax.Array:
    """Vertical dilation of bool [H, W] by a uniform window centered on each pixel."""
    before = (window - 1) // 2
    return jax.lax.reduce_window(
        mask,
        False,
        jax.lax.bitwise_or,
        (window, 1),
        (1, 1),
        ((before, window - 1 - before), (0, 0)),
    )


def remove_ground(
    range_image: jax.Array,
    inclinations: jax.Array,
    *,
    wraps: bool,
    angle: float = np.radians(9.0),
    smoothing: int = 5,
    repair_window: int = 5,
    repair_step: float = 1.0,
    dilation: int | None = None,
    start_angle: float | None = None,
    max_ground_angle: float | None = None,
) -> Ground:
    """Ground of a range image [H, W] in meters; see `Ground`.

    Angles in radians. `dilation` None is the published `max(smoothing - 2, 3)` rows. The published
    code has neither `start_angle` nor `max_ground_angle`.
    """
    depth = jnp.asarray(range_image)
    repaired = repair_gaps(depth, repair_window, repair_step)
    slope = angle_image(repaired, inclinations)
    smoothed = smooth_columns(slope, smoothing)
    seeded = fill_ground(
        smoothed,
        repaired,
        angle,
        wraps=wraps,
        start_angle=start_angle,
        max_ground_angle=max_ground_angle,
    )
    ground = dilate_rows(seeded, max(smoothing - 2, 3) if dilation is None else dilation)
    return Ground(repaired, slope, smoothed, seeded, ground, jnp.where(ground, 0, repaired))
