"""Objects of a range image: neighbors that belong together by the angle between them.

I. Bogoslavskyi, C. Stachniss, IROS 2016, in the form of cpsintegrationlab/depth_clustering@3f30c545
with its optional test on elongation. Connected components run on the device in a fixed shape;
`cluster_table` keeps the nearest `max_clusters` of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import ground_removal
from jaxmodels.driving.connected_components import grid_components, raster_ids
from jaxmodels.driving.ground_removal import HAS_DEPTH, Ground

CRITERIA = ("angle", "line_dist", "line_dist_official", "simple")


@dataclasses.dataclass(frozen=True)
class ClusteringOptions:
    """Settings from the range image to clusters; angles in degrees, lengths in meters.

    Attributes:
      angle: neighbors join when the angle between beam and connecting line exceeds it.
      ground_angle: neighbors are ground together when their slopes differ by less.
      smoothing: window of the Savitzky-Golay filter, 0 for none.
      min_points, max_points: returns of a kept cluster.
      elongation: largest difference of normalized elongation between neighbors; negative: off.
      criterion: `angle`, `line_dist` (d1 sin beta < threshold), `line_dist_official` (">", as
        published) or `simple` (|d1 - d2| < threshold).
      distance: threshold of the criteria in meters.
      start_angle, max_ground_angle: see `ground_removal.fill_ground`; None is the published code.
      max_clusters: rows of a cluster table.
    """

    angle: float = 10.0
    ground_angle: float = 9.0
    smoothing: int = 5
    min_points: int = 10
    max_points: int = 20000
    elongation: float = -1.0
    criterion: str = "angle"
    distance: float = 0.5
    repair_window: int = 5
    repair_step: float = 1.0
    dilation: int | None = None
    start_angle: float | None = 30.0
    max_ground_angle: float | None = 45.0
    max_clusters: int = 128

    def __post_init__(self) -> None:
        for name in ("angle", "ground_angle"):
            if not 0 < getattr(self, name) < 90:
                raise ValueError(f"{name} {getattr(self, name)} must be between 0 and 90 degrees")
        for name in ("start_angle", "max_ground_angle"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 90:
                raise ValueError(f"{name} {value} must be within 0..90 degrees, or None")
        for name in ("distance", "repair_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if self.smoothing not in ground_removal.SMOOTHING_WINDOWS:
            known = ground_removal.SMOOTHING_WINDOWS
            raise ValueError(f"smoothing window {self.smoothing} must be one of {known}")
        if self.repair_window < 2:
            raise ValueError(f"repair_window {self.repair_window} must be at least 2")
        if self.dilation is not None and self.dilation < 1:
            raise ValueError(f"dilation {self.dilation} must be at least 1 row, or None")
        if not 0 < self.min_points <= self.max_points:
            raise ValueError(
                f"min_points {self.min_points} must be positive and at most max_points "
                f"{self.max_points}"
            )
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion {self.criterion!r}: known are {', '.join(CRITERIA)}")
        if self.max_clusters < 1:
            raise ValueError(f"max_clusters {self.max_clusters} must be positive")


# The published code of the fork, for comparison with it.
OFFICIAL = ClusteringOptions(start_angle=None, max_ground_angle=None)


class DepthClusters(NamedTuple):
    """Clusters of a range image.

    Attributes:
      ground: see `Ground`.
      beta_down, beta_right: angles [H, W] to the row below and the column to the right, radians.
      labels: int32 [H, W], 1, 2, ... in raster order, 0 for none.
      counts: int32 [H W + 1], returns of each label (repaired pixels are none).
      kept: `labels`, 0 where the size filter drops the cluster.
    """

    ground: Ground
    beta_down: jax.Array
    beta_right: jax.Array
    labels: jax.Array
    counts: jax.Array
    kept: jax.Array


def beam_angles(
    inclinations: jax.Array, azimuths: jax.Array, span: float = 2 * math.pi
) -> tuple[jax.Array, jax.Array]:
    """Angles to the next row [H] (the last is 0) and column [W] (the last across the turn).

    On the host in its own precision; `span` is the turn, radians.
    """
    rows, columns = np.asarray(inclinations, np.float64), np.asarray(azimuths, np.float64)
    down = np.abs(np.append(np.diff(rows), 0.0))
    across = abs(abs(columns[0] - columns[-1]) - span)
    return down, np.abs(np.append(np.diff(columns), across))


def angle_between(first: jax.Array, second: jax.Array, angle: jax.Array) -> jax.Array:
    """`|atan2(d2 sin a, d1 - d2 cos a)|` with d1 >= d2, radians; 0 where a depth is missing."""
    far, near = jnp.maximum(first, second), jnp.minimum(first, second)
    # d1 - d2 cos a without its cancellation.
    along = (far - near) + near * 2 * jnp.sin(angle / 2) ** 2
    beta = jnp.abs(jnp.arctan2(near * jnp.sin(angle), along))
    return jnp.where(near >= HAS_DEPTH, beta, 0.0)


def _joined(first, second, beta, options: ClusteringOptions):
    both = jnp.minimum(first, second) >= HAS_DEPTH
    if options.criterion == "angle":
        return both & (beta > math.radians(options.angle))
    if options.criterion == "simple":
        return both & (jnp.abs(first - second) < options.distance)
    reach = jnp.maximum(first, second) * jnp.sin(beta)
    near = reach < options.distance
    if options.criterion == "line_dist_official":
        near = reach > options.distance
    return both & near


def cluster_depth(
    depth: jax.Array,
    down_angles: jax.Array,
    right_angles: jax.Array,
    *,
    wraps: bool,
    options: ClusteringOptions = ClusteringOptions(),
    elongation: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels int32 [H, W] in raster order and the angles `beta_down`, `beta_right`.

    Args:
      depth: meters [H, W], 0 for ground and missing pixels.
      down_angles, right_angles: see `beam_angles`.
      elongation: [H, W], normalized to 0..1, wanted when `options.elongation` is positive.
    """
    below, beside = jnp.roll(depth, -1, 0), jnp.roll(depth, -1, 1)
    down_angles = jnp.asarray(down_angles, depth.dtype)[:, None]
    right_angles = jnp.asarray(right_angles, depth.dtype)[None]
    beta_down = angle_between(depth, below, down_angles).at[-1].set(0)
    beta_right = angle_between(depth, beside, right_angles)
    down = _joined(depth, below, beta_down, options).at[-1].set(False)
    right = _joined(depth, beside, beta_right, options)
    if options.elongation > 0:
        if elongation is None:
            raise ValueError("options.elongation is set, but the frame has no elongation")
        elongation = jnp.asarray(elongation)
        down &= jnp.abs(jnp.roll(elongation, -1, 0) - elongation) < options.elongation
        right &= jnp.abs(jnp.roll(elongation, -1, 1) - elongation) < options.elongation
    if not wraps or depth.shape[1] == 1:
        right = right.at[:, -1].set(False)
        beta_right = beta_right.at[:, -1].set(0)
    labels = raster_ids(grid_components(right, down), depth >= HAS_DEPTH)
    return labels, beta_down, beta_right


