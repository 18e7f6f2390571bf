"""From vehicle coordinates to pixels and back, and the image boxes of clusters.

The camera frame has x forward, y left, z up; intrinsics are [fu fv cu cv k1 k2 p1 p2 k3] and
extrinsics map camera to vehicle coordinates (waymo-research/waymo-open-dataset@99a4cb3f). Flat
boxes follow cpsintegrationlab/depth_clustering@3f30c545, `post_processing`, but for the camera's
translation, which is kept unless `drop_translation`. Global shutter.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving.range_image import check_extrinsic, inverse_transform, transform

NEAR_PLANE = 0.1  # meters before the camera at which partial boxes are cut
# The polynomial folds points far off the axis back into the image: beyond 45 degrees nothing is
# trusted.
_TRUSTED_SQUARE = 1.0
_UNDISTORT_ROUNDS = 40
_LEAST_SHARE = 2.0**-53  # of a box in the image; 1 minus less is 1 in double precision


class Camera(NamedTuple):
    """A calibrated camera.

    Attributes:
      intrinsic: [9], focal lengths and center in pixels. extrinsic: camera to vehicle [4, 4].
      width, height: pixels.
    """

    intrinsic: Any
    extrinsic: Any
    width: int
    height: int


def check_camera(camera: Camera, image: Any = None) -> Camera:
    """The camera with float32 calibration, checked on the host.

    Raises ValueError: not nine intrinsics, a focal length that is not positive, no rigid extrinsic,
    or an image of another size or kind (see `check_image`).
    """
    intrinsic = np.asarray(camera.intrinsic, np.float64)
    if intrinsic.shape != (9,):
        raise ValueError(
            f"intrinsics must be 9 numbers (fu fv cu cv k1 k2 p1 p2 k3), got {intrinsic.shape}"
        )
    if not (intrinsic[:2] > 0).all():
        raise ValueError(f"focal lengths must be positive, got {intrinsic[:2].tolist()}")
    extrinsic = check_extrinsic(camera.extrinsic, "camera extrinsic")
    if image is not None:
        check_image(image)
        height, width = np.shape(image)[:2]
        if (width, height) != (camera.width, camera.height):
            raise ValueError(
                f"image is {width}x{height}, the calibration is for {camera.width}x{camera.height}"
            )
    return camera._replace(
        intrinsic=intrinsic.astype(np.float32), extrinsic=extrinsic.astype(np.float32)
    )


def check_image(image: Any) -> None:
    """Refuse anything but RGB images [H, W, 3] of uint8 or of floats; warn beyond 0..1.

    Raises ValueError naming the shape or the dtype. Whether red comes first cannot be seen.
    """
    shape, dtype = np.shape(image), np.asarray(image).dtype
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"image must be [H, W, 3] in RGB order, got shape {shape}")
    if dtype == np.uint8:
        return
    if dtype.kind != "f":
        raise ValueError(f"image must be uint8 or floats in 0..1, got {dtype}")
    low, high = float(np.min(image)), float(np.max(image))
    if not (low >= 0 and high <= 1):
        warnings.warn(f"floating image must be in 0..1, got {low:g}..{high:g}", stacklevel=2)


def scaled_intrinsic(intrinsic: Any, factor: float) -> Any:
    """Intrinsics of the same camera for an image `factor` times as large."""
    scale = np.asarray([factor] * 4 + [1.0] * 5)
    return np.asarray(intrinsic) * scale


# Lens


def distort(plane: jax.Array, intrinsic: jax.Array) -> jax.Array:
    """Brown's polynomial on normalized coordinates [..., 2]: k1 k2 k3 radial, p1 p2 tangential."""
    xp = plane.__array_namespace__()
    k1, k2, p1, p2, k3 = (intrinsic[i] for i in range(4, 9))
    x, y = plane[..., 0], plane[..., 1]
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return xp.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y),
        ],
        axis=-1,
    )


def undistort(plane: jax.Array, intrinsic: jax.Array) -> jax.Array:
    """The inverse of `distort` by fixed-point iteration, [..., 2].

    Converges where the polynomial is one to one, as it is in the image of a usual lens.
    """
    intrinsic = jnp.asarray(intrinsic)
    k1, k2, p1, p2, k3 = (intrinsic[i] for i in range(4, 9))
    target = jnp.asarray(plane)

    def refine(_, guess):
        x, y = guess[..., 0], guess[..., 1]
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        shift = jnp.stack(
            [
                2 * p1 * x * y + p2 * (square + 2 * x * x),
                2 * p2 * x * y + p1 * (square + 2 * y * y),
            ],
            axis=-1,
        )
        return (target - shift) / radial[..., None]

    return jax.lax.fori_loop(0, _UNDISTORT_ROUNDS, refine, target)


def to_camera(points: jax.Array, extrinsic: jax.Array) -> jax.Array:
    """Points [..., 3] of the vehicle frame in camera coordinates."""
    return transform(inverse_transform(extrinsic), points)


