"""A rendered camera over a simulated scene, and the frame that LiDAR and camera see together."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from scipy import ndimage

from jaxmodels.driving import camera_projection, lidar_simulator
from jaxmodels.driving.cluster_boxes import oriented_corners
from jaxmodels.driving.driving_scene import LANE, NAMES, Scene
from jaxmodels.driving.frame import Frame, Labels2D, Labels3D
from jaxmodels.driving.lidar_simulator import Noise
from jaxmodels.driving.patch_classifier import BACKGROUND
from jaxmodels.driving.range_image import Sensor, waymo_like

CAMERA_PLACE = (1.54, 0.0, 2.0)  # meters
# Of Waymo's front camera, at 1920 x 1280.
FULL_SIZE = (1920, 1280)
INTRINSIC = (2080.0, 2080.0, 955.0, 650.0, 0.05, -0.33, 0.0025, -0.0009, 0.01)
BLUR, SENSOR_NOISE = 0.7, 4.0 / 255  # of the lens, pixels; of a channel
EXPOSURE = (0.8, 1.2)
_SHADES = np.array([0.8, 0.95, 1.1])  # front and back, side, top
_LEAST_PIXELS = 12  # an object with fewer is not labeled
_MOST_OCCLUSION = 0.85


def front_camera(scale: float = 0.5) -> camera_projection.Camera:
    """Waymo's front camera at `scale` of its size."""
    width, height = (round(side * scale) for side in FULL_SIZE)
    intrinsic = camera_projection.scaled_intrinsic(INTRINSIC, scale)
    extrinsic = lidar_simulator.default_extrinsic(CAMERA_PLACE)
    return camera_projection.Camera(intrinsic, extrinsic, width, height)


