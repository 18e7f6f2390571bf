"""Textures on a vehicle of a simulated street, as the project's camera renderer sees it.

The camera renderer (`jaxmodels.driving.camera_renderer`) traces rays on NumPy; what it computes is
affine in the paint of a vehicle. A scene is therefore traced twice, with a black and with a white
lead vehicle: the difference is how much of a texture each pixel of the rear shows (nothing of
windows, lamps and shadows), and lens and sensor follow under `jit`, differentiable in the texture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving import camera_renderer, driving_scene
from jaxmodels.driving.camera_projection import Camera
from jaxmodels.driving.driving_scene import KINDS, NAMES, Scene
from jaxmodels.security.driving_renderer import Rendered
from jaxmodels.security.patches import grid_sample

LEAD = "car"
REACH = 30.0  # m, the farthest rear of a drive-up
LIGHT = (0.7, 1.3)
_CORRIDOR = 2.8  # m beside the lead vehicle's way that is kept free
_BLUR_RADIUS = int(4 * camera_renderer.BLUR + 0.5)  # scipy's


class StreetFrames(NamedTuple):
    """M scenes with a lead vehicle, before lens and sensor.

    Attributes:
      base: [M, H, W, 3] colors without the rear's paint. gain: [M, H, W], how much of a texture a
        pixel shows. points: [M, H, W, 2], where on it, in -1..1 from left to right, top to bottom.
      boxes: [M, 4] of the lead vehicle (x0, y0, x1, y1) in pixels.
    """

    base: jax.Array
    gain: jax.Array
    points: jax.Array
    boxes: jax.Array


class LeadPose(NamedTuple):
    """Rear of the lead vehicle: `distance` m from the camera, `lateral` m to the right, `yaw`."""

    distance: float
    lateral: float = 0.0
    yaw: float = 0.0


def drive_up(frames: int, lateral: float = 0.0, yaw: float = 0.0) -> list[LeadPose]:
    """An approach from 30 m to 6 m in equal steps."""
    return [LeadPose(float(d), lateral, yaw) for d in np.linspace(REACH, 6.0, frames)]


def sample_pose(rng: np.random.Generator) -> LeadPose:
    """Uniform over the drive-up: 30 to 6 m, +-1 m, +-10 degrees."""
    yaw = np.deg2rad(rng.uniform(-10, 10))
    return LeadPose(rng.uniform(6.0, REACH), rng.uniform(-1, 1), float(yaw))


def with_lead(scene: Scene, pose: LeadPose, paint: np.ndarray) -> Scene:
    """The scene with a car of this paint [3] as its last object and nothing before or around it."""
    _, _, length, width, height = KINDS[LEAD]
    x0 = camera_renderer.CAMERA_PLACE[0] + pose.distance
    x = x0 + length / 2 * np.cos(pose.yaw)
    y = -pose.lateral + length / 2 * np.sin(pose.yaw)
    beside = np.abs(scene.boxes[:, 1]) - scene.boxes[:, 4] / 2
    before = scene.boxes[:, 0] - scene.boxes[:, 3] / 2
    free = (beside > _CORRIDOR) | (before > x0 + length + 3.0)
    # The two parts of a sign go together.
    free = np.asarray([free[scene.ids == i].all() for i in scene.ids], bool)
    box = np.asarray([x, y, height / 2, length, width, height, pose.yaw])
    box[2] += driving_scene.ground_height(scene, box[0], box[1])

    def joined(array, value):
        return np.concatenate([array[free], np.asarray([value], array.dtype)])

    return dataclasses.replace(
        scene,
        kinds=joined(scene.kinds, NAMES.index(LEAD)),
        boxes=joined(scene.boxes, box),
        velocity=joined(scene.velocity, (scene.ego_speed, 0.0)),
        colors=joined(scene.colors, paint),
        black=joined(scene.black, False),
        ids=joined(scene.ids, scene.ids.max(initial=0) + 1),
        lane=joined(scene.lane, 1),
        wish=joined(scene.wish, scene.ego_speed),
    )


def trace_frames(
    scenes: Sequence[Scene], poses: Sequence[LeadPose], camera: Camera, paint: np.ndarray
) -> StreetFrames:
    """Scene i with the lead vehicle at pose i; `paint` [3] is the lead vehicle's elsewhere."""
    paint = np.asarray(paint, np.float32)
    rows = []
    for number, (scene, pose) in enumerate(zip(scenes, poses, strict=True)):
        leads = [with_lead(scene, pose, np.full(3, value)) for value in (0.0, 1.0)]
        black, white = (
            camera_renderer.trace(lead, camera, np.random.default_rng((number, 1)))
            for lead in leads
        )
        # The paint weighs every channel alike.
        weight = (white.color - black.color).mean(-1)
        own = black.surface == len(leads[0].boxes)
        local = black.local
        rear = own & (black.face == 0) & (local[..., 0] < 0)
        gain = np.where(rear, weight, 0).astype(np.float32)
        elsewhere = np.where(own & ~rear, weight, 0)[..., None]
        points = np.stack([-local[..., 1], -local[..., 2]], -1) * rear[..., None]
        y, x = np.nonzero(own)
        if not len(x):
            raise ValueError(f"the lead vehicle at {pose} is not in the picture")
        box = np.asarray([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)
        rows.append((black.color + elsewhere * paint, gain, points.astype(np.float32), box))
    return StreetFrames(*(jnp.asarray(np.stack(part)) for part in zip(*rows)))


def blurred(images: jax.Array) -> jax.Array:
    """The lens: Gaussian blur of images [B, H, W, C], edges mirrored, as in the camera renderer."""
    radius, sigma = _BLUR_RADIUS, camera_renderer.BLUR
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (radius, radius)
        padded = jnp.pad(images, pads, mode="symmetric")
        size = images.shape[axis]
        images = sum(
            w * jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k, w in enumerate(weights)
        )
    return images


def photograph(
    frames: StreetFrames, texture: jax.Array, exposure: jax.Array, noise: jax.Array
) -> Rendered:
    """Frames with the texture [side, side, 3] on the rear, as the camera takes them.

    `exposure` [B] multiplies colors; `noise` [B, H, W, 3] is added, in units of the sensor's.
    """
    # At the very edge the texture's outer pixels, not the zeros outside.
    limit = 1 - 1 / np.asarray(texture.shape[1::-1], np.float32)
    points = jnp.clip(frames.points, -limit, limit)
    seen = jax.vmap(grid_sample, in_axes=(None, 0))(texture, points)
    color = blurred(frames.base + frames.gain[..., None] * seen)
    color = color * exposure[:, None, None, None] + camera_renderer.SENSOR_NOISE * noise
    return Rendered(jnp.clip(color, 0, 1), frames.boxes)


def sample_photographs(
    key: jax.Array, frames: StreetFrames, texture: jax.Array, batch: int
) -> Rendered:
    """`batch` frames drawn at random, in light of 0.7 to 1.3 and with fresh sensor noise."""
    choice, light, noise = jax.random.split(key, 3)
    rows = jax.random.randint(choice, (batch,), 0, len(frames.base))
    chosen = jax.tree.map(lambda part: part[rows], frames)
    exposure = jax.random.uniform(light, (batch,), minval=LIGHT[0], maxval=LIGHT[1])
    return photograph(chosen, texture, exposure, jax.random.normal(noise, chosen.base.shape))
