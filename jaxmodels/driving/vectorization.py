"""From tracks and lanes in city coordinates to polylines of vectors in the target's frame.

VectorNet (arXiv 2005.04259), sections 3.1 and 4.1; what the paper leaves open is settled here:

- origin: the target's position at the last observed step; heading: from the last earlier position
  at least `heading_min_disp` away, 0 for a vehicle that stood all the time;
- columns: start (c), end (c), one-hot target / other agent / lane, time of the vector's end (s, not
  above 0; 0 for lanes), is_intersection, has_traffic_control, turn (-1 right, 0, +1 left), number
  of the polyline; with c = 3 coordinates z stands behind each xy;
- order: the target, other agents by distance, then lanes by distance.

NumPy in float64 until the last cast: city coordinates are thousands of metres, and float32 would
lose centimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ATTRIBUTES = 8  # columns besides the two points


class TooManyPolylines(ValueError):
    """A scene has more polylines than its bucket."""


@dataclass(frozen=True)
class VectorScene:
    """One scene around one target, padded.

    Attributes:
      vectors: float32 [P, V, D]. vector_mask: bool [P, V].
      target_index: 0, the target comes first.
      future_offsets: float32 [T, c], zero where not valid. future_valid: float32 [T].
      history: float32 [To, c] the target's observed positions in its frame, zero where unknown.
      history_valid: float32 [To].
      origin: float64 [c], heading: radians; of the frame, in city coordinates.
      dropped: polylines for which there was no room.
    """

    vectors: np.ndarray
    vector_mask: np.ndarray
    target_index: int
    future_offsets: np.ndarray
    future_valid: np.ndarray
    history: np.ndarray
    history_valid: np.ndarray
    origin: np.ndarray
    heading: float
    dropped: int


def target_frame(
    track: np.ndarray,
    valid: np.ndarray,
    obs: int,
    heading_min_disp: float = 0.1,
    name: str = "scene",
) -> tuple[np.ndarray, float]:
    """Origin [c] and heading (radians) of a target's frame.

    track [T, c] in city coordinates, valid [T], `obs` observed steps.

    Raises ValueError naming the sequence when the target is not there at the last observed step.
    """
    if len(track) < obs:
        raise ValueError(f"{name}: {len(track)} steps, fewer than the {obs} observed ones")
    if not valid[obs - 1]:
        raise ValueError(f"{name}: the target is not valid at the last observed step ({obs - 1})")
    origin = np.asarray(track[obs - 1], np.float64)
    moved = np.asarray(track[: obs - 1, :2], np.float64) - origin[:2]
    far = valid[: obs - 1] & (np.hypot(moved[:, 0], moved[:, 1]) >= heading_min_disp)
    if not far.any():
        return origin, 0.0
    back = -moved[np.flatnonzero(far)[-1]]
    return origin, float(np.arctan2(back[1], back[0]))


def to_frame(points: np.ndarray, origin: np.ndarray, heading: float) -> np.ndarray:
    """City coordinates [..., c] in the frame, float64; z is shifted only."""
    moved = np.asarray(points, np.float64) - origin
    cos, sin = np.cos(heading), np.sin(heading)
    x, y = moved[..., 0], moved[..., 1]
    turned = [cos * x + sin * y, cos * y - sin * x]
    return np.stack([*turned, *(moved[..., i] for i in range(2, moved.shape[-1]))], -1)


def to_city(points: np.ndarray, origin: np.ndarray, heading: float) -> np.ndarray:
    """The inverse of `to_frame`."""
    points = np.asarray(points, np.float64)
    back = to_frame(points, np.zeros(points.shape[-1]), -heading)
    return back + origin


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """`count` points at equal distances along a polyline [N, c] -> [count, c]."""
    points = np.asarray(points, np.float64)
    steps = np.hypot(*(points[1:, :2] - points[:-1, :2]).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], count)
    return np.stack([np.interp(wanted, along, axis) for axis in points.T], -1)


def lane_boundaries(centerline: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Left and right boundary of a lane `width` metres wide, each [N, 2] like its center line.

    Peer A of the paper draws these at half the city's lane width (Miami 3.84 m, Pittsburgh 3.97 m)
    in place of center lines.
    """
    along = np.gradient(np.asarray(centerline, np.float64)[:, :2], axis=0)
    along /= np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    left = np.stack([-along[:, 1], along[:, 0]], -1) * (width / 2)
    return centerline[:, :2] + left, centerline[:, :2] - left


