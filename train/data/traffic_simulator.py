"""Kinematic traffic with lanes: one vehicle to forecast on a road that bends ahead of it.

The target follows its lane by the intelligent driver model; until the last observed step it is on
the straight approach, so that its history never shows the bend: only the map tells. Metres,
seconds, radians; a scene is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS, OBSERVED, DT = 50, 20, 0.1
ROADS = ("straight", "left", "right", "s_left", "s_right")
ROUTES = ("straight", "left", "right")  # of a crossing
LANE_SPACING = 3.6
PIECE, PIECE_POINTS = 45.0, 10
VEHICLE_LENGTH = 4.8
POSITION_NOISE = 0.03
LATERAL = BRAKING = 2.5  # m/s^2, comfortable in bends and before them
ACCELERATION, TIME_GAP, MIN_GAP = 1.5, 1.2, 2.0
LEAST_ACCELERATION, MOST_ACCELERATION = -6.0, 2.0
STANDING_SHARE = 0.4
MOST_ONCOMING = 3
MOST_AGENTS = 2 + MOST_ONCOMING

_GRID = 0.5  # metres between the points of a path
_ATTEMPTS = 50


@dataclass(frozen=True)
class TrafficScene:
    """A scene in city coordinates.

    Attributes:
      tracks: float64 [A, 50, 2], the target first. valid: bool [A, 50].
      lanes: [N_l, 2] each, in driving direction; a single point is a stop.
      lane_attributes: float64 [L, 3]: is_intersection, has_traffic_control, turn (-1, 0, 1).
    """

    tracks: np.ndarray
    valid: np.ndarray
    lanes: tuple[np.ndarray, ...]
    lane_attributes: np.ndarray


class Path:
    """A curve of piecewise constant curvature from the origin along +x.

    `segments` are (length, curvature). Points, headings and speed limits lie on a grid of 0.5 m.
    """

    def __init__(self, segments: list[tuple[float, float]]):
        lengths, curvatures = zip(*segments)
        ends = np.cumsum(lengths)
        self.length = float(ends[-1])
        self.s = np.arange(0.0, self.length + _GRID, _GRID)
        self.curvature = np.asarray(curvatures)[np.minimum(
            np.searchsorted(ends, self.s, side="right"), len(ends) - 1
        )]  # fmt: skip
        middle = (self.s[:-1] + self.s[1:]) / 2
        bends = np.asarray(curvatures)[np.minimum(
            np.searchsorted(ends, middle, side="right"), len(ends) - 1
        )]  # fmt: skip
        self.heading = np.concatenate([[0.0], np.cumsum(bends * _GRID)])
        along = (self.heading[:-1] + self.heading[1:]) / 2
        steps = np.stack([np.cos(along), np.sin(along)], -1) * _GRID
        self.points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])

    def at(self, s: np.ndarray) -> np.ndarray:
        """Points [..., 2] at arc lengths s [...]."""
        return np.stack([np.interp(s, self.s, axis) for axis in self.points.T], -1)

    def offset(self, left: float) -> np.ndarray:
        """The parallel curve `left` metres to the left, on the same grid."""
        normal = np.stack([-np.sin(self.heading), np.cos(self.heading)], -1)
        return self.points + left * normal

    def speed_limits(self) -> np.ndarray:
        """sqrt(2.5 / |curvature|), propagated backwards with 2.5 m/s^2 of braking."""
        with np.errstate(divide="ignore"):
            squares = LATERAL / np.abs(self.curvature)
        for i in range(len(squares) - 2, -1, -1):
            squares[i] = min(squares[i], squares[i + 1] + 2 * BRAKING * _GRID)
        return np.sqrt(squares)


def simulate(seed: int | tuple[int, ...], crossing: bool = False) -> TrafficScene:
    """One scene. With `crossing` the map shows all three routes of an intersection with a stop."""
    rng = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        scene = _attempt(rng, crossing)
        if scene is not None:
            return scene
    raise RuntimeError(f"no scene after {_ATTEMPTS} attempts from seed {seed}")


def _attempt(rng: np.random.Generator, crossing: bool) -> TrafficScene | None:
    approach = rng.uniform(70, 100)
    radius, angle = rng.uniform(12, 35), np.deg2rad(rng.uniform(60, 90))
    if crossing:
        routes = {name: _route(approach, name, radius) for name in ROUTES}
        path = routes[ROUTES[rng.integers(len(ROUTES))]]
        lanes, attributes = _crossing_lanes(routes, approach, radius)
        oncoming = routes["straight"].offset(LANE_SPACING)[::-1]
    else:
        path = Path(_road(ROADS[rng.integers(len(ROADS))], approach, radius, angle))
        oncoming = path.offset(LANE_SPACING)[::-1]
        lanes = _pieces(path.points) + _pieces(oncoming)
        attributes = np.array([[0, 0, _turn(lane)] for lane in lanes], np.float64)

    place = approach - rng.uniform(0, 22)
    desired, start_speed = rng.uniform(6, 14), rng.uniform(4, 13)
    standing = rng.uniform() < STANDING_SHARE
    obstacle = place + rng.uniform(8, 45) if standing else np.inf
    driven = _drive(path, place, start_speed, desired, obstacle)
    if driven is None or driven[OBSERVED - 1] > approach:
        return None
    tracks = [path.at(driven)]
    if standing:
        tracks.append(np.tile(path.at(np.array(obstacle)), (STEPS, 1)))
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(oncoming, axis=0).T))])
    for _ in range(rng.integers(MOST_ONCOMING + 1)):
        speed = rng.uniform(3, 12)
        s = rng.uniform(0, along[-1] - speed * DT * STEPS) + speed * DT * np.arange(STEPS)
        tracks.append(np.stack([np.interp(s, along, axis) for axis in oncoming.T], -1))
    tracks = np.stack(tracks)
    tracks = tracks + rng.normal(0, POSITION_NOISE, tracks.shape)

    turn, shift = rng.uniform(-np.pi, np.pi), rng.uniform(500, 4000, 2)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return TrafficScene(
        tracks=tracks @ rotation + shift,
        valid=np.ones(tracks.shape[:2], bool),
        lanes=tuple(lane @ rotation + shift for lane in lanes),
        lane_attributes=attributes,
    )


def _road(kind: str, approach: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Segments of a road: the approach, the bend, 140 m straight on."""
    sign = {"straight": 0, "left": 1, "right": -1, "s_left": 1, "s_right": -1}[kind]
    curvature, length = sign / radius, radius * angle
    if kind.startswith("s_"):
        bend = [(length / 2, curvature), (length / 2, -curvature)]
    else:
        bend = [(length, curvature)]
    return [(approach, 0.0), *bend, (140.0, 0.0)]


