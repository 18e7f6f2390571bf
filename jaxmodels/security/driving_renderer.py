"""A differentiable pinhole renderer of a drive-up: textured planes over photographed backgrounds.

The camera looks along +z, x to the right, y down, `HEIGHT` above the road. A vehicle's rear, a
billboard or a piece of road is a rectangle in space; its texture is sampled where each pixel's ray
meets it, so that gradients reach the texture through perspective, yaw and light.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security.patches import grid_sample

CAMERA_HEIGHT = 1.4  # m above the road
VEHICLE_SIZE = (1.9, 1.5)  # width, height of a rear in m
SIGN_SIZE = (1.6, 1.6)
ROAD_PATCH_SIZE = (2.2, 4.0)  # width, length of what is painted on the road
SURFACES = ("rear", "billboard", "road")
TEXTURE_SIDE = 64


class Pose(NamedTuple):
    """Where the lead vehicle is and how it is lit, each [B].

    `distance` in m; `lateral` offset in m, right positive; `yaw` in radians; `light` multiplies
    colors.
    """

    distance: jax.Array
    lateral: jax.Array
    yaw: jax.Array
    light: jax.Array


class Rendered(NamedTuple):
    """`images` [B, H, W, 3] in [0, 1]; `boxes` [B, 4] of the target (x0, y0, x1, y1) in pixels."""

    images: jax.Array
    boxes: jax.Array


def sample_poses(key: jax.Array, batch: int) -> Pose:
    """Uniform over the drive-up: 30 to 6 m, +-1 m, +-10 degrees, light 0.7 to 1.3."""
    u = jax.random.uniform(key, (4, batch))
    return Pose(
        distance=6 + 24 * u[0],
        lateral=2 * u[1] - 1,
        yaw=jnp.deg2rad(20 * u[2] - 10),
        light=0.7 + 0.6 * u[3],
    )


def drive_up(frames: int, lateral: float = 0.0, yaw: float = 0.0, light: float = 1.0) -> Pose:
    """An approach from 30 m to 6 m in equal steps."""
    ones = jnp.ones(frames)
    return Pose(jnp.linspace(30.0, 6.0, frames), lateral * ones, yaw * ones, light * ones)


def focal_length(width: int) -> float:
    """In pixels, for a horizontal field of view of about 53 degrees."""
    return float(width)


def _rectangle(surface: str, pose: Pose):
    """Center [B, 3], unit right and down axes [B, 3] and (width, height) of a surface in m."""
    zero, one = jnp.zeros_like(pose.yaw), jnp.ones_like(pose.yaw)
    cos, sin = jnp.cos(pose.yaw), jnp.sin(pose.yaw)
    if surface == "rear":
        width, height = VEHICLE_SIZE
        center = jnp.stack(
            [pose.lateral, one * (CAMERA_HEIGHT - 0.25 - height / 2), pose.distance], -1
        )
        return (
            center,
            jnp.stack([cos, zero, sin], -1),
            jnp.stack([zero, one, zero], -1),
            (
                width,
                height,
            ),
        )
    if surface == "billboard":
        width, height = SIGN_SIZE
        center = jnp.stack([pose.lateral + 3.2, one * (CAMERA_HEIGHT - 2.4), pose.distance], -1)
        return (
            center,
            jnp.stack([cos, zero, sin], -1),
            jnp.stack([zero, one, zero], -1),
            (
                width,
                height,
            ),
        )
    if surface != "road":
        raise ValueError(f"surface {surface!r}; known: {', '.join(SURFACES)}")
    width, length = ROAD_PATCH_SIZE
    center = jnp.stack([pose.lateral, one * CAMERA_HEIGHT, pose.distance - 3.5], -1)
    right, down = jnp.stack([one, zero, zero], -1), jnp.stack([zero, zero, -one], -1)
    return center, right, down, (width, length)


def _rays(height: int, width: int) -> jax.Array:
    """Direction (x / f, y / f, 1) of every pixel's center [H, W, 3]; the horizon at 40 % height."""
    f = focal_length(width)
    x = (jnp.arange(width) + 0.5 - width / 2) / f
    y = (jnp.arange(height) + 0.5 - 0.4 * height) / f
    grid = jnp.stack(jnp.meshgrid(x, y), -1)
    return jnp.concatenate([grid, jnp.ones((height, width, 1))], -1)