def camera_to_pixels(
    points: jax.Array, intrinsic: jax.Array, *, distortion: bool = True
) -> jax.Array:
    """Pixels [..., 2] of points in camera coordinates, whether they can be seen or not."""
    xp = points.__array_namespace__()
    x = points[..., 0]
    ahead = xp.where(x == 0, 1e-12, x)
    plane = -points[..., 1:] / ahead[..., None]
    if distortion:
        plane = distort(plane, intrinsic)
    return plane * intrinsic[:2] + intrinsic[2:4]


def pixel_rays(pixels: jax.Array, intrinsic: jax.Array, *, distortion: bool = True) -> jax.Array:
    """Directions [..., 3] in camera coordinates, one meter ahead, seen at pixels [..., 2]."""
    plane = (pixels - intrinsic[2:4]) / intrinsic[:2]
    if distortion:
        plane = undistort(plane, intrinsic)
    plane = jnp.asarray(plane)
    return jnp.concatenate([jnp.ones_like(plane[..., :1]), -plane], axis=-1)


class Projected(NamedTuple):
    """uv: pixels [..., 2], 0 where not trusted. depth: meters ahead [...]. in_front: bool.
    visible: bool, trusted and inside the image."""

    uv: jax.Array
    depth: jax.Array
    in_front: jax.Array
    visible: jax.Array


def project_points(points: jax.Array, camera: Camera, *, distortion: bool = True) -> Projected:
    """Project points [..., 3] of the vehicle frame.

    Only points in front of the camera and within 45 degrees of its axis are trusted.
    """
    intrinsic = jnp.asarray(camera.intrinsic)
    seen = to_camera(jnp.asarray(points), jnp.asarray(camera.extrinsic))
    depth = seen[..., 0]
    in_front = depth > 0
    off_axis = jnp.square(seen[..., 1]) + jnp.square(seen[..., 2])
    trusted = in_front & (off_axis <= _TRUSTED_SQUARE * depth * depth)
    # Untrusted points would overflow the polynomial.
    safe = jnp.where(trusted[..., None], seen, jnp.asarray([1.0, 0, 0], seen.dtype))
    uv = camera_to_pixels(safe, intrinsic, distortion=distortion)
    inside = (uv >= 0).all(-1) & (uv[..., 0] < camera.width) & (uv[..., 1] < camera.height)
    return Projected(jnp.where(trusted[..., None], uv, 0), depth, in_front, trusted & inside)


# Image boxes of clusters


class FlatBoxes(NamedTuple):
    """Image boxes of objects; rows that are not `ok` are zero.

    Attributes:
      boxes: x1 y1 x2 y2 in whole pixels [N, 4]. depth: meters to the nearest corner [N].
      truncation: share of the box outside the image [N]. ok: bool [N].
    """

    boxes: jax.Array
    depth: jax.Array
    truncation: jax.Array
    ok: jax.Array


class _Extremes(NamedTuple):
    low: jax.Array  # [N, 2] pixels
    high: jax.Array  # [N, 2]
    nearest: jax.Array  # [N] meters
    behind: jax.Array  # bool [N], any corner
    all_behind: jax.Array  # bool [N]


def _corner_pixels(corners, camera, distortion, partial, drop_translation):
    """Pixels, distance from the frame's origin and whether behind, of corners [..., 3]."""
    extrinsic, intrinsic = jnp.asarray(camera.extrinsic), jnp.asarray(camera.intrinsic)
    if drop_translation:
        extrinsic = extrinsic.at[:3, 3].set(0)
    seen = to_camera(corners, extrinsic)
    behind = seen[..., 0] < 0
    distance = jnp.sqrt((corners * corners).sum(-1))
    if not partial:
        return camera_to_pixels(seen, intrinsic, distortion=distortion), distance, behind
    # Cut at the near plane; far off the axis, outside any image, the polynomial means nothing.
    cut = jnp.concatenate([jnp.maximum(seen[..., :1], NEAR_PLANE), seen[..., 1:]], axis=-1)
    pixels = camera_to_pixels(cut, intrinsic, distortion=False)
    if distortion:
        near_axis = jnp.square(cut[..., 1:]).sum(-1) <= _TRUSTED_SQUARE * jnp.square(cut[..., 0])
        bent = camera_to_pixels(cut, intrinsic, distortion=True)
        pixels = jnp.where(near_axis[..., None], bent, pixels)
    return pixels, distance, seen[..., 0] < NEAR_PLANE


def _round_away(x):
    return jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)


