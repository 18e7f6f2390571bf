"""Simulated street scenes: what stands and moves where, seeded, on NumPy alone.

Coordinates are the ego vehicle's: x forward, y left, z up, the origin on the ground. The sizes of
cars, vans, trucks, cyclists and pedestrians are fixed; everything else is drawn. The ego vehicle
drives along x; vehicles follow their lane and the vehicle ahead by the intelligent driver model
(M. Treiber, A. Hennecke, D. Helbing, 2000), cyclists and pedestrians go straight on.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmodels.driving.frame import FRAME_INTERVAL
from jaxmodels.driving.patch_classifier import BACKGROUND, CLASSES

BOX, CYLINDER = 0, 1
LANE = 3.5  # meters
VEHICLE, PEDESTRIAN, CYCLIST, SIGN = (CLASSES.index(c) for c in CLASSES[:-1])

# kind -> (shape, class, length, width, height)
KINDS: dict[str, tuple[int, int, float, float, float]] = {
    "car": (BOX, VEHICLE, 4.6, 1.9, 1.6),
    "van": (BOX, VEHICLE, 5.5, 2.1, 2.4),
    "truck": (BOX, VEHICLE, 10.0, 2.6, 3.2),
    "cyclist": (BOX, CYCLIST, 1.8, 0.7, 1.5),
    "pedestrian": (CYLINDER, PEDESTRIAN, 0.6, 0.6, 1.75),
    "sign": (BOX, SIGN, 0.1, 0.8, 0.8),
    "post": (CYLINDER, SIGN, 0.1, 0.1, 2.0),
    "pole": (CYLINDER, BACKGROUND, 0.4, 0.4, 5.0),
    "trunk": (CYLINDER, BACKGROUND, 0.5, 0.5, 2.2),
    "foliage": (CYLINDER, BACKGROUND, 2.6, 2.6, 3.0),
    "wall": (BOX, BACKGROUND, 30.0, 0.3, 3.0),
}
NAMES = tuple(KINDS)
FOLIAGE_ELONGATION = 0.6
_SIGN_HEIGHT = 1.9  # of a plate's lower edge


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects and ground of one moment, N surfaces with ids 1..N in their order.

    Attributes:
      kinds: int32 [N], place in `NAMES`. boxes: [N, 7]. velocity: [N, 2] m/s over ground.
      colors: [N, 3] in 0..1. black: bool [N], hardly reflects the laser.
      ids: int32 [N]; a sign's plate and its post have one id.
      lane: int32 [N], lane that a vehicle follows, -1 for what does not.
      wish: [N], a vehicle's desired speed, m/s.
      slope: of the ground along x, radians. kerb: height of the sidewalk, meters.
      kerb_y: half the width of the road. ego_speed, ego_wish: m/s along x. time: seconds.
    """

    kinds: np.ndarray
    boxes: np.ndarray
    velocity: np.ndarray
    colors: np.ndarray
    black: np.ndarray
    ids: np.ndarray
    lane: np.ndarray
    wish: np.ndarray
    slope: float = 0.0
    kerb: float = 0.0
    kerb_y: float = 2 * LANE
    ego_speed: float = 10.0
    ego_wish: float = 10.0
    time: float = 0.0

    @property
    def classes(self) -> np.ndarray:
        """Class of every object, int32 [N]; poles, trees and walls are background."""
        return np.asarray([KINDS[NAMES[k]][1] for k in self.kinds], np.int32)

    @property
    def shapes(self) -> np.ndarray:
        """`BOX` or `CYLINDER`, int32 [N]."""
        return np.asarray([KINDS[NAMES[k]][0] for k in self.kinds], np.int32)

    @property
    def foliage(self) -> np.ndarray:
        """bool [N]."""
        return self.kinds == NAMES.index("foliage")


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """What is drawn.

    Attributes:
      vehicles, parked, pedestrians, cyclists, signs, poles, trees, walls: least and most.
      reach: meters ahead (and, with `around`, behind) that are populated.
      around: populate all sides, for a LiDAR that turns.
      slope: largest slope of the ground, radians. kerb: height of the sidewalk, meters.
      black_share: share of objects that hardly reflect the laser.
      nearest: meters from the ego vehicle's origin that stay free ahead.
    """

    vehicles: tuple[int, int] = (1, 5)
    parked: tuple[int, int] = (0, 3)
    pedestrians: tuple[int, int] = (1, 5)
    cyclists: tuple[int, int] = (0, 3)
    signs: tuple[int, int] = (0, 3)
    poles: tuple[int, int] = (1, 4)
    trees: tuple[int, int] = (0, 4)
    walls: tuple[int, int] = (0, 2)
    reach: float = 60.0
    around: bool = False
    slope: float = 0.0
    kerb: float = 0.0
    black_share: float = 0.05
    nearest: float = 7.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (tuple, list)) and not 0 <= value[0] <= value[1]:
                raise ValueError(f"{field.name} {tuple(value)} must be (least, most), not negative")
        if not self.reach > self.nearest > 0:
            raise ValueError(f"reach {self.reach} must exceed nearest {self.nearest} > 0")


