"""Tracks driven so that a forecaster is wrong about them: displacement-error attacks.

After Q. Zhang et al., "On Adversarial Robustness of Trajectory Prediction for Autonomous Vehicles",
CVPR 2022, arXiv 2201.05057: an observed vehicle departs a little from its track; average and final
displacement errors, or the mean error to one side, are raised by gradients or by questions alone.
Where the paper clips perturbations to observed ranges, ours are by construction drivable: the
twofold sum of a bounded extra acceleration, scaled to a largest deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.driving.traced_vectorization import target_heading, turned
from jaxmodels.security.knot_search import check_search, search_knots

OBJECTIVES = ("average", "final", "left", "right", "front", "behind")
_SPREAD = 0.7


@struct.dataclass
class TrajectoryAttack:
    """Options: `objective`, one of OBJECTIVES; the search (`knot_search`); what is drivable.

    `deviation`: meters, the farthest that any observed place may be moved. `acceleration`: m/s^2,
    of the extra acceleration along and across the track each. `knots` of it over the observation.
    """

    objective: str = struct.field(pytree_node=False, default="average")
    method: str = struct.field(pytree_node=False, default="gradient")
    restarts: int = struct.field(pytree_node=False, default=8)
    iterations: int = struct.field(pytree_node=False, default=20)
    learning_rate: float = struct.field(pytree_node=False, default=0.15)
    deviation: float = struct.field(pytree_node=False, default=1.0)
    acceleration: float = struct.field(pytree_node=False, default=3.0)
    knots: int = struct.field(pytree_node=False, default=5)


class AttackedTrack(NamedTuple):
    """`track` [To, 2] as driven by the adversary; displacement errors in meters before and after,
    average and final, against the same future."""

    track: jax.Array
    clean_average: jax.Array
    clean_final: jax.Array
    average: jax.Array
    final: jax.Array


def check_trajectory_attack(cfg: TrajectoryAttack) -> None:
    """Refuse unknown objectives and searches, and departures of no size."""
    if cfg.objective not in OBJECTIVES:
        raise ValueError(f"objective {cfg.objective!r}; known: {', '.join(OBJECTIVES)}")
    check_search(cfg.method, cfg.restarts, cfg.iterations)
    if not (cfg.deviation > 0 and cfg.acceleration > 0 and cfg.knots >= 2):
        raise ValueError(
            "deviation and acceleration must be positive and knots at least 2, got "
            f"{cfg.deviation:g}, {cfg.acceleration:g} and {cfg.knots}"
        )


def departures(
    knots: jax.Array, heading: jax.Array, steps: int, dt: float, cfg: TrajectoryAttack
) -> jax.Array:
    """Knots [K, 2] of extra acceleration along and across, any numbers -> moves [steps, 2], m."""
    bounded = cfg.acceleration * jnp.tanh(knots)
    places = jnp.linspace(0, len(knots) - 1, steps - 1)
    low = jnp.minimum(jnp.floor(places).astype(jnp.int32), len(knots) - 2)
    share = (places - low)[:, None]
    extra = bounded[low] * (1 - share) + bounded[low + 1] * share
    moved = dt**2 * jnp.cumsum(jnp.cumsum(extra, 0), 0)
    moved = jnp.concatenate([jnp.zeros((1, 2)), moved])
    farthest = jnp.sqrt(jnp.square(moved).sum(-1).max() + 1e-12)
    return turned(moved, heading) * (cfg.deviation / jnp.maximum(farthest, cfg.deviation))


def attack_track(
    key: jax.Array,
    forecast: Callable[[jax.Array], jax.Array],
    tracks: jax.Array,
    truth: jax.Array,
    cfg: TrajectoryAttack,
    *,
    target: int = 0,
    dt: float = 0.1,
) -> AttackedTrack:
    """The target's observed track, driven so that the forecaster misses where it then goes.

    Args:
      forecast: tracks [A, To, 2] -> the target's next places [T, 2].
      tracks: as observed. truth: [T, 2], the target's future, the same with and without attack.
    """
    check_trajectory_attack(cfg)
    own = tracks[target]
    heading = target_heading(own)

    def driven(knots):
        return own + departures(knots, heading, len(own), dt, cfg)

    def misses(track):
        return forecast(tracks.at[target].set(track)) - truth

    def value(off):
        if cfg.objective in ("average", "final"):
            errors = jnp.sqrt(jnp.square(off).sum(-1) + 1e-12)
            return -errors[-1] if cfg.objective == "final" else -errors.mean()
        along, left = turned(off, -heading).mean(0)
        return {"left": -left, "right": left, "front": -along, "behind": along}[cfg.objective]

    best = search_knots(
        key,
        lambda knots: (value(misses(driven(knots))), jnp.float32(0)),
        (cfg.knots, 2),
        np.full(2, _SPREAD, np.float32),
        method=cfg.method,
        restarts=cfg.restarts,
        iterations=cfg.iterations,
        learning_rate=cfg.learning_rate,
    )
    track = driven(best)
    clean, attacked = (jnp.sqrt(jnp.square(misses(t)).sum(-1)) for t in (own, track))
    return AttackedTrack(track, clean.mean(), clean[-1], attacked.mean(), attacked[-1])
