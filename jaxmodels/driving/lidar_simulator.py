"""Ray-cast LiDAR over a simulated scene, on NumPy."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxmodels.driving.driving_scene import CYLINDER, FOLIAGE_ELONGATION, Scene
from jaxmodels.driving.range_image import MAX_RANGE, Sensor

MOUNT = (1.43, 0.0, 2.1)  # meters, about where Waymo's top LiDAR is
_REACH_SCALE = 90.0  # meters at which most rays are lost
BLACK_DROPOUT = 0.8


@dataclasses.dataclass(frozen=True)
class Noise:
    """Errors of a simulated LiDAR: deviation of ranges in meters, share of lost rays."""

    deviation: float = 0.02
    dropout: float = 0.03
    fading: bool = True


QUIET = Noise(0.0, 0.0, False)


class Hits(NamedTuple):
    """First surfaces along rays.

    Attributes:
      distance: [...] meters, inf for none. surface: int32 [...], row of the scene + 1, 0 ground,
        -1 nothing. incidence: |cosine| between ray and normal. local: [..., 3], the hit in the
        object's own frame divided by half its size (-1..1), 0 on the ground.
      face: int32 [...], axis of the face hit (0 front or back, 1 side, 2 top).
    """

    distance: np.ndarray
    surface: np.ndarray
    incidence: np.ndarray
    local: np.ndarray
    face: np.ndarray


def default_extrinsic(place: tuple[float, float, float] = MOUNT) -> np.ndarray:
    """Sensor to vehicle [4, 4] of a sensor that looks ahead from `place`."""
    extrinsic = np.eye(4)
    extrinsic[:3, 3] = place
    return extrinsic


def ray_directions(inclinations: np.ndarray, azimuths: np.ndarray) -> np.ndarray:
    """Unit vectors [H, W, 3] in the sensor's frame."""
    up, turn = np.asarray(inclinations)[:, None], np.asarray(azimuths)[None]
    return np.stack(
        [np.cos(up) * np.cos(turn), np.cos(up) * np.sin(turn), np.sin(up) + 0 * turn], axis=-1
    )


def ground_hits(scene: Scene, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Distance along rays [..., 3] to the ground (inf for none) and |cosine| of incidence."""
    tangent = np.tan(scene.slope)
    falling = tangent * rays[..., 0] - rays[..., 2]
    height = origin[2] - tangent * origin[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.where(falling > 1e-9, height / falling, np.inf)
        distance = flat
        if scene.kerb:
            raised = np.where(falling > 1e-9, (height - scene.kerb) / falling, np.inf)
            aside = np.abs(origin[1] + raised * rays[..., 1]) > scene.kerb_y
            beyond = np.abs(origin[1] + flat * rays[..., 1]) > scene.kerb_y
            edge = (np.sign(rays[..., 1]) * scene.kerb_y - origin[1]) / rays[..., 1]
            distance = np.where(aside, raised, np.where(beyond, edge, flat))
    normal = np.cos(scene.slope) * falling
    return np.where(distance > 0, distance, np.inf), np.abs(normal)


def box_hits(box: np.ndarray, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Distance, |cosine|, local coordinates and face of rays [..., 3] on a box (slab method)."""
    rotation = _turn(box[6])
    start = (origin - box[:3]) @ rotation
    ways = rays @ rotation
    half = box[3:6] / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-half - start) / ways, (half - start) / ways
    low, high = np.minimum(first, second), np.maximum(first, second)
    face = low.argmax(-1)
    entry, leave = low.max(-1), high.min(-1)
    hit = (entry <= leave) & (entry > 0)
    distance = np.where(hit, entry, np.inf)
    local = (start + np.where(hit, entry, 0)[..., None] * ways) / half
    incidence = np.abs(np.take_along_axis(ways, face[..., None], -1)[..., 0])
    return distance, incidence, local, face


