"""Traffic on a straight road of several lanes: keeping lanes, following, changing lanes.

The world of the driving track (`jaxmodels.security.driving_simulator`) without its adversary: what
a forecaster that drives there has seen before. Metres, seconds; a scene is a function of its seed.
"""

from __future__ import annotations

import numpy as np

from jaxmodels.security.driving_simulator import LANE, LENGTH, WHEELBASE
from train.data.traffic_simulator import DT, OBSERVED, PIECE, PIECE_POINTS, STEPS, TrafficScene

LANES = 3
SPEEDS = (6.0, 18.0)
CHANGE_SHARE = 0.35  # of vehicles
# Tracked places along the road are less certain than those across it.
NOISE = (0.1, 0.03)
_STEER_LIMIT = 0.06
_TIME_GAP, _MIN_GAP, _ACCELERATION, _BRAKING = 1.2, 2.0, 1.5, 2.0
_ATTEMPTS = 100


def simulate(seed: int | tuple[int, ...]) -> TrafficScene:
    """Two to five vehicles, the first of them the one to forecast."""
    rng = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        tracks = _attempt(rng)
        if tracks is not None:
            break
    else:
        raise RuntimeError(f"no scene after {_ATTEMPTS} attempts from seed {seed}")
    tracks = tracks + rng.normal(0, NOISE, tracks.shape)
    start = rng.uniform(0, PIECE)
    places = np.linspace(0, PIECE, PIECE_POINTS)
    lanes = tuple(
        np.stack([start + PIECE * k + places, np.full(PIECE_POINTS, (lane + 0.5) * LANE)], -1)
        for lane in range(LANES)
        for k in range(-5, 6)
    )
    return TrafficScene(
        tracks=tracks,
        valid=np.ones(tracks.shape[:2], bool),
        lanes=lanes,
        lane_attributes=np.zeros((len(lanes), 3)),
    )


def _attempt(rng: np.random.Generator) -> np.ndarray | None:
    """Tracks [A, 50, 2]; None where vehicles touch."""
    count = int(rng.integers(2, 6))
    lane = rng.integers(LANES, size=count)
    x, v = rng.uniform(-40, 40, count), rng.uniform(*SPEEDS, count)
    y, heading = (lane + 0.5) * LANE, np.zeros(count)
    wish = v + rng.normal(0, 2.0, count)
    # Some brake or speed up for a while, some change lanes, before or after the last observation.
    push = np.where(rng.random(count) < 0.4, rng.uniform(-3.5, 1.5, count), 0.0)
    push_from = rng.uniform(0, STEPS, count)
    push_until = push_from + rng.uniform(5, 20, count)
    change = rng.uniform(OBSERVED - 15, OBSERVED + 20, count)
    change = np.where(rng.random(count) < CHANGE_SHARE, change, np.inf)
    side = np.where(rng.random(count) < 0.5, 1, -1)
    goal = lane + side
    goal = np.where((goal < 0) | (goal >= LANES), lane - side, goal)
    haste = rng.uniform(1.0, 2.0, count)  # seconds that the aim lies ahead
    tracks = np.empty((count, STEPS, 2))
    root = 2 * np.sqrt(_ACCELERATION * _BRAKING)
    for step in range(STEPS):
        tracks[:, step] = np.stack([x, y], -1)
        away = x[None] - x[:, None]
        beside = np.abs(y[None] - y[:, None])
        if ((np.abs(away) < LENGTH) & (beside < 2.0) & ~np.eye(count, dtype=bool)).any():
            return None
        ahead = np.where((away > 0) & (beside < 2.2), away, np.inf)
        lead = ahead.argmin(1)
        gap = np.maximum(ahead[np.arange(count), lead] - LENGTH, 0.5)
        desired = _MIN_GAP + np.maximum(0.0, v * _TIME_GAP + v * (v - v[lead]) / root)
        free = (v / np.maximum(wish, 1.0)) ** 4
        a = _ACCELERATION * (1 - free - np.where(np.isfinite(gap), (desired / gap) ** 2, 0.0))
        a = a + np.where((step >= push_from) & (step < push_until), push, 0.0)
        aim_y = (np.where(step >= change, goal, lane) + 0.5) * LANE
        reach = np.maximum(8.0, haste * v)
        aim = np.arcsin(np.clip((aim_y - y) / reach, -0.9, 0.9)) - heading
        delta = np.arctan(2 * WHEELBASE * np.sin(aim) / reach).clip(-_STEER_LIMIT, _STEER_LIMIT)
        x, y = x + DT * v * np.cos(heading), y + DT * v * np.sin(heading)
        heading = heading + DT * v * np.tan(delta) / WHEELBASE
        v = np.maximum(v + DT * a.clip(-6.0, 3.0), 0.0)
    return tracks