def _route(approach: float, name: str, radius: float) -> Path:
    if name == "straight":
        return Path([(approach, 0.0), (2 * radius, 0.0), (140.0, 0.0)])
    return Path(_road(name, approach, radius, np.pi / 2))


def _crossing_lanes(routes: dict[str, Path], approach: float, radius: float):
    """Approach and its opposite lane, three connectors with their exits, and a stop point."""
    lanes, attributes = [], []

    def add(pieces, intersection=0, control=0, turn=0):
        lanes.extend(pieces)
        attributes.extend([[intersection, control, turn]] * len(pieces))

    straight = routes["straight"]
    before = straight.s <= approach
    add(_pieces(straight.points[before]))
    add(_pieces(straight.offset(LANE_SPACING)[before][::-1]))
    for name, path in routes.items():
        length = 2 * radius if name == "straight" else radius * np.pi / 2
        inside = (path.s >= approach - _GRID) & (path.s <= approach + length)
        turn = {"straight": 0, "left": 1, "right": -1}[name]
        add([_points_along(path.points[inside])], 1, 1, turn)
        after = path.s >= approach + length
        add(_pieces(path.points[after]))
        add(_pieces(path.offset(LANE_SPACING)[after][::-1]))
    add([straight.at(np.array([approach - 3.0]))], 0, 1, 0)
    return lanes, np.array(attributes, np.float64)


def _points_along(points: np.ndarray) -> np.ndarray:
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    wanted = np.linspace(0, along[-1], PIECE_POINTS)
    return np.stack([np.interp(wanted, along, axis) for axis in points.T], -1)


def _pieces(points: np.ndarray) -> list[np.ndarray]:
    """A lane cut into pieces of 45 m with ten points each; the rest is a shorter piece."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    pieces = []
    for start in np.arange(0, along[-1] - 1.0, PIECE):
        wanted = np.linspace(start, min(start + PIECE, along[-1]), PIECE_POINTS)
        pieces.append(np.stack([np.interp(wanted, along, axis) for axis in points.T], -1))
    return pieces


def _turn(lane: np.ndarray) -> int:
    """-1 right, +1 left, 0 for a change of heading below 0.2 rad."""
    steps = np.diff(lane, axis=0)
    headings = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    change = headings[-1] - headings[0]
    return int(np.sign(change)) if abs(change) > 0.2 else 0


def _drive(path: Path, place: float, speed: float, desired: float, obstacle: float):
    """Arc lengths [50] of a drive that is at `place` at the last observed step, None if none is.

    The start is found by repeated shooting: a later start arrives further on.
    """
    limits = path.speed_limits().tolist()
    start = place - speed * DT * (OBSERVED - 1)
    for _ in range(12):
        s, gap = _roll(start, speed, desired, limits, obstacle)
        miss = place - s[OBSERVED - 1]
        if abs(miss) < 0.01:
            break
        start = max(start + miss, 0.0)
    if gap < 0.3 or s[-1] > path.length or abs(miss) > 5.0:
        return None
    return np.asarray(s)


def _roll(start, speed, desired, limits, obstacle):
    """Intelligent driver model for 50 steps: arc lengths and the smallest gap to the obstacle."""
    s, v, found = start, speed, [start]
    smallest = np.inf
    last = len(limits) - 1
    root = 2 * (ACCELERATION * BRAKING) ** 0.5
    for _ in range(STEPS - 1):
        goal = min(desired, limits[min(int(s / _GRID), last)])
        a = 1 - (v / goal) ** 4
        if obstacle < np.inf:
            gap = obstacle - s - VEHICLE_LENGTH
            smallest = min(smallest, gap)
            wanted = MIN_GAP + max(v * TIME_GAP + v * v / root, 0.0)
            a -= (wanted / max(gap, 0.1)) ** 2
        a = min(max(ACCELERATION * a, LEAST_ACCELERATION), MOST_ACCELERATION)
        v = max(v + a * DT, 0.0)
        s += v * DT
        found.append(s)
    return found, smallest