def cylinder_hits(box: np.ndarray, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same on an upright cylinder of the box's length as diameter, with its top."""
    radius, half = box[3] / 2, box[5] / 2
    start = origin - box[:3]
    a = rays[..., 0] ** 2 + rays[..., 1] ** 2
    b = start[0] * rays[..., 0] + start[1] * rays[..., 1]
    c = start[0] ** 2 + start[1] ** 2 - radius**2
    square = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        side = (-b - np.sqrt(square)) / a
        lid = (half - start[2]) / rays[..., 2]
    at_side = start[2] + side * rays[..., 2]
    on_side = (square > 0) & (side > 0) & (np.abs(at_side) <= half)
    x, y = start[0] + lid * rays[..., 0], start[1] + lid * rays[..., 1]
    on_lid = (lid > 0) & (x * x + y * y <= radius**2) & (start[2] > half)
    side, lid = np.where(on_side, side, np.inf), np.where(on_lid, lid, np.inf)
    distance = np.minimum(side, lid)
    face = np.where(lid < side, 2, 1)
    at = np.where(np.isfinite(distance), distance, 0)
    local = (start + at[..., None] * rays) / (radius, radius, half)
    flat = np.abs(local[..., 0] * rays[..., 0] + local[..., 1] * rays[..., 1])
    return distance, np.where(face == 2, np.abs(rays[..., 2]), flat), local, face


def object_hits(scene: Scene, row: int, origin: np.ndarray, rays: np.ndarray):
    """`box_hits` or `cylinder_hits` of one object."""
    hits = cylinder_hits if scene.shapes[row] == CYLINDER else box_hits
    return hits(scene.boxes[row], origin, rays)


def _turn(yaw: float) -> np.ndarray:
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def cast(scene: Scene, origin: np.ndarray, rays: np.ndarray, max_range: float = MAX_RANGE) -> Hits:
    """First hits of rays [H, W, 3] (vehicle frame, unit length) from `origin`.

    Columns share an azimuth: objects are tested in the columns that can see them.
    """
    distance, incidence = ground_hits(scene, origin, rays)
    surface = np.zeros(distance.shape, np.int32)
    local = np.zeros(rays.shape)
    face = np.full(distance.shape, 2, np.int32)
    middle = rays[rays.shape[0] // 2]
    azimuth = np.arctan2(middle[:, 1], middle[:, 0])
    for row, box in enumerate(scene.boxes):
        columns = _columns_towards(box, origin, azimuth)
        if not len(columns):
            continue
        far, cosine, inside, side = object_hits(scene, row, origin, rays[:, columns])
        nearer = far < distance[:, columns]
        for whole, part in (
            (distance, far),
            (incidence, cosine),
            (surface, np.int32(row + 1)),
            (face, side),
        ):
            whole[:, columns] = np.where(nearer, part, whole[:, columns])
        local[:, columns] = np.where(nearer[..., None], inside, local[:, columns])
    lost = ~(distance <= max_range)
    return Hits(
        np.where(lost, np.inf, distance), np.where(lost, -1, surface), incidence, local, face
    )


def _columns_towards(box: np.ndarray, origin: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    offset = box[:2] - origin[:2]
    reach, radius = np.hypot(*offset), np.hypot(box[3], box[4]) / 2
    if reach <= radius:
        return np.arange(len(azimuth))
    half = np.arcsin(radius / reach) + 0.01
    apart = azimuth - np.arctan2(offset[1], offset[0])
    return np.flatnonzero(np.abs((apart + np.pi) % (2 * np.pi) - np.pi) <= half)


class Scan(NamedTuple):
    """range: meters [H, W], 0 for no return. elongation: [H, W] in 0..1. surface: int32 [H, W]."""

    range: np.ndarray
    elongation: np.ndarray
    surface: np.ndarray


def scan(
    scene: Scene,
    sensor: Sensor,
    extrinsic: np.ndarray | None = None,
    *,
    seed: int = 0,
    noise: Noise = Noise(),
) -> Scan:
    """A range image of the scene, with errors drawn from `seed`.

    Ranges get normal errors; rays are lost at random, more of them far away and at grazing
    incidence (`1 - exp(-(r / 90)^4 / sqrt(cos))`), most of them on black objects.
    """
    extrinsic = default_extrinsic() if extrinsic is None else np.asarray(extrinsic)
    rays = ray_directions(sensor.rows, sensor.azimuths) @ extrinsic[:3, :3].T
    hits = cast(scene, extrinsic[:3, 3], rays)
    rng = np.random.default_rng(seed)
    distance = np.where(np.isfinite(hits.distance), hits.distance, 0.0)
    measured = distance + noise.deviation * rng.normal(size=distance.shape)
    kept = np.full(distance.shape, 1 - noise.dropout)
    if noise.fading:
        grazing = np.sqrt(np.maximum(hits.incidence, 0.05))
        kept = kept * np.exp(-((distance / _REACH_SCALE) ** 4) / grazing)
    black = np.append(False, scene.black)[np.maximum(hits.surface, 0)]
    if noise.dropout:
        kept = kept * np.where(black, 1 - BLACK_DROPOUT, 1.0)
    seen = (hits.surface >= 0) & (rng.random(distance.shape) < kept) & (measured > 0)
    elongation = rng.uniform(0, 0.05, distance.shape)
    leaves = np.append(False, scene.foliage)[np.maximum(hits.surface, 0)]
    elongation = np.where(leaves, elongation + FOLIAGE_ELONGATION, elongation)
    return Scan(
        np.where(seen, measured, 0).astype(np.float32),
        np.where(seen, elongation, 0).astype(np.float32),
        hits.surface,
    )