def _boxes_of(found: _Extremes, camera: Camera, max_truncation: float, partial: bool) -> FlatBoxes:
    whole = _round_away(jnp.concatenate([found.low, found.high], axis=-1))
    limit = jnp.asarray([camera.width - 1, camera.height - 1] * 2, whole.dtype)
    clipped = jnp.clip(whole, 0, limit)

    def extent(boxes):
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    full, shown = extent(whole), extent(clipped)
    truncation = 1 - shown / jnp.where(full > 0, full, 1)
    # `truncation < max_truncation` as doubles have it, in any precision: a corner just before the
    # camera makes boxes of which less than a float's rounding is in the image.
    enough = shown > ((1 - max_truncation) or _LEAST_SHARE) * full
    ok = (full > 0) & (shown > 0)
    if partial:
        # The unclipped area of a cut box means nothing.
        ok &= ~found.all_behind & (found.behind | enough)
    else:
        ok &= ~found.behind & enough
    return FlatBoxes(
        jnp.where(ok[:, None], clipped, 0),
        jnp.where(ok, found.nearest, 0),
        jnp.where(ok, truncation, 0),
        ok,
    )


def flat_boxes(
    corners: jax.Array,
    mask: jax.Array,
    camera: Camera,
    *,
    max_truncation: float = 0.7,
    distortion: bool = True,
    partial: bool = False,
    drop_translation: bool = False,
) -> FlatBoxes:
    """Boxes around the projected corners of N objects.

    An object with a corner behind the camera, no area in the image, or at least `max_truncation` of
    its area outside is not `ok`. The published code's default is 0.7, its Waymo settings 1.0.

    Args:
      corners: [N, K, 3], vehicle frame. mask: bool [N, K], which corners count.
      partial: cut objects at a plane before the camera instead of dropping them.
      drop_translation: as if the camera stood in the frame's origin, as the published code.
    """
    corners = jnp.asarray(corners)
    pixels, distance, behind = _corner_pixels(
        corners, camera, distortion, partial, drop_translation
    )
    infinite = jnp.asarray(jnp.inf, pixels.dtype)
    counted = mask[..., None]
    low = jnp.where(counted, pixels, infinite).min(1)
    high = jnp.where(counted, pixels, -infinite).max(1)
    some = mask.any(1)
    found = _Extremes(
        jnp.where(some[:, None], low, 0),
        jnp.where(some[:, None], high, 0),
        jnp.where(mask, distance, infinite).min(1),
        (behind & mask).any(1) | ~some,
        (behind | ~mask).all(1),
    )
    return _boxes_of(found, camera, max_truncation, partial)


def flat_boxes_of_points(
    points: jax.Array,
    slots: jax.Array,
    low: jax.Array,
    high: jax.Array,
    camera: Camera,
    *,
    max_truncation: float = 0.7,
    distortion: bool = True,
    partial: bool = False,
    drop_translation: bool = False,
) -> FlatBoxes:
    """`flat_boxes` of extruded footprints: all points of a cluster at its lowest and highest z.

    The footprint's hull has the same extremes but for lens distortion, and needs no hull.

    Args:
      points: [P, 3], vehicle frame. slots: int32 [P], row of each point, N for none.
      low, high: [N, 3], of which z is taken.
    """
    rows = len(low)
    at = jnp.minimum(slots, rows - 1)
    used = slots < rows
    prisms = jnp.stack([points.at[:, 2].set(low[at, 2]), points.at[:, 2].set(high[at, 2])], axis=1)
    pixels, distance, behind = _corner_pixels(prisms, camera, distortion, partial, drop_translation)
    infinite = jnp.asarray(jnp.inf, pixels.dtype)

    def per_row(start, values, how):
        shape = (rows + 1, *values.shape[1:])
        return getattr(jnp.full(shape, start, values.dtype).at[slots], how)(values)[:rows]

    least = per_row(infinite, pixels.min(1), "min")
    most = per_row(-infinite, pixels.max(1), "max")
    some = per_row(False, used, "max")
    found = _Extremes(
        jnp.where(some[:, None], least, 0),
        jnp.where(some[:, None], most, 0),
        per_row(infinite, distance.min(1), "min"),
        per_row(False, behind.any(1), "max") | ~some,
        per_row(True, behind.all(1), "min"),
    )
    return _boxes_of(found, camera, max_truncation, partial)


def tunnel(
    low: jax.Array,
    high: jax.Array,
    depth: jax.Array,
    *,
    min_top: float | None = None,
    left: float | None = None,
    right: float | None = None,
    max_depth: float | None = None,
) -> jax.Array:
    """Which objects lie in the corridor ahead, bool [N]; None leaves a test out (dc, all off).

    Args:
      low, high: box corners [N, 3], vehicle frame. depth: meters [N].
      min_top: least height of an object's top. left, right: lateral limits, y between -right and
        left. max_depth: meters, 75 in the published settings.
    """
    inside = jnp.ones(len(depth), bool)
    if min_top is not None:
        inside &= high[:, 2] >= min_top
    if left is not None:
        inside &= low[:, 1] <= left
    if right is not None:
        inside &= high[:, 1] >= -right
    if max_depth is not None:
        inside &= depth <= max_depth
    return inside
