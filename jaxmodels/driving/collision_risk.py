"""How dangerous objects are: distance, time to collision, and ranks of imminent collision.

Ranks after A. Bansal et al., "Risk Ranked Recall", arXiv 2106.04146, official code
CPS-IL/risk-ranked-recall@21f8fd48 (`rrr.py`). Positions and velocities are seen from above, in
ego axes (x forward, y left), meters and m/s; velocities are over ground. Functions follow their
argument: NumPy in its own precision on the host, JAX under `jit`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEVER = 1e9  # seconds to a collision that does not come
NONE, POTENTIAL, IMMINENT = 0, 1, 2
_CLOSING = 1e-3  # m/s
_EGO_REACH = 2.2  # meters, the published half diagonal of the ego vehicle
ORDERS = ("distance", "ttc", "rank", "rank_official")


def distances(position: Any) -> Any:
    """Meters [N] from the ego vehicle's origin to object centers [N, 2]."""
    xp = position.__array_namespace__()
    return xp.sqrt((position * position).sum(-1))


def time_to_collision(position: Any, velocity: Any, size: Any, ego_velocity: Any) -> Any:
    """Seconds [N]: gap over closing speed, `NEVER` where the gap does not close.

    The gap is the distance less half the object's diagonal seen from above, at least 0; the closing
    speed is -(p . v_rel) / |p|.

    Args:
      position, velocity: [N, 2]. size: [N, >= 2], length and width. ego_velocity: [2].
    """
    xp = position.__array_namespace__()
    reach = distances(position)
    gap = (reach - xp.sqrt(size[:, 0] ** 2 + size[:, 1] ** 2) / 2).clip(0)
    approach = -(position * (velocity - ego_velocity)).sum(-1)
    closing = approach / xp.where(reach > 0, reach, 1)
    closes = closing > _CLOSING
    return xp.where(closes, gap / xp.where(closes, closing, 1), NEVER)


def horizon_steps(
    ego_velocity: Any, *, a_max: float = 7.5, t_compute: float = 0.1, timestep: float = 0.1
) -> int:
    """Steps looked ahead, `int(TTS / dt) + 1` with TTS = t_compute + |v_ego| / a_max; host."""
    speed = float(np.linalg.norm(np.asarray(ego_velocity, np.float64)))
    return int((t_compute + speed / a_max) / timestep) + 1


def collision_ranks(
    position: Any,
    velocity: Any,
    size: Any,
    yaw: Any,
    ego_velocity: Any,
    *,
    official: bool = False,
    steps: Any = None,
    max_steps: int | None = None,
    a_max: float = 7.5,
    t_compute: float = 0.1,
    timestep: float = 0.1,
    ego_length: float = 4.0,
    ego_width: float = 2.0,
) -> Any:
    """0 none, 1 potential, 2 imminent, int [N].

    Ego vehicle and objects go on at constant velocity; an object keeps its yaw. Imminent: the
    object's rectangle meets the ego vehicle's (axis-aligned) at some step. Potential: at some
    step t the centers are nearer than sqrt(l^2 + w^2) + 2.2 + a_max t^2.

    Args:
      position, velocity: [N, 2]. size: [N, >= 2]. yaw: radians [N]. ego_velocity: [2].
      official: the published loop, which returns at the first step that meets either test and so
        almost never says imminent.
      steps: of `horizon_steps`, may be traced. None computes it, for an ego velocity on the host.
      max_steps: bound of a traced `steps`.
    """
    xp = position.__array_namespace__()
    if steps is None:
        steps = horizon_steps(ego_velocity, a_max=a_max, t_compute=t_compute, timestep=timestep)
    if max_steps is None:
        max_steps = int(steps)
    index = xp.arange(max_steps)
    time = (index * timestep).astype(position.dtype)[:, None]
    ego = xp.asarray(ego_velocity)
    relative = position[None] + time[..., None] * (velocity - ego)[None]
    within = (index < steps)[:, None]
    contact = within & _rectangles_meet(relative, size, yaw, ego_length, ego_width)
    reach = xp.sqrt(size[:, 0] ** 2 + size[:, 1] ** 2) + _EGO_REACH + a_max * time**2
    near = within & (xp.sqrt((relative * relative).sum(-1)) < reach)
    if not official:
        return xp.where(contact.any(0), IMMINENT, xp.where(near.any(0), POTENTIAL, NONE))
    either = contact | near
    first = either.argmax(0)
    touched = xp.take_along_axis(contact, first[None], axis=0)[0]
    return xp.where(either.any(0), xp.where(touched, IMMINENT, POTENTIAL), NONE)


def _rectangles_meet(center, size, yaw, length, width):
    """Whether rectangles meet an axis-aligned one about the origin: separating axes; [T, N]."""
    xp = center.__array_namespace__()
    cos, sin = xp.cos(yaw), xp.sin(yaw)
    half_l, half_w = size[:, 0] / 2, size[:, 1] / 2
    x, y = center[..., 0], center[..., 1]
    own_x = xp.abs(cos) * half_l + xp.abs(sin) * half_w
    own_y = xp.abs(sin) * half_l + xp.abs(cos) * half_w
    ego_along = xp.abs(cos) * (length / 2) + xp.abs(sin) * (width / 2)
    ego_across = xp.abs(sin) * (length / 2) + xp.abs(cos) * (width / 2)
    return (
        (xp.abs(x) <= own_x + length / 2)
        & (xp.abs(y) <= own_y + width / 2)
        & (xp.abs(x * cos + y * sin) <= half_l + ego_along)
        & (xp.abs(y * cos - x * sin) <= half_w + ego_across)
    )


def urgency_order(distance: Any, ttc: Any = None, rank: Any = None, valid: Any = None) -> Any:
    """Indices [N], the most urgent first; ties keep the index's order.

    By rank (highest first) and then distance where `rank` is given; by time to collision and then
    distance where `ttc` is; else by distance. Rows that are not `valid` come last.
    """
    xp = distance.__array_namespace__()
    order = xp.argsort(distance, stable=True)
    key = -rank if rank is not None else ttc
    if key is not None:
        order = order[xp.argsort(key[order], stable=True)]
    if valid is not None:
        order = order[xp.argsort((~valid)[order], stable=True)]
    return order


class Tracks(NamedTuple):
    """Where the last frame's objects were: position [N, 2] in a fixed frame, valid bool [N]."""

    position: jax.Array
    valid: jax.Array


def associate_velocities(
    last: Tracks, position: jax.Array, valid: jax.Array, interval: float, gate: float = 3.0
) -> jax.Array:
    """Velocities [N, 2] over ground from the nearest object of the last frame, 0 if there is none.

    Args:
      last: of the frame before. position: [N, 2] in the same fixed (world) axes.
      interval: seconds between the frames. gate: meters beyond which an object counts as new.
    """
    apart = position[:, None] - last.position[None]
    square = (apart * apart).sum(-1)
    square = jnp.where(last.valid[None], square, jnp.inf)
    nearest = square.argmin(1)
    moved = jnp.take_along_axis(apart, nearest[:, None, None], axis=1)[:, 0]
    found = valid & (square.min(1) <= gate * gate)
    return jnp.where(found[:, None], moved / interval, 0)