@functools.lru_cache(maxsize=4)
def _rays(intrinsic: tuple[float, ...], width: int, height: int) -> np.ndarray:
    """Unit vectors [h, w, 3] in camera coordinates through the pixels' centers."""
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).astype(
        np.float32
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        rays = np.asarray(camera_projection.pixel_rays(pixels, np.asarray(intrinsic, np.float32)))
    rays = rays.astype(np.float64)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


class Picture(NamedTuple):
    """image: uint8 [h, w, 3]. surface: int32 [h, w], row of the scene + 1, 0 ground, -1 sky.
    covered: int64 [N], pixels each object would have without the others."""

    image: np.ndarray
    surface: np.ndarray
    covered: np.ndarray


class Layers(NamedTuple):
    """What the rays meet, before lens and sensor.

    Attributes:
      color: float32 [h, w, 3]. surface, covered: see `Picture`.
      local: float32 [h, w, 3], of a hit on an object in -1..1 along its axes. face: int32 [h, w],
        axis of the face that was hit (0 front and back). Both are zero elsewhere.
    """

    color: np.ndarray
    surface: np.ndarray
    covered: np.ndarray
    local: np.ndarray
    face: np.ndarray


def render(scene: Scene, camera: camera_projection.Camera, *, seed: int = 0) -> Picture:
    """The scene as the camera sees it; textures, noise and exposure drawn from `seed`."""
    rng = np.random.default_rng((seed, 1))
    layers = trace(scene, camera, rng)
    color = ndimage.gaussian_filter(layers.color, (BLUR, BLUR, 0))
    color = color * rng.uniform(*EXPOSURE)
    color += SENSOR_NOISE * rng.standard_normal(color.shape, dtype=np.float32)
    image = (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Picture(image, layers.surface, layers.covered)


def trace(scene: Scene, camera: camera_projection.Camera, rng: np.random.Generator) -> Layers:
    """Colors and surfaces that the camera's rays meet; textures are drawn from `rng`."""
    extrinsic = np.asarray(camera.extrinsic, np.float64)
    origin = extrinsic[:3, 3]
    rays = _rays(tuple(np.asarray(camera.intrinsic).tolist()), camera.width, camera.height)
    rays = rays @ extrinsic[:3, :3].T
    distance, _ = lidar_simulator.ground_hits(scene, origin, rays)
    grounded = distance < 500
    surface = np.where(grounded, 0, -1).astype(np.int32)
    inside, faces = np.zeros(rays.shape, np.float32), np.zeros(surface.shape, np.int32)
    color = _sky(rays)
    place = origin + np.where(grounded, distance, 0)[..., None] * rays
    color[grounded] = _ground(scene, place[grounded], distance[grounded], rng)
    distance = np.where(grounded, distance, np.inf)
    covered = np.zeros(len(scene.boxes), np.int64)
    for row in range(len(scene.boxes)):
        window = _window(scene.boxes[row], camera, extrinsic)
        if window is None:
            continue
        far, _, local, face = lidar_simulator.object_hits(scene, row, origin, rays[window])
        hit = np.isfinite(far)
        covered[row] = hit.sum()
        nearer = hit & (far < distance[window])
        distance[window][nearer] = far[nearer]
        surface[window][nearer] = row + 1
        color[window][nearer] = _texture(scene, row, local[nearer], face[nearer], rng)
        inside[window][nearer], faces[window][nearer] = local[nearer], face[nearer]
    return Layers(color, surface, covered, inside, faces)


def _window(box: np.ndarray, camera, extrinsic: np.ndarray):
    """Rows and columns in which an object can show, None for none."""
    corners = oriented_corners(box[None])[0]
    # Cylinders are drawn with the length as diameter, inside their box.
    seen = (corners - extrinsic[:3, 3]) @ extrinsic[:3, :3]
    if (seen[:, 0] < 0.2).all():
        return None
    if (seen[:, 0] < 0.2).any() or (np.abs(seen[:, 1:]).max(-1) > seen[:, 0]).any():
        return slice(0, camera.height), slice(0, camera.width)
    uv = camera_projection.camera_to_pixels(seen, np.asarray(camera.intrinsic))
    low, high = np.floor(uv.min(0)) - 4, np.ceil(uv.max(0)) + 4
    left, top = (max(int(v), 0) for v in low)
    right, bottom = min(int(high[0]), camera.width), min(int(high[1]), camera.height)
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _sky(rays: np.ndarray) -> np.ndarray:
    up = np.clip(rays[..., 2:] * 3, 0, 1).astype(np.float32)
    return (1 - up) * np.float32([0.82, 0.86, 0.9]) + up * np.float32([0.45, 0.62, 0.88])


def _ground(scene: Scene, place: np.ndarray, distance: np.ndarray, rng) -> np.ndarray:
    """Asphalt with lane marks; sidewalk and grass beside it."""
    x, y = place[:, 0] + scene.time * scene.ego_speed, place[:, 1]
    gray = np.float32([0.36, 0.36, 0.37])
    color = np.broadcast_to(gray, (len(x), 3)).copy()
    grain = 0.04 / (1 + distance / 20)
    color += (grain * rng.standard_normal(len(x), dtype=np.float32))[:, None]
    across = (y + LANE / 2) % LANE
    on_line = (np.abs(across - LANE / 2) > LANE / 2 - 0.08) & (np.mod(x, 6.0) < 3.0)
    road = (y > -1.5 * LANE) & (y < 2.5 * LANE)
    color[on_line & road] = 0.85
    walk = ~road & (y > -1.5 * LANE - 3) & (y < 2.5 * LANE + 3)
    color[walk] += 0.18
    grass = ~road & ~walk
    color[grass] = color[grass] * np.float32([0.6, 1.05, 0.5])
    return color


def _texture(scene: Scene, row: int, local: np.ndarray, face: np.ndarray, rng) -> np.ndarray:
    """Colors [K, 3] of hits on one object, by its kind."""
    kind = NAMES[scene.kinds[row]]
    own = scene.colors[row].astype(np.float32)
    x, y, z = local[:, 0], local[:, 1], local[:, 2]
    color = np.broadcast_to(own, (len(x), 3)).astype(np.float32).copy()
    dark = np.float32([0.07, 0.08, 0.1])
    if kind in ("car", "van", "truck"):
        low, high = {"car": (0.15, 0.8), "van": (0.2, 0.75), "truck": (0.3, 0.7)}[kind]
        pillar = np.abs(np.abs(x) - 0.1) < 0.04
        band = (z > low) & (z < high) & (face != 2)
        if kind == "car":
            band &= ~(pillar & (face == 1))
        else:
            band &= (face == 0) | (x > 0.6)
        color[z > low] *= 0.75
        color[band] = np.float32([0.1, 0.12, 0.16])
        height = scene.boxes[row, 5]
        wheel_x = (np.abs(x) - 0.62) * scene.boxes[row, 3] / 2
        wheel_z = (z + 1) * height / 2 - 0.33
        color[(face == 1) & (wheel_x**2 + wheel_z**2 < 0.33**2)] = dark
        lamps = (face == 0) & (np.abs(y) > 0.65) & (np.abs(z + 0.15) < 0.14)
        color[lamps] = np.where(
            x[lamps, None] > 0, np.float32([1, 1, 0.8]), np.float32([0.8, 0, 0])
        )
        color[(face == 0) & (z < -0.75)] = dark
    elif kind == "pedestrian":
        color[z < -0.1] = own[::-1] * 0.5
        color[z > 0.72] = np.float32([0.85, 0.65, 0.5])
        color[z > 0.93] = dark
    elif kind == "cyclist":
        along, up = x * 0.9, (z + 1) * 0.75
        wheels = np.abs(np.hypot(np.abs(along) - 0.52, up - 0.34) - 0.3) < 0.07
        color[:] = np.float32([0.5, 0.5, 0.5])
        rider = (np.abs(along) < 0.3) & (up > 0.7)
        color[rider] = own
        color[rider & (up > 1.28)] = np.float32([0.85, 0.65, 0.5])
        color[wheels & (up < 0.75)] = dark
        front = face == 0
        color[front & (up < 0.7)] = np.float32([0.3, 0.3, 0.32])
        color[front & (up < 0.65) & (np.abs(y) < 0.15)] = dark
        color[front & (up >= 0.7)] = own
    elif kind == "sign":
        stripes = np.mod((y + z) * 2.5, 2.0) < 1.0
        color[:] = np.where(stripes[:, None], np.float32([0.85, 0.1, 0.1]), np.float32(0.95))
    elif kind in ("pole", "post"):
        color[:] = np.float32([0.45, 0.45, 0.47])
    elif kind == "trunk":
        color[:] = np.float32([0.35, 0.25, 0.17])
    elif kind == "foliage":
        color[:] = np.float32([0.15, 0.4, 0.14])
        color *= rng.uniform(0.6, 1.3, (len(x), 1)).astype(np.float32)
    else:
        rows = np.floor((z + 1) * 12)
        mortar = (np.mod((z + 1) * 12, 1) < 0.15) | (np.mod(x * 60 + rows * 0.5, 1) < 0.08)
        color[:] = np.float32([0.6, 0.45, 0.38])
        color[mortar] = np.float32([0.75, 0.72, 0.68])
    if scene.black[row] and kind not in ("sign", "post", "foliage"):
        color *= 0.35
    shade = _SHADES[face]
    if scene.shapes[row]:  # cylinders are lit from the left
        shade = np.where(face == 2, 1.1, 0.85 + 0.2 * y)
    return color * shade[:, None].astype(np.float32)


def _parts(scene: Scene) -> list[np.ndarray]:
    """Rows of every object that is not background, by rising id."""
    kept = np.flatnonzero(scene.classes != BACKGROUND)
    return [kept[scene.ids[kept] == i] for i in np.unique(scene.ids[kept])]


def labels_2d(scene: Scene, picture: Picture) -> Labels2D:
    """Boxes around the visible pixels of every object that is not background."""
    windows = ndimage.find_objects(np.maximum(picture.surface, 0), len(scene.boxes))
    rows, boxes, occlusion = [], [], []
    for parts in _parts(scene):
        found = [(row, windows[row]) for row in parts if windows[row] is not None]
        shown = sum(int((picture.surface[w] == row + 1).sum()) for row, w in found)
        hidden = 1 - shown / max(picture.covered[parts].sum(), 1)
        if shown < _LEAST_PIXELS or hidden > _MOST_OCCLUSION:
            continue
        vertical, horizontal = ([w[axis] for _, w in found] for axis in (0, 1))
        rows.append(parts[0])
        boxes.append(
            (
                min(w.start for w in horizontal),
                min(w.start for w in vertical),
                max(w.stop for w in horizontal),
                max(w.stop for w in vertical),
            )
        )
        occlusion.append(hidden)
    rows = np.asarray(rows, np.int64)
    return Labels2D(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        scene.classes[rows],
        scene.ids[rows],
        np.asarray(occlusion, np.float32),
    )


def labels_3d(scene: Scene, surface: np.ndarray, returned: np.ndarray) -> Labels3D:
    """Boxes of every object that is not background, with its number of LiDAR returns.

    Args:
      surface: int32 [H, W], the surface of each ray. returned: bool [H, W].
    """
    hits = np.bincount(surface[returned & (surface > 0)], minlength=len(scene.boxes) + 1)[1:]
    parts = _parts(scene)
    rows = np.asarray([p[-1] for p in parts], np.int64)
    boxes = scene.boxes[rows]
    for i, own in enumerate(parts):
        low = (scene.boxes[own, 2] - scene.boxes[own, 5] / 2).min()
        high = (scene.boxes[own, 2] + scene.boxes[own, 5] / 2).max()
        boxes[i, 2], boxes[i, 5] = (low + high) / 2, high - low
    return Labels3D(
        boxes.astype(np.float32),
        scene.classes[rows],
        scene.velocity[rows].astype(np.float32),
        np.asarray([hits[p].sum() for p in parts], np.int32),
        scene.ids[rows],
    )


def default_sensor(half_angle: float = 26.0, columns: int = 2650, beams: int = 64) -> Sensor:
    """A LiDAR like Waymo's: `columns` on a whole turn, cut to `half_angle` degrees if less."""
    sensor = waymo_like(beams, columns)
    return sensor if half_angle >= 180 else sensor.front(half_angle)


def make_frame(
    scene: Scene,
    *,
    seed: int = 0,
    sensor: Sensor | None = None,
    camera: camera_projection.Camera | None = None,
    noise: Noise = Noise(),  # noqa: B008 (frozen)
) -> Frame:
    """LiDAR and camera of one moment with exact labels; by default the front view at half size."""
    sensor = default_sensor() if sensor is None else sensor
    camera = front_camera() if camera is None else camera
    extrinsic = lidar_simulator.default_extrinsic()
    scanned = lidar_simulator.scan(scene, sensor, extrinsic, seed=seed, noise=noise)
    picture = render(scene, camera, seed=seed)
    return Frame(
        range=scanned.range,
        inclinations=sensor.rows.astype(np.float32),
        azimuths=sensor.azimuths.astype(np.float32),
        lidar_extrinsic=extrinsic.astype(np.float32),
        image=picture.image,
        camera_intrinsic=np.asarray(camera.intrinsic, np.float32),
        camera_extrinsic=np.asarray(camera.extrinsic, np.float32),
        wraps=sensor.wraps,
        labels3d=labels_3d(scene, scanned.surface, scanned.range > 0),
        labels2d=labels_2d(scene, picture),
        ego_velocity=np.asarray([scene.ego_speed, 0.0], np.float32),
        timestamp=scene.time,
        elongation=scanned.elongation,
        surface=scanned.surface,
    )