@functools.partial(jax.jit, static_argnames=("wraps", "options"))
def cluster_range_image(
    range_image: jax.Array,
    inclinations: jax.Array,
    down_angles: jax.Array,
    right_angles: jax.Array,
    *,
    wraps: bool,
    options: ClusteringOptions = ClusteringOptions(),
    elongation: jax.Array | None = None,
) -> DepthClusters:
    """Ground removal, clustering and size filter of one range image [H, W]; `vmap` for more.

    Args:
      inclinations: radians [H], row 0 the top beam. down_angles, right_angles: `beam_angles`.
      wraps: whether the columns are a whole turn.
    """
    depth = jnp.asarray(range_image)

    def radians(degrees):
        return None if degrees is None else math.radians(degrees)

    ground = ground_removal.remove_ground(
        depth,
        inclinations,
        wraps=wraps,
        angle=math.radians(options.ground_angle),
        smoothing=options.smoothing,
        repair_window=options.repair_window,
        repair_step=options.repair_step,
        dilation=options.dilation,
        start_angle=radians(options.start_angle),
        max_ground_angle=radians(options.max_ground_angle),
    )
    labels, beta_down, beta_right = cluster_depth(
        ground.remaining,
        down_angles,
        right_angles,
        wraps=wraps,
        options=options,
        elongation=elongation,
    )
    returns = jnp.where(depth >= HAS_DEPTH, labels, 0).reshape(-1)
    counts = jnp.zeros(depth.size + 1, jnp.int32).at[returns].add(1).at[0].set(0)
    fits = (counts >= options.min_points) & (counts <= options.max_points)
    kept = jnp.where(fits[labels], labels, 0)
    return DepthClusters(ground, beta_down, beta_right, labels, counts, kept)


def cluster(
    range_image: jax.Array,
    inclinations: jax.Array,
    azimuths: jax.Array,
    *,
    wraps: bool,
    options: ClusteringOptions = ClusteringOptions(),
    elongation: jax.Array | None = None,
) -> DepthClusters:
    """`cluster_range_image` from the sensor's angles, radians [H] and [W]."""
    down, right = beam_angles(inclinations, azimuths)
    return cluster_range_image(
        range_image,
        np.asarray(inclinations, np.float32),
        down.astype(np.float32),
        right.astype(np.float32),
        wraps=wraps,
        options=options,
        elongation=elongation,
    )


