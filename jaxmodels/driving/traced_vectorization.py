"""Polylines of vectors around every vehicle at once, under `jit` and differentiable.

The same numbers as `vectorization.vectorize` for scenes whose vehicles were all seen all the time
and whose lanes have one length: what a simulator gives a forecaster while it runs, and what an
attack on tracks differentiates. float32: coordinates must be near the origin.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.driving.vectorization import ATTRIBUTES


class TracedScenes(NamedTuple):
    """What `VectorNet` takes, one scene around each target.

    `vectors` [A, P, V, D], `vector_mask` bool [A, P, V], the target being polyline 0; `origin`
    [A, 2] and `heading` [A] of the targets' frames.
    """

    vectors: jax.Array
    vector_mask: jax.Array
    origin: jax.Array
    heading: jax.Array


def turned(points: jax.Array, angle: jax.Array) -> jax.Array:
    """Points [..., 2] turned by `angle` radians, a scalar."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return jnp.stack([cos * x - sin * y, sin * x + cos * y], -1)


def target_heading(track: jax.Array, heading_min_disp: float = 0.1) -> jax.Array:
    """Direction of a track [To, 2], as `vectorization.target_frame` says: a scalar, radians."""
    moved = track[:-1] - track[-1]
    far = jnp.square(moved).sum(-1) >= heading_min_disp**2
    last = len(far) - 1 - jnp.argmax(far[::-1])
    # A standing vehicle looks along x; the angle of nothing would have no gradient.
    back = jnp.where(far.any(), -moved[last], jnp.asarray([1.0, 0.0]))
    return jnp.arctan2(back[1], back[0])


def vectorize_tracks(
    tracks: jax.Array,
    lanes: jax.Array,
    lane_attributes: jax.Array,
    targets: jax.Array | None = None,
    *,
    dt: float = 0.1,
    radius: float = 65.0,
    heading_min_disp: float = 0.1,
    max_polylines: int = 64,
    max_vectors: int = 19,
    columns: int | None = None,
) -> TracedScenes:
    """The scenes around `targets` (int [K], all vehicles by default), P being at most
    `max_polylines`: what does not fit is the farthest.

    Args:
      tracks: [A, To, 2]. lanes: [L, N, 2]. lane_attributes: [L, 3].
      dt, radius, heading_min_disp, max_polylines, max_vectors, columns: as for `vectorize`.
    """
    count, obs = tracks.shape[:2]
    width = 4 + ATTRIBUTES
    columns = columns or width
    if columns < width:
        raise ValueError(f"columns = {columns}: 2 coordinates need at least {width}")
    if targets is None:
        targets = jnp.arange(count)
    times = jnp.asarray((np.arange(1, obs) - (obs - 1)) * dt, tracks.dtype)[-max_vectors:]

    def padded(rows):
        """Polylines [M, v, width] -> [M, V, columns] with their mask."""
        short = max_vectors - rows.shape[1]
        mask = jnp.arange(max_vectors) < rows.shape[1]
        rows = jnp.pad(rows, ((0, 0), (0, short), (0, columns - width)))
        return rows, jnp.broadcast_to(mask, rows.shape[:2])

    def around(target):
        origin = tracks[target, -1]
        heading = target_heading(tracks[target], heading_min_disp)

        def frame(points):
            return turned(points - origin, -heading)

        own = jnp.arange(count) == target
        away = jax.lax.stop_gradient(tracks[:, -1] - origin)
        near = (jnp.abs(away).max(-1) <= radius) | own
        distance = jnp.where(own, -1.0, jnp.where(near, jnp.hypot(*away.T), jnp.inf))
        order = jnp.argsort(distance)
        points, is_target = frame(tracks[order]), own[order]
        starts, ends = points[:, :-1][:, -max_vectors:], points[:, 1:][:, -max_vectors:]
        shape = starts.shape[:2]
        zero = jnp.zeros(shape)
        kind = jnp.broadcast_to(is_target[:, None], shape).astype(points.dtype)
        time = jnp.broadcast_to(times, shape)
        agents, agent_mask = padded(
            jnp.concatenate(
                [starts, ends, jnp.stack([kind, 1 - kind, zero, time, *([zero] * 4)], -1)], -1
            )
        )

        away = jax.lax.stop_gradient(lanes - origin)
        inside = (jnp.abs(away).max(-1) <= radius).any(-1)
        nearest = jnp.where(inside, jnp.hypot(away[..., 0], away[..., 1]).min(-1), jnp.inf)
        lane_order = jnp.argsort(nearest)
        points = frame(lanes[lane_order])
        starts, ends = points[:, :-1][:, :max_vectors], points[:, 1:][:, :max_vectors]
        shape = starts.shape[:2]
        zero = jnp.zeros((*shape, 1))
        told = jnp.broadcast_to(lane_attributes[lane_order][:, None], (*shape, 3))
        rows = [starts, ends, zero, zero, zero + 1, zero, told, zero]
        roads, road_mask = padded(jnp.concatenate(rows, -1))

        vectors = jnp.concatenate([agents, roads])
        present = jnp.concatenate([near[order], inside[lane_order]])
        mask = jnp.concatenate([agent_mask, road_mask]) & present[:, None]
        # Those that count come first, and are numbered.
        kept = jnp.argsort(~present)[:max_polylines]
        vectors, mask = vectors[kept], mask[kept]
        number = jnp.arange(len(kept), dtype=vectors.dtype)[:, None]
        vectors = vectors.at[..., width - 1].set(jnp.broadcast_to(number, mask.shape))
        return TracedScenes(jnp.where(mask[..., None], vectors, 0), mask, origin, heading)

    return jax.vmap(around)(targets)


def to_road(positions: jax.Array, scenes: TracedScenes) -> jax.Array:
    """Positions [A, T, 2] in the targets' frames, back in the coordinates of the tracks."""
    return jax.vmap(turned)(positions, scenes.heading) + scenes.origin[:, None]
