"""First half of the pipeline, one jitted function: range image to objects, patches and risk.

See `lidar_camera` for the whole. Everything has a fixed shape: at most `max_clusters` objects with
a mask, whatever a frame holds, so that no frame is traced twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import camera_projection, cluster_boxes, collision_risk, image_patches
from jaxmodels.driving.camera_projection import Camera, FlatBoxes
from jaxmodels.driving.collision_risk import Tracks
from jaxmodels.driving.depth_clustering import (
    ClusteringOptions,
    beam_angles,
    cluster_range_image,
    cluster_table,
    merge_oversegmented,
)
from jaxmodels.driving.frame import FRAME_INTERVAL, Frame
from jaxmodels.driving.image_patches import BUCKETS, Patches
from jaxmodels.driving.range_image import range_to_points

BOXES = ("polygon", "cube")
# A traced number of steps needs a bound: 8 s ahead, an ego speed of 59 m/s.
_MOST_STEPS = 80


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """Settings of the pipeline; those of clustering apart.

    Attributes:
      box: `polygon` (extruded footprint, the published default) or `cube`.
      partial: cut objects beside the camera at its image plane instead of dropping them; the
        published code drops them.
      drop_translation: as if the camera stood where the LiDAR boxes' origin is (published).
      distortion: apply the lens polynomial.
      max_truncation: share of a box outside the image from which it is dropped.
      merge_parts: join clusters that are parts of one object.
      yaw: fit the boxes' yaw; else they are axis-aligned.
      min_top, left, right, max_depth: see `camera_projection.tunnel`.
      grow_share, grow_pixels, over_smaller, over_union, min_height, max_patches: see
        `image_patches`.
      buckets: sizes of patches. letterbox: keep their aspect.
      risk: order of inspection, one of `collision_risk.ORDERS`.
      batch: patches of a launch. deadline_ms: from the arrival of the frame.
      detector_every: every how many frames the full-frame detector runs; 0 for never.
      background_confidence: from which a patch is dropped as background.
      least_overlap: a full-frame box that overlaps a patch as much is not reported again.
      suppression: IoU of the final non-maximum suppression, class by class.
    """

    clustering: ClusteringOptions = ClusteringOptions()  # noqa: RUF009 (frozen)
    box: str = "polygon"
    partial: bool = True
    drop_translation: bool = False
    distortion: bool = True
    max_truncation: float = 1.0
    merge_parts: bool = True
    yaw: bool = False
    min_top: float | None = None
    left: float | None = None
    right: float | None = None
    max_depth: float | None = None
    grow_share: float = 0.15
    grow_pixels: float = 8.0
    over_smaller: float = 0.6
    over_union: float = 0.4
    min_height: float = 12.0
    max_patches: int = 64
    buckets: tuple[int, ...] = BUCKETS
    letterbox: bool = False
    risk: str = "distance"
    batch: int = 8
    deadline_ms: float = float("inf")
    detector_every: int = 5
    background_confidence: float = 0.9
    least_overlap: float = 0.3
    suppression: float = 0.5

    def __post_init__(self) -> None:
        if self.box not in BOXES:
            raise ValueError(f"box {self.box!r}: known are {', '.join(BOXES)}")
        if self.risk not in collision_risk.ORDERS:
            known = ", ".join(collision_risk.ORDERS)
            raise ValueError(f"risk {self.risk!r}: known are {known}")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets {self.buckets} must rise")
        if min(self.batch, self.max_patches) < 1 or self.detector_every < 0:
            raise ValueError("batch and max_patches must be at least 1, detector_every 0 or more")
        for name in (
            *("over_smaller", "over_union", "max_truncation", "suppression"),
            *("background_confidence", "least_overlap"),
        ):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be within 0..1, above 0")
        if not self.deadline_ms > 0:
            raise ValueError(f"deadline_ms {self.deadline_ms} must be positive")


class Objects(NamedTuple):
    """Clusters of one frame, N rows, nearest first.

    Attributes:
      valid: bool [N]. boxes: [N, 7], vehicle frame. low, high: [N, 3] of the axis-aligned box.
      returns: int32 [N]. distance: meters [N]. flat: image boxes.
      velocity: [N, 2] m/s over ground. ttc: seconds [N]. rank: int [N].
      patches: regions of the image; a patch has the row of its nearest cluster.
      bucket: int32 [N], size of each patch. order: int32 [N], rows, the most urgent first, those
        without a patch last. overflow: int32 [], clusters that found no row.
      labels: int32 [H, W], row + 1 of each pixel's cluster, 0 for none.
      tracks: for the next frame.
    """

    valid: jax.Array
    boxes: jax.Array
    low: jax.Array
    high: jax.Array
    returns: jax.Array
    distance: jax.Array
    flat: FlatBoxes
    velocity: jax.Array
    ttc: jax.Array
    rank: jax.Array
    patches: Patches
    bucket: jax.Array
    order: jax.Array
    overflow: jax.Array
    labels: jax.Array
    tracks: Tracks


class FrameArrays(NamedTuple):
    """What the device needs of a frame, all float32; `vmap` maps over all of it."""

    range: Any
    elongation: Any
    inclinations: Any
    azimuths: Any
    down_angles: Any
    right_angles: Any
    lidar_extrinsic: Any
    camera_intrinsic: Any
    camera_extrinsic: Any
    ego_velocity: Any
    steps: Any
    interval: Any


def check_elongation(frame: Frame, options: PipelineOptions) -> None:
    """Raises ValueError where clusters are to be split by elongation and the frame has none."""
    if options.clustering.elongation > 0 and frame.elongation is None:
        raise ValueError(
            f"clustering.elongation is {options.clustering.elongation:g}, but the frame has no "
            "elongation; a negative value leaves that test out"
        )


def frame_arrays(frame: Frame, interval: float = FRAME_INTERVAL) -> FrameArrays:
    """The arrays of a checked frame; `interval` seconds have passed since the last one.

    Without elongation it is 0 everywhere, which no test on it splits: see `check_elongation`.
    """
    down, right = beam_angles(frame.inclinations, frame.azimuths)
    elongation = frame.elongation
    if elongation is None:
        elongation = np.zeros_like(frame.range)
    steps = min(collision_risk.horizon_steps(frame.ego_velocity), _MOST_STEPS)
    single = functools.partial(np.asarray, dtype=np.float32)
    return FrameArrays(
        *map(single, (frame.range, elongation, frame.inclinations, frame.azimuths, down, right)),
        *map(single, (frame.lidar_extrinsic, frame.camera_intrinsic, frame.camera_extrinsic)),
        single(frame.ego_velocity),
        np.int32(steps),
        single(interval),
    )


def no_tracks(options: PipelineOptions) -> Tracks:
    """Tracks before the first frame."""
    rows = options.clustering.max_clusters
    return Tracks(np.zeros((rows, 2), np.float32), np.zeros(rows, bool))


@functools.partial(jax.jit, static_argnames=("options", "wraps", "width", "height"))
def find_objects(
    arrays: FrameArrays,
    tracks: Tracks,
    *,
    options: PipelineOptions,
    wraps: bool,
    width: int,
    height: int,
) -> Objects:
    """Cluster, project, merge and rank the objects of one frame.

    Args:
      tracks: of the last frame, in its ego axes. width, height: of the image, pixels.
    """
    clustering = options.clustering
    clusters = cluster_range_image(
        arrays.range,
        arrays.inclinations,
        arrays.down_angles,
        arrays.right_angles,
        wraps=wraps,
        options=clustering,
        elongation=arrays.elongation,
    )
    points, returned = range_to_points(
        arrays.range, arrays.inclinations, arrays.azimuths, arrays.lidar_extrinsic
    )
    table = cluster_table(clusters.kept, points, returned, clustering.max_clusters)
    points = points.reshape(-1, 3)
    if options.merge_parts:
        table = merge_oversegmented(table, points)
    rows = clustering.max_clusters
    center, extent = (table.low + table.high) / 2, table.high - table.low
    boxes = jnp.concatenate([center, extent, jnp.zeros((rows, 1), center.dtype)], axis=-1)
    if options.yaw:
        boxes = cluster_boxes.fit_yaw(points, table.slots, rows)

    camera = Camera(arrays.camera_intrinsic, arrays.camera_extrinsic, width, height)
    how = dict(
        max_truncation=options.max_truncation,
        distortion=options.distortion,
        partial=options.partial,
        drop_translation=options.drop_translation,
    )
    if options.box == "cube":
        corners = cluster_boxes.cube_corners(center, extent)
        mask = jnp.broadcast_to(table.valid[:, None], corners.shape[:2])
        flat = camera_projection.flat_boxes(corners, mask, camera, **how)
    else:
        flat = camera_projection.flat_boxes_of_points(
            points, table.slots, table.low, table.high, camera, **how
        )
    shown = table.valid & flat.ok
    shown &= camera_projection.tunnel(
        table.low,
        table.high,
        table.distance,
        min_top=options.min_top,
        left=options.left,
        right=options.right,
        max_depth=options.max_depth,
    )
    grown = image_patches.grow_boxes(
        flat.boxes, width, height, options.grow_share, options.grow_pixels
    )
    patches = image_patches.merge_patches(
        grown,
        table.distance,
        shown,
        over_smaller=options.over_smaller,
        over_union=options.over_union,
        min_height=options.min_height,
        max_patches=options.max_patches,
    )

    position = boxes[:, :2]
    moved = tracks._replace(position=tracks.position - arrays.interval * arrays.ego_velocity)
    velocity = collision_risk.associate_velocities(moved, position, table.valid, arrays.interval)
    official = options.risk == "rank_official"
    rank = collision_risk.collision_ranks(
        position,
        velocity,
        boxes[:, 3:5],
        boxes[:, 6],
        arrays.ego_velocity,
        official=official,
        steps=arrays.steps,
        max_steps=_MOST_STEPS,
    )
    ttc = collision_risk.time_to_collision(position, velocity, boxes[:, 3:5], arrays.ego_velocity)
    rank = jnp.where(table.valid, rank, collision_risk.NONE)
    ttc = jnp.where(table.valid, ttc, collision_risk.NEVER)
    order = _inspection_order(options, patches, table, ttc, rank)
    labels = jnp.where(table.slots < rows, table.slots + 1, 0).reshape(arrays.range.shape)
    return Objects(
        table.valid,
        boxes,
        table.low,
        table.high,
        table.count,
        jnp.where(table.valid, table.distance, 0),
        flat,
        velocity,
        ttc,
        rank,
        patches,
        image_patches.bucket_of(patches.boxes, options.buckets).astype(jnp.int32),
        order.astype(jnp.int32),
        table.overflow,
        labels,
        Tracks(position, table.valid),
    )


def _inspection_order(options, patches: Patches, table, ttc, rank):
    """A patch is as urgent as the most dangerous of its clusters."""

    def least(values, empty):
        return jnp.where(patches.members, values[None], empty).min(1)

    distance = least(table.distance, jnp.inf)
    if options.risk == "distance":
        return collision_risk.urgency_order(distance, valid=patches.valid)
    if options.risk == "ttc":
        soonest = least(ttc, jnp.inf)
        return collision_risk.urgency_order(distance, ttc=soonest, valid=patches.valid)
    highest = jnp.where(patches.members, rank[None], -1).max(1)
    return collision_risk.urgency_order(distance, rank=highest, valid=patches.valid)