class _Builder:
    """Objects placed one after the other where there is room."""

    def __init__(self, rng: np.random.Generator, options: SceneOptions):
        self.rng, self.options = rng, options
        self.rows: list[tuple] = []
        self.circles: list[tuple[float, float, float]] = []

    def place_x(self) -> float:
        x = self.rng.uniform(self.options.nearest, self.options.reach)
        return -x if self.options.around and self.rng.random() < 0.5 else x

    def free(self, x: float, y: float, radius: float) -> bool:
        return all(np.hypot(x - a, y - b) > radius + r for a, b, r in self.circles)

    def add(self, kind, x, y, yaw=0.0, speed=0.0, z=0.0, lane=-1, scale=1.0, solid=True) -> bool:
        _, _, length, width, height = KINDS[kind]
        length, width, height = length * scale, width * scale, height
        radius = min(np.hypot(length, width) / 2, 6.0) * 0.8 + 0.2
        if solid and not self.free(x, y, radius):
            return False
        if solid:
            self.circles.append((x, y, radius))
        color = self.rng.uniform(0.15, 0.95, 3)
        black = self.rng.random() < self.options.black_share
        velocity = (speed * np.cos(yaw), speed * np.sin(yaw))
        box = (x, y, z + height / 2, length, width, height, yaw)
        self.rows.append((NAMES.index(kind), box, velocity, color, black, lane, abs(speed)))
        return True

    def several(self, bounds: tuple[int, int], attempt) -> None:
        for _ in range(int(self.rng.integers(bounds[0], bounds[1] + 1))):
            for _ in range(20):
                if attempt():
                    break


def sample_scene(seed: int, options: SceneOptions = SceneOptions()) -> Scene:
    """A scene drawn from `seed`: a street of four lanes, the ego vehicle in the second from right.

    Some objects may find no room and are left out.
    """
    rng = np.random.default_rng(seed)
    build = _Builder(rng, options)
    ego = rng.uniform(5.0, 15.0)
    lanes = np.asarray([-LANE, 0.0, LANE, 2 * LANE])
    right_edge, left_edge = -1.5 * LANE, 2.5 * LANE

    def vehicle():
        lane = int(rng.integers(4))
        kind = ("car", "van", "truck")[rng.choice(3, p=(0.7, 0.2, 0.1))]
        oncoming = lane >= 2
        speed = rng.uniform(3.0, 14.0) if rng.random() < 0.85 else 0.0
        yaw = np.pi if oncoming else 0.0
        x = build.place_x() + KINDS[kind][2] / 2
        y = lanes[lane] + rng.normal(0, 0.2)
        return build.add(kind, x, y, yaw + rng.normal(0, 0.02), speed, lane=lane)

    def parked():
        y, yaw = (right_edge + 0.2, 0.0) if rng.random() < 0.5 else (left_edge - 0.2, np.pi)
        return build.add("car", build.place_x() + 2.3, y, yaw + rng.normal(0, 0.05))

    def pedestrian():
        crossing = rng.random() < 0.3
        if crossing:
            y, yaw = rng.uniform(right_edge, left_edge), rng.choice([-1, 1]) * np.pi / 2
        else:
            side = rng.random() < 0.5
            y = right_edge - rng.uniform(0.8, 4) if side else left_edge + rng.uniform(0.8, 4)
            yaw = rng.choice([0.0, np.pi])
        speed = rng.uniform(0.5, 1.8)
        x = options.nearest + (build.place_x() - options.nearest) * 0.7
        return build.add("pedestrian", x, y, yaw + rng.normal(0, 0.2), speed)

    def cyclist():
        y, yaw = (right_edge + 0.7, 0.0) if rng.random() < 0.6 else (left_edge - 0.7, np.pi)
        x = options.nearest + (build.place_x() - options.nearest) * 0.8
        speed = rng.uniform(2.5, 6.0)
        return build.add("cyclist", x, y + rng.normal(0, 0.2), yaw + rng.normal(0, 0.1), speed)

    def roadside(low: float, high: float) -> tuple[float, float]:
        side = rng.random() < 0.6
        away = rng.uniform(low, high)
        return build.place_x(), right_edge - away if side else left_edge + away

    def sign():
        x, y = roadside(0.6, 1.5)
        if not build.add("post", x + 0.1, y):
            return False
        return build.add("sign", x, y, np.pi + rng.normal(0, 0.15), z=_SIGN_HEIGHT, solid=False)

    def pole():
        return build.add("pole", *roadside(0.6, 4.0), scale=rng.uniform(0.75, 1.75))

    def tree():
        x, y = roadside(3.0, 8.0)
        if not build.add("trunk", x, y, scale=rng.uniform(0.6, 1.4)):
            return False
        return build.add("foliage", x, y, z=2.2, scale=rng.uniform(0.8, 1.4), solid=False)

    def wall():
        side = rng.random() < 0.5
        y = right_edge - rng.uniform(6, 10) if side else left_edge + rng.uniform(6, 10)
        return build.add("wall", build.place_x(), y, rng.normal(0, 0.03), solid=False)

    build.several(options.vehicles, vehicle)
    build.several(options.parked, parked)
    build.several(options.pedestrians, pedestrian)
    build.several(options.cyclists, cyclist)
    build.several(options.signs, sign)
    build.several(options.poles, pole)
    build.several(options.trees, tree)
    build.several(options.walls, wall)
    rows = build.rows
    count = len(rows)
    scene = Scene(
        kinds=np.asarray([r[0] for r in rows], np.int32),
        boxes=np.asarray([r[1] for r in rows], np.float64).reshape(count, 7),
        velocity=np.asarray([r[2] for r in rows], np.float64).reshape(count, 2),
        colors=np.asarray([r[3] for r in rows], np.float64).reshape(count, 3),
        black=np.asarray([r[4] for r in rows], bool),
        ids=_ids(np.asarray([r[0] for r in rows], np.int32)),
        lane=np.asarray([r[5] for r in rows], np.int32),
        wish=np.asarray([r[6] for r in rows], np.float64),
        slope=float(rng.uniform(-options.slope, options.slope)) if options.slope else 0.0,
        kerb=options.kerb,
        kerb_y=2.6 * LANE,
        ego_speed=float(ego),
        ego_wish=float(ego),
    )
    return _on_the_ground(scene)