def vectorize(
    tracks: np.ndarray,
    valid: np.ndarray,
    target: int,
    lanes: Sequence[np.ndarray],
    lane_attributes: np.ndarray,
    *,
    obs: int = 20,
    dt: float = 0.1,
    radius: float = 65.0,
    heading_min_disp: float = 0.1,
    max_polylines: int = 64,
    max_vectors: int = 19,
    columns: int | None = None,
    truncate: bool = True,
    name: str = "scene",
) -> VectorScene:
    """The scene around one target as polylines of vectors.

    Args:
      tracks: [A, T, c] city coordinates (metres), c = 2 or 3. valid: bool [A, T].
      target: row of the target.
      lanes: [L, N, c] or a sequence of [N_l, c]; a single point (stop sign, light) is one vector
        whose start is its end.
      lane_attributes: [L, 3]: is_intersection, has_traffic_control, turn.
      obs: observed steps To; the rest is the future. dt: seconds a step.
      radius: half the side of the square (city axes) around the origin in which agents and lanes
        count; None or infinity takes all.
      max_polylines, max_vectors: P and V. Tracks keep their newest V vectors, lanes the first V.
      columns: D, if more than 2 c + 8 (the rest is zero).
      truncate: cut at P (the nearest stay), else a scene that does not fit is an error.
      name: what errors call the sequence.

    Raises:
      ValueError: the target is absent at the last observed step or has no vector, too few steps, a
        position that counts is not finite.
      TooManyPolylines: with `truncate=False`.
    """
    tracks, valid = np.asarray(tracks, np.float64), np.asarray(valid, bool)
    c = tracks.shape[-1]
    width = 2 * c + ATTRIBUTES
    columns = columns or width
    if columns < width:
        raise ValueError(f"columns = {columns}: {c} coordinates need at least {width}")
    if not 0 <= target < len(tracks):
        raise ValueError(f"{name}: target {target} is not one of {len(tracks)} tracks")
    origin, heading = target_frame(tracks[target], valid[target], obs, heading_min_disp, name)

    def frame(points):
        return to_frame(points, origin, heading)

    polylines = []
    for row, is_target in [(target, True)] + [
        (row, False) for row in _near_agents(tracks, valid, target, obs, origin, radius)
    ]:
        # No bridging of gaps: both ends of a vector are observed.
        starts = np.flatnonzero(valid[row, : obs - 1] & valid[row, 1:obs])[-max_vectors:]
        if not len(starts):
            if is_target:
                raise ValueError(f"{name}: the target has no two consecutive observed steps")
            continue
        points = frame(tracks[row, :obs])
        rows = np.zeros((len(starts), columns))
        rows[:, :c], rows[:, c : 2 * c] = points[starts], points[starts + 1]
        rows[:, 2 * c + (0 if is_target else 1)] = 1
        rows[:, 2 * c + 3] = (starts + 1 - (obs - 1)) * dt
        polylines.append(rows)
    lane_attributes = np.asarray(lane_attributes, np.float64).reshape(-1, 3)
    for lane in _near_lanes(lanes, origin, radius):
        points = frame(np.atleast_2d(np.asarray(lanes[lane], np.float64))[:, :c])
        starts, ends = (points, points) if len(points) == 1 else (points[:-1], points[1:])
        starts, ends = starts[:max_vectors], ends[:max_vectors]
        rows = np.zeros((len(starts), columns))
        rows[:, :c], rows[:, c : 2 * c], rows[:, 2 * c + 2] = starts, ends, 1
        rows[:, 2 * c + 4 : 2 * c + 7] = lane_attributes[lane]
        polylines.append(rows)

    dropped = max(len(polylines) - max_polylines, 0)
    if dropped and not truncate:
        raise TooManyPolylines(
            f"{name}: {len(polylines)} polylines, more than the {max_polylines} there is room for; "
            "use a larger bucket or truncate=True"
        )
    vectors = np.zeros((max_polylines, max_vectors, columns))
    mask = np.zeros((max_polylines, max_vectors), bool)
    for j, rows in enumerate(polylines[:max_polylines]):
        rows[:, 2 * c + 7] = j
        vectors[j, : len(rows)], mask[j, : len(rows)] = rows, True

    bad = mask & ~np.isfinite(vectors).all(-1)
    if bad.any():
        j, v = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}: vector {v} of polyline {j} is not finite; check its positions")
    offsets, future_valid = future_steps(frame(tracks[target]), valid[target], obs)
    seen = valid[target, :obs]
    return VectorScene(
        vectors=vectors.astype(np.float32),
        vector_mask=mask,
        target_index=0,
        future_offsets=offsets.astype(np.float32),
        future_valid=future_valid.astype(np.float32),
        history=np.where(seen[:, None], frame(tracks[target, :obs]), 0).astype(np.float32),
        history_valid=seen.astype(np.float32),
        origin=origin,
        heading=heading,
        dropped=dropped,
    )