def paint(
    images: jax.Array, texture: jax.Array, alpha: jax.Array, surface: str, pose: Pose
) -> Rendered:
    """Images [B, H, W, 3] with the texture [h, w, 3] (or [B, ...]) on a surface, seen from `pose`.

    `alpha` [h, w, 1] of the texture; the box encloses the whole rectangle, clipped to the image.
    """
    height, width = images.shape[1:3]
    rays = _rays(height, width)
    center, right, down, size = _rectangle(surface, pose)
    normal = jnp.cross(right, down)
    along = jnp.einsum("bi,hwi->bhw", normal, rays)
    safe = jnp.where(jnp.abs(along) < 1e-6, 1e-6, along)
    t = jnp.einsum("bi,bi->b", normal, center)[:, None, None] / safe
    offset = t[..., None] * rays - center[:, None, None]
    u = jnp.einsum("bhwi,bi->bhw", offset, right) / (size[0] / 2)
    v = jnp.einsum("bhwi,bi->bhw", offset, down) / (size[1] / 2)
    # Rays away from the plane see nothing of it.
    points = jnp.where((t > 0)[..., None], jnp.stack([u, v], -1), 2.0)
    layered = jnp.concatenate([texture, jnp.broadcast_to(alpha, (*texture.shape[:-1], 1))], -1)
    seen = jax.vmap(grid_sample, in_axes=(0 if layered.ndim == 4 else None, 0))(layered, points)
    light = pose.light[:, None, None, None]
    color, cover = jnp.clip(seen[..., :3] * light, 0, 1), seen[..., 3:]
    images = images * (1 - cover) + color * cover
    return Rendered(images, _boxes(center, right, down, size, height, width))


def _boxes(center, right, down, size, height, width):
    f = focal_length(width)
    corners = jnp.stack(
        [
            center + sx * right * size[0] / 2 + sy * down * size[1] / 2
            for sx in (-1, 1)
            for sy in (-1, 1)
        ],
        1,
    )
    depth = jnp.maximum(corners[..., 2], 0.1)
    x = corners[..., 0] / depth * f + width / 2
    y = corners[..., 1] / depth * f + 0.4 * height
    box = jnp.stack([x.min(1), y.min(1), x.max(1), y.max(1)], -1)
    return jnp.clip(box, 0, jnp.asarray([width, height, width, height], box.dtype))


def rear_parts(side: int = TEXTURE_SIDE) -> tuple[np.ndarray, np.ndarray]:
    """(fixed [side, side, 3], paintable [side, side, 1]) of a vehicle's rear.

    Fixed are the window, lights, plate, bumper and wheels; the paintable rest takes a texture.
    """
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    fixed = np.zeros((side, side, 3), np.float32)
    paintable = np.ones((side, side), bool)

    def part(where, color):
        fixed[where] = color
        paintable[where] = False

    part((np.abs(x - 0.5) < 0.34) & (y > 0.06) & (y < 0.3), (0.12, 0.15, 0.2))
    for cx in (0.1, 0.9):
        part((np.abs(x - cx) < 0.075) & (y > 0.4) & (y < 0.52), (0.75, 0.06, 0.06))
        part((np.abs(x - cx) < 0.085) & (y > 0.86), (0.04, 0.04, 0.04))
    part((np.abs(x - 0.5) < 0.13) & (y > 0.62) & (y < 0.7), (0.9, 0.9, 0.85))
    part((y > 0.78) & (y <= 0.86), (0.18, 0.18, 0.19))
    part((y > 0.86) & (np.abs(x - 0.5) < 0.3), (0.03, 0.03, 0.03))
    return fixed, paintable[..., None].astype(np.float32)


def rear_alpha(side: int = TEXTURE_SIDE) -> np.ndarray:
    """[side, side, 1]: the outline of a rear, rounded above and open between the wheels."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    shoulder = np.abs(x - 0.5) < 0.36 + 0.14 * np.clip(y / 0.34, 0, 1)
    gap = (y > 0.9) & (np.abs(x - 0.5) < 0.3)
    return (shoulder & ~gap).astype(np.float32)[..., None]


def dressed(texture: jax.Array) -> jax.Array:
    """A rear [.., side, side, 3] whose paintable part is the texture."""
    fixed, paintable = rear_parts(texture.shape[-2])
    return fixed * (1 - paintable) + texture * paintable


def road_scene(photo: jax.Array, gray: jax.Array) -> jax.Array:
    """A background: the photograph [B, H, W, 3], and below the horizon a road of shade `gray` [B].

    The road narrows towards the horizon and has a dashed line beside the lane.
    """
    height, width = photo.shape[1:3]
    rays = _rays(height, width)
    below = rays[..., 1] > 1e-3
    depth = CAMERA_HEIGHT / jnp.maximum(rays[..., 1], 1e-3)
    x = rays[..., 0] * depth
    road = below & (jnp.abs(x) < 5.4)
    dashes = (jnp.abs(jnp.abs(x) - 1.8) < 0.08) & (depth % 6 < 3)
    edge = jnp.abs(jnp.abs(x) - 5.2) < 0.1
    shade = jnp.broadcast_to(gray[:, None, None, None], (*photo.shape[:3], 1))
    shade = jnp.where((dashes | edge)[None, ..., None], 0.85, shade)
    return jnp.where(road[None, ..., None], shade, photo)