def _ids(kinds: np.ndarray) -> np.ndarray:
    """1, 2, ...; a plate is placed right after its post and shares its id."""
    return np.cumsum(kinds != NAMES.index("sign"), dtype=np.int32)


def ground_height(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """z of the ground at places of the vehicle frame, meters."""
    return np.tan(scene.slope) * x + np.where(np.abs(y) > scene.kerb_y, scene.kerb, 0.0)


def _on_the_ground(scene: Scene) -> Scene:
    if not scene.slope and not scene.kerb:
        return scene
    boxes = scene.boxes.copy()
    boxes[:, 2] += ground_height(scene, boxes[:, 0], boxes[:, 1])
    return dataclasses.replace(scene, boxes=boxes)


# Motion

_MOST_ACCELERATION, _COMFORTABLE_BRAKING, _HEADWAY, _STANDSTILL = 1.5, 2.0, 1.2, 3.0


def _following(speed: float, wish: float, gap: float, leader: float) -> float:
    """Acceleration of the intelligent driver model, m/s^2, at most 7.5 of braking."""
    root = 2 * np.sqrt(_MOST_ACCELERATION * _COMFORTABLE_BRAKING)
    wanted = _STANDSTILL + max(0.0, speed * _HEADWAY + speed * (speed - leader) / root)
    free = (speed / max(wish, 0.1)) ** 4
    return max(_MOST_ACCELERATION * (1 - free - (wanted / max(gap, 0.1)) ** 2), -7.5)


def advance(scene: Scene, interval: float = FRAME_INTERVAL) -> Scene:
    """The scene `interval` seconds later, in the ego vehicle's new frame."""
    boxes, velocity = scene.boxes.copy(), scene.velocity.copy()
    speeds = np.append(np.abs(velocity[:, 0]), scene.ego_speed)
    places = np.append(boxes[:, 0], 0.0)
    lengths = np.append(boxes[:, 3], 4.6)
    lanes = np.append(scene.lane, 1)  # the ego vehicle's lane
    wishes = np.append(scene.wish, scene.ego_wish)
    new_speeds = speeds.copy()
    for i in np.flatnonzero(lanes >= 0):
        direction = -1.0 if lanes[i] >= 2 else 1.0
        ahead = direction * (places - places[i])
        rivals = (lanes == lanes[i]) & (ahead > 0)
        gap, leader = 1e3, wishes[i]
        if rivals.any():
            j = np.flatnonzero(rivals)[ahead[rivals].argmin()]
            gap = ahead[j] - (lengths[i] + lengths[j]) / 2
            leader = speeds[j]
        change = _following(speeds[i], wishes[i], gap, leader) * interval
        new_speeds[i] = max(speeds[i] + change, 0.0)
    moving = np.flatnonzero(scene.lane >= 0)
    for i in moving:
        # The direction of travel stays when a vehicle stands.
        direction = -1.0 if scene.lane[i] >= 2 else 1.0
        velocity[i] = (direction * new_speeds[i], 0.0)
    ego = new_speeds[-1]
    boxes[:, :2] += (scene.velocity + velocity) / 2 * interval
    travelled = (scene.ego_speed + ego) / 2 * interval
    boxes[:, 0] -= travelled
    if scene.slope or scene.kerb:
        # Up and down with the ground, also on what an object travelled itself.
        before, after = (ground_height(scene, b[:, 0], b[:, 1]) for b in (scene.boxes, boxes))
        boxes[:, 2] += after - before
    return dataclasses.replace(
        scene,
        boxes=boxes,
        velocity=velocity,
        ego_speed=float(ego),
        time=scene.time + interval,
    )


def sequence(seed: int, frames: int = 50, options: SceneOptions = SceneOptions()) -> list[Scene]:
    """Scenes of one drive, ten a second."""
    scenes = [sample_scene(seed, options)]
    while len(scenes) < frames:
        scenes.append(advance(scenes[-1]))
    return scenes