def future_steps(points: np.ndarray, valid: np.ndarray, obs: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-step offsets [T, c] of a track in its frame [To + T, c], and which are known [T].

    The first starts at the origin; an offset is known when both its ends are. Others are zero.
    """
    known = valid[obs:] & np.concatenate([[True], valid[obs:-1]]) if len(valid) > obs else valid[:0]
    before = np.concatenate([np.zeros_like(points[:1]), points[obs:-1]])[: len(points) - obs]
    return np.where(known[:, None], points[obs:] - before, 0.0), known


def _near_agents(tracks, valid, target, obs, origin, radius):
    """Rows of the other agents that are present and inside the square, nearest first."""
    away = tracks[:, obs - 1, :2] - origin[:2]
    inside = valid[:, obs - 1] & (np.abs(away).max(-1) <= _or_all(radius))
    inside[target] = False
    rows = np.flatnonzero(inside)
    return rows[np.argsort(np.hypot(*away[rows].T), kind="stable")]


def _near_lanes(lanes, origin, radius):
    """Lanes with any point inside the square, by their nearest point."""
    if not len(lanes):
        return np.zeros(0, int)
    limit = _or_all(radius)
    if isinstance(lanes, np.ndarray) and lanes.ndim == 3:
        away = lanes[..., :2] - origin[:2]
        inside = (np.abs(away).max(-1) <= limit).any(-1)
        nearest = np.hypot(away[..., 0], away[..., 1]).min(-1)
    else:
        inside, nearest = np.zeros(len(lanes), bool), np.zeros(len(lanes))
        for i, lane in enumerate(lanes):
            away = np.atleast_2d(np.asarray(lane, np.float64))[:, :2] - origin[:2]
            inside[i] = (np.abs(away).max(-1) <= limit).any()
            nearest[i] = np.hypot(*away.T).min()
    rows = np.flatnonzero(inside)
    return rows[np.argsort(nearest[rows], kind="stable")]


def _or_all(radius: float | None) -> float:
    return np.inf if radius is None else float(radius)


def bucket_of(count: int, buckets: Sequence[int], *, truncate: bool = False) -> int:
    """The smallest bucket that holds `count`; the largest where none does and `truncate` is on.

    Raises TooManyPolylines otherwise.
    """
    for bucket in sorted(buckets):
        if count <= bucket:
            return bucket
    if truncate:
        return max(buckets)
    raise TooManyPolylines(
        f"{count} polylines are more than the largest bucket, {max(buckets)}; "
        "add a bucket or use truncate=True"
    )


def fit_bucket(scene: VectorScene, polylines: int) -> VectorScene:
    """The scene with its P slots cut or padded to `polylines`; what is cut counts as dropped."""
    from dataclasses import replace

    have = len(scene.vectors)
    lost = int(scene.vector_mask[polylines:].any(-1).sum())
    pad = max(polylines - have, 0)
    return replace(
        scene,
        vectors=np.pad(scene.vectors[:polylines], ((0, pad), (0, 0), (0, 0))),
        vector_mask=np.pad(scene.vector_mask[:polylines], ((0, pad), (0, 0))),
        dropped=scene.dropped + lost,
    )


def collate(
    scenes: Sequence[VectorScene],
    buckets: Sequence[int] = (32, 64, 128),
    *,
    truncate: bool = False,
) -> dict[str, np.ndarray]:
    """A batch of scenes in the smallest bucket of P that holds them all, as `VectorNet` takes it.

    Returns `vectors` [B, P, V, D], `vector_mask` [B, P, V], `target_index` [B], `future_offsets`
    [B, T, c], `future_valid` [B, T]. Raises TooManyPolylines.
    """
    most = max(int(scene.vector_mask.any(-1).sum()) for scene in scenes)
    polylines = bucket_of(most, buckets, truncate=truncate)
    scenes = [fit_bucket(scene, polylines) for scene in scenes]
    return {
        "vectors": np.stack([s.vectors for s in scenes]),
        "vector_mask": np.stack([s.vector_mask for s in scenes]),
        "target_index": np.array([s.target_index for s in scenes], np.int32),
        "future_offsets": np.stack([s.future_offsets for s in scenes]),
        "future_valid": np.stack([s.future_valid for s in scenes]),
    }