class ClusterTable(NamedTuple):
    """The nearest clusters of a frame in rows of a fixed number N, nearest first.

    Attributes:
      valid: bool [N]. slots: int32 [P], row of each return, N for none.
      count: int32 [N], returns. distance: meters [N], the nearest return.
      low, high: [N, 3], corners of the axis-aligned box in the points' frame; 0 in empty rows.
      overflow: int32 [], clusters that found no row.
    """

    valid: jax.Array
    slots: jax.Array
    count: jax.Array
    distance: jax.Array
    low: jax.Array
    high: jax.Array
    overflow: jax.Array


def cluster_table(
    labels: jax.Array, points: jax.Array, returns: jax.Array, max_clusters: int
) -> ClusterTable:
    """Rows for the nearest clusters.

    Args:
      labels: int32, any shape of P entries, 0 for none and ids up to P.
      points: [..., 3]. returns: bool, which pixels carry a point.
    """
    labels = jnp.where(returns, labels, 0).reshape(-1)
    points = points.reshape(-1, 3)
    size = labels.size
    reach = jnp.sqrt((points * points).sum(-1))
    nearest = jnp.full(size + 1, jnp.inf, points.dtype).at[labels].min(reach).at[0].set(jnp.inf)
    rows = min(max_clusters, size)
    distance, ids = jax.lax.top_k(-nearest, rows)
    if rows < max_clusters:
        distance = jnp.pad(distance, (0, max_clusters - rows), constant_values=-jnp.inf)
        ids = jnp.pad(ids, (0, max_clusters - rows))
    valid = jnp.isfinite(distance)
    row_of = jnp.full(size + 1, max_clusters, jnp.int32)
    row_of = (
        row_of.at[jnp.where(valid, ids, 0)].set(jnp.arange(max_clusters)).at[0].set(max_clusters)
    )
    table = table_of_slots(row_of[labels], points, max_clusters)
    overflow = jnp.isfinite(nearest).sum() - valid.sum()
    return table._replace(overflow=overflow.astype(jnp.int32))


def table_of_slots(slots: jax.Array, points: jax.Array, rows: int) -> ClusterTable:
    """A table from the row of each point, int32 [P], `rows` for none; points [P, 3]."""
    grown = (rows + 1, 3)
    low = jnp.full(grown, jnp.inf, points.dtype).at[slots].min(points)[:rows]
    high = jnp.full(grown, -jnp.inf, points.dtype).at[slots].max(points)[:rows]
    reach = jnp.sqrt((points * points).sum(-1))
    distance = jnp.full(rows + 1, jnp.inf, points.dtype).at[slots].min(reach)[:rows]
    count = jnp.zeros(rows + 1, jnp.int32).at[slots].add(1)[:rows]
    valid = count > 0
    return ClusterTable(
        valid,
        slots,
        count,
        distance,
        jnp.where(valid[:, None], low, 0),
        jnp.where(valid[:, None], high, 0),
        jnp.int32(0),
    )


def merge_oversegmented(
    table: ClusterTable,
    points: jax.Array,
    *,
    grow: float = 0.3,
    largest: tuple[float, float, float] = (12.0, 3.0, 4.0),
) -> ClusterTable:
    """Join clusters that are parts of one object: boxes seen from above overlap when grown.

    A pair joins when its boxes, grown by `grow` meters, overlap and the box around both is at most
    `largest` (length, width, height; the longer side seen from above is its length). Joining is
    repeated over the new boxes, one pair at a time, the nearest first, so that the whole
    never exceeds `largest`.
    """
    rows = len(table.valid)
    length, width, height = largest
    index = jnp.arange(rows)

    def fits(low, high, valid):
        reach_low, reach_high = low[:, :2] - grow / 2, high[:, :2] + grow / 2
        overlap = (
            (reach_low[:, None] <= reach_high[None]) & (reach_low[None] <= reach_high[:, None])
        ).all(-1)
        size = jnp.maximum(high[:, None], high[None]) - jnp.minimum(low[:, None], low[None])
        long = size[..., :2].max(-1)
        short = size[..., :2].min(-1)
        small = (long <= length) & (short <= width) & (size[..., 2] <= height)
        later = index[:, None] < index[None]
        return overlap & small & later & valid[:, None] & valid[None]

    def unfinished(state):
        low, high, valid, _ = state
        return fits(low, high, valid).any()

    def join(state):
        low, high, valid, target = state
        first = jnp.argmax(fits(low, high, valid).reshape(-1))
        keep, gone = first // rows, first % rows
        low = low.at[keep].min(low[gone])
        high = high.at[keep].max(high[gone])
        return low, high, valid.at[gone].set(False), jnp.where(target == gone, keep, target)

    state = (table.low, table.high, table.valid, index)
    _, _, valid, target = jax.lax.while_loop(unfinished, join, state)
    # Rows close up, in their order: nearest first.
    place = jnp.where(valid, jnp.cumsum(valid) - 1, rows)
    target = jnp.append(place[target], rows)
    joined = table_of_slots(target[table.slots], points.reshape(-1, 3), rows)
    return joined._replace(overflow=table.overflow)
